"""TopK SAE (Gao et al. 2024, arXiv 2406.04093): k latents fire a token, so L0 needs no penalty.

    z = relu(topk((x - b_dec) @ W_enc + b_enc)),  x_hat = z @ W_dec + b_dec
    loss = mean |x - x_hat|^2  +  auxk_coef * V * mean |e - e_hat|^2 / Var(e)

e is the reconstruction error, held fixed, and e_hat the best that k_aux dead latents make of it. V
is the variance of x (summed over d_in, from a sample), so that auxk_coef means what it does in the
paper, whose reconstruction loss is normalised by V. Two departures: the auxiliary selection reads
signed pre-activations, without the ReLU, because a latent that is negative on every token would
else get no gradient and stay dead; and decoder rows are normalised after each step rather than
before.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit import kernels
from saekit.config import TrainConfig
from saekit.errors import ConfigError
from saekit.sae import SAE, TopK
from saekit.trainers._base import (
    Trainer,
    geometric_median,
    normalise_rows,
    project_out_rows,
    unit_rows,
)
from saekit.trainers._dead_latents import DeadLatents


@dataclass(frozen=True, kw_only=True)
class TopKConfig(TrainConfig):
    """TopK SAE: exactly k latents fire a token; dead ones are revived by an auxiliary loss
    (AuxK)."""

    k: int = 32
    """Latents kept per token."""

    auxk_coef: float = 1 / 32
    """Weight of the auxiliary loss that revives dead latents; 0 switches it off."""

    k_aux: int | None = None
    """Dead latents that the auxiliary loss uses per token; d_in / 2 where not given."""

    dead_after: int = 1_000_000
    """Tokens without firing after which a latent counts as dead."""

    b_dec_init: Literal["geometric_median", "mean", "zero"] = "geometric_median"
    """What the decoder bias starts as, over a sample of the activations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.k <= self.d_sae:
            raise ConfigError(
                f"k={self.k} must lie in 1..d_sae={self.d_sae}: it is how many latents stay active"
            )
        if self.k_aux is not None and self.k_aux < 1:
            raise ConfigError(
                f"k_aux={self.k_aux} must be at least 1; auxk_coef=0 switches AuxK off"
            )
        if self.auxk_coef < 0:
            raise ConfigError(f"auxk_coef={self.auxk_coef} may not be negative: it weighs a loss")
        if self.dead_after < 1:
            raise ConfigError(f"dead_after={self.dead_after} must be at least 1 token")


class TopKTrainer(Trainer):
    """See the module."""

    Config = TopKConfig
    cfg: TopKConfig
    variance: Tensor

    def __init__(self, cfg: TopKConfig, d_in: int) -> None:
        super().__init__(cfg, d_in)
        rows = unit_rows(cfg.d_sae, d_in)
        self.W_dec = nn.Parameter(rows)
        # Transposed in memory: a latent's encoder weights lie together, as its gradient is made.
        self.W_enc = nn.Parameter(rows.clone().T)
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("variance", torch.ones(()))
        self.dead = DeadLatents(cfg.d_sae, cfg.dead_after)
        self._l0 = torch.zeros(())

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "row d_in"]) -> None:
        self.variance.copy_(_variance(sample))
        match self.cfg.b_dec_init:
            case "geometric_median":
                self.b_dec.copy_(geometric_median(sample))
            case "mean":
                self.b_dec.copy_(sample.mean(0))
            case "zero":
                self.b_dec.zero_()

    def losses(self, x: Float[Tensor, "batch d_in"]) -> dict[str, Float[Tensor, ""]]:
        centred = x - self.b_dec
        values, indices = kernels.topk_encode(centred, self.W_enc, self.b_enc, self.cfg.k)
        error = centred - kernels.sparse_decode(values, indices, self.W_dec)
        self.dead.saw(values, indices)
        self._l0 = (values.detach() > 0).sum(1).float().mean()
        losses = {"mse": error.square().sum(1).mean()}
        if self.cfg.auxk_coef > 0:
            losses["auxk"] = self._auxk(centred.detach(), error.detach())
        return losses

    def _auxk(
        self, centred: Float[Tensor, "batch d_in"], error: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, ""]:
        dead = self.dead.mask.nonzero().flatten()
        if len(dead) == 0:
            return error.new_zeros(())
        k_aux = min(self.cfg.k_aux or self.d_in // 2 or 1, len(dead))
        pre = centred @ self.W_enc[:, dead] + self.b_enc[dead]
        values, indices = pre.topk(k_aux, dim=1, sorted=False)
        missed = error - kernels.sparse_decode(values, indices, self.W_dec[dead])
        share = missed.square().sum(1).mean() / _variance(error)
        return self.cfg.auxk_coef * self.variance * share

    def before_step(self) -> None:
        assert self.W_dec.grad is not None
        project_out_rows(self.W_dec.grad, self.W_dec)

    def after_step(self) -> None:
        normalise_rows(self.W_dec)

    def metrics(self) -> dict[str, float]:
        return {"l0": float(self._l0), "dead": self.dead.share}

    def export(self) -> SAE:
        b_enc = self.b_enc - self.b_dec @ self.W_enc
        return SAE(self.W_enc, b_enc, self.W_dec, self.b_dec, TopK(self.cfg.k))


def _variance(x: Float[Tensor, "row d_in"]) -> Float[Tensor, ""]:
    """Variance about the mean, summed over d_in. A tiny floor keeps a constant x from dividing by
    0."""
    return (x - x.mean(0)).square().sum(1).mean().clamp_min(1e-12)


KIND = TopKTrainer
