"""What the core row's numbers would be on other documents: the sums behind them, in each bootstrap
resample (see `_resample`), and variants of explained variance that other tools report.

Axes: sample (resamples, the first of them the rows as they are), row, d.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from saekit.evals._metrics import Reconstruction, not_finite
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


_AT_ONCE = 2**17
"""Elements of one fp64 `[row, d]` tensor: 1 MiB, so that what is made of some rows is still in a
CPU's cache when it is added up."""


@dataclass(frozen=True, eq=False)
class CoreRows:
    """Sums over rows x, of reconstructions x_hat with e = x - x_hat, in each resample."""

    x: Scatter
    e: Scatter
    """About 0: its second sum is that of e^2, by dimension."""
    sums: Float[Tensor, "sample column"]

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
        far from it as token by token explained variance has it. `norm` is of decoder rows.

        Raises SaekitError where a row or its reconstruction is not finite.
        """
        norm = norm.double()

        def parts() -> Iterator[Tensor]:
            size = max(1, _AT_ONCE // x.shape[1])
            # One part at least, of no rows where there are none.
            for first in range(0, max(len(x), 1), size):
                some = slice(first, first + size)
                here = SparseCode(code.values[some], code.indices[some])
                yield _of_rows(x[some].double(), x_hat[some].double(), here, norm, centre)

        sums = resamples.sums_of(parts(), document)
        if not bool(sums[0].isfinite().all()):
            raise not_finite(x)
        apart, apart_square, e, e_square, columns = sums.split(
            [*[x.shape[1]] * 4, len(_COLUMNS)], dim=1
        )
        count = columns[:, :1]
        return cls(
            Scatter(centre, count, apart, apart_square),
            Scatter(torch.zeros_like(centre), count, e, e_square),
            columns,
        )

    def __add__(self, other: "CoreRows") -> "CoreRows":
        return CoreRows(
            self.x + other.x,
            self.e + other.e,
            self.sums + other.sums,
        )

    def __getitem__(self, name: str) -> Samples:
        return self.sums[:, _COLUMNS.index(name)]

    @property
    def residual(self) -> Float[Tensor, "sample d"]:
        """sum of e^2, by dimension."""
        return self.e.second

    @property
    def quality(self) -> Reconstruction:
        """Of the rows as they are."""
        names = ("rows", "nonzero", "hat_square", "dot", "cosine", "ratio")
        n, nonzero, hat_square, dot, cosine, ratio = (float(self[name][0]) for name in names)
        return Reconstruction(
            n=int(n),
            mean=(self.x.pilot + self.x.first[0] / max(n, 1)).cpu(),
            scatter=float(self.x.total[0].nan_to_num(0.0)),
            error=float(self.residual[0].sum()),
            hat_square=hat_square,
            dot=dot,
            n_nonzero=int(nonzero),
            cosine_sum=cosine,
            ratio_sum=ratio,
        )

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


def _of_rows(
    x: Float64[Tensor, "row d"],
    x_hat: Float64[Tensor, "row d"],
    code: SparseCode,
    norm: Float64[Tensor, " d_sae"],
    centre: Float64[Tensor, " d"],
) -> Float64[Tensor, "row sum"]:
    """What is added up of rows: x - centre, e, and the squares of both, then `_COLUMNS`."""
    apart, e = x - centre, x - x_hat
    apart_square, e_square = apart.square(), e.square()
    length, hat_length, dot = x.norm(dim=1), x_hat.norm(dim=1), (x * x_hat).sum(1)
    nonzero = length > 0
    one = torch.ones_like(length)
    product = torch.where(nonzero & (hat_length > 0), length * hat_length, one)
    spread = apart_square.sum(1)
    values = code.values.double().abs()
    columns = [
        one,
        nonzero.double(),
        length.square(),
        x.sum(1),
        hat_length.square(),
        dot,
        dot / product * nonzero,
        hat_length / torch.where(nonzero, length, one) * nonzero,
        # A row at the centre itself has no variance to explain: as if none were left.
        torch.where(spread > 0, e_square.sum(1) / spread.clamp_min(1e-300), 0.0),
        (values != 0).sum(1).double(),
        (values * norm[code.indices]).sum(1),
    ]
    return torch.cat([apart, apart_square, e, e_square, torch.stack(columns, 1)], 1)


def _positive(values: Samples, denominator: Samples) -> Samples:
    """NaN where the denominator is not above 0."""
    return values.where(denominator > 0, torch.nan)
