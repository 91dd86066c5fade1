"""What every kind of SAE gives the training loop.

A kind is one public module of this folder: a config, a `Trainer`, and `KIND = ThatTrainer`. Losses
are sums over d_in and means over rows, already weighted; the loop adds them up and knows nothing
else about a kind. Axes: batch, d_in, d_sae.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.config import TrainConfig
from saekit.sae import SAE, JumpReLU


class Trainer(nn.Module):
    """The trainable form of one kind. Every tensor that a resumed run needs is a parameter or a
    buffer."""

    Config: ClassVar[type[TrainConfig]]

    def __init__(self, cfg: TrainConfig, d_in: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.d_in = d_in

    def initialise(self, sample: Float[Tensor, "row d_in"]) -> None:
        """Set what depends on the data, from a sample of it. Called once, before the first step."""

    def losses(self, x: Float[Tensor, "batch d_in"]) -> dict[str, Float[Tensor, ""]]:
        """The terms of the loss by name, each already weighted; `mse` is the reconstruction's."""
        raise NotImplementedError

    def before_step(self) -> None:
        """After the gradients are there, before the optimiser uses them."""

    def after_step(self) -> None:
        """After the optimiser's step: constraints."""

    def metrics(self) -> dict[str, float]:
        """Figures of the last batch for the log."""
        return {}

    def export(self) -> SAE:
        """The inference form, in the units that `losses` sees."""
        raise NotImplementedError


def fold_input_scale(sae: SAE, scale: float) -> SAE:
    """The SAE for `x` that does what this one does for `scale * x`.

    Decoder rows keep their norm; latents, biases and thresholds shrink by the scale instead.
    """
    activation = sae.activation
    if isinstance(activation, JumpReLU):
        activation = JumpReLU(activation.threshold / scale)
    return replace(sae, b_enc=sae.b_enc / scale, b_dec=sae.b_dec / scale, activation=activation)


def unit_rows(d_sae: int, d_in: int) -> Float[Tensor, "{d_sae} {d_in}"]:
    """Random directions."""
    rows = torch.randn(d_sae, d_in)
    normalise_rows(rows)
    return rows


@torch.no_grad()
def project_out_rows(grad: Float[Tensor, "d_sae d_in"], W: Float[Tensor, "d_sae d_in"]) -> None:
    """Take from each row of `grad` its part along the unit row of `W`, which would only change its
    norm."""
    along = (grad * W).sum(1, keepdim=True)
    grad.addcmul_(along, W, value=-1)


@torch.no_grad()
def normalise_rows(W: Float[Tensor, "d_sae d_in"]) -> None:
    """Give each row of `W` norm 1, in place."""
    W.div_(W.norm(dim=1, keepdim=True))


def geometric_median(
    x: Float[Tensor, "row d_in"], *, tolerance: float = 1e-6, max_steps: int = 100
) -> Float[Tensor, " d_in"]:
    """The point with the least summed distance to the rows (Weiszfeld's iteration from the
    mean)."""
    point = x.mean(0)
    for _ in range(max_steps):
        weight = 1 / (x - point).norm(dim=1).clamp_min(1e-12)
        moved = (weight @ x) / weight.sum()
        if (moved - point).norm() <= tolerance * point.norm().clamp_min(1e-12):
            break
        point = moved
    return point
