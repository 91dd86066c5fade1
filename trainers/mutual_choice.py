"""Mutual Choice SAE (Ayonrinde 2024, "Adaptive Sparse Allocation", arXiv 2411.02124): a budget of
entries for the whole batch, which go to the best pairs of a token and a latent.

    training and inference: as BatchTopK with k * batch = the budget
    loss = mean |x - x_hat|^2  +  aux_zipf

The choice is BatchTopK's, published at the same time. What is its own is aux_zipf, which revives
latents that fire too little, not the dead alone. A RECONSTRUCTION, as neither code nor the
expression is public:

    expected_i = what the rank of latent i gives it by a Zipf-like law (see `_zipf`), at most 1
    u_i        = max(0, 1 - density_i / expected_i), and 1 for the dead
    aux_zipf   = AuxK (see `_autoencoder`) with the latents of u_i > under_used for the dead ones,
                 and u_i * pre_i for their pre-activations

density_i is a moving average of how often latent i fires a token; the law has its exponent and
offset from a fit to the densities of all, renewed every few steps. Until the moving average has
seen 1 / density_rate batches, only the dead count as under-used. With u in {0, 1} this is AuxK,
which is what the paper says that it generalises.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit import kernels
from saekit.errors import ConfigError
from saekit.trainers._autoencoder import LATENTS
from saekit.trainers._base import Step
from saekit.trainers._fused import FusedMutualChoice, fused_step
from saekit.trainers._threshold import RunningMean
from saekit.trainers._zipf import law, water_fill
from saekit.trainers.batch_topk import BatchTopKConfig, BatchTopKTrainer

RANK_EVERY = 10
"""Steps between two times that ranks and the law are renewed."""


@dataclass(frozen=True, kw_only=True)
class MutualChoiceConfig(BatchTopKConfig):
    """Mutual Choice SAE: a budget of entries for each batch goes to its best pairs of token and
    latent; dead and under-used latents are revived (aux_zipf)."""

    budget: int | None = None
    """Entries kept of each batch of `batch_size` tokens, in all. Where given, it is used in place
    of k; where not, it is k * batch_size."""

    zipf: bool = True
    """Whether "auxk" revives under-used latents beside dead ones. Without it, this is BatchTopK."""

    under_used: float = 0.5
    """How far below its expected density a latent must be to be revived, as a share of it."""

    zipf_exponent: float | None = None
    """Of the law that says what density a rank is expected to have; fitted where not given."""

    zipf_offset: float | None = None
    """What the law adds to a rank before it is raised to the exponent; fitted where not given."""

    zipf_mass: float = 0.9
    """The law is fitted to the most frequent latents that have this share of all firings, so that
    it says what the rare others should have."""

    density_rate: float = 0.01
    """Rate of the moving average of how often each latent fires."""

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.d_sae * self.batch_size
        if self.budget is not None and not 0 < self.budget <= most:
            raise ConfigError(
                f"budget={self.budget} must lie in 1..d_sae * batch_size={most}: it is how many "
                "entries of a batch are kept"
            )
        if not 0 <= self.under_used < 1:
            raise ConfigError(
                f"under_used={self.under_used} must lie in 0..1 and below 1: a latent that never "
                "fires is 1 below what is expected"
            )
        if min(self.zipf_exponent or 0, self.zipf_offset or 0) < 0:
            raise ConfigError(
                f"zipf_exponent={self.zipf_exponent} and zipf_offset={self.zipf_offset} may not be "
                "negative: a latent of a lower rank would be expected to fire more"
            )
        if not 0 < self.zipf_mass <= 1:
            raise ConfigError(
                f"zipf_mass={self.zipf_mass} must lie above 0 and not above 1: it is a share of "
                "all firings"
            )
        if not 0 < self.density_rate <= 1:
            raise ConfigError(
                f"density_rate={self.density_rate} must lie above 0 and not above 1: it is the "
                "share of a moving average that each batch replaces"
            )

    @property
    def mean_l0(self) -> float:
        """Latents kept per token, on the mean."""
        return float(self.k) if self.budget is None else self.budget / self.batch_size


class MutualChoiceTrainer(BatchTopKTrainer):
    """See the module."""

    Config = MutualChoiceConfig
    LATENTS = {**LATENTS, "density.value": 0, "density.count": 0, "expected": 0}
    cfg: MutualChoiceConfig
    expected: Tensor
    """How often each latent should fire a token."""
    revived: Tensor
    """Share of the latents that aux_zipf took for dead or under-used in the last batch."""

    def __init__(self, cfg: MutualChoiceConfig, d_in: int) -> None:
        super().__init__(cfg, d_in)
        self.density = RunningMean(cfg.density_rate, (self.n_latents,))
        self.register_buffer("expected", torch.zeros(self.n_latents))
        self.register_buffer("revived", torch.zeros(()), persistent=False)

    def fused_step(self, optimiser: torch.optim.Optimizer, device: str) -> Step | None:
        # A kind made from this one chooses in a way of its own.
        if type(self) is not MutualChoiceTrainer:
            return None
        k = max(1, round(self.cfg.mean_l0))
        return fused_step(FusedMutualChoice, self, optimiser, k, device)

    def entries(self, rows: int) -> int:
        return round(self.cfg.mean_l0 * rows)

    def count(self, code: kernels.Code, rows: int) -> None:
        super().count(code, rows)
        self.density.update(self.densities(code[1], rows))

    def densities(self, indices: Int[Tensor, " kept"], rows: int) -> Float[Tensor, " d_sae"]:
        """Of the latents in a batch, from the indices of its code."""
        count = torch.bincount(indices, minlength=self.n_latents)
        return self.mesh.reduce(count, "data") / (rows * self.mesh.data)

    def revival(
        self, centred: Float[Tensor, "batch d_in"], error: Float[Tensor, "batch d_in"]
    ) -> dict[str, Float[Tensor, ""]]:
        cfg = self.cfg
        if not (cfg.zipf and cfg.revive == "auxk" and cfg.auxk_coef > 0):
            return super().revival(centred, error)
        self.renew()
        deficit = self.deficit()
        latents = (deficit > cfg.under_used).nonzero().flatten()
        self.revived = torch.tensor(self.over_latents(len(latents)) / cfg.d_sae)
        loss = self._auxk(centred.detach(), error.detach(), latents, deficit[latents])
        return {"aux_zipf": loss}

    @torch.no_grad()
    def deficit(self) -> Float[Tensor, " d_sae"]:
        """By what share of its expected density each latent falls short of it: u of the module."""
        short = (1 - self.density.value / self.expected).clamp_min(0)
        judged = self.density.count * self.cfg.density_rate >= 1
        return torch.where(self.dead.mask, 1.0, torch.where(judged, short, 0.0))

    def renew(self) -> None:
        """Find out anew how often each latent should fire, where it is time."""
        if self.step % RANK_EVERY == 0:
            every = self.by_law(self.mesh.whole(self.density.value), cap=1.0)
            self.expected.copy_(every[self.mesh.held(self.cfg.d_sae)])

    def by_law(self, density: Float[Tensor, " d_sae"], cap: float) -> Float[Tensor, " d_sae"]:
        """What the law gives each latent of the mean L0, none more than `cap`, from densities that
        say its rank."""
        cfg = self.cfg
        share = law(density, exponent=cfg.zipf_exponent, offset=cfg.zipf_offset, mass=cfg.zipf_mass)
        return water_fill(share, cfg.mean_l0, cap)

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), "revived": float(self.revived)}


KIND = MutualChoiceTrainer
