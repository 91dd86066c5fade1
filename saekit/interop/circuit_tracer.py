"""circuit-tracer (Anthropic fellows): a set of transcoders, `config.yaml` with
`layer_0.safetensors`, `layer_1.safetensors`, ... without gaps and of one width.

    pre = x @ W_enc.T + b_enc        (W_enc [d_sae, d_model], unlike SAELens's)
    z = relu(pre), or pre where pre > activation_function.threshold
    y = z @ W_dec + b_dec  (+ x @ W_skip.T)

One layer is one SAE: read `SET/layer_3.safetensors`. A set is written from SAEs in the order of
their layers. After circuit-tracer, transcoder/single_layer_transcoder.py.
"""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from saekit.errors import CheckpointError
from saekit.files import write_atomic, write_text
from saekit.interop._files import Options, Tensors, load_safetensors, load_yaml, nonnegative
from saekit.interop._stored import Stored
from saekit.sae import SAE, Activation, JumpReLU, ReLU

CONFIG = "config.yaml"
FILES = (CONFIG, "layer_*.safetensors")
HOLDS = "sets of ReLU and JumpReLU transcoders of one width, with a skip path or without"
SETS = True
"""`write_set` takes several SAEs."""

_LAYER = re.compile(r"layer_(\d+)\.safetensors")


def detect(path: Path) -> bool:
    """Whether it is a set, or a layer's file in one."""
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG).is_file():
        return False
    return path.is_dir() or _LAYER.fullmatch(path.name) is not None


def layers(folder: Path) -> list[Path]:
    """The files of a set, in order. Raises CheckpointError where a layer is missing."""
    found = {int(m[1]): p for p in folder.iterdir() if (m := _LAYER.fullmatch(p.name))}
    if sorted(found) != list(range(len(found))) or not found:
        raise CheckpointError(
            f"{folder} has layers {sorted(found)}: a set has all from 0 to its last"
        )
    return [found[i] for i in range(len(found))]


def read(path: Path) -> Stored:
    """One layer. Raises CheckpointError for a folder of more than one, for cross-layer transcoders,
    and for topk, which there gives out negative values where fewer than k are positive."""
    if path.is_dir():
        files = layers(path)
        if len(files) > 1:
            raise CheckpointError(
                f"{path} is a set of {len(files)} transcoders: name one, such as {files[0]}"
            )
        path = files[0]
    options = load_yaml(path.parent / CONFIG)
    options.must_be(
        "model_kind", "transcoder_set", why="a cross-layer transcoder has an output for each layer"
    )
    activation = options.take_if("activation", str)
    if activation == "topk":
        raise CheckpointError(
            f"{options.where}: activation=topk cannot be held: there it keeps negative values "
            "where fewer than k are positive"
        )
    tensors = Tensors(path, load_safetensors(path))
    W_enc = tensors.take("W_enc", "d_sae", "d_in").T
    b_enc = tensors.take("b_enc", "d_sae")
    W_dec = tensors.take("W_dec", "d_sae", "d_in")
    b_dec = tensors.take("b_dec", "d_in")
    how = _activation(activation, options, tensors)
    W_skip = tensors.take_if("W_skip", "d_in", "d_in")
    tensors.finish()
    layer = _LAYER.fullmatch(path.name)
    return Stored(
        format="circuit_tracer",
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        activation=how,
        W_skip=None if W_skip is None else W_skip.T,
        origin={"layer": int(layer[1]) if layer else None, **options.scalars()},
    )


def _activation(name: str | None, options: Options, tensors: Tensors) -> Activation:
    if name == "relu":
        return ReLU()
    if name not in (None, "jump_relu", "jumprelu"):
        raise CheckpointError(f"{options.where}: activation={name!r:.80} cannot be held")
    threshold = tensors.left.get("activation_function.threshold")
    if threshold is None:
        return ReLU()
    if threshold.ndim == 0 or threshold.numel() == 1:
        value = tensors.number("activation_function.threshold")
        threshold = torch.full((tensors.size("d_sae"),), value)
    else:
        threshold = tensors.take("activation_function.threshold", "d_sae")
    return JumpReLU(nonnegative(tensors.where, threshold))


def write(sae: SAE, path: Path, origin: dict[str, Any]) -> None:
    """A set of one layer."""
    write_set([sae], path, [origin])


def write_set(saes: Sequence[SAE], path: Path, origins: Sequence[dict[str, Any]]) -> None:
    """SAE i as layer i. Raises CheckpointError where one cannot be held, or they differ in width.

    `origins` may say model_name (or model), feature_input_hook and feature_output_hook, scan.
    """
    sizes = {(sae.d_in, sae.d_out, sae.d_sae) for sae in saes}
    if len(sizes) != 1:
        raise CheckpointError(
            f"a set is of one width and one number of latents; these are {sorted(sizes)}"
        )
    for layer, sae in enumerate(saes):
        _refuse(layer, sae)
    for layer, sae in enumerate(saes):
        tensors = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        if isinstance(sae.activation, JumpReLU):
            tensors["activation_function.threshold"] = sae.activation.threshold
        if sae.W_skip is not None:
            tensors["W_skip"] = sae.W_skip.T
        whole = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        write_atomic(path / f"layer_{layer}.safetensors", partial(save_file, whole))
    about = origins[0]
    model = about.get("model_name", about.get("model"))
    config = {
        "model_kind": "transcoder_set",
        "model_name": model,
        "feature_input_hook": about.get("feature_input_hook", "ln2.hook_normalized"),
        "feature_output_hook": about.get("feature_output_hook", "hook_mlp_out"),
        "scan": about.get("scan", path.name),
    }
    write_text(path / CONFIG, yaml.safe_dump(config, sort_keys=False))


def _refuse(layer: int, sae: SAE) -> None:
    what = None
    if not isinstance(sae.activation, ReLU | JumpReLU):
        what = f"activation {type(sae.activation).__name__}"
    elif sae.row_norm is not None:
        what = "rows that are normalised"
    elif sae.d_in != sae.d_out:
        what = f"an output of width {sae.d_out} for an input of {sae.d_in}"
    if what is not None:
        raise CheckpointError(
            "circuit-tracer holds ReLU and JumpReLU transcoders of one width; "
            f"SAE {layer} has {what}"
        )
