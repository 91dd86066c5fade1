"""The native SAE folder: `sae.safetensors` (the tensors) and `config.json` (activation, origin,
checksum).

`config.json` is written last and carries the checksum of the tensors, so a folder that was half
written, or whose tensors were altered, is refused rather than read.
"""

import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saekit.errors import CheckpointError, first_line
from saekit.files import file_sha256, write_atomic, write_json
from saekit.results import Provenance
from saekit.sae import (
    SAE,
    Activation,
    JumpReLU,
    LayerNorm,
    MatchingPursuit,
    ReLU,
    RowNorm,
    TopK,
    UnitRow,
)

WEIGHTS = "sae.safetensors"
CONFIG = "config.json"
FORMAT = "saekit-sae"
VERSION = 2
"""2 has `row_norm`, and the pursuit's `rest` and `once`. A file without them is written as version
1, which every release reads."""


def save(sae: SAE, folder: Path | str) -> str:
    """Write the SAE into `folder` (made where missing); returns its fingerprint."""
    folder = Path(folder)
    tensors = _stored(sae)
    write_atomic(folder / WEIGHTS, lambda path: save_file(tensors, path))
    digest = file_sha256(folder / WEIGHTS)
    config = {
        "format": FORMAT,
        "version": VERSION if sae.row_norm or _needs_2(sae.activation) else 1,
        "activation": _activation_to_dict(sae.activation),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "d_out": sae.d_out,
        "fingerprint": digest,
        "provenance": sae.provenance.to_dict() if sae.provenance else None,
    }
    if sae.row_norm is not None:
        config["row_norm"] = _row_norm_to_dict(sae.row_norm)
    write_json(folder / CONFIG, config)
    return digest


def fingerprint(sae: SAE) -> str:
    """What `save` would return: the SHA-256 of the tensors as the file holds them."""
    return sha256(safetensors.torch.save(_stored(sae))).hexdigest()


def _stored(sae: SAE) -> dict[str, Tensor]:
    """The tensors as the file holds them: each in one piece, and none part of another."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in sae.tensors().items()}
    if tensors["W_enc"].data_ptr() == tensors["W_dec"].data_ptr():
        # The transpose of one row is in one piece as it is.
        tensors["W_enc"] = tensors["W_enc"].clone()
    return tensors


def load(path: Path | str, device: str = "cpu") -> SAE:
    """Read an SAE folder (a run's folder is one).

    Raises CheckpointError where the folder holds no finished SAE or its tensors fail their
    checksum.
    """
    folder = Path(path)
    config = read_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS, device=device)
        actual = file_sha256(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    if actual != config.get("fingerprint"):
        raise CheckpointError(
            f"{folder / WEIGHTS} has SHA-256 {actual[:12]}..., {CONFIG} beside it says "
            f"{str(config.get('fingerprint'))[:12]}...: the file was altered or only partly "
            "written. Copy the folder again from its source, or train again"
        )
    try:
        return _sae(config, tensors)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG} is not what saekit writes ({type(error).__name__}: "
            f"{first_line(error)[:200]}): copy the folder again from its source"
        ) from error


def _sae(config: dict[str, Any], tensors: dict[str, Tensor]) -> SAE:
    provenance = config["provenance"]
    return SAE(
        W_enc=tensors["W_enc"],
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        activation=_activation_from_dict(config["activation"], tensors),
        W_skip=tensors.get("W_skip"),
        row_norm=_row_norm_from_dict(config.get("row_norm")),
        provenance=Provenance.from_dict(provenance) if provenance else None,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`, checked to be a native SAE's of a version this release reads."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} holds no finished SAE ({CONFIG} is missing or unreadable). Give the folder "
            "that `saekit train ... --out` wrote; if the run was stopped, the same command "
            "finishes it"
        ) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a saekit SAE: its 'format' is not '{FORMAT}'")
    version = config.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise CheckpointError(
            f"{path} is of format version {version}, this saekit reads up to {VERSION}: "
            "upgrade saekit"
        )
    return config


def _needs_2(activation: Activation) -> bool:
    return isinstance(activation, MatchingPursuit) and bool(activation.rest or activation.once)


def _activation_to_dict(activation: Activation) -> dict[str, Any]:
    match activation:
        case ReLU():
            return {"kind": "relu"}
        case TopK(k):
            return {"kind": "topk", "k": k}
        case JumpReLU():
            return {"kind": "jumprelu"}
        case MatchingPursuit():
            values = {"kind": "matching_pursuit", **asdict(activation)}
            if not _needs_2(activation):
                del values["rest"], values["once"]
            return values


def _activation_from_dict(values: dict[str, Any], tensors: dict[str, Tensor]) -> Activation:
    for name in ("k", "steps"):
        if type(values.get(name, 1)) is not int:
            raise CheckpointError(f"{CONFIG}: {name}={values[name]!r:.80} must be a whole number")
    match values["kind"]:
        case "relu":
            return ReLU()
        case "topk":
            return TopK(values["k"])
        case "jumprelu":
            return JumpReLU(tensors["threshold"])
        case "matching_pursuit":
            return MatchingPursuit(**{key: v for key, v in values.items() if key != "kind"})
        case other:
            raise CheckpointError(
                f"activation kind '{other!s:.80}' is unknown to this saekit (relu, topk, jumprelu, "
                "matching_pursuit): upgrade"
            )


def _row_norm_to_dict(how: RowNorm) -> dict[str, Any]:
    match how:
        case LayerNorm(eps):
            return {"kind": "layer_norm", "eps": eps}
        case UnitRow():
            return {"kind": "unit_row"}


def _row_norm_from_dict(values: dict[str, Any] | None) -> RowNorm | None:
    if values is None:
        return None
    match values["kind"]:
        case "layer_norm":
            return LayerNorm(values["eps"])
        case "unit_row":
            return UnitRow()
        case other:
            raise CheckpointError(
                f"row_norm '{other!s:.80}' is unknown to this saekit (layer_norm, unit_row): "
                "upgrade"
            )
