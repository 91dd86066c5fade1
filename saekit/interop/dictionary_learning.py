"""dictionary_learning (Marks, Karvonen and Mueller): a folder `trainer_N` of `ae.pt`, a pickled
state dict, and `config.json`, whose trainer.dict_class says what the tensors are of.

| dict_class | x is read | latents |
| --- | --- | --- |
| AutoEncoder | less `bias` | relu(pre), and pre as if decoder columns had norm 1 |
| AutoEncoderNew | as it is | relu(pre) |
| GatedAutoEncoder | less `decoder_bias` | (pre + gate_bias > 0) relu(exp(r_mag) pre + mag_bias) |
| JumpReluAutoEncoder | as it is | relu(pre) where pre > threshold |
| AutoEncoderTopK | less `b_dec` | the k largest of relu(pre) |
| BatchTopKSAE, MatryoshkaBatchTopKSAE | less `b_dec` | relu(pre) where > threshold, one number |

Activations that training scaled are unscaled in `ae.pt`; in a backup, which is a dict with `ae` and
`norm_factor`, they are not, and are here. Files are read without unpickling (`_torch_file`). As no
pickle is written either, `write` leaves `ae.safetensors`, which takes two lines to load there:

    ae = AutoEncoderTopK(d_in, d_sae, k)           # or the dict_class that config.json names
    ae.load_state_dict(safetensors.torch.load_file("ae.safetensors"))

After dictionary_learning 0.1.0, dictionary.py and trainers/.
"""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saekit.errors import CheckpointError
from saekit.files import write_atomic, write_json
from saekit.interop._files import Options, Tensors, load_json, load_safetensors
from saekit.interop._stored import Gate, Stored, uncentred
from saekit.interop._torch_file import is_torch, load_torch
from saekit.sae import SAE, Activation, JumpReLU, ReLU, TopK

CONFIG = "config.json"
WEIGHTS = "ae.pt"
SAFE = "ae.safetensors"
FILES = (CONFIG, WEIGHTS, SAFE)
HOLDS = "ReLU, TopK, JumpReLU"
READS = "ReLU, TopK, BatchTopK and Matryoshka (with their threshold), JumpReLU, gated"

_CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)


def detect(path: Path) -> bool:
    """Whether it is such a folder, or a file `ae.pt` or `ae_STEP.pt` in one."""
    if path.is_dir():
        return (path / WEIGHTS).is_file() or (path / SAFE).is_file()
    return (is_torch(path) and path.stem.startswith("ae")) or path.name == SAFE


def read(path: Path) -> Stored:
    """Raises CheckpointError for other classes, and where a file alone does not say which it is:
    TopK and BatchTopK have the same tensors."""
    file = path
    if path.is_dir():
        file = path / WEIGHTS if (path / WEIGHTS).is_file() else path / SAFE
    found: dict[str, Any] = load_safetensors(file) if file.suffix != ".pt" else load_torch(file)
    norm_factor = 1.0
    if "ae" in found:
        found, norm_factor = _of_backup(file, found)
    trainer = _config(file)
    values = {name: t for name, t in found.items() if isinstance(t, Tensor)}
    if len(values) < len(found):
        other = next(name for name in found if name not in values)
        raise CheckpointError(
            f"{file}: '{other[:80]}' is no tensor, in what should be a state dict"
        )
    tensors = Tensors(file, values)
    kind = _kind(file, trainer, tensors)
    stored = _read_class(kind, tensors, norm_factor, trainer)
    tensors.finish()
    return stored


def _of_backup(file: Path, found: dict[str, Any]) -> tuple[dict[str, Any], float]:
    state = found["ae"]
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{file}: 'ae' must be a state dict")
    if "norm_factor" not in found:
        raise CheckpointError(
            f"{file} is a backup that does not say what activations were divided by: 'norm_factor' "
            "must be there, or null"
        )
    factor = found["norm_factor"]
    if isinstance(factor, Tensor) and factor.numel() == 1:
        factor = float(factor)
    if factor is None:
        factor = 1.0
    if not isinstance(factor, float | int) or not 0 < factor < math.inf:
        raise CheckpointError(f"{file}: norm_factor={factor!r:.80} must be a number above 0")
    return state, float(factor)


def _config(file: Path) -> Options:
    """Of the folder that the file lies in, or of the one above `checkpoints`."""
    folder = file.parent.parent if file.parent.name == "checkpoints" else file.parent
    if not (folder / CONFIG).is_file():
        return Options(str(folder), {})
    return load_json(folder / CONFIG).within("trainer")


def _kind(file: Path, trainer: Options, tensors: Tensors) -> str:
    said = trainer.take_if("dict_class", str)
    if said not in (None, *_CLASSES):
        raise CheckpointError(
            f"{trainer.where}: dict_class={said!r:.80} cannot be held; {', '.join(_CLASSES)} can"
        )
    if "gate_bias" in tensors:
        return "GatedAutoEncoder"
    if "group_sizes" in tensors:
        return "MatryoshkaBatchTopKSAE"
    if "W_enc" in tensors:
        return "JumpReluAutoEncoder"
    if "bias" in tensors:
        return "AutoEncoder"
    if "decoder.bias" in tensors:
        # Trainers that take another class write the name of their usual one all the same.
        return "AutoEncoderNew"
    if said in ("AutoEncoderTopK", "BatchTopKSAE"):
        return str(said)
    raise CheckpointError(
        f"{file}: dict_class={said!r:.80} does not say whether these tensors are a TopK's or a "
        f"BatchTopK's: put the run's {CONFIG} beside the file"
    )


def _read_class(kind: str, tensors: Tensors, norm_factor: float, trainer: Options) -> Stored:
    weights = _matrices(tensors)
    scale = 1 / norm_factor
    gate, score, centred = None, None, kind not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    activation: Activation = ReLU()
    match kind:
        case "AutoEncoder":
            weights["b_enc"] = tensors.take("encoder.bias", "d_sae")
            weights["b_dec"] = tensors.take("bias", "d_in")
            norm = weights["W_dec"].norm(dim=1)
            # The package leaves them alone where they are as near to 1.
            score = None if torch.allclose(norm, torch.ones_like(norm)) else norm
        case "AutoEncoderNew":
            weights["b_enc"] = tensors.take("encoder.bias", "d_sae")
            weights["b_dec"] = tensors.take("decoder.bias", "d_in")
        case "GatedAutoEncoder":
            weights["b_enc"] = tensors.take("mag_bias", "d_sae")
            weights["b_dec"] = tensors.take("decoder_bias", "d_in")
            gate = Gate(tensors.take("gate_bias", "d_sae"), tensors.take("r_mag", "d_sae"))
        case "JumpReluAutoEncoder":
            weights["b_enc"] = tensors.take("b_enc", "d_sae")
            weights["b_dec"] = tensors.take("b_dec", "d_in")
            activation = JumpReLU(tensors.take("threshold", "d_sae") * norm_factor)
        case _:
            bias = "b_enc" if kind == "MatryoshkaBatchTopKSAE" else "encoder.bias"
            weights["b_enc"] = tensors.take(bias, "d_sae")
            weights["b_dec"] = tensors.take("b_dec", "d_in")
            activation = _budget(kind, tensors, norm_factor)
    if norm_factor != 1:
        if gate is not None:
            raise CheckpointError(
                f"{tensors.where} is a backup of a gated SAE whose activations were scaled, which "
                "cannot be held: read the run's final ae.pt"
            )
        ones = torch.ones_like(weights["b_enc"])
        score = norm_factor * (ones if score is None else score)
    return Stored(
        format="dictionary_learning",
        **weights,  # type: ignore[arg-type]
        activation=activation,
        centred=centred,
        gate=gate,
        scale_in=scale,
        scale_out=scale,
        score=score,
        origin={"dict_class": kind, "norm_factor": norm_factor, **trainer.scalars()},
    )


def _matrices(tensors: Tensors) -> dict[str, Tensor]:
    if "W_enc" in tensors:
        W_enc = tensors.take("W_enc", "d_in", "d_sae")
        return {"W_enc": W_enc, "W_dec": tensors.take("W_dec", "d_sae", "d_in")}
    W_enc = tensors.take("encoder.weight", "d_sae", "d_in").T
    return {"W_enc": W_enc, "W_dec": tensors.take("decoder.weight", "d_in", "d_sae").T}


def _budget(kind: str, tensors: Tensors, norm_factor: float) -> Activation:
    """Of the kinds that have both a k and a threshold, what they use at inference."""
    k, threshold = tensors.whole("k"), tensors.number("threshold")
    d_sae = tensors.size("d_sae")
    if kind == "MatryoshkaBatchTopKSAE":
        sizes = tensors.left.pop("group_sizes")
        if sizes.is_floating_point() or int(sizes.sum()) != d_sae or (sizes < 1).any():
            raise CheckpointError(
                f"{tensors.where}: group_sizes must be whole numbers that sum to {d_sae} latents"
            )
    if k > d_sae:
        raise CheckpointError(f"{tensors.where}: k={k} exceeds its {d_sae} latents")
    if kind == "AutoEncoderTopK":
        return TopK(k)
    # Below 0 it was never found, and every positive latent fires.
    return JumpReLU(torch.full((d_sae,), max(0.0, threshold * norm_factor)))


def write(sae: SAE, path: Path, origin: dict[str, Any]) -> None:
    """Raises CheckpointError for an SAE that has no class there."""
    if sae.row_norm is not None or sae.W_skip is not None or sae.d_in != sae.d_out:
        raise CheckpointError(
            "dictionary_learning holds neither rows that are normalised, nor skip paths, nor "
            "another width of the output than of the input: convert to sae_lens in its place"
        )
    tensors: dict[str, Tensor]
    k: int | None = None
    match sae.activation:
        case JumpReLU():
            kind, tensors = "JumpReluAutoEncoder", sae.tensors()
        case TopK(k):
            kind = "AutoEncoderTopK"
            tensors = {
                "encoder.weight": sae.W_enc.T,
                "encoder.bias": uncentred(sae),
                "decoder.weight": sae.W_dec.T,
                "b_dec": sae.b_dec,
                "k": torch.tensor(k, dtype=torch.int),
                "threshold": torch.tensor(-1.0),
            }
        case ReLU():
            kind = "AutoEncoderNew"
            tensors = {
                "encoder.weight": sae.W_enc.T,
                "encoder.bias": sae.b_enc,
                "decoder.weight": sae.W_dec.T,
                "decoder.bias": sae.b_dec,
            }
        case other:
            raise CheckpointError(
                f"dictionary_learning has no {type(other).__name__}: convert to sae_lens in its "
                "place"
            )
    whole = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_atomic(path / SAFE, lambda file: save_file(whole, file))
    trainer = {"dict_class": kind, "activation_dim": sae.d_in, "dict_size": sae.d_sae, "k": k}
    known = {"layer": origin.get("layer"), "lm_name": origin.get("model")}
    write_json(path / CONFIG, {"trainer": {**trainer, **known}})
