"""OpenAI's SAEs of GPT-2 small (Gao et al. 2024): one file of `torch.save` for each layer, with
pre_bias [d_in], latent_bias [d_sae], encoder.weight [d_sae, d_in], decoder.weight [d_in, d_sae],
counts of training, and the activation's class name beside its state.

    pre = (x - pre_bias) @ encoder.weight.T + latent_bias
    x_hat = activation(pre) @ decoder.weight.T + pre_bias

Where the activation is TopK, each row of x is first taken less its mean, over its standard
deviation plus 1e-5, and x_hat put back. After openai/sparse_autoencoder, model.py.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from saekit.errors import CheckpointError
from saekit.interop._files import Options, Tensors
from saekit.interop._stored import Stored
from saekit.interop._torch_file import is_torch, load_torch, names_in
from saekit.sae import Activation, LayerNorm, ReLU, TopK

HOLDS = "ReLU; TopK with rows normalised"
_STATE = "activation_state_dict"
_COUNTS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def detect(path: Path) -> bool:
    """Whether it is a file of torch.save with these tensors."""
    return is_torch(path) and {"pre_bias", "latent_bias"} <= names_in(path)


def read(path: Path) -> Stored:
    """Raises CheckpointError for other activations, and for a TopK that keeps negative values."""
    found = load_torch(path)
    state = found.pop(_STATE, {})
    rest = {name: found.pop(name) for name in list(found) if not isinstance(found[name], Tensor)}
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: {_STATE} must be a dict")
    options = Options(
        str(path), {**_flat(rest), **{f"activation.{k}": v for k, v in state.items()}}
    )
    name = options.take("activation", str, "ReLU")
    activation = _activation(path, name, options)
    options.finish()
    tensors = Tensors(path, found)
    W_enc = tensors.take("encoder.weight", "d_sae", "d_in").T
    W_dec = tensors.take("decoder.weight", "d_in", "d_sae").T
    b_enc = tensors.take("latent_bias", "d_sae")
    b_dec = tensors.take("pre_bias", "d_in")
    if isinstance(activation, TopK) and activation.k > tensors.size("d_sae"):
        raise CheckpointError(f"{path}: k={activation.k} exceeds its {len(b_enc)} latents")
    tensors.finish(*_COUNTS)
    return Stored(
        format="openai_gpt2",
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        activation=activation,
        row_norm=LayerNorm(1e-5) if isinstance(activation, TopK) else None,
        centred=True,
        origin={"model": "gpt2", "file": "/".join(path.absolute().parts[-3:])},
    )


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _activation(path: Path, name: str, options: Options) -> Activation:
    if name == "ReLU":
        return ReLU()
    if name != "TopK":
        raise CheckpointError(f"{path}: activation {name[:80]!r} cannot be held: ReLU and TopK can")
    k = options.take("activation.k", int)
    options.must_be("activation.postact_fn", "ReLU", why="latents would have a sign")
    if k < 1:
        raise CheckpointError(f"{path}: k={k} must be at least 1")
    return TopK(k)
