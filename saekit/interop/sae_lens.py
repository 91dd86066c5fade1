"""SAELens v6: a folder of `cfg.json` and `sae_weights.safetensors`. Folders of earlier versions,
whose config is flat, are read, too.

Reads standard, topk, jumprelu, gated, matching_pursuit, transcoder, skip_transcoder,
jumprelu_transcoder and jumprelu_skip_transcoder, and unfinished batchtopk and
matryoshka_batchtopk. What their tool does at run time:

- apply_b_dec_to_input: b_dec is subtracted from x;
- normalize_activations: "layer_norm" and "constant_norm_rescale" normalise each row;
  "expected_average_only_in" and "covariance_whitening" are left to whoever calls, until they are
  folded in when training ends. Here they are taken from `activation_scaler.json` and
  `activation_whitening.safetensors`, which a checkpoint has beside it;
- rescale_acts_by_decoder_norm: latents are chosen, and given out, as if rows of W_dec had norm 1;
- reshape_activations "hook_z": heads are concatenated, as they are in an activation cache.

Without `metadata.sae_lens_version` its reader takes a file for a flat one. After SAELens 6.54.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saekit.errors import CheckpointError
from saekit.files import write_atomic, write_json
from saekit.interop._files import Options, Tensors, load_json, load_safetensors
from saekit.interop._hooks import transformer_lens_name
from saekit.interop._stored import Gate, Stored, Whitening
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

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SCALER = "activation_scaler.json"
WHITENING = "activation_whitening.safetensors"
FILES = (CONFIG, WEIGHTS, SCALER, WHITENING)
HOLDS = (
    "ReLU, TopK, JumpReLU, matching pursuit; rows normalised; ReLU and JumpReLU transcoders, with "
    "a skip path or without"
)
READS = "the same, gated, and unfinished BatchTopK and Matryoshka"

VERSION = "6.54.12"
"""Whose form is written."""

_TRANSCODERS = (
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)
_BUDGETS = ("batchtopk", "matryoshka_batchtopk")
_ARCHITECTURES = (
    *("standard", "topk", "jumprelu", "gated", "matching_pursuit"),
    *_BUDGETS,
    *_TRANSCODERS,
)
# How an SAE was trained, and where it is to run.
_TRAINING = (
    *("device", "dtype", "decoder_init_norm", "l1_coefficient", "l1_warm_up_steps", "lp_norm"),
    *("aux_loss_coefficient", "use_sparse_activations", "topk_threshold_lr", "target_l0"),
    *("jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode"),
    *("jumprelu_ste_to_input", "jumprelu_tanh_scale", "l0_coefficient", "l0_warm_up_steps"),
    *("pre_act_loss_coefficient", "matryoshka_widths", "use_matryoshka_aux_loss"),
)


def detect(path: Path) -> bool:
    """Whether the folder is one of SAELens's, whole or damaged."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> Stored:
    """Raises CheckpointError for architectures and options that cannot be held, by name."""
    options = load_json(path / CONFIG)
    tensors = Tensors(path / WEIGHTS, load_safetensors(path / WEIGHTS))
    about = options.within("metadata")
    flat = _is_flat(options, about)
    if flat:
        options, about = _unflattened(options)
    architecture = options.take("architecture", str)
    if architecture not in _ARCHITECTURES:
        raise CheckpointError(
            f"{options.where}: architecture={architecture!r:.80} cannot be held; "
            f"{', '.join(_ARCHITECTURES)} can"
        )
    transcoder = architecture in _TRANSCODERS
    d_in, d_sae = options.take("d_in", int), options.take("d_sae", int)
    d_out = options.take("d_out", int, d_in)
    centred = options.take("apply_b_dec_to_input", bool, not transcoder)
    options.must_be(
        "reshape_activations", "none", "hook_z", why="only the concatenation of heads is known"
    )
    rescaled = options.take("rescale_acts_by_decoder_norm", bool, False)
    weights = _weights(tensors, architecture, centred)
    sizes = (*weights["W_enc"].shape, weights["W_dec"].shape[1])
    if sizes != (d_in, d_sae, d_out):
        raise CheckpointError(
            f"{path / WEIGHTS} has d_in, d_sae, d_out = {sizes}, {CONFIG} says "
            f"{(d_in, d_sae, d_out)}"
        )
    gate = None
    if architecture == "gated":
        gate = Gate(tensors.take("b_gate", "d_sae"), tensors.take("r_mag", "d_sae"))
    activation = _activation(architecture, options, tensors, weights["W_dec"], transcoder)
    row_norm, scale, whitening = _norms(path, options, d_in, transcoder)
    skip = tensors.take("W_skip", "d_out", "d_in").T if "skip" in architecture else None
    _refuse_scaling(tensors)
    tensors.finish()
    options.finish(*_TRAINING)
    return Stored(
        format="sae_lens",
        **weights,  # type: ignore[arg-type]
        activation=activation,
        W_skip=skip,
        row_norm=row_norm,
        scale_in=scale,
        scale_out=scale,
        centred=(centred and not transcoder) or isinstance(activation, MatchingPursuit),
        whitening=whitening,
        gate=gate,
        score=weights["W_dec"].norm(dim=1) if rescaled else None,
        origin={"architecture": architecture, **about.scalars()},
    )


def _is_flat(options: Options, about: Options) -> bool:
    """Whether SAELens 6 would take the config for one of before version 6."""
    version = options.left.pop("sae_lens_version", None) or about.left.get("sae_lens_version")
    if not isinstance(version, str):
        return True
    major = version.partition(".")[0]
    return not major.isdigit() or int(major) < 6


def _unflattened(options: Options) -> tuple[Options, Options]:
    """A config of before version 6 as one of today, and what became its metadata."""
    old = dict(options.left)
    where = options.where
    renamed = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    old = {renamed.get(name, name): value for name, value in old.items()}
    held = Options(where, old)
    kwargs = held.within("activation_fn_kwargs")
    name = held.take("activation_fn", str, "relu")
    now: dict[str, Any] = {
        key: old[key] for key in ("d_in", "d_sae", "apply_b_dec_to_input", "d_out") if key in old
    }
    now["architecture"] = held.take("architecture", str, "standard")
    if name in ("topk", "relu"):
        if name == "topk":
            now |= {"architecture": "topk", "k": kwargs.take("k", int)}
    else:
        raise CheckpointError(
            f"{where}: activation_fn={name!r:.80} cannot be held; relu and topk can"
        )
    norm = old.get("normalize_activations")
    now["normalize_activations"] = (
        {None: "none", False: "none", True: "expected_average_only_in"}[norm]
        if norm is None or isinstance(norm, bool)
        else norm
    )
    for key in now:
        held.left.pop(key, None)
    return Options(where, now), held


def _weights(tensors: Tensors, architecture: str, centred: bool) -> dict[str, Tensor]:
    if architecture == "matching_pursuit":
        W_dec = tensors.take("W_dec", "d_sae", "d_in")
        b_dec = tensors.take("b_dec", "d_in")
        return {
            "W_enc": W_dec.T,
            "b_enc": torch.zeros_like(W_dec[:, 0]),
            "W_dec": W_dec,
            # It is neither subtracted nor added where it is not to be applied.
            "b_dec": b_dec if centred else torch.zeros_like(b_dec),
        }
    out = "d_out" if architecture in _TRANSCODERS else "d_in"
    return {
        "W_enc": tensors.take("W_enc", "d_in", "d_sae"),
        "b_enc": tensors.take("b_mag" if architecture == "gated" else "b_enc", "d_sae"),
        "W_dec": tensors.take("W_dec", "d_sae", out),
        "b_dec": tensors.take("b_dec", out),
    }


def _activation(
    architecture: str, options: Options, tensors: Tensors, W_dec: Tensor, transcoder: bool
) -> Activation:
    d_sae = len(W_dec)
    if architecture in _BUDGETS:
        options.left.pop("k", None)
        threshold = tensors.number("topk_threshold")
        return JumpReLU(torch.full_like(W_dec[:, 0], max(0.0, threshold)))
    if "jumprelu" in architecture:
        # It applies ReLU, too, so that one below 0 is one of 0.
        return JumpReLU(tensors.take("threshold", "d_sae").clamp_min(0))
    if architecture == "topk":
        k = options.take("k", int, 100)
        if not 1 <= k <= d_sae:
            raise CheckpointError(f"{options.where}: k={k} must lie in 1..{d_sae}, its latents")
        return TopK(k)
    if architecture == "matching_pursuit":
        steps = options.take("max_iterations", int, W_dec.shape[1])
        rest = options.take("residual_threshold", float, 1e-2)
        once = options.take("stop_on_duplicate_support", bool, True)
        if steps < 1 or rest < 0:
            raise CheckpointError(
                f"{options.where}: max_iterations={steps} must be at least 1, and "
                f"residual_threshold={rest} at least 0"
            )
        return MatchingPursuit(steps, rest=rest, once=once)
    return ReLU()


def _norms(
    path: Path, options: Options, d_in: int, transcoder: bool
) -> tuple[RowNorm | None, float, Whitening | None]:
    """How rows are normalised, what they are scaled by, how they are whitened."""
    how = options.take("normalize_activations", str, "none")
    if how == "none":
        return None, 1.0, None
    if transcoder:
        raise CheckpointError(
            f"{options.where}: a transcoder with normalize_activations={how!r:.80} cannot be held: "
            "what comes out of it stays normalised"
        )
    if how == "layer_norm":
        return LayerNorm(1e-5), 1.0, None
    if how == "constant_norm_rescale":
        return UnitRow(), 1.0, None
    if how not in ("expected_average_only_in", "covariance_whitening"):
        raise CheckpointError(f"{options.where}: normalize_activations={how!r:.80} is unknown")
    if not (path / SCALER).is_file():
        raise CheckpointError(
            f"{options.where}: normalize_activations={how!r} means that x is to be scaled by what "
            f"stands in {SCALER}, which is not there: take the SAE that training wrote at its end, "
            "or put the file beside it"
        )
    scaler = load_json(path / SCALER)
    if how == "expected_average_only_in":
        scale = scaler.take("scaling_factor", float)
        if scale <= 0:
            raise CheckpointError(f"{path / SCALER}: scaling_factor={scale} must be above 0")
        return None, scale, None
    held = Tensors(path / WHITENING, load_safetensors(path / WHITENING))
    held.sizes["d_in"] = d_in
    found = (held.take("mean", "d_in"), held.take("matrix", "d_in", "d_in"))
    whitening = Whitening(*found, held.take("inverse_matrix", "d_in", "d_in"))
    held.finish()
    return None, 1.0, whitening


def _refuse_scaling(tensors: Tensors) -> None:
    """Factors of latents, that a finetuning left; ones are harmless."""
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        factor = tensors.take_if(name, "d_sae")
        if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
            raise CheckpointError(
                f"{tensors.where}: '{name}' scales latents for the decoder alone, which cannot be "
                "held: its latents are not in units of W_dec"
            )


def write(sae: SAE, path: Path, origin: dict[str, Any]) -> None:
    """Raises CheckpointError for what SAELens has no architecture for."""
    architecture, extra = _form(sae)
    hook = origin.get("hook")
    name = transformer_lens_name(str(hook)) if hook else origin.get("hook_name")
    tensors = {name: t.detach().cpu() for name, t in sae.tensors().items()}
    if architecture == "matching_pursuit":
        tensors = {name: tensors[name] for name in ("W_dec", "b_dec")}
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"].T
    whole = {name: t.contiguous().clone() for name, t in tensors.items()}
    metadata = {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": origin.get("model", origin.get("model_name")),
        "hook_name": name,
        "hook_head_index": None,
        "prepend_bos": origin.get("prepend_bos", True),
        "dataset_path": origin.get("dataset_path"),
        "context_size": origin.get("context_size"),
        "neuronpedia_id": origin.get("neuronpedia_id"),
    }
    config = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": architecture == "matching_pursuit",
        "normalize_activations": _NORMS[type(sae.row_norm)],
        "reshape_activations": "hook_z" if str(name).endswith("hook_z") else "none",
        **extra,
        "metadata": metadata,
    }
    write_atomic(path / WEIGHTS, lambda file: save_file(whole, file))
    write_json(path / CONFIG, config)


_NORMS = {type(None): "none", LayerNorm: "layer_norm", UnitRow: "constant_norm_rescale"}


def _form(sae: SAE) -> tuple[str, dict[str, Any]]:
    """The architecture that computes what the SAE does, and its own options."""
    transcoder = sae.W_skip is not None or sae.d_in != sae.d_out
    name = type(sae.activation).__name__
    if isinstance(sae.row_norm, LayerNorm) and sae.row_norm.eps != 1e-5:
        raise CheckpointError(
            f"SAELens's layer_norm has eps 1e-5, this SAE's {sae.row_norm.eps:g}: it cannot hold it"
        )
    if transcoder:
        if not isinstance(sae.activation, ReLU | JumpReLU) or sae.row_norm is not None:
            raise CheckpointError(
                f"SAELens has transcoders of ReLU and JumpReLU, without normalised rows; this one "
                f"has {name}{'' if sae.row_norm is None else ' and a row_norm'}"
            )
        skip = "skip_" if sae.W_skip is not None else ""
        jump = "jumprelu_" if isinstance(sae.activation, JumpReLU) else ""
        return f"{jump}{skip}transcoder", {"d_out": sae.d_out}
    match sae.activation:
        case ReLU():
            return "standard", {}
        case JumpReLU():
            return "jumprelu", {}
        case TopK(k):
            return "topk", {"k": k, "rescale_acts_by_decoder_norm": False}
        case MatchingPursuit(residual=0.0, signed=False) as how:
            options = {"max_iterations": how.steps, "residual_threshold": how.rest}
            return "matching_pursuit", {**options, "stop_on_duplicate_support": how.once}
        case _:
            raise CheckpointError(
                "SAELens's matching pursuit stops at a length, not at a share of x, and takes no "
                "negative latents: set residual to 0 and signed to False, or it cannot be held"
            )
