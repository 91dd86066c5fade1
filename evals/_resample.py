"""Ratios of sums over rows, and how far they would move on other documents: a bootstrap by
document.

Rows of one document resemble each other, so rows cannot stand for independent draws: whole
documents are drawn with replacement (Efron and Tibshirani 1993, ch. 8), each as often as there are
documents. Sums are taken for all resamples at once while the rows go by, so no row and no
document's sums are kept. Resample 0 is the sample itself. The mean that a variance is taken about
stays the sample's: about a mean of its own, which lies nearer to its rows, every resample would
score below the sample.

A value that is undefined, such as a share of no variance, is NaN inside these classes alone:
`Estimate.of` turns it into None.

Axes: sample (resamples, the first of them the rows as they are), document, row, q (targets).
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Int16
from torch import Tensor

from saekit.evals._linear import ROUNDING
from saekit.seeds import stream

log = logging.getLogger(__name__)

CONFIDENCE = 0.95
FEW = 30
"""Documents, or prompts, below which intervals are widened."""
_NORMAL = 1.959963984540054
"""What 97.5 % of a normal distribution lie below."""


@dataclass(frozen=True, eq=False)
class Resamples:
    """How often each resample takes each document."""

    documents: Int[Tensor, " document"]
    """Their numbers in the cache, rising."""
    weights: Int16[Tensor, "sample document"]

    @classmethod
    def of(cls, document: Int[Tensor, " row"], n_bootstrap: int, seed: int) -> "Resamples":
        """For rows of these documents; `n_bootstrap` draws beside the sample itself. Of a single
        document there is nothing to draw, which the log says."""
        documents = document.unique()
        n = len(documents)
        if n_bootstrap and n == 1:
            log.warning("intervals are left out: all rows looked at are of one document")
            n_bootstrap = 0
        generator = stream("bootstrap", seed)
        weights = torch.ones(1 + n_bootstrap, n, dtype=torch.int16)
        for drawn in weights[1:]:
            drawn.copy_(torch.randint(n, (n,), generator=generator).bincount(minlength=n))
        return cls(documents, weights.to(document.device))

    @property
    def sample(self) -> "Resamples":
        """The sample itself alone."""
        return replace(self, weights=self.weights[:1])

    def sums(
        self, values: Float[Tensor, "row q"], document: Int[Tensor, " row"]
    ) -> Float[Tensor, "sample q"]:
        """The sum of values over the rows, in each resample, in fp64."""
        return self.sums_of([values], document)

    def sums_of(
        self, parts: Iterable[Float[Tensor, "_ q"]], document: Int[Tensor, " row"]
    ) -> Float[Tensor, "sample q"]:
        """The same of values that come some rows at a time, in order: one part at least."""
        some, place = document.unique(return_inverse=True)
        by_document: Tensor | None = None
        first = 0
        for values in parts:
            if by_document is None:
                shape = len(some), values.shape[1]
                by_document = values.new_zeros(shape, dtype=torch.float64)
            last = first + len(values)
            by_document.index_add_(0, place[first:last], values.double())
            first = last
        assert by_document is not None and first == len(place)
        columns = torch.searchsorted(self.documents, some)
        return self.weights[:, columns].double() @ by_document


@dataclass(frozen=True, eq=False)
class Scatter:
    """Sums of rows about a fixed point near their mean: joined by `+`, in each resample."""

    pilot: Float[Tensor, " q"]
    count: Float[Tensor, "sample 1"]
    first: Float[Tensor, "sample q"]
    """sum of (y - pilot)."""
    second: Float[Tensor, "sample q"]
    """sum of (y - pilot)^2."""

    @classmethod
    def of(
        cls,
        resamples: Resamples,
        y: Float[Tensor, "row q"],
        document: Int[Tensor, " row"],
        pilot: Float[Tensor, " q"],
    ) -> "Scatter":
        y = y.double() - pilot
        count = resamples.sums(torch.ones_like(y[:, :1]), document)
        first, second = (resamples.sums(values, document) for values in (y, y.square()))
        return cls(pilot, count, first, second)

    def __add__(self, other: "Scatter") -> "Scatter":
        return Scatter(
            self.pilot,
            self.count + other.count,
            self.first + other.first,
            self.second + other.second,
        )

    def __getitem__(self, columns: slice) -> "Scatter":
        return Scatter(
            self.pilot[columns], self.count, self.first[:, columns], self.second[:, columns]
        )

    @property
    def by_dimension(self) -> Float[Tensor, "sample q"]:
        """sum of (y - mean y)^2, the mean that of the sample in all resamples. NaN where all y are
        the same, up to fp64 rounding."""
        apart = self.first[:1] / self.count[:1]
        scatter = self.second - 2 * apart * self.first + self.count * apart.square()
        mean = self.pilot + apart
        return scatter.where(scatter > ROUNDING * self.count * mean.square(), math.nan)

    @property
    def total(self) -> Float[Tensor, " sample"]:
        """The same, summed over dimensions: NaN where all of them are."""
        return _nan_where_none(self.by_dimension, torch.nansum(self.by_dimension, dim=1))


@dataclass(frozen=True, eq=False)
class Explained:
    """How much of targets y predictions y_hat, made without looking at them, explain."""

    scatter: Scatter
    residual: Float[Tensor, "sample q"]
    """sum of (y - y_hat)^2."""

    @classmethod
    def of(
        cls,
        resamples: Resamples,
        y: Float[Tensor, "row q"],
        y_hat: Float[Tensor, "row q"],
        document: Int[Tensor, " row"],
        pilot: Float[Tensor, " q"],
    ) -> "Explained":
        scatter = Scatter.of(resamples, y, document, pilot)
        return cls(scatter, resamples.sums((y.double() - y_hat).square(), document))

    def __add__(self, other: "Explained") -> "Explained":
        return Explained(self.scatter + other.scatter, self.residual + other.residual)

    def __getitem__(self, columns: slice) -> "Explained":
        return Explained(self.scatter[columns], self.residual[:, columns])

    @property
    def uniform(self) -> Float[Tensor, " sample"]:
        """Mean over dimensions of 1 - sum (y - y_hat)^2 / sum (y - mean y)^2. A dimension that
        does not vary is left out."""
        return torch.nanmean(1 - self.residual / self.scatter.by_dimension, dim=1)

    @property
    def pooled(self) -> Float[Tensor, " sample"]:
        """1 - sum |y - y_hat|^2 / sum |y - mean y|^2, over all dimensions at once."""
        return 1 - self.residual.sum(1) / self.scatter.total


@dataclass(frozen=True)
class Estimate:
    """A number, and the interval that holds it on 95 % of the resamples."""

    value: float
    interval: tuple[float, float] | None
    """Percentiles; None where a resample leaves the number undefined, or nothing was resampled."""

    @classmethod
    def of(cls, values: Float[Tensor, " sample"], units: int | None = None) -> "Estimate | None":
        """None where the number itself is undefined. Of few `units`, the documents or prompts that
        were drawn from, the interval is widened (see `widening`)."""
        value, drawn = float(values[0]), values[1:]
        if not math.isfinite(value):
            return None
        if len(drawn) == 0 or not drawn.isfinite().all():
            return cls(value, None)
        tails = drawn.new_tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        low, high = torch.quantile(drawn, tails).tolist()
        wider = 1.0 if units is None else widening(units)
        if wider > 1:
            low, high = value - wider * (value - low), value + wider * (high - value)
        return cls(value, (low, high))


def widening(units: int) -> float:
    """How much wider an interval must be that percentiles of resamples of `units` documents give: 1
    from `FEW` on.

    A bootstrap takes the spread among n for that among all, which is less by sqrt((n - 1) / n), and
    as if it were known: t(n - 1) in place of a normal distribution (Hesterberg 2015, "What teachers
    should know about the bootstrap", sec. 5.3). The quantile of t is exact for n of 2 and 3, and
    within 1 % beyond (Fisher and Cornish's series).
    """
    if not 1 < units < FEW:
        return 1.0
    free, z = units - 1, _NORMAL
    if free == 1:
        t = math.tan(math.pi * CONFIDENCE / 2)
    elif free == 2:
        t = CONFIDENCE * math.sqrt(2 / (1 - CONFIDENCE**2))
    else:
        t = (
            z
            + (z**3 + z) / (4 * free)
            + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
        )
    return t / z * math.sqrt(units / free)


def few(units: int, what: str = "documents") -> str:
    """What a definition says beside an interval of few; nothing where there are enough."""
    if not 1 < units < FEW:
        return ""
    return (
        f"; of {units} {what} alone, too few to rest a claim on: its interval is widened "
        f"{widening(units):.2f} times, as for a t distribution"
    )


def _nan_where_none(
    parts: Float[Tensor, "sample q"], total: Float[Tensor, " sample"]
) -> Float[Tensor, " sample"]:
    return total.where(~parts.isnan().all(1), math.nan)
