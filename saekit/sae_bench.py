"""SAEs as SAEBench's evaluations take them: an object of its own, "custom" SAE.

    from saekit.sae_bench import custom_sae
    selected = [("my_sae", custom_sae("run", model_name="pythia-70m-deduped", hook_layer=4))]

`docs/sae_bench.md` has the whole command. SAEBench itself is not needed here: what it asks of an
object is `encode`, `decode` and `forward` of `[..., d_in]`, the four weights, `device`, `dtype`,
and a `cfg`. Axes: d_in, d_sae.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.errors import ConfigError
from saekit.interop import load
from saekit.interop._hooks import transformer_lens_name
from saekit.sae import SAE, JumpReLU, ReLU


@dataclass
class CustomConfig:
    """The fields that SAEBench reads of an SAE's `cfg`."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    architecture: str
    dtype: str = "float32"
    device: str = "cpu"
    context_size: int | None = None
    hook_head_index: int | None = None
    prepend_bos: bool = True
    apply_b_dec_to_input: bool = False
    """b_dec is part of b_enc."""
    normalize_activations: str = "none"
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = "relu"
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -1
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class CustomSAE(nn.Module):
    """An SAE under the names that SAEBench uses.

    Rows of W_dec have norm 1, which its evaluations take for granted, wherever that changes no
    choice among latents: the norms are part of the encoder and of the thresholds. A TopK whose rows
    have other norms is left as it is, since it would choose otherwise.
    """

    def __init__(self, sae: SAE, cfg: CustomConfig) -> None:
        super().__init__()
        if sae.d_in != sae.d_out or sae.W_skip is not None or sae.row_norm is not None:
            raise ConfigError(
                "SAEBench decodes from latents alone, to the width that it encodes: a transcoder, "
                "a skip path or rows that are normalised cannot be evaluated by it"
            )
        if isinstance(sae.activation, ReLU | JumpReLU):
            sae = _unit_rows(sae)
        self.cfg = cfg
        self.W_enc = nn.Parameter(sae.W_enc, requires_grad=False)
        self.b_enc = nn.Parameter(sae.b_enc, requires_grad=False)
        self.W_dec = nn.Parameter(sae.W_dec, requires_grad=False)
        self.b_dec = nn.Parameter(sae.b_dec, requires_grad=False)
        self._activation = sae.activation
        if isinstance(sae.activation, JumpReLU):
            self.threshold = nn.Parameter(sae.activation.threshold, requires_grad=False)
        self._note()

    # Heads are concatenated already, as they are in an activation cache.
    hook_z_reshaping_mode = False

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """There is none."""

    def _note(self) -> None:
        self.device = self.W_enc.device
        self.dtype = self.W_enc.dtype
        self.cfg.device = str(self.device)
        self.cfg.dtype = str(self.dtype).removeprefix("torch.")

    def to(self, *args: Any, **kwargs: Any) -> "CustomSAE":
        super().to(*args, **kwargs)
        self._note()
        return self

    @property
    def sae(self) -> SAE:
        """With the weights as they are now."""
        how = self._activation
        if isinstance(how, JumpReLU):
            how = JumpReLU(self.threshold)
        return SAE(self.W_enc, self.b_enc, self.W_dec, self.b_dec, how)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        rows = x.reshape(-1, x.shape[-1]).to(self.dtype)
        return self.sae.encode(rows).reshape(*x.shape[:-1], self.cfg.d_sae)

    def decode(self, z: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        rows = z.reshape(-1, z.shape[-1]).to(self.dtype)
        return self.sae.decode(rows).reshape(*z.shape[:-1], self.cfg.d_in)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        return self.decode(self.encode(x))


def _unit_rows(sae: SAE) -> SAE:
    norm = sae.W_dec.double().norm(dim=1)
    # A row of zeros adds nothing at any length.
    norm = torch.where(norm > 0, norm, 1.0)

    def scaled(tensor: Tensor, by: Tensor) -> Tensor:
        return (tensor.double() * by).to(tensor.dtype)

    how = sae.activation
    if isinstance(how, JumpReLU):
        how = JumpReLU(scaled(how.threshold, norm))
    return replace(
        sae,
        W_enc=scaled(sae.W_enc, norm),
        b_enc=scaled(sae.b_enc, norm),
        W_dec=scaled(sae.W_dec, 1 / norm[:, None]),
        activation=how,
    )


def custom_sae(
    what: SAE | Path | str,
    *,
    model_name: str,
    hook_layer: int,
    hook_name: str | None = None,
    context_size: int | None = 128,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> CustomSAE:
    """An SAE, or one of a run, of any format or of the hub, for SAEBench.

    `model_name` is TransformerLens's name of the model; the hook point is taken from the SAE's
    provenance where it has one, and is the residual stream after `hook_layer` otherwise. Raises
    ConfigError for an SAE that it cannot evaluate, or whose hook point is of another layer.
    """
    sae = what if isinstance(what, SAE) else load(what)
    if hook_name is None:
        hook = sae.provenance.hook if sae.provenance else f"resid_post.{hook_layer}"
        hook_name = transformer_lens_name(hook)
    if hook_name.startswith("blocks.") and hook_name.split(".")[1] != str(hook_layer):
        raise ConfigError(f"hook_layer={hook_layer}, but the SAE is of '{hook_name}'")
    cfg = CustomConfig(
        model_name=model_name,
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        hook_layer=hook_layer,
        hook_name=hook_name,
        architecture=type(sae.activation).__name__.lower(),
        context_size=context_size,
    )
    return CustomSAE(sae, cfg).to(device=device, dtype=dtype)
