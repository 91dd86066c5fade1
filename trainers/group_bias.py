"""Group Bias Adaptation (Chen et al. 2025, "Taming Polysemanticity in LLMs", arXiv 2506.14002):
biases that no gradient moves hold each latent below a frequency of its group's.

    y      = (x - b_dec) @ W_dec.T + bias                        -1 <= bias <= 0
    z      = (y - bias) where y > 0, else 0                      the bias says when, not how much
    x_hat  = (scale * z) @ W_dec + b_dec                         unit rows, tied; loss |x - x_hat|^2

Every `adapt_every` tokens, from p = the share of those tokens with y > 0 and r = max(0, max y):

    p > cap of the group:   bias <- max(bias - gamma_minus * r, -1)
    p < eps:                bias <- min(bias + gamma_plus * mean of the group's positive r, 0)

and no change between: a cap is no target, and nothing raises a latent that fires at all. Caps fall
geometrically from group to group, so L0 is at most d_sae times their mean once biases have settled.
Inference is JumpReLU with thresholds -bias.

A RECONSTRUCTION: the authors' code could not be read. The rule is the self-consistent form of the
paper's algorithm, whose max and min look swapped (a reviewer says so); that directions are
normalised after each step, that b_dec learns, and that biases begin at 0 (`bias_init`) are
guesses. The paper adapts every 50 steps of 512 tokens; here the interval is counted in tokens, as a
larger batch would leave too few adaptations to settle. A departure: where no latent of a group
fires, the mean is taken as 1, the norm of the input; as written such a group would stay dead. The
paper halves the loss, which Adam does not see.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit import kernels
from saekit.config import TrainConfig
from saekit.errors import ConfigError
from saekit.sae import SAE, JumpReLU
from saekit.trainers._base import Batch, Centre, centre
from saekit.trainers._sparsity import DENSE_ABOVE, Kept, above
from saekit.trainers._tied import Tied


@dataclass(frozen=True, kw_only=True)
class GroupBiasConfig(TrainConfig):
    """Group Bias Adaptation: each latent's bias is moved until it fires no more often than its
    group may."""

    n_groups: int = 10
    """Groups of latents, of equal size; 1 is the paper's "BA"."""

    cap_high: float = 0.1
    """Share of the tokens on which a latent of the first group may fire. Caps that do not cover
    the frequencies of the features lose them."""

    cap_low: float = 1e-3
    """That of the last group; those between lie on a geometric series. L0 settles below d_sae
    times their mean."""

    adapt_every: int = 25_600
    """Tokens between two adaptations of the biases, each by what was seen since the last."""

    gamma_minus: float = 0.01
    """How far a bias falls for a latent that fires too often, as a share of its peak."""

    gamma_plus: float = 0.01
    """How far it rises for a dead latent, as a share of its group's mean peak."""

    eps: float = 1e-6
    """Share of the tokens below which a latent is dead. One token in `adapt_every` is more, so
    this means never."""

    bias_init: float = 0.0
    """What biases begin at; at 0 each latent fires on half of the tokens."""

    scale: Literal["fixed", "learned"] = "fixed"
    """What a latent's output is multiplied by: 1, or a factor of its own."""

    b_dec_init: Centre = "geometric_median"
    """What the decoder bias starts as, over a sample of the activations."""

    input_scaling: Literal["sqrt_d", "unit", "none"] = "unit"
    """Scale activations so that their mean norm is 1 or sqrt(d_in). Biases end at -1, which only
    reaches every activation where norms are about 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n_groups <= self.d_sae:
            raise ConfigError(
                f"n_groups={self.n_groups} must lie in 1..d_sae={self.d_sae}: every group has "
                "latents"
            )
        if not 0 < self.cap_low <= self.cap_high <= 1:
            raise ConfigError(
                f"cap_low={self.cap_low} and cap_high={self.cap_high} are shares of the tokens: "
                "they must hold 0 < cap_low <= cap_high <= 1"
            )
        if self.adapt_every < 1:
            raise ConfigError(f"adapt_every={self.adapt_every} must be at least 1 token")
        if min(self.gamma_minus, self.gamma_plus, self.eps) < 0:
            raise ConfigError(
                f"gamma_minus={self.gamma_minus}, gamma_plus={self.gamma_plus} and eps={self.eps} "
                "may not be negative"
            )
        if not -1 <= self.bias_init <= 0:
            raise ConfigError(
                f"bias_init={self.bias_init} must lie in -1..0, where adaptation keeps biases"
            )


class GroupBiasTrainer(Tied):
    """See the module."""

    Config = GroupBiasConfig
    cfg: GroupBiasConfig
    bias: Tensor
    seen: Tensor
    """Tokens since the last adaptation; of them, on how many each latent fired (`often`), and its
    largest y (`peak`), at least 0."""
    often: Tensor
    peak: Tensor
    group: Tensor
    """The group of each latent, and how often it may fire (`cap`)."""
    cap: Tensor
    density: Tensor
    """Share of the latents that fired in the last batch."""

    def __init__(self, cfg: GroupBiasConfig, d_in: int) -> None:
        super().__init__(cfg, d_in)
        self.scale = nn.Parameter(torch.ones(cfg.d_sae)) if cfg.scale == "learned" else None
        self.register_buffer("bias", torch.full((cfg.d_sae,), cfg.bias_init))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("often", torch.zeros(cfg.d_sae, dtype=torch.int64))
        self.register_buffer("peak", torch.zeros(cfg.d_sae))
        group = torch.arange(cfg.d_sae) * cfg.n_groups // cfg.d_sae
        caps = torch.logspace(0, 1, cfg.n_groups, base=cfg.cap_low / cfg.cap_high) * cfg.cap_high
        self.register_buffer("group", group, persistent=False)
        self.register_buffer("cap", caps[group], persistent=False)
        self.register_buffer("density", torch.ones(()))

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "row d_in"]) -> None:
        self.b_dec.copy_(centre(sample, self.cfg.b_dec_init))

    def losses(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        centred = batch.x - self.b_dec
        kept, z = self._latents(centred)
        self._observe(kept, z)
        if self.scale is not None:
            z = z * kept.of(self.scale)
        error = centred - kept.decode(z, self.W_dec)
        return {"mse": error.square().sum(1).mean()}

    def _latents(self, centred: Float[Tensor, "batch d_in"]) -> tuple[Kept, Float[Tensor, "..."]]:
        """Those that fire alone; all of them where many fired in the last batch."""
        floor = -self.bias
        if self.density < DENSE_ABOVE:
            none = torch.zeros_like(self.bias)
            code = kernels.encode(centred, self.W_dec.T, none, lambda pre: above(pre > floor))
            kept = Kept(*code, rows=len(centred))
            return kept, kept.pre
        pre = (centred @ self.W_dec.T).to(self.W_dec.dtype)
        return Kept(pre, None, None, len(centred)), pre * (pre > floor)

    @torch.no_grad()
    def _observe(self, kept: Kept, z: Float[Tensor, "..."]) -> None:
        """What the next adaptation goes by."""
        y = kept.pre + kept.of(self.bias)
        if kept.indices is None:
            fired = (z > 0).sum(0)
            self.peak = torch.maximum(self.peak, y.amax(0))
        else:
            fired = torch.bincount(kept.indices, minlength=self.cfg.d_sae)
            self.peak = self.peak.scatter_reduce(0, kept.indices, y, "amax")
        self.often += fired
        self.seen += kept.rows
        self.dead.count(fired, kept.rows)
        self.density = fired.sum() / (kept.rows * self.cfg.d_sae)

    @torch.no_grad()
    def adapt(self) -> None:
        """Move the biases by what was seen since the last time."""
        cfg = self.cfg
        p = self.often / self.seen
        n_groups = self.peak.new_zeros(cfg.n_groups)
        alive = n_groups.index_add(0, self.group, (self.peak > 0).to(self.peak.dtype))
        peaks = n_groups.index_add(0, self.group, self.peak)
        mean_peak = torch.where(alive > 0, peaks / alive.clamp_min(1), 1.0)[self.group]
        lower = (self.bias - cfg.gamma_minus * self.peak).clamp_min(-1)
        higher = (self.bias + cfg.gamma_plus * mean_peak).clamp_max(0)
        self.bias = torch.where(p > self.cap, lower, torch.where(p < cfg.eps, higher, self.bias))
        self.seen.zero_()
        self.often.zero_()
        self.peak.zero_()

    def after_step(self) -> None:
        super().after_step()
        # `step` still counts the steps before this one.
        if (self.step + 1) % max(1, round(self.cfg.adapt_every / self.cfg.batch_size)) == 0:
            self.adapt()

    def metrics(self) -> dict[str, float]:
        return {
            "l0": float(self.density) * self.cfg.d_sae,
            "bias": float(self.bias.mean()),
            **super().metrics(),
        }

    def export(self) -> SAE:
        """A scale goes into its latent, and its sign into the direction."""
        scale = torch.ones_like(self.bias) if self.scale is None else self.scale
        W_enc = self.W_dec.T * scale.abs()
        W_dec = self.W_dec * torch.where(scale < 0, -1.0, 1.0)[:, None]
        threshold = -self.bias * scale.abs()
        return SAE(W_enc, -self.b_dec @ W_enc, W_dec, self.b_dec, JumpReLU(threshold))


KIND = GroupBiasTrainer
