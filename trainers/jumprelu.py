"""JumpReLU SAE (Rajamanoharan et al. 2024, arXiv 2407.14435): each latent has a threshold of its
own, learnt with straight-through estimators.

    pre = (x - b_dec) @ W_enc + b_enc
    z = pre H(pre - threshold),  x_hat = z @ W_dec + b_dec
    loss = mean |x - x_hat|^2  +  c mean S

    penalty "l0":    S = sum_i H(pre_i - threshold_i)
    penalty "tanh":  S = sum_i tanh(4 z_i / u)       (Anthropic's update of January 2025)

H is the step from 0 to 1. Where |pre - threshold| < w / 2, with w the bandwidth,

    dz / dthreshold = -threshold / w,  dH / dthreshold = -1 / w

and 0 elsewhere; dz / dpre = H, dH / dpre = 0. Both read pre itself: of the gated z nothing is left
below the threshold, and half of the gradient would be missing.

**Units.** Bandwidth and threshold mean nothing without the size of pre-activations, so both are
given in units of u, the root mean square of a coordinate of x about its mean: what a random
direction reads off x. With inputs scaled to a norm of sqrt(d_in), u is near 1 for centred
activations. The paper's inputs have a norm of 1, and its 0.001 is 0.001 sqrt(d_in) here: 0.05 for
d_in = 2304; Anthropic's bandwidth is 2.

A latent that has not fired for long can be brought back by Anthropic's loss on its
pre-activations, p mean sum_i relu(threshold_i - pre_i), over such latents alone.

Departures: AuxK, as for the TopK kinds, revives what the falling L0 leaves without a feature; the
threshold is learnt itself, not its logarithm, and put back to 0 after a step that
takes it below, because a small threshold hardly moves in the logarithm; and "tanh" with rows of
norm 1, where Anthropic weighs z_i by the norm of its row.
"""

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.errors import ConfigError
from saekit.sae import SAE, JumpReLU
from saekit.trainers._autoencoder import LATENTS, forget
from saekit.trainers._base import Batch, Step
from saekit.trainers._fused import FusedJumpReLU, fused_step
from saekit.trainers._sparsity import Penalised, PenalisedConfig

log = logging.getLogger(__name__)

_LEAST = 0.01
"""Share of the rows on which some latent must fire at first."""
_TRIED_ROWS, _AT_ONCE = 8_192, 1 << 26
"""Rows that are looked at for it, and pre-activations of them that are held at a time."""


@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig(PenalisedConfig):
    """JumpReLU SAE: each latent learns a threshold, and a penalty counts the latents that fire."""

    penalty: Literal["l0", "tanh"] = "l0"
    """What is penalised: the number of latents that fire, or a smooth form of it, which also
    pushes on their values."""

    l0_coef: float = 1.0
    """Weight of the penalty."""

    bandwidth: float = 1.0
    """Width of the window about a threshold in which pre-activations move it, in units of the root
    mean square of a coordinate of x about its mean."""

    threshold_init: float = 0.3
    """What thresholds start as, in the same units; lower where next to nothing would fire. At 1 one
    in seven latents of a residual stream died, AuxK notwithstanding (docs/kinds.md)."""

    threshold_lr: float = 10.0
    """How many times as fast as the other weights thresholds learn, in the same units."""

    pre_act_coef: float = 0.0
    """Weight of the loss that raises the pre-activations of dead latents (Anthropic have 3e-6); 0
    switches it off."""

    revive: Literal["none", "auxk", "resample", "ghost"] = "auxk"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("l0_coef", "threshold_init", "pre_act_coef"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name):g} may not be negative")
        for name in ("bandwidth", "threshold_lr"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"{name}={getattr(self, name):g} must be positive: thresholds would not learn"
                )


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold, width)
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        pre, threshold, width = ctx.saved_tensors
        d_threshold = grads[0] * (-threshold / width) * _inside(pre, threshold, width)
        return grads[0] * (pre > threshold), d_threshold.sum_to_size(threshold.shape), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold, width)
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        pre, threshold, width = ctx.saved_tensors
        d_threshold = grads[0] * (-1 / width) * _inside(pre, threshold, width)
        return None, d_threshold.sum_to_size(threshold.shape), None


def _inside(pre: Tensor, threshold: Tensor, width: Tensor) -> Tensor:
    return (pre - threshold).abs() < width / 2


class JumpReLUTrainer(Penalised):
    """See the module."""

    Config = JumpReLUConfig
    LATENTS = {**LATENTS, "level": 0}
    COEFFICIENT = "l0_coef"
    cfg: JumpReLUConfig

    def __init__(self, cfg: JumpReLUConfig, d_in: int) -> None:
        super().__init__(cfg, d_in)
        # So that a step of Adam, about lr for any parameter, moves a threshold further.
        self.level = nn.Parameter(
            torch.full((self.n_latents,), cfg.threshold_init / cfg.threshold_lr)
        )

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "row d_in"]) -> None:
        """Thresholds start at threshold_init, or as far below as it takes for some latent to fire
        on one row in a hundred. With many latents for each dimension of x the encoder's columns
        start short (`encoder_norm`), and so do pre-activations; and an encoder of which nothing
        fires has no gradient, so that thousands of steps would change nothing."""
        super().initialise(sample)
        at_once = max(1, _AT_ONCE // self.n_latents)
        parts = (sample[:_TRIED_ROWS] - self.b_dec).split(at_once)
        largest = torch.cat([(x @ self.W_enc + self.b_enc).amax(1) for x in parts])
        largest = self.mesh.reduce(largest, "latent", "max") / self.unit.clamp_min(1e-30)
        found = largest.quantile(1 - _LEAST).clamp(0, self.cfg.threshold_init)
        # Slices of the same latents must start alike, whatever their processors make of a product.
        self.mesh.same(found)
        start = float(found)
        if start < self.cfg.threshold_init:
            log.info(
                "thresholds start at %.2g: at threshold_init=%g next to nothing would fire",
                start,
                self.cfg.threshold_init,
            )
            self.level.fill_(start / self.cfg.threshold_lr)

    @property
    def unit(self) -> Float[Tensor, ""]:
        """The root mean square of a coordinate of x about its mean."""
        return (self.variance / self.d_in).sqrt()

    @property
    def threshold(self) -> Float[Tensor, " d_sae"]:
        return self.level * (self.cfg.threshold_lr * self.unit)

    @property
    def width(self) -> Float[Tensor, ""]:
        """Of the window in which pre-activations move a threshold."""
        return self.cfg.bandwidth * self.unit

    def fused_step(self, optimiser: torch.optim.Optimizer, device: str) -> Step | None:
        if type(self) is not JumpReLUTrainer:
            return None
        cfg, obstacle = self.cfg, ""
        if cfg.penalty != "l0":
            obstacle = f"penalty='{cfg.penalty}'"
        elif cfg.pre_act_coef > 0:
            obstacle = f"pre_act_coef={cfg.pre_act_coef:g}"
        elif cfg.economy:
            obstacle = "its first steps are eager, and economy is for fused ones"
        k = min(max(1, round(cfg.target_l0 or 32)), cfg.d_sae)
        return fused_step(FusedJumpReLU, self, optimiser, k, device, obstacle)

    def guess(self, target_l0: float) -> float:
        # A latent pays for itself where the error that it takes away, at most its square, is more.
        return 0.1 * float(self.variance / target_l0)

    def losses(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        cfg = self.cfg
        centred = batch.x - self.b_dec
        width = self.width
        kept = self.keep(centred, self.threshold.detach() - width / 2)
        threshold = kept.of(self.threshold)
        z: Tensor = _Jump.apply(kept.pre, threshold, width)  # type: ignore[no-untyped-call]
        error = centred - self.mesh.add_up(kept.decode(z, self.W_dec))
        self.saw(kept, z)
        size: Tensor
        if cfg.penalty == "l0":
            size = _Step.apply(kept.pre, threshold, width)  # type: ignore[no-untyped-call]
        else:
            size = (4 * z / self.unit).tanh()
        losses = {
            "mse": error.square().sum(1).mean(),
            "sparsity": self.penalty(size, kept),
            **self.revival(centred, error),
        }
        if cfg.pre_act_coef > 0:
            losses["pre_act"] = cfg.pre_act_coef * self._short_of(centred, self._dead())
        return losses

    def _short_of(
        self, centred: Float[Tensor, "batch d_in"], latents: Int[Tensor, " latent"]
    ) -> Float[Tensor, ""]:
        """How far latents stay below their thresholds, summed, on the mean over rows."""
        pre = centred @ self.W_enc[:, latents] + self.b_enc[latents]
        return self.mesh.add_up((self.threshold[latents] - pre).relu().sum(1).mean())

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        self.level.clamp_(min=0)

    @torch.no_grad()
    def replant(
        self, batch: Batch, optimiser: torch.optim.Optimizer
    ) -> Int[Tensor, " latent"] | None:
        planted = super().replant(batch, optimiser)
        if planted is not None:
            self.level[planted] = self.cfg.threshold_init / self.cfg.threshold_lr
            forget(optimiser, self.level, planted, 0)
        return planted

    def export(self) -> SAE:
        b_enc = self.b_enc - self.b_dec @ self.W_enc
        return SAE(self.W_enc, b_enc, self.W_dec, self.b_dec, JumpReLU(self.threshold))


KIND = JumpReLUTrainer
