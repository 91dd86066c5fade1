"""What an SAE is judged by: sums over rows that can be taken in batches and joined. No model, no
files.

Each accumulator is a value: `X.of(batch)` takes the sums of some rows, `a + b` joins those of two
disjoint sets of rows. Sums are in fp64 and variance is kept about the running mean, so a number
does not depend on how the rows were cut into batches, and a large mean costs no digits. A number
that is not finite is refused where it comes in, and a ratio without a meaning raises `Undefined`:
no NaN leaves this module.

Axes: row (one token's activation), d (its width), k, d_sae (latents), token (scored positions),
vocab.
"""

from dataclasses import dataclass
from math import isfinite

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.errors import SaekitError, Undefined
from saekit.sae import SparseCode

DENSE = 0.1
"""A latent that fires on more than this share of the rows counts as dense."""

MIN_CE_RISE = 1e-6
"""Nats that an ablation must cost before the share of it that an SAE wins back means anything."""


def not_finite(x: Float[Tensor, "row d"]) -> SaekitError:
    """For rows x of which, or of whose reconstructions, some number is not finite."""
    which = "the activations" if not x.isfinite().all() else "the reconstructions"
    return SaekitError(
        f"{which} contain NaN or infinity, so no metric over them would mean anything; "
        "check the cache with `saekit verify`, then the SAE's weights"
    )


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """How near reconstructions x_hat come to activations x; `e = x - x_hat`."""

    n: int
    mean: Float[Tensor, " d"]
    """mu, the mean of x over the rows."""
    scatter: float
    """sum of |x - mu|^2."""
    error: float
    """sum of |e|^2."""
    hat_square: float
    """sum of |x_hat|^2."""
    dot: float
    """sum of x . x_hat."""
    n_nonzero: int
    """Rows with x != 0: only those have a direction and a length to compare with."""
    cosine_sum: float
    """sum over the nonzero rows of x . x_hat / (|x| |x_hat|), 0 where x_hat = 0."""
    ratio_sum: float
    """sum over the nonzero rows of |x_hat| / |x|."""

    @classmethod
    def of(cls, x: Float[Tensor, "row d"], x_hat: Float[Tensor, "row d"]) -> "Reconstruction":
        x, x_hat = x.double(), x_hat.double()
        n = x.shape[0]
        mean = x.mean(0) if n else x.new_zeros(x.shape[1])
        length, hat_length = x.norm(dim=1), x_hat.norm(dim=1)
        dots = (x * x_hat).sum(1)
        nonzero = length > 0
        ones = torch.ones_like(length)
        product = torch.where(nonzero & (hat_length > 0), length * hat_length, ones)
        sums = torch.stack(
            [
                (x - mean).square().sum(),
                (x - x_hat).square().sum(),
                hat_length.square().sum(),
                dots.sum(),
                nonzero.sum().double(),
                (dots / product * nonzero).sum(),
                (hat_length / torch.where(nonzero, length, ones) * nonzero).sum(),
            ]
        ).tolist()
        if not all(map(isfinite, sums)):
            raise not_finite(x)
        scatter, error, hat_square, dot, n_nonzero, cosines, ratios = sums
        return cls(n, mean.cpu(), scatter, error, hat_square, dot, int(n_nonzero), cosines, ratios)

    def __add__(self, other: "Reconstruction") -> "Reconstruction":
        n = self.n + other.n
        # Chan, Golub and LeVeque 1983: the scatter of a union from the scatters of its parts.
        apart = other.mean - self.mean
        share = other.n / max(n, 1)
        return Reconstruction(
            n,
            self.mean + apart * share,
            self.scatter + other.scatter + float(apart.square().sum()) * self.n * share,
            self.error + other.error,
            self.hat_square + other.hat_square,
            self.dot + other.dot,
            self.n_nonzero + other.n_nonzero,
            self.cosine_sum + other.cosine_sum,
            self.ratio_sum + other.ratio_sum,
        )

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained, sum|e|^2 / sum|x - mu|^2 over all rows and dimensions
        at once: 0 is perfect, 1 is what the mean would score."""
        _require_rows(self.n, "rows")
        # What fp64 rounding leaves of equal rows lies some 30 orders below their squared length.
        if self.scatter <= 1e-24 * self.n * float(self.mean.square().sum()):
            raise Undefined(
                f"the {self.n} activations are all the same, so there is no variance to explain; "
                "evaluate on more rows, or on another hook"
            )
        return self.error / self.scatter

    @property
    def ev(self) -> float:
        """Explained variance about the mean, 1 - fvu."""
        return 1 - self.fvu

    @property
    def mse(self) -> float:
        """Mean over rows of |e|^2, which is summed over d: it grows with the width."""
        _require_rows(self.n, "rows")
        return self.error / self.n

    @property
    def cosine(self) -> float:
        """Mean over nonzero rows of the uncentred cosine between x and x_hat."""
        _require_rows(self.n_nonzero, "rows other than zero")
        return self.cosine_sum / self.n_nonzero

    @property
    def l2_ratio(self) -> float:
        """Mean over nonzero rows of |x_hat| / |x|."""
        _require_rows(self.n_nonzero, "rows other than zero")
        return self.ratio_sum / self.n_nonzero

    @property
    def relative_reconstruction_bias(self) -> float:
        """sum|x_hat|^2 / sum(x . x_hat) (Rajamanoharan et al. 2024, eq. 10): below 1 is shrinkage,
        1 is none. Its inverse is the one gain on x_hat that minimises the error."""
        _require_rows(self.n, "rows")
        if self.dot <= 0:
            raise Undefined(
                f"the relative reconstruction bias divides by sum(x . x_hat) = {self.dot:.3g}, "
                "which is not positive: the reconstructions do not point where the activations do"
            )
        return self.hat_square / self.dot


@dataclass(frozen=True, eq=False)
class Firing:
    """Which latents fire how often, and how many a row. A latent fires where its value is not 0."""

    n: int
    count: Int[Tensor, " d_sae"]
    """Rows on which each latent fires."""
    rows_with: Int[Tensor, " d_sae_plus_1"]
    """Rows on which exactly 0, 1, 2, ... d_sae latents fire."""

    @classmethod
    def of(cls, code: SparseCode, d_sae: int) -> "Firing":
        """Counts of a batch, in which each row names a latent at most once."""
        if not isfinite(float(code.values.sum(dtype=torch.float64))):
            raise SaekitError(
                "the SAE's latents contain NaN or infinity, so they cannot be counted; "
                "check the cache with `saekit verify`, then the SAE's weights"
            )
        active = code.values != 0
        count = code.indices[active].bincount(minlength=d_sae)
        rows_with = active.sum(1).bincount(minlength=d_sae + 1)
        return cls(code.values.shape[0], count.cpu(), rows_with.cpu())

    def __add__(self, other: "Firing") -> "Firing":
        return Firing(self.n + other.n, self.count + other.count, self.rows_with + other.rows_with)

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of the rows on which each latent fires."""
        _require_rows(self.n, "rows")
        return self.count.double() / self.n

    @property
    def l0_mean(self) -> float:
        """Mean over rows of the number of latents that fire."""
        _require_rows(self.n, "rows")
        return int(self.count.sum()) / self.n

    def l0_quantile(self, q: float) -> float:
        """The smallest number of latents that a share `q` of the rows does not exceed (exact)."""
        _require_rows(self.n, "rows")
        return float((self.rows_with.cumsum(0) >= q * self.n).int().argmax())

    @property
    def dead_share(self) -> float:
        """Share of the latents that fire on none of the n rows; it falls as n grows."""
        return float((self.density == 0).double().mean())

    @property
    def dense_share(self) -> float:
        """Share of the latents that fire on more than a tenth of the rows."""
        return float((self.density > DENSE).double().mean())


@dataclass(frozen=True)
class Mean:
    """A mean over scored tokens, as sum and count."""

    total: float = 0.0
    n: int = 0

    @classmethod
    def of(cls, values: Float[Tensor, " token"]) -> "Mean":
        total = float(values.double().sum())
        if not isfinite(total):
            raise SaekitError(
                "a token's loss is NaN or infinite: the model's logits overflow on these tokens; "
                "evaluate in a wider dtype"
            )
        return cls(total, values.numel())

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.n + other.n)

    @property
    def value(self) -> float:
        _require_rows(self.n, "tokens")
        return self.total / self.n


def cross_entropy(
    log_p: Float[Tensor, "token vocab"], target: Int[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """-log p(target), from log-probabilities."""
    return -log_p.gather(1, target[:, None])[:, 0]


def kl_divergence(
    log_p: Float[Tensor, "token vocab"], log_q: Float[Tensor, "token vocab"]
) -> Float[Tensor, " token"]:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), from log-probabilities, so that no tiny
    probability is rounded to 0 before its logarithm is taken."""
    return (log_p.exp() * (log_p - log_q)).sum(1)


def ce_recovered(clean: float, sae: float, ablated: float) -> float:
    """(ce_ablated - ce_sae) / (ce_ablated - ce_clean): 1 is the untouched model, 0 the ablated one.

    Takes means over all tokens: a ratio of means, not a mean of ratios. Raises Undefined where the
    ablation does not hurt, for then any SAE would score anything.
    """
    rise = ablated - clean
    if rise <= MIN_CE_RISE:
        raise Undefined(
            f"the ablation changes the loss by {rise:.3g} nats, not by more than {MIN_CE_RISE:g}: "
            "there is nothing to win back, so the share won back has no meaning"
        )
    return (ablated - sae) / rise


def _require_rows(n: int, what: str) -> None:
    if n == 0:
        raise SaekitError(
            f"there are no {what} to take a metric over; choose another split, exclude fewer kinds "
            "of token, or harvest more"
        )
