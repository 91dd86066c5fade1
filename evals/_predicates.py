"""How well a latent's activity tells that a predicate holds: F1 (Makelov, Lange and Nanda 2024,
arXiv 2405.08366, section 5).

A predicate is a union of values of one *family*, such as "the subject is Mary or John". A latent is
read as the classifier f > 0:

    F1 = 2 TP / (rows where it fires + rows where the predicate holds)

and has F1 0 where it never fires. An F1 of 0.8 needs precision and recall of 2/3 at least. A latent
that always fires has F1 = 2p / (1 + p) for a predicate of share p: 2/3 for half of the rows, so
that an F1 of 0.5 means nothing there.

Unions grow by the value that raises F1 most, up to `most` values and until none does. The best of
many predicates looks good on the rows it was chosen on: choose on some (`choose`,
`best_thresholds`), score on others (`resampled_f1`).

Axes: row, latent, value (of a family), active (a latent on a row where it fires), sample (resamples
of the rows).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from saekit.sae import SparseCode


@dataclass(frozen=True, eq=False)
class Family:
    """Predicates that exclude each other: a row has one value at most."""

    name: str
    value: Int[Tensor, " row"]
    """The row's value, counted from 0; -1 where it has none of this family."""
    size: int
    """How many values there are."""
    most: int = 1
    """Values that a union may join."""

    @property
    def count(self) -> Int[Tensor, " value"]:
        """Rows with each value."""
        return self.value[self.value >= 0].bincount(minlength=self.size)


@dataclass(frozen=True, eq=False)
class Firings:
    """Where latents fire, and how strongly."""

    n_rows: int
    d_sae: int
    row: Int[Tensor, " active"]
    latent: Int[Tensor, " active"]
    value: Float[Tensor, " active"]

    @classmethod
    def of(cls, code: SparseCode, d_sae: int) -> "Firings":
        """A value below 0, which a signed matching pursuit gives, counts as not firing."""
        row, slot = (code.values > 0).nonzero(as_tuple=True)
        values, indices = code.values[row, slot], code.indices[row, slot]
        return cls(len(code.values), d_sae, row.cpu(), indices.cpu(), values.cpu())

    @property
    def count(self) -> Int[Tensor, " d_sae"]:
        """Rows on which each latent fires."""
        return self.latent.bincount(minlength=self.d_sae)

    def places(self, latents: Int[Tensor, " latent"]) -> Int[Tensor, " active"]:
        """Where in `latents` each active latent stands; -1 where it is none of them."""
        place = torch.full((self.d_sae,), -1)
        place[latents] = torch.arange(len(latents))
        return place[self.latent]

    def above(
        self, latents: Int[Tensor, " latent"], threshold: Float[Tensor, " latent"]
    ) -> "Firings":
        """Of `latents` alone, and where they reach their threshold."""
        at = self.places(latents)
        keep = (at >= 0) & (self.value >= threshold[at.clamp(min=0)])
        parts = (x[keep] for x in (self.row, self.latent, self.value))
        return Firings(self.n_rows, self.d_sae, *parts)

    def with_values(self, family: Family, latents: Int[Tensor, " latent"]) -> "Counts":
        """On how many rows each of `latents` fires with each value."""
        at, value = self.places(latents), family.value[self.row]
        both = (at >= 0) & (value >= 0)
        cells = at[both] * family.size + value[both]
        table = cells.bincount(minlength=len(latents) * family.size)
        return Counts(table.view(-1, family.size), self.count[latents], family.count)


@dataclass(frozen=True, eq=False)
class Counts:
    """All that F1 of any union of a family's values needs: its values exclude each other, so counts
    of a union are sums."""

    together: Int[Tensor, "latent value"]
    fires: Int[Tensor, " latent"]
    holds: Int[Tensor, " value"]


@dataclass(frozen=True, eq=False)
class Choice:
    """A union of a family's values for each latent."""

    union: Bool[Tensor, "latent value"]
    f1: Float[Tensor, " latent"]
    """On the rows that it was chosen on."""


def choose(counts: Counts, most: int) -> Choice:
    """The best union of each latent that greedy search finds."""
    rows = torch.arange(len(counts.together))
    union = torch.zeros_like(counts.together, dtype=torch.bool)
    hits, size = torch.zeros_like(counts.fires), counts.fires.clone()
    best = torch.zeros(len(rows), dtype=torch.float64)
    for _ in range(min(most, counts.together.shape[1])):
        joined = _f1(hits[:, None] + counts.together, size[:, None] + counts.holds)
        top = joined.masked_fill(union, -1.0).max(1)
        # A value that raises nothing is not taken. A first one is, so that each has a predicate.
        better = (top.values > best) | ~union.any(1)
        added = counts.together[rows, top.indices], counts.holds[top.indices]
        hits, size = hits + added[0] * better, size + added[1] * better
        union[rows[better], top.indices[better]] = True
        best = top.values.where(better, best)
    return Choice(union, best)


@dataclass(frozen=True, eq=False)
class Thresholds:
    """For each latent the single value (no union) and the threshold that tell it best."""

    family: Int[Tensor, " latent"]
    value: Int[Tensor, " latent"]
    threshold: Float[Tensor, " latent"]
    f1: Float[Tensor, " latent"]
    """On the rows that they were chosen on."""


def best_thresholds(
    firings: Firings, families: Sequence[Family], latents: Int[Tensor, " latent"]
) -> Thresholds:
    """Search every threshold of each of `latents`, all of which fire, with every single value.

    For latents with graded meaning: weak activity may be noise, and strong activity tell.
    """
    holds = torch.cat([family.count for family in families])
    family_of = torch.cat([torch.full((f.size,), i) for i, f in enumerate(families)])
    value_of = torch.cat([torch.arange(f.size) for f in families])
    hot = torch.cat([_one_hot(family) for family in families], 1)
    order = firings.latent.argsort(stable=True)
    starts = firings.count.cumsum(0) - firings.count
    found = []
    for latent in latents.tolist():
        mine = order[int(starts[latent]) : int(starts[latent] + firings.count[latent])]
        value, by = firings.value[mine].sort(descending=True, stable=True)
        hits = hot[firings.row[mine[by]]].cumsum(0, dtype=torch.int32)
        f1 = _f1(hits, torch.arange(1, len(mine) + 1)[:, None] + holds)
        # Rows of equal value are all above a threshold or all below it.
        last = torch.cat([value[1:] != value[:-1], torch.ones(1, dtype=torch.bool)])
        top = int(f1.masked_fill(~last[:, None], -1.0).argmax())
        at, column = divmod(top, len(holds))
        where = family_of[column], value_of[column]
        found.append((*where, value[at].double(), f1[at, column]))
    if not found:
        none = torch.zeros(0, dtype=torch.long)
        return Thresholds(none, none, none.double(), none.double())
    family, value, threshold, f1 = (torch.stack(list(x)) for x in zip(*found, strict=True))
    return Thresholds(family, value, threshold.float(), f1)


def resampled_f1(
    firings: Firings,
    family: Family,
    latents: Int[Tensor, " latent"],
    union: Bool[Tensor, "latent value"],
    weights: Float[Tensor, "sample row"],
) -> Float[Tensor, "latent sample"]:
    """F1 of each of `latents` with its union, in resamples that take rows so many times."""
    times = weights.double().T
    at = firings.places(latents)
    row, at = firings.row[at >= 0], at[at >= 0]
    value = family.value[row]
    hit = (value >= 0) & union[at, value.clamp(min=0)]
    n = len(latents), len(times)
    fires = _sparse(at, row, n) @ times
    hits = _sparse(at[hit], row[hit], n) @ times
    holds = union.double() @ (_one_hot(family).double().T @ times)
    return _f1(hits, fires + holds)


def _sparse(at: Tensor, row: Tensor, shape: tuple[int, int]) -> Tensor:
    ones = torch.ones(len(at), dtype=torch.float64)
    return torch.sparse_coo_tensor(torch.stack([at, row]), ones, shape, check_invariants=True)


def _one_hot(family: Family) -> Bool[Tensor, "row value"]:
    return family.value[:, None] == torch.arange(family.size)


def _f1(hits: Shaped[Tensor, "*of"], both: Shaped[Tensor, "*of"]) -> Float[Tensor, "*of"]:
    """2 TP / (fires + holds); 0 where there is nothing of either."""
    return 2 * hits.double() / both.double().clamp(min=1)
