"""An SAE's error, taken apart: `x = x_hat + linear + nonlinear`, with `error = x - x_hat`,
`linear = x W + b` its best linear prediction from x, and `nonlinear` the rest (Engels et al. 2024,
arXiv 2410.14670, sec. 3).

No metrics here. Axes: row, d (width of the activations), norm (the vectors of `NORMS`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.activations_cache.store import ActivationCache
from saekit.errors import SaekitError
from saekit.evals._linear import Affine, Moments
from saekit.progress import bar
from saekit.sae import SAE

NORMS = (
    "error",
    "rescaled_error",
    "x",
    "x_hat",
    "linear",
    "nonlinear",
    "x_hat_plus_nonlinear",
)
"""The vectors whose squared length is predicted from x. `x_hat + nonlinear` is `x - linear`."""

_RUN = 1024
"""Rows that are fitted on lie in runs of so many, as rows of one shard are quick to read."""


@dataclass(frozen=True, eq=False)
class Seen:
    """Rows, and what an SAE makes of them."""

    x: Float[Tensor, "row d"]
    x_hat: Float[Tensor, "row d"]
    l0: Float[Tensor, " row"]
    """Latents != 0."""

    @property
    def error(self) -> Float[Tensor, "row d"]:
        return self.x - self.x_hat


@dataclass(frozen=True, eq=False)
class Subject:
    """An SAE, at its hook of the cache."""

    name: str
    sae: SAE
    hook: str

    def see(self, cache: ActivationCache, index: Int[Tensor, " row"]) -> Seen:
        """The given rows. Raises SaekitError where a reconstruction is not finite."""
        x = cache.rows(self.hook, index).to(self.sae.device)
        code = self.sae.encode_sparse(x)
        x_hat = self.sae.decode(code, x)
        if not x_hat.isfinite().all():
            raise SaekitError(
                f"reconstructions at '{self.hook}' contain NaN or infinity, so nothing can be "
                "fitted to their errors; check the cache with `saekit verify`, then the SAE's "
                "weights"
            )
        return Seen(x.double(), x_hat.double(), (code.values != 0).sum(1).double())


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a cache, to be gone through again and again."""

    cache: ActivationCache
    index: Int[Tensor, " row"]
    batch_size: int
    device: str = "cpu"
    progress: bool = False

    def seen(self, what: str, *subjects: Subject) -> Iterator[tuple[Tensor, tuple[Seen, ...]]]:
        """Batches in stored order: which rows, and what each of the SAEs makes of them."""
        with bar(what, len(self.index), shown=self.progress) as shown:
            for some in torch.split(self.index, self.batch_size):
                yield some, tuple(subject.see(self.cache, some) for subject in subjects)
                shown.advance(len(some))

    def documents(self, index: Int[Tensor, " some"] | None = None) -> Int[Tensor, " some"]:
        """Of some of the rows, or of all."""
        return self._column("document", self.index if index is None else index)

    def tokens(self, index: Int[Tensor, " some"] | None = None) -> Int[Tensor, " some"]:
        """Ids of some of the rows, or of all."""
        return self._column("token", self.index if index is None else index)

    def _column(self, name: str, index: Int[Tensor, " some"]) -> Int[Tensor, " some"]:
        return self.cache.take(name, index).long().to(self.device)

    def first(self, n: int) -> "Rows":
        return replace(self, index=self.index[:n])

    def spread(self, n: int) -> "Rows":
        """At most n of them, in runs that lie evenly over all."""
        if len(self.index) <= n:
            return self
        if n < _RUN:
            return self.first(n)
        runs = torch.split(self.index, _RUN)[: len(self.index) // _RUN]
        chosen = torch.linspace(0, len(runs) - 1, n // _RUN, dtype=torch.float64).round().int()
        return replace(self, index=torch.cat([runs[i] for i in chosen.tolist()]))


@dataclass(frozen=True, eq=False)
class Split:
    """How one SAE's error is split, as fitted on training rows."""

    gain: float | None
    """gamma* = sum x . x_hat / sum |x_hat|^2, the one factor on x_hat that leaves the least error;
    None where x_hat is always 0."""
    error: Affine
    """x to its best prediction of x - x_hat."""
    rescaled: Affine
    """x to its best prediction of x - gamma* x_hat."""

    @classmethod
    def fit(
        cls, moments: Moments, *, intercept: bool, ridge: float, rescale: bool = True
    ) -> "Split":
        """From `reconstruction_moments`."""
        d = len(moments.x_mean)
        x_mean, hat_mean, hat_square = (
            moments.x_mean,
            moments.y_mean[:d],
            float(moments.y_mean[d]) * moments.n,
        )
        dot = float(moments.xy.diagonal().sum() + moments.n * (x_mean @ hat_mean))
        gain = dot / hat_square if hat_square > 0 else None
        factors = (1.0, 1.0 if gain is None else gain) if rescale else (1.0,)
        # x - g x_hat is linear in x and x_hat, so its moments are known without another look.
        fitted = moments.of_targets(
            torch.cat([x_mean - g * hat_mean for g in factors]),
            torch.cat([moments.xx - g * moments.xy[:, :d] for g in factors], 1),
        ).solve(intercept=intercept, ridge=ridge)
        return cls(gain, fitted[:d], fitted[-d:])

    def parts(self, seen: Seen) -> "Parts":
        gain = 1.0 if self.gain is None else self.gain
        return Parts(seen, self.error(seen.x), seen.x - gain * seen.x_hat, self.rescaled(seen.x))


@dataclass(frozen=True, eq=False)
class Parts:
    """Rows and their errors, taken apart."""

    seen: Seen
    linear: Float[Tensor, "row d"]
    rescaled_error: Float[Tensor, "row d"]
    rescaled_linear: Float[Tensor, "row d"]

    @property
    def nonlinear(self) -> Float[Tensor, "row d"]:
        return self.seen.error - self.linear

    @property
    def squared_norms(self) -> Float[Tensor, "row norm"]:
        """|.|^2 of the vectors of `NORMS`, in that order."""
        x, x_hat = self.seen.x, self.seen.x_hat
        vectors = (
            self.seen.error,
            self.rescaled_error,
            x,
            x_hat,
            self.linear,
            self.nonlinear,
            x - self.linear,
        )
        return torch.stack([vector.square().sum(1) for vector in vectors], 1)

    @property
    def unexplained(self) -> Float[Tensor, "row 5"]:
        """|.|^2 of what is left of x by x_hat, by x_hat + linear, by x_hat + nonlinear, by
        gamma* x_hat, and by gamma* x_hat + its linear part."""
        left = (
            self.seen.error,
            self.nonlinear,
            self.linear,
            self.rescaled_error,
            self.rescaled_error - self.rescaled_linear,
        )
        return torch.stack([vector.square().sum(1) for vector in left], 1)


def reconstruction_moments(seen: Seen) -> Moments:
    """Of the targets x_hat and, last, |x_hat|^2."""
    x_hat = seen.x_hat
    return Moments.of(seen.x, torch.cat([x_hat, x_hat.square().sum(1, keepdim=True)], 1))


def cross_moments(other: Seen, seen: Seen) -> Moments:
    """Of x and x_hat, seen from another SAE's reconstruction."""
    return Moments.of(other.x_hat, torch.cat([seen.x, seen.x_hat], 1))


def predict_parts(cross: Moments, split: Split, *, intercept: bool, ridge: float) -> Affine:
    """From another SAE's reconstruction to error, linear and nonlinear part, side by side.

    `cross` are `cross_moments`. The linear part is linear in x, so its moments follow from x's.
    """
    d = split.error.weight.shape[1]
    x_mean, hat_mean = cross.y_mean[:d], cross.y_mean[d:]
    x, x_hat = cross.xy[:, :d], cross.xy[:, d:]
    error_mean, error = x_mean - hat_mean, x - x_hat
    linear_mean, linear = split.error(x_mean[None])[0], x @ split.error.weight
    return cross.of_targets(
        torch.cat([error_mean, linear_mean, error_mean - linear_mean]),
        torch.cat([error, linear, error - linear], 1),
    ).solve(intercept=intercept, ridge=ridge)
