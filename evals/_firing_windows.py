"""How often latents fire: in windows of rows, as a histogram, and by rank.

A latent fires on a row where its value is not 0. No model, no files; a number without a meaning
raises `Undefined`. Axes: row, latent, rank (of the latents that fire, the most frequent is 1), bin.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.distributed import Mesh
from saekit.errors import Undefined
from saekit.sae import SparseCode


class Windows:
    """How many latents fall silent in windows of `size` rows, which follow each other without a
    gap; an incomplete one at the end does not count. Memory is a few numbers a latent.

    Under the rule `least` a latent is dead in a window where it fires on fewer than `least` rows.
    One of several processes begins at row `start` of all, and `joined` has the windows of all of
    them.
    """

    def __init__(self, size: int, d_sae: int, rules: Sequence[int], start: int = 0) -> None:
        self.size = size
        self.d_sae = d_sae
        self.n = 0
        """Complete windows."""
        self._count = torch.zeros(d_sae, dtype=torch.long)
        self._rows = start % size
        """Of the open window, those before `start` too."""
        self._begun_before = self._rows > 0
        self._head = torch.zeros(0, d_sae, dtype=torch.long)
        """Of the window that began before `start`: its part behind, once it was filled."""
        self._dead = dict.fromkeys(rules, 0)
        self._first = self._last = self._count

    def add(self, code: SparseCode) -> None:
        """Take the next rows, in order: windows do not depend on how rows are batched."""
        values, indices = code.values, code.indices
        while len(values):
            take = min(len(values), self.size - self._rows)
            fired = indices[:take][values[:take] != 0]
            self._count = self._count + fired.bincount(minlength=self.d_sae).cpu()
            self._rows += take
            values, indices = values[take:], indices[take:]
            if self._rows == self.size:
                self._close()

    def joined(self, mesh: Mesh) -> "Windows":
        """Those of all rows, of which each process was given its own, in the order of the ranks."""
        if mesh.data == 1:
            return self
        whole = Windows(self.size, self.d_sae, tuple(self._dead))
        gathered = zip(*(mesh.gather(t, "data") for t in self._state()), strict=True)
        for numbers, head, count, first, last in gathered:
            begun_before, filled, rows, n, *dead = numbers.tolist()
            if begun_before:
                whole._count = whole._count + (head if filled else count)
                whole._rows = self.size if filled else rows
                if filled:
                    whole._close()
            if filled or not begun_before:
                whole._first = first if whole.n == 0 else whole._first
                whole._last = last if n else whole._last
                whole.n += n
                whole._dead = {
                    least: one + more
                    for (least, one), more in zip(whole._dead.items(), dead, strict=True)
                }
                whole._count, whole._rows = count, rows
        return whole

    def _state(self) -> list[Int[Tensor, "..."]]:
        """As tensors of the same shapes in all processes."""
        filled = len(self._head)
        numbers = [self._begun_before, filled, self._rows, self.n, *self._dead.values()]
        return [
            torch.tensor([int(number) for number in numbers]),
            self._head.sum(0),
            self._count,
            self._first,
            self._last,
        ]

    def _close(self) -> None:
        if self._begun_before and not len(self._head):
            # Of what came before its share others know.
            self._head = self._count[None]
            self._count, self._rows = torch.zeros_like(self._count), 0
            return
        for least in self._dead:
            self._dead[least] += int((self._count < least).sum())
        self._first = self._count if self.n == 0 else self._first
        self._last = self._count
        self.n += 1
        self._count, self._rows = torch.zeros_like(self._count), 0

    def dead_share(self, least: int) -> float:
        """Share of the latents that fire on fewer than `least` rows of a window, on the mean over
        the complete windows."""
        self._require(1)
        return self._dead[least] / (self.n * self.d_sae)

    def dying(self, least: int) -> Bool[Tensor, " latent"]:
        """Which fire on at least `least` rows of the first window and on fewer of the last."""
        self._require(2)
        return (self._first >= least) & (self._last < least)

    def waking(self, least: int) -> Bool[Tensor, " latent"]:
        """Which fire on fewer than `least` rows of the first window and on at least as many of the
        last."""
        self._require(2)
        return (self._first < least) & (self._last >= least)

    def _require(self, n: int) -> None:
        if self.n < n:
            raise Undefined(
                f"it takes {n} complete windows of {self.size} rows, and there are {self.n}: look "
                "at more rows, or at shorter windows"
            )


def log_histogram(
    count: Int[Tensor, " latent"], n: int, bins: int
) -> tuple[Int[Tensor, " bins"], Float[Tensor, " bins_plus_1"], int]:
    """Latents by log10 of their density `count / n`: how many in each bin, the bins' edges, and how
    many fire never and are in none.

    Bins are equally wide from log10(1 / n), the least density that n rows can show, to 0; each
    holds its lower edge, and the last one the density 1 too. Near the left end some are empty,
    because counts are whole numbers.
    """
    edges = torch.linspace(-math.log10(max(n, 2)), 0, bins + 1, dtype=torch.float64)
    alive = count[count > 0].double()
    # By 1 + 1e-12, so that a count that lies on an edge is not rounded to below it.
    place = torch.searchsorted(edges, (alive / n).log10() + 1e-12, right=True) - 1
    counts = place.clamp(0, bins - 1).bincount(minlength=bins)
    return counts, edges, int((count == 0).sum())


@dataclass(frozen=True)
class Zipf:
    """The law `count of rank r ~ r ** -exponent`, and how well it fits."""

    exponent: float
    fit: float
    """R2 of the line (1 is a law kept exactly) or the Kolmogorov-Smirnov distance (0 is)."""
    n: int
    """Latents it was fitted to."""


def zipf_line(count: Int[Tensor, " latent"], least: int = 1) -> Zipf:
    """Least squares of log(count) on log(rank) over the latents that fire at least `least` times,
    each weighing the same; `fit` is R2 = 1 - sum(residual^2) / sum((log count - mean)^2).

    The rare latents, which are most of the points, decide; R2 is high for many laws that are not
    Zipf's (Clauset, Shalizi and Newman 2009), which is why `zipf_likelihood` stands beside it.
    """
    ranked = _ranked(count, least)
    x = -torch.arange(1, len(ranked) + 1, dtype=torch.float64).log()
    y = ranked.log()
    x, y = x - x.mean(), y - y.mean()
    if float(y.square().sum()) <= 1e-24 * len(y):
        raise Undefined(
            f"all {len(ranked)} latents fire equally often, so a line through them explains nothing"
        )
    slope = float((x * y).sum() / x.square().sum())
    residual = float((y - slope * x).square().sum())
    return Zipf(slope, 1 - residual / float(y.square().sum()), len(ranked))


def zipf_likelihood(count: Int[Tensor, " latent"], least: int = 1) -> Zipf:
    """Maximum likelihood: each firing is a draw of a rank with p(r) = r^-s / sum_q q^-s over the
    latents that fire at least `least` times; s makes the mean of log r under p that of the data.

    `fit` is the Kolmogorov-Smirnov distance max_r |F_data(r) - F_p(r)|. The frequent latents,
    which are most of the draws, decide. Ranks come from the same counts, which favours the fit; so
    the distance is for comparison, and no p-value follows from it.
    """
    ranked = _ranked(count, least)
    log_rank = torch.arange(1, len(ranked) + 1, dtype=torch.float64).log()
    share = ranked / ranked.sum()
    mean = float(share @ log_rank)

    def law(s: float) -> Float[Tensor, " rank"]:
        return (-s * log_rank).softmax(0)

    # The mean of log r falls as s grows; it is largest at 0, as no rank fires less than a later
    # one.
    low, high = 0.0, 1.0
    while float(law(high) @ log_rank) > mean:
        low, high = high, 2 * high
    while high - low > 1e-12 * max(high, 1):
        middle = (low + high) / 2
        low, high = (middle, high) if float(law(middle) @ log_rank) > mean else (low, middle)
    apart = (share.cumsum(0) - law(high).cumsum(0)).abs().max()
    return Zipf(high, float(apart), len(ranked))


def _ranked(count: Int[Tensor, " latent"], least: int) -> Float[Tensor, " rank"]:
    ranked = count[count >= least].double().sort(descending=True).values
    if len(ranked) < 3:
        raise Undefined(
            f"{len(ranked)} latents fire at least {least} times, and a law of rank takes 3: look "
            "at more rows"
        )
    return ranked
