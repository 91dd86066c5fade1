"""What the kinds with a sparsity penalty have in common: its coefficient over the course of a run,
and work on the latents above a floor alone.

**The coefficient** is either fixed, and rises to that from 0 over the first steps; or it is
searched for while training, so that L0 comes to a target:

    wanted = the target, before which, over a share of the steps, L0 may come down to it
    e = log(L0 / wanted), at most 1 either way
    coefficient = exp(I + P e),  I <- I + K e

L0 is that of the very batch whose loss is weighed. It is led to its target rather than pulled,
because a coefficient that finds the many latents which fire at first too many grows until hardly
any does, and those that died on the way do not come back when it falls again.
"""

import logging
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saekit import kernels
from saekit.errors import ConfigError
from saekit.trainers._autoencoder import Autoencoder, AutoencoderConfig
from saekit.trainers._threshold import RunningMean

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PenalisedConfig(AutoencoderConfig):
    """What every kind with a sparsity penalty is trained with."""

    target_l0: float | None = None
    """Latents that shall fire a token, on the mean. The penalty's coefficient is then searched for
    while training, and the fixed one is not used."""

    target_by: float = 0.5
    """Share of the steps after which L0 shall have come down to target_l0."""

    sparsity_warmup: float = 0.05
    """Share of the steps over which a fixed coefficient rises from 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_l0 is not None and not 0 < self.target_l0 <= self.d_sae:
            raise ConfigError(
                f"target_l0={self.target_l0:g} must lie above 0 and not above d_sae={self.d_sae}: "
                "it is how many latents shall fire a token"
            )
        if not 0 < self.target_by <= 1:
            raise ConfigError(
                f"target_by={self.target_by:g} must lie above 0 and not above 1: it is a share of "
                "the steps"
            )
        if not 0 <= self.sparsity_warmup <= 1:
            raise ConfigError(
                f"sparsity_warmup={self.sparsity_warmup:g} must lie in 0..1: it is a share of the "
                "steps"
            )


P = 2.0
"""How strongly the coefficient answers to what L0 is now; much more, and L0 swings."""
K, FASTEST = 40.0, 0.05
"""How fast it learns: by e^40 over a run with L0 off by a factor of e throughout, but by no more
than 5 % a step, which is what the weights can follow."""
START = 0.1
"""Share of the guess that the search begins at: too little costs a few steps, too much kills."""
OFF = 0.1
"""Share of the target by which L0 may miss it in silence."""


class Coefficient(nn.Module):
    """The coefficient of a penalty; see the module."""

    learnt: Tensor
    """I, the logarithm that the search has come to."""
    highest: Tensor
    """The highest L0 of any batch so far."""
    value: Tensor
    """The coefficient of the last batch."""

    def __init__(self, cfg: PenalisedConfig, name: str) -> None:
        super().__init__()
        self.cfg, self.name = cfg, name
        self.l0 = RunningMean(min(1.0, 50 / cfg.n_steps))
        self.register_buffer("learnt", torch.zeros(()))
        self.register_buffer("highest", torch.zeros(()))
        self.register_buffer("value", torch.zeros(()), persistent=False)

    def begin(self, guess: float) -> None:
        """Where a search starts."""
        self.learnt.fill_(math.log(START * guess))

    @torch.no_grad()
    def weigh(self, l0: Float[Tensor, ""], step: int) -> Float[Tensor, ""]:
        """The coefficient for a batch with this L0, the next after `step` steps."""
        target = self.cfg.target_l0
        if target is None:
            rise = max(1, round(self.cfg.sparsity_warmup * self.cfg.n_steps))
            fixed: float = getattr(self.cfg, self.name)
            self.value = torch.full_like(self.value, fixed * min(1.0, (step + 1) / rise))
        else:
            self.value = self._search(l0, target, step)
        return self.value

    def _search(self, l0: Float[Tensor, ""], target: float, step: int) -> Float[Tensor, ""]:
        n_steps = self.cfg.n_steps
        self.highest.copy_(torch.maximum(self.highest, l0))
        left = max(0.0, 1 - step / (self.cfg.target_by * n_steps)) ** 2
        # Down a line in the logarithm, ever more slowly.
        wanted = math.log(target) + left * (self.highest / target).clamp_min(1).log()
        e = (l0.clamp_min(1e-6).log() - wanted).clamp(-1, 1)
        self.learnt += min(FASTEST, K / n_steps) * e
        self.l0.update(l0, torch.ones_like(l0, dtype=torch.bool))
        if step == n_steps - 1:
            self._tell_if_missed(float(self.l0.value), target)
        return (self.learnt + P * e).exp()

    def _tell_if_missed(self, reached: float, target: float) -> None:
        if abs(reached / target - 1) > OFF:
            log.warning(
                "L0 came to %.4g, not within %.0f %% of target_l0=%g (%s was %.3g at last): give "
                "the search more steps (--n-tokens), or fix the coefficient with --%s",
                reached,
                100 * OFF,
                target,
                self.name,
                float(self.learnt.exp()),
                self.name.replace("_", "-"),
            )


@dataclass(frozen=True, eq=False)
class Kept:
    """Pre-activations of a batch: those above a floor alone, row after row, or all of them.

    Which of the two makes no difference to the losses, only to the time they take.
    """

    pre: Float[Tensor, "..."]
    """[kept], where one below 0 counts as 0; or [batch, d_sae]."""
    indices: Int[Tensor, " kept"] | None
    offsets: Int[Tensor, " offsets"] | None
    rows: int

    def of(self, parameter: Float[Tensor, " d_sae"]) -> Float[Tensor, "..."]:
        """What each entry's latent has of a parameter."""
        return parameter if self.indices is None else parameter.index_select(0, self.indices)

    def decode(
        self, values: Float[Tensor, "..."], W_dec: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, "batch d_in"]:
        if self.indices is None:
            return values @ W_dec
        return kernels.sparse_decode(values, self.indices, W_dec, self.offsets)


def above(exceeds: Bool[Tensor, "batch d_sae"]) -> tuple[Tensor, Tensor]:
    """Indices and offsets of what is marked."""
    flat = exceeds.flatten().nonzero().flatten()
    d_sae = exceeds.shape[1]
    return flat % d_sae, kernels.row_offsets(flat // d_sae, len(exceeds))


DENSE_ABOVE = 0.08
"""Share of the entries above the floor from which on it takes longer to pick them out than to work
on all; the share at which the two took equally long lay between 0.09 and 0.17, by shape."""


class Penalised(Autoencoder):
    """An autoencoder with a sparsity penalty. A kind gives `losses`, `export` and `guess`."""

    COEFFICIENT: str
    """The field of the config that fixes the penalty's coefficient."""
    cfg: PenalisedConfig
    density: Tensor
    """Share of the entries of the last batch that lay above the floor."""

    def __init__(self, cfg: PenalisedConfig, d_in: int) -> None:
        super().__init__(cfg, d_in)
        self.coefficient = Coefficient(cfg, self.COEFFICIENT)
        self.register_buffer("density", torch.ones(()))

    def encoder_norm(self) -> float:
        # With rows of norm 1, columns of norm 1 would begin with an x_hat that is too long by a
        # factor of d_sae / d_in, and learning with getting rid of that.
        return min(1.0, self.d_in / self.cfg.d_sae)

    def guess(self, target_l0: float) -> float:
        """About the coefficient that leads to an L0, for a search to begin near."""
        raise NotImplementedError

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "row d_in"]) -> None:
        super().initialise(sample)
        if self.cfg.target_l0 is not None:
            self.coefficient.begin(self.guess(self.cfg.target_l0))

    def keep(
        self,
        x: Float[Tensor, "batch d_in"],
        floor: float | Float[Tensor, " d_sae"] = 0.0,
    ) -> Kept:
        """Pre-activations above the floor, or of all latents where the last batch had many."""
        if self.density < DENSE_ABOVE:
            code = kernels.encode(x, self.W_enc, self.b_enc, lambda pre: above(pre > floor))
            kept = Kept(*code, rows=len(x))
            found = kept.pre.new_tensor(len(kept.pre))
        else:
            pre = torch.addmm(self.b_enc, x, self.W_enc).to(self.W_enc.dtype)
            kept = Kept(pre, None, None, rows=len(x))
            found = (pre.detach() > floor).sum()
        self.density.copy_(self.per_row(found, len(x) * self.cfg.d_sae))
        return kept

    def saw(self, kept: Kept, z: Float[Tensor, "..."]) -> None:
        """Count the latents of a batch."""
        if kept.indices is None:
            self.dead.saw_dense(z)
        else:
            self.dead.saw(z, kept.indices, kept.rows)
        self.l0 = self.per_row((z.detach() != 0).sum(), kept.rows)

    def penalty(self, size: Float[Tensor, "..."], kept: Kept) -> Float[Tensor, ""]:
        """The weighed penalty on entries of this size, for the batch that was counted last."""
        total = self.mesh.add_up(size.sum())
        return self.coefficient.weigh(self.l0, self.step) * total / kept.rows

    def metrics(self) -> dict[str, float]:
        return {self.COEFFICIENT: float(self.coefficient.value), **super().metrics()}


def check_l1(coefficient: float) -> None:
    if coefficient < 0:
        raise ConfigError(f"l1_coef={coefficient:g} may not be negative: it weighs a penalty")


class L1Penalised(Penalised):
    """One whose penalty is the sum of what the latents, or their gates, are."""

    COEFFICIENT = "l1_coef"

    def guess(self, target_l0: float) -> float:
        # A latent of this size on each token would make up all of the variance.
        return float((self.variance / target_l0).sqrt())
