"""Feature Choice SAE (Ayonrinde 2024, "Adaptive Sparse Allocation", arXiv 2411.02124): each latent
chooses its tokens, as many as a Zipf-like law allows it, so that none can starve.

    pre = (x - b_dec) @ W_enc + b_enc
    training:   in column i of relu(pre), the m_i largest entries; sum_i m_i = k * batch
    m_i         = k * batch * (r_i + offset) ** -exponent / sum, at most cap_share * batch; what is
                  cut off goes to the others in proportion. r_i is the rank of latent i
    inference:  z_i = pre_i where pre_i > threshold_i, a moving average of the smallest entry that
                column i kept
    loss as in `mutual_choice`, with m_i / batch as the expected density

The first steps choose as Mutual Choice does, to see how often each latent is wanted; then ranks and
m_i stand, but for a new ranking now and then. Every batch gives each latent m_i rounded down or up,
so that all add up to k * batch, and so that a latent with an m_i of 0.3 has three batches in ten.

A RECONSTRUCTION beyond the law and the choice by columns: neither code nor the numbers are public.
Ours: the phases, the cap, how fractions are dealt with, that ranks are taken from what Mutual
Choice would give (under Feature Choice, densities are what the ranks made them), the thresholds.

What a token gets in training depends on the other tokens of its batch, more than in any other kind:
train on shuffled activations, with a batch in which the rarest latent of interest has an m_i of 4
or more (the log's `least_quota`). That no latent is dead in training holds nearly by construction;
whether one is at inference, evaluations tell.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit import kernels
from saekit.errors import ConfigError
from saekit.trainers._threshold import RunningMean, smallest_by_latent
from saekit.trainers._zipf import whole
from saekit.trainers.mutual_choice import MutualChoiceConfig, MutualChoiceTrainer

MEASURE_EVERY = 10
"""Steps between two batches of which it is measured, while latents choose, what Mutual Choice would
give them."""

GOLDEN = 0.6180339887498949
"""Multiples of it are spread over [0, 1) as evenly as can be, wherever they begin and end."""


@dataclass(frozen=True, kw_only=True)
class FeatureChoiceConfig(MutualChoiceConfig):
    """Feature Choice SAE: each latent chooses as many tokens of a batch as a Zipf-like law gives
    its rank."""

    mutual_share: float = 0.2
    """Share of the steps, at the beginning, that choose as Mutual Choice does, to find the latents'
    ranks."""

    rank_every: int = 2_000
    """Steps between two rankings after that."""

    cap_share: float = 0.5
    """Share of a batch's tokens that one latent may choose at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mutual_share < 1:
            raise ConfigError(
                f"mutual_share={self.mutual_share} must lie between 0 and 1: ranks are found in "
                "that share of the steps, and used in the others"
            )
        if self.rank_every < 1:
            raise ConfigError(f"rank_every={self.rank_every} must be at least 1 step")
        if not 0 < self.cap_share <= 1:
            raise ConfigError(
                f"cap_share={self.cap_share} must lie above 0 and not above 1: it is a share of a "
                "batch's tokens"
            )
        if self.mean_l0 > self.cap_share * self.d_sae:
            raise ConfigError(
                f"cap_share={self.cap_share} of each token's d_sae={self.d_sae} latents is less "
                f"than the {self.mean_l0:g} that are to be kept: raise it, or keep fewer"
            )


class FeatureChoiceTrainer(MutualChoiceTrainer):
    """See the module."""

    Config = FeatureChoiceConfig
    cfg: FeatureChoiceConfig
    expected: Tensor
    """Once latents choose, m_i / batch."""

    def __init__(self, cfg: FeatureChoiceConfig, d_in: int) -> None:
        super().__init__(cfg, d_in)
        self.demand = RunningMean(cfg.density_rate, (cfg.d_sae,))
        self.least = RunningMean(cfg.threshold_rate, (cfg.d_sae,))

    @property
    def first(self) -> int:
        """The step with which latents begin to choose."""
        return max(1, round(self.cfg.mutual_share * self.cfg.n_steps))

    @property
    def choosing(self) -> bool:
        return self.step >= self.first

    def choose(self, centred: Float[Tensor, "batch d_in"]) -> kernels.Code:
        if not self.choosing:
            code = super().choose(centred)
            self.demand.update(self.densities(code[1], len(centred)))
            return code
        since = self.step - self.first
        if since % self.cfg.rank_every == 0:
            self.expected.copy_(self.by_law(self.demand.value, self.cfg.cap_share))
        quotas = self.quotas(len(centred))

        def rule(pre: Tensor) -> tuple[Tensor, Tensor]:
            if since % MEASURE_EVERY == 0:
                wanted, _ = kernels.batch_topk(pre, self.entries(len(pre)))
                self.demand.update(self.densities(wanted, len(pre)))
            return kernels.column_topk(pre, quotas)

        code = kernels.encode(centred, self.W_enc, self.b_enc, rule)
        self.least.update(*smallest_by_latent(code[0], code[1], self.cfg.d_sae))
        return code

    def quotas(self, rows: int) -> Int[Tensor, " d_sae"]:
        """How many of so many rows each latent may choose at this step."""
        return whole(self.expected * rows, self.entries(rows), self.step * GOLDEN % 1).long()

    def renew(self) -> None:
        if not self.choosing:
            super().renew()

    def thresholds(self) -> Float[Tensor, " d_sae"]:
        # Mutual Choice's for what has chosen nothing yet.
        return torch.where(self.least.count > 0, self.least.value, super().thresholds())

    def metrics(self) -> dict[str, float]:
        least = float(self.expected.min()) * self.cfg.batch_size
        return {**super().metrics(), "least_quota": least}


KIND = FeatureChoiceTrainer
