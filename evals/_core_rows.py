"""What the core row's numbers would be on other documents: the sums behind them, in each bootstrap
resample (see `_resample`), and variants of explained variance that other tools report.

Axes: sample (resamples, the first of them the rows as they are), row, d.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.evals._resample import Resamples, Scatter
from saekit.sae import SparseCode

Samples = Float[Tensor, " sample"]

_COLUMNS = (
    "rows",
    "nonzero",
    "square",
    "total",
    "hat_square",
    "dot",
    "cosine",
    "ratio",
    "by_token",
    "l0",
    "l1",
)


@dataclass(frozen=True, eq=False)
class CoreRows:
    """Sums over rows x, of reconstructions x_hat with e = x - x_hat, in each resample."""

    x: Scatter
    e: Scatter
    sums: Float[Tensor, "sample column"]
    residual: Float[Tensor, "sample d"]
    """sum of e^2, by dimension."""

    @classmethod
    def of(
        cls,
        resamples: Resamples,
        x: Float[Tensor, "row d"],
        x_hat: Float[Tensor, "row d"],
        code: SparseCode,
        norm: Float[Tensor, " d_sae"],
        document: Int[Tensor, " row"],
        centre: Float[Tensor, " d"],
    ) -> "CoreRows":
        """`centre` is a fixed point near the mean of x: variance is summed about it, and x is as
        far from it as token by token explained variance has it. `norm` is of decoder rows."""
        x, x_hat = x.double(), x_hat.double()
        e = x - x_hat
        length, hat_length, dot = x.norm(dim=1), x_hat.norm(dim=1), (x * x_hat).sum(1)
        nonzero = length > 0
        one = torch.ones_like(length)
        product = torch.where(nonzero & (hat_length > 0), length * hat_length, one)
        spread = (x - centre).square().sum(1)
        values = code.values.double().abs()
        columns = torch.stack(
            [
                one,
                nonzero.double(),
                length.square(),
                x.sum(1),
                hat_length.square(),
                dot,
                dot / product * nonzero,
                hat_length / torch.where(nonzero, length, one) * nonzero,
                # A row at the centre itself has no variance to explain: as if none were left.
                torch.where(spread > 0, e.square().sum(1) / spread.clamp_min(1e-300), 0.0),
                (values != 0).sum(1).double(),
                (values * norm.double()[code.indices]).sum(1),
            ],
            dim=1,
        )
        zero = torch.zeros_like(centre)
        return cls(
            Scatter.of(resamples, x, document, centre),
            Scatter.of(resamples, e, document, zero),
            resamples.sums(columns, document),
            resamples.sums(e.square(), document),
        )

    def __add__(self, other: "CoreRows") -> "CoreRows":
        return CoreRows(
            self.x + other.x,
            self.e + other.e,
            self.sums + other.sums,
            self.residual + other.residual,
        )

    def __getitem__(self, name: str) -> Samples:
        return self.sums[:, _COLUMNS.index(name)]

    @property
    def fvu(self) -> Samples:
        return self.residual.sum(1) / self.x.total

    def found(self) -> dict[str, Samples]:
        """Each number that has an interval, by its metric's name; NaN where it is undefined."""
        d = self.residual.shape[1]
        error, rows = self.residual.sum(1), self["rows"]
        mean = self["total"][0] / (rows[0] * d)
        scalar = self["square"] - 2 * mean * self["total"] + mean.square() * rows * d
        ratios: dict[str, Callable[[], Samples]] = {
            "ev": lambda: 1 - self.fvu,
            "fvu": lambda: self.fvu,
            "ev_dimension_mean": lambda: torch.nanmean(
                1 - self.residual / self.x.by_dimension, dim=1
            ),
            "ev_token_mean": lambda: 1 - self["by_token"] / rows,
            "ev_uncentred": lambda: 1 - error / self["square"],
            # An error that is the same everywhere has no scatter, which is NaN as a denominator.
            "ev_centred_error": lambda: 1 - self.e.total.nan_to_num(0.0) / self.x.total,
            "ev_scalar_mean": lambda: 1 - error / scalar,
            "mse": lambda: error / rows,
            "cosine": lambda: self["cosine"] / self["nonzero"],
            "l2_ratio": lambda: self["ratio"] / self["nonzero"],
            "relative_reconstruction_bias": lambda: _positive(
                self["hat_square"] / self["dot"], self["dot"]
            ),
            "gain": lambda: _positive(self["dot"] / self["hat_square"], self["hat_square"]),
            "l0_mean": lambda: self["l0"] / rows,
            "l1_mean": lambda: self["l1"] / rows,
        }
        return {name: ratio() for name, ratio in ratios.items()}


def _positive(values: Samples, denominator: Samples) -> Samples:
    """NaN where the denominator is not above 0."""
    return values.where(denominator > 0, torch.nan)
