"""overcomplete (Kempner Institute): a state dict, `sae.pt` or `sae.safetensors`, of an SAE with the
linear encoder, and `overcomplete.json` beside it.

The library saves nothing by itself, and a state dict says neither its class nor its options. So
write beside it what you gave to the constructor:

    {"class": "TopKSAE", "top_k": 16, "normalization": "l2"}

with "top_k" for TopKSAE, "running_threshold" for BatchTopKSAE (`float(sae.running_threshold)`), and
neither for SAE and JumpSAE. Then

    codes = relu(x @ encoder.final_block.0.weight.T + encoder.final_block.0.bias)
    z = codes, the top_k largest, or those at or above the threshold (exp(thresholds) of JumpSAE)
    x_hat = z @ dictionary,    dictionary = normalised(dictionary._weights) * exp(multiplier)

There is no decoder bias. After overcomplete 0.3.0.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saekit.errors import CheckpointError
from saekit.files import write_atomic, write_json
from saekit.interop._files import Options, Tensors, load_json, load_safetensors
from saekit.interop._stored import Stored
from saekit.interop._torch_file import load_torch
from saekit.sae import SAE, Activation, JumpReLU, ReLU, TopK

CONFIG = "overcomplete.json"
WEIGHTS = "sae.pt"
SAFE = "sae.safetensors"
FILES = (CONFIG, WEIGHTS, SAFE)
HOLDS = "ReLU, TopK, JumpReLU, with a b_dec of 0"
READS = "ReLU, TopK, BatchTopK (with its threshold), JumpReLU; linear encoders"

_CLASSES = ("SAE", "TopKSAE", "BatchTopKSAE", "JumpSAE")
_NORMS = ("l2", "max_l2", "l1", "max_l1", "identity")
_ENCODER = "encoder.final_block.0"


def detect(path: Path) -> bool:
    """Whether the folder has a config of ours beside the library's state dict."""
    return (path / CONFIG).is_file()


def read(path: Path) -> Stored:
    """Raises CheckpointError for other encoders and classes. Of these, MpSAE takes a latent with a
    negative value where none is positive."""
    options = load_json(path / CONFIG)
    kind = options.take("class", str)
    if kind not in _CLASSES:
        raise CheckpointError(
            f"{options.where}: class={kind!r:.80} cannot be held; {', '.join(_CLASSES)} can"
        )
    norm = options.take("normalization", str, "l2")
    if norm not in _NORMS:
        raise CheckpointError(
            f"{options.where}: normalization={norm!r:.80} is unknown; {', '.join(_NORMS)} are"
        )
    file = path / (WEIGHTS if (path / WEIGHTS).is_file() else SAFE)
    found = load_torch(file) if file.name == WEIGHTS else load_safetensors(file)
    tensors = Tensors(file, {name: t for name, t in found.items() if isinstance(t, Tensor)})
    W_enc = tensors.take(f"{_ENCODER}.weight", "d_sae", "d_in").T
    b_enc = tensors.take(f"{_ENCODER}.bias", "d_sae")
    weights = tensors.take("dictionary._weights", "d_sae", "d_in")
    multiplier = tensors.number("dictionary.multiplier")
    activation = _activation(kind, options, tensors)
    tensors.finish()
    options.finish()
    return Stored(
        format="overcomplete",
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=_normalised(weights, norm) * torch.tensor(multiplier).exp(),
        b_dec=torch.zeros_like(weights[0]),
        activation=activation,
        origin={"class": kind, "normalization": norm},
    )


def _normalised(weights: Tensor, norm: str) -> Tensor:
    """As the library does it in training, and once more before it evaluates."""
    if norm == "identity":
        return weights
    order = 1 if norm.endswith("l1") else 2
    length: Tensor = torch.linalg.vector_norm(weights, ord=order, dim=1, keepdim=True)
    if norm.startswith("max"):
        return weights / length.max().clamp_min(torch.finfo(weights.dtype).tiny)
    return weights / (length + 1e-8)


def _activation(kind: str, options: Options, tensors: Tensors) -> Activation:
    d_sae = tensors.size("d_sae")
    if kind == "TopKSAE":
        k = options.take("top_k", int)
        if not 1 <= k <= d_sae:
            raise CheckpointError(f"{options.where}: top_k={k} must lie in 1..{d_sae}, its latents")
        return TopK(k)
    if kind == "BatchTopKSAE":
        options.left.pop("top_k", None)
        return JumpReLU(_from(torch.full((d_sae,), options.take("running_threshold", float))))
    if kind == "JumpSAE":
        log = tensors.take("thresholds", "d_sae")
        return JumpReLU(_from(log.exp().clamp_max(torch.finfo(log.dtype).max)))
    return ReLU()


def _from(threshold: Tensor) -> Tensor:
    """The threshold that lets through above it what this one lets through at or above it."""
    return torch.nextafter(threshold, torch.full_like(threshold, -torch.inf)).clamp_min(0)


def write(sae: SAE, path: Path, origin: dict[str, Any]) -> None:
    """`sae.safetensors`, as no pickle is written: `sae.load_state_dict(load_file(...))` on an
    object of the class that overcomplete.json names, with its dictionary_params
    {"normalization": "identity"}. Raises CheckpointError for an SAE that has no class there."""
    if sae.b_dec.any() or sae.W_skip is not None or sae.row_norm is not None:
        raise CheckpointError(
            "overcomplete holds neither a decoder bias, nor a skip path, nor rows that are "
            "normalised: convert to sae_lens in its place"
        )
    if sae.d_in != sae.d_out:
        raise CheckpointError("overcomplete holds no transcoder: convert to sae_lens in its place")
    config: dict[str, Any] = {"class": "SAE", "normalization": "identity"}
    tensors = {
        f"{_ENCODER}.weight": sae.W_enc.T,
        f"{_ENCODER}.bias": sae.b_enc,
        "dictionary._weights": sae.W_dec,
        "dictionary.multiplier": torch.tensor(0.0),
    }
    match sae.activation:
        case ReLU():
            pass
        case TopK(k):
            config |= {"class": "TopKSAE", "top_k": k}
        case JumpReLU(threshold):
            config |= {"class": "JumpSAE"}
            least = torch.finfo(threshold.dtype).tiny
            above = torch.nextafter(threshold, torch.full_like(threshold, torch.inf))
            tensors["thresholds"] = above.clamp_min(least).log()
        case other:
            raise CheckpointError(
                f"overcomplete has no {type(other).__name__} that computes this: convert to "
                "sae_lens in its place"
            )
    whole = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_atomic(path / SAFE, lambda file: save_file(whole, file))
    write_json(path / CONFIG, config)
