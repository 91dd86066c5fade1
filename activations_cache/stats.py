"""Running statistics of the activations at a hook point, as sums: exact to add up, in any order of
shards.

Axes: row, d.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class HookStats:
    """Sums over rows x, as the model computed them, before they were rounded for the disk.

    Rows of special tokens and rows that are not finite are left out.
    """

    n: int = 0
    sum: tuple[float, ...] = ()
    """Of x, by dimension."""
    sum_norm: float = 0.0
    """Of |x|."""
    sum_squares: float = 0.0
    """Of |x|^2."""
    sum_squared_error: float | None = None
    """Of |x - stored x|^2; measured for int8 only."""

    def plus(self, other: "HookStats") -> "HookStats":
        """Both together."""
        if not self.n or not other.n:
            return self if self.n else other
        return HookStats(
            n=self.n + other.n,
            sum=tuple(a + b for a, b in zip(self.sum, other.sum, strict=True)),
            sum_norm=self.sum_norm + other.sum_norm,
            sum_squares=self.sum_squares + other.sum_squares,
            sum_squared_error=(
                None
                if self.sum_squared_error is None or other.sum_squared_error is None
                else self.sum_squared_error + other.sum_squared_error
            ),
        )

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """mu = sum x / n."""
        return torch.tensor(self.sum, dtype=torch.float64) / max(self.n, 1)

    @property
    def mean_norm(self) -> float:
        """sum |x| / n."""
        return self.sum_norm / max(self.n, 1)

    @property
    def covariance_trace(self) -> float:
        """Total variance about the mean: sum |x - mu|^2 / n = sum |x|^2 / n - |mu|^2."""
        return max(0.0, self.sum_squares / max(self.n, 1) - float(self.mean.square().sum()))

    @property
    def rounding_error(self) -> float | None:
        """Share of the variance that int8 lost: sum |x - stored x|^2 / sum |x - mu|^2."""
        total = self.n * self.covariance_trace
        if self.sum_squared_error is None or not total:
            return None
        return self.sum_squared_error / total
