"""Llama Scope and Llamascopium (OpenMOSS, He et al. 2024), in the three layouts there are:

- v1: `hyperparams.json` and `checkpoints/final.safetensors` (encoder.weight [d_sae, d_in],
  decoder.weight [d_out, d_sae], both with a bias), one threshold for all latents;
- of the R1 distillation: `config.json` and `sae_weights.safetensors`, the same names, and
  log_jumprelu_threshold [d_sae];
- v2: the same files with W_E [d_in, d_sae], b_E, W_D, b_D and
  activation_function.log_jumprelu_threshold.

Where norm_activation is "dataset-wise", x is multiplied by sqrt(d_model) over the mean norm of the
hook point it is read from, and the reconstruction divided by that of the one it is of; the norms
stand in the file. With sparsity_include_decoder_norm latents are chosen by pre times the norm of
their decoder rows. v1's threshold was found after both had been folded in, so it is one of
pre * |row| / scale, which are the latents that it has here. After OpenMOSS/Language-Model-SAEs,
initializer.py and sae.py.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from saekit.errors import CheckpointError
from saekit.interop._files import Options, Tensors, load_json, load_safetensors
from saekit.interop._stored import Stored
from saekit.sae import Activation, JumpReLU, ReLU, RowNorm, TopK, UnitRow

V1_CONFIG = "hyperparams.json"
V1_WEIGHTS = "checkpoints/final.safetensors"
CONFIG = "config.json"
WEIGHTS = "sae_weights.safetensors"
FILES = (V1_CONFIG, V1_WEIGHTS, CONFIG, WEIGHTS)
HOLDS = "JumpReLU, ReLU, TopK; transcoders of one width"

_NORM = "dataset_average_activation_norm"


def detect(path: Path) -> bool:
    """Whether the folder has one of the three layouts."""
    v1 = (path / V1_CONFIG).is_file() and (path / V1_WEIGHTS).is_file()
    return v1 or ((path / CONFIG).is_file() and (path / WEIGHTS).is_file())


def read(path: Path) -> Stored:
    """Raises CheckpointError for gated linear encoders, for crosscoders, and for norms of a batch,
    which hang on rows beside the one that is encoded."""
    v1 = (path / V1_CONFIG).is_file()
    options = load_json(path / (V1_CONFIG if v1 else CONFIG))
    file = path / (V1_WEIGHTS if v1 else WEIGHTS)
    tensors = Tensors(file, load_safetensors(file))
    options.must_be("use_glu_encoder", False, why="its encoder is not linear")
    options.must_be("sae_type", "sae", why="a crosscoder, CLT, Lorsa or MOLT is no SAE")
    centred = options.take("apply_decoder_bias_to_pre_encoder", bool, False)
    biased = options.take("use_decoder_bias", bool, True)
    hook = options.take("hook_point_in", str, "in")
    out = options.take("hook_point_out", str, hook)
    d_model = options.take_if("d_model", int)
    weights = _weights(tensors, biased)
    d_in = tensors.size("d_in")
    if d_model not in (None, d_in):
        raise CheckpointError(f"{path}: d_model={d_model}, but its encoder reads width {d_in}")
    row_norm, scale_in, scale_out = _norms(options, tensors, d_in, hook, out, v1)
    by_norm = options.take("sparsity_include_decoder_norm", bool, True)
    norm = weights["W_dec"].norm(dim=1)
    activation = _activation(options, tensors, v1)
    score: Tensor | None = norm if by_norm else None
    if v1:
        score = (norm if by_norm else torch.ones_like(norm)) / scale_in
    tensors.finish()
    return Stored(
        format="llama_scope",
        **weights,  # type: ignore[arg-type]
        activation=activation,
        row_norm=row_norm,
        centred=centred,
        scale_in=scale_in,
        scale_out=scale_out,
        score=score,
        gives_scores=v1,
        origin={"hook_point_in": hook, "hook_point_out": out, **options.scalars()},
    )


def _weights(tensors: Tensors, biased: bool) -> dict[str, Tensor]:
    if "W_E" in tensors:
        W_enc = tensors.take("W_E", "d_in", "d_sae")
        b_enc = tensors.take("b_E", "d_sae")
        W_dec = tensors.take("W_D", "d_sae", "d_in")
        b_dec = tensors.take("b_D", "d_in") if biased else torch.zeros_like(W_dec[0])
    else:
        W_enc = tensors.take("encoder.weight", "d_sae", "d_in").T
        b_enc = tensors.take("encoder.bias", "d_sae")
        W_dec = tensors.take("decoder.weight", "d_in", "d_sae").T
        b_dec = tensors.take("decoder.bias", "d_in") if biased else torch.zeros_like(W_dec[0])
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}


def _norms(
    options: Options, tensors: Tensors, d_in: int, hook: str, out: str, v1: bool
) -> tuple[RowNorm | None, float, float]:
    """How rows are normalised, and what x and x_hat are scaled by."""
    how = options.take("norm_activation", str, "dataset-wise")
    measured: dict[str, float] = {}
    within = options.within(_NORM)
    for name in list(within.left):
        measured[name] = within.take(name, float)
    for name in [name for name in tensors.left if name.startswith(f"{_NORM}.")]:
        measured[name.removeprefix(f"{_NORM}.")] = tensors.number(name)
    if how == "inference":
        return None, 1.0, 1.0
    if how == "token-wise" and hook != out:
        raise CheckpointError(
            f"{options.where}: a transcoder whose output is in units of its own target's norm, "
            "token by token, cannot be held: the target is not there at inference"
        )
    if how == "token-wise":
        return UnitRow(), 1.0, 1.0
    if how != "dataset-wise":
        raise CheckpointError(
            f"{options.where}: norm_activation={how[:80]!r} cannot be held: dataset-wise, "
            "token-wise and inference can"
        )
    names = ("in", "out") if v1 else (hook, out)
    if names[0] not in measured or min(measured.values()) <= 0:
        raise CheckpointError(
            f"{options.where}: norm_activation is dataset-wise, so {_NORM} must have the mean norm "
            f"at '{names[0][:80]}', above 0; it has {str(measured)[:200]}"
        )
    norm_out = measured.get(names[1], measured[names[0]])
    return None, math.sqrt(d_in) / measured[names[0]], math.sqrt(d_in) / norm_out


def _activation(options: Options, tensors: Tensors, v1: bool) -> Activation:
    name = options.take("act_fn", str, "jumprelu").lower()
    k = options.take("top_k", int, 50)
    threshold = options.take("jump_relu_threshold", float, 0.0)
    d_sae = tensors.size("d_sae")
    # v1 was trained as TopK, and is used with a threshold where there is one.
    if v1 and name in ("topk", "jumprelu") and threshold > 0:
        return JumpReLU(torch.full((d_sae,), threshold))
    match name:
        case "relu":
            return ReLU()
        case "topk" if 1 <= k <= d_sae:
            return TopK(k)
        case "jumprelu" if not v1:
            prefix = "activation_function." if "activation_function." in _heads(tensors) else ""
            log = tensors.take(f"{prefix}log_jumprelu_threshold", "d_sae")
            return JumpReLU(log.exp().clamp_max(torch.finfo(log.dtype).max))
    raise CheckpointError(
        f"{options.where}: act_fn={name[:80]!r} with top_k={k} and jump_relu_threshold={threshold} "
        f"cannot be held: relu, topk with top_k in 1..{d_sae}, and jumprelu with a threshold above "
        "0 can (batchtopk chooses among all rows of a batch)"
    )


def _heads(tensors: Tensors) -> set[str]:
    return {name.partition(".")[0] + "." for name in tensors.left if "." in name}
