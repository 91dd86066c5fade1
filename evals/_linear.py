"""Linear regression over more rows than fit in memory: streaming normal equations in fp64.

`Moments.of(x, y)` takes the sums of some rows, `a + b` joins those of two disjoint sets, `solve`
gives the least squares map. The sums are kept about the running means, so one pass serves fits with
an intercept and without, no large mean costs digits, and no result depends on how the rows were cut
into batches. Memory is that of the sums, p^2 + p q numbers.

Axes: row, p (predictors), q (targets).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.errors import SaekitError

ROUNDING = 1e-24
"""Scatter, as a share of the summed squares, that fp64 leaves of numbers that are all the same."""


@dataclass(frozen=True, eq=False)
class Affine:
    """`y_hat = x @ weight + bias`."""

    weight: Float[Tensor, "p q"]
    bias: Float[Tensor, " q"]
    y_mean: Float[Tensor, " q"]
    """Mean of y over the rows of the fit."""
    rank: int
    """Directions of x that the fit used: below p where x does not vary in all of them."""

    def __call__(self, x: Float[Tensor, "row p"]) -> Float[Tensor, "row q"]:
        return x.double() @ self.weight + self.bias

    def __getitem__(self, columns: slice) -> "Affine":
        """The map to some of the targets."""
        return Affine(self.weight[:, columns], self.bias[columns], self.y_mean[columns], self.rank)


@dataclass(frozen=True, eq=False)
class Moments:
    """What a linear fit of targets y to predictors x needs to know of the rows."""

    n: int
    x_mean: Float[Tensor, " p"]
    y_mean: Float[Tensor, " q"]
    xx: Float[Tensor, "p p"]
    """sum of (x - x_mean)(x - x_mean)^T."""
    xy: Float[Tensor, "p q"]
    """sum of (x - x_mean)(y - y_mean)^T."""

    @classmethod
    def of(cls, x: Float[Tensor, "row p"], y: Float[Tensor, "row q"] | None = None) -> "Moments":
        """Without targets, where mean and scatter of x are all that is wanted."""
        x = x.double()
        y = x[:, :0] if y is None else y.double()
        n = max(len(x), 1)
        x_mean, y_mean = x.sum(0) / n, y.sum(0) / n
        centred = x - x_mean
        return cls(len(x), x_mean, y_mean, centred.T @ centred, centred.T @ (y - y_mean))

    def __add__(self, other: "Moments") -> "Moments":
        n = self.n + other.n
        share = other.n / max(n, 1)
        # Chan, Golub and LeVeque 1983: the scatter of a union from the scatters of its parts.
        dx, dy = other.x_mean - self.x_mean, other.y_mean - self.y_mean
        return Moments(
            n,
            self.x_mean + share * dx,
            self.y_mean + share * dy,
            (self.xx + other.xx).addr_(dx, dx, alpha=self.n * share),
            (self.xy + other.xy).addr_(dx, dy, alpha=self.n * share),
        )

    def of_targets(self, y_mean: Float[Tensor, " r"], xy: Float[Tensor, "p r"]) -> "Moments":
        """The same rows with other targets, whose moments are linear in those that are known."""
        return replace(self, y_mean=y_mean, xy=xy)

    def __getitem__(self, predictors: list[int]) -> "Moments":
        """With some of the predictors alone."""
        some = torch.tensor(predictors, device=self.xx.device)
        return replace(self, x_mean=self.x_mean[some], xx=self.xx[some][:, some], xy=self.xy[some])

    def solve(self, *, intercept: bool, ridge: float = 0.0) -> Affine:
        """argmin sum|y - x W - b|^2 (+ ridge), with b = 0 where there is no intercept.

        `ridge` adds that share of each predictor's own summed square to it, so it means the same
        for dimensions of any scale. Directions in which x does not vary, up to fp64 rounding, get
        weight 0. Raises SaekitError where there are not more rows than weights and no ridge.
        """
        p = len(self.x_mean)
        weights = p + intercept
        if self.n <= weights and ridge == 0:
            raise SaekitError(
                f"{self.n} rows do not determine a linear map with {weights} weights a target: it "
                "would fit them without error, whatever they are. Fit on more rows (fit_rows, or "
                "harvest more documents), or set ridge above 0"
            )
        xx, xy = self.xx, self.xy
        if not intercept:
            xx = xx.addr(self.x_mean, self.x_mean, alpha=self.n)
            xy = xy.addr(self.x_mean, self.y_mean, alpha=self.n)
        weight, rank = _least_squares(xx, xy, self.n * self.x_mean.square(), ridge)
        bias = self.y_mean - self.x_mean @ weight if intercept else torch.zeros_like(self.y_mean)
        return Affine(weight, bias, self.y_mean, rank)


def _least_squares(
    xx: Float[Tensor, "p p"], xy: Float[Tensor, "p q"], offset: Float[Tensor, " p"], ridge: float
) -> tuple[Float[Tensor, "p q"], int]:
    """The weights, and how many directions they use. `offset`: summed square of each mean."""
    square = xx.diagonal()
    varies = square > ROUNDING * offset
    # Each predictor in units of its own length: a few huge dimensions then hide no small ones.
    scale = torch.where(varies, square, 1.0).sqrt()
    scaled = torch.where(varies & varies[:, None], xx / scale / scale[:, None], 0.0)
    values, vectors = torch.linalg.eigh(scaled)
    used = values > len(values) * torch.finfo(values.dtype).eps * values[-1].clamp_min(0)
    inverse = torch.where(used, 1 / torch.where(used, values + ridge, 1.0), 0.0)
    target = torch.where(varies[:, None], xy / scale[:, None], 0.0)
    weight = vectors @ (inverse[:, None] * (vectors.T @ target)) / scale[:, None]
    return torch.where(varies[:, None], weight, 0.0), int(used.sum())
