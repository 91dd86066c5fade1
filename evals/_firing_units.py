"""Whether latents vary with the input: the diagnostics of posterior collapse.

All of them are in the units that training saw, in which the prior of a variational SAE has variance
1. The definitions of active units and of (epsilon, delta)-collapse are reconstructions: they are
given as they are remembered from Burda et al. 2016 and from the literature on collapse, and were
not compared with a source. Axes: row, latent.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.errors import ConfigError
from saekit.results import Provenance
from saekit.sae import SAE, SparseCode

_CODES_AT_ONCE = 2**23
"""Elements of one dense `[row, latent]` tensor."""


def training_scale(origin: Provenance | None, mean_norm: float, d_in: int) -> float:
    """What training multiplied x by, as the run's config says, at this mean norm of x; as by
    default (so that the mean norm is sqrt(d_in)) for an SAE that does not say."""
    how = "sqrt_d" if origin is None else origin.config.get("input_scaling", "sqrt_d")
    wanted = {"sqrt_d": math.sqrt(d_in), "unit": 1.0, "none": mean_norm}
    if how not in wanted:
        raise ConfigError(
            f"the SAE was trained with input_scaling='{how}', which is none of {', '.join(wanted)}:"
            " leave the posterior out"
        )
    return wanted[how] / mean_norm if mean_norm > 0 else 1.0


def variance_kind(origin: Provenance | None) -> str | None:
    """The posterior variance that a variational SAE was trained with, "fixed" or "learned"; None
    for an SAE whose latents have no posterior."""
    config: dict[str, Any] = {} if origin is None else origin.config
    kind = config.get("variance") if origin is not None and origin.kind == "variational" else None
    return kind if kind in ("fixed", "learned") else None


@dataclass(frozen=True, eq=False)
class Spread:
    """Mean and scatter of each latent's value over rows, about its own mean."""

    n: int
    mean: Float[Tensor, " latent"]
    scatter: Float[Tensor, " latent"]
    """sum of (z - mean)^2."""

    @classmethod
    def of(cls, code: SparseCode, d_sae: int) -> "Spread":
        active = code.values != 0
        z, latent = code.values[active].double().cpu(), code.indices[active].cpu()
        n = code.values.shape[0]
        zero = torch.zeros(d_sae, dtype=torch.float64)
        mean = zero.index_add(0, latent, z) / max(n, 1)
        scatter = zero.index_add(0, latent, (z - mean[latent]).square())
        silent = n - latent.bincount(minlength=d_sae)
        return cls(n, mean, scatter + silent * mean.square())

    @classmethod
    def of_dense(cls, z: Float[Tensor, "row latent"]) -> "Spread":
        z = z.double()
        mean = z.sum(0) / max(len(z), 1)
        return cls(len(z), mean.cpu(), (z - mean).square().sum(0).cpu())

    def __add__(self, other: "Spread") -> "Spread":
        n = self.n + other.n
        # Chan, Golub and LeVeque 1983: the scatter of a union from the scatters of its parts.
        apart, share = other.mean - self.mean, other.n / max(n, 1)
        return Spread(
            n,
            self.mean + apart * share,
            self.scatter + other.scatter + apart.square() * (self.n * share),
        )

    @property
    def variance(self) -> Float[Tensor, " latent"]:
        """scatter / n."""
        return self.scatter / max(self.n, 1)


@dataclass(frozen=True, eq=False)
class Posterior:
    """The posterior means mu = relu(pre) of a variational SAE, before any selection, and
    KL_i = mu_i^2 / 2, the part of a latent's divergence from the prior that its mean makes. With
    the variance fixed at that of the prior there is no other part."""

    epsilon: float
    """Nats."""
    spread: Spread
    """Of mu."""
    kl: Float[Tensor, " latent"]
    """sum over rows of KL_i."""
    below: Float[Tensor, " latent"]
    """Rows with KL_i < epsilon."""

    @classmethod
    def of(
        cls, sae: SAE, x: Float[Tensor, "row d_in"], scale: float, epsilon: float
    ) -> tuple["Posterior", Float[Tensor, " row"]]:
        """The posteriors on some rows, and each row's KL summed over the latents."""
        spread = Spread.of_dense(x.new_zeros(0, sae.d_sae))
        kl, below = torch.zeros_like(spread.mean), torch.zeros_like(spread.mean)
        rows = []
        for some in x.split(max(1, _CODES_AT_ONCE // sae.d_sae)):
            mean = sae.pre(some).relu().double() * scale
            each = mean.square() / 2
            spread = spread + Spread.of_dense(mean)
            kl = kl + each.sum(0).cpu()
            below = below + (each < epsilon).double().sum(0).cpu()
            rows.append(each.sum(1))
        return cls(epsilon, spread, kl, below), torch.cat(rows)

    def __add__(self, other: "Posterior") -> "Posterior":
        return Posterior(
            self.epsilon, self.spread + other.spread, self.kl + other.kl, self.below + other.below
        )

    def collapsed_share(self, delta: float) -> float:
        """Share of the latents with KL_i < epsilon on at least 1 - delta of the rows."""
        n = self.spread.n
        return float((n - self.below <= delta * n * (1 + 1e-12)).double().mean())
