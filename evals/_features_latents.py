"""What there is to say of latents, from all the places where they fire: pure functions of arrays.

Every function takes the actives of some latents, by latent and then by place, and does all of them
at once. A value below 0, which a signed matching pursuit gives, counts as firing and shows among a
context's values, but makes no context and falls in no bin.

Axes: active, latent (those looked at), entry (a context to cut out), bin, edge (quantiles + 1),
top (most first).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int, Int64, Shaped, UInt64
from numpy import ndarray

from saekit.evals._features_spool import Actives, Text

TOP, SAMPLE, SILENT = 0, 1, 2
"""Kinds of context: indices into `saekit.features.KINDS`."""


@dataclass(frozen=True, eq=False)
class Entries:
    """Contexts, each by the place that it is cut out around."""

    latent: Int64[ndarray, " entry"]
    kind: Int64[ndarray, " entry"]
    group: Int64[ndarray, " entry"]
    rank: Int64[ndarray, " entry"]
    place: Int64[ndarray, " entry"]

    @classmethod
    def joined(cls, *parts: "Entries") -> "Entries":
        """All of them, by latent, kind, group and rank."""
        columns = [
            np.concatenate([getattr(part, name) for part in parts])
            for name in cls.__dataclass_fields__
        ]
        latent, kind, group, rank, _ = columns
        order = np.lexsort((rank, group, kind, latent))
        return cls(*(column[order] for column in columns))

    def __len__(self) -> int:
        return len(self.latent)


def scalars(
    actives: Actives, n_latents: int, n_rows: int
) -> dict[str, Float64[ndarray, " latent"]]:
    """Counts and moments; the moments are about the mean over all rows, in float64."""
    latent, value = actives.latent, actives.value.astype(np.float64)

    def total(weights: ndarray) -> Float64[ndarray, " latent"]:
        # Of nothing, its counts are whole numbers.
        return np.bincount(latent, weights, minlength=n_latents).astype(np.float64)

    active = np.bincount(latent, minlength=n_latents)
    mean = total(value) / n_rows
    silent = n_rows - active
    from_mean = value - mean[latent]
    m2, m3, m4 = ((total(from_mean**p) + silent * (-mean) ** p) / n_rows for p in (2, 3, 4))
    return {
        "active": active.astype(np.float64),
        "density": active / n_rows,
        "maximum": maximum(actives, n_latents).astype(np.float64),
        "mean": mean,
        "mean_active": divided(total(value), active),
        "std": np.sqrt(m2),
        "skewness": divided(m3, m2**1.5),
        "kurtosis": divided(m4, m2**2),
    }


def maximum(actives: Actives, n_latents: int) -> Float32[ndarray, " latent"]:
    """The largest value of each; 0 where none is above 0."""
    found = np.zeros(n_latents, dtype=np.float32)
    np.maximum.at(found, actives.latent, actives.value)
    return found


def histogram(actives: Actives, n_latents: int, bins: int) -> Int64[ndarray, "latent bin"]:
    """Counts of `floor(bins * value / maximum)` of the values above 0; the maximum itself falls in
    the last bin."""
    some = actives[actives.value > 0]
    largest = maximum(some, n_latents).astype(np.float64)
    share = some.value.astype(np.float64) / largest[some.latent]
    bin_ = np.minimum((share * bins).astype(np.int64), bins - 1)
    counts = np.bincount(some.latent * bins + bin_, minlength=n_latents * bins)
    return counts.reshape(n_latents, bins)


def peaks(actives: Actives, text: Text, n: int) -> Entries:
    """Where each latent is strongest, at most once in each window of the text and n times in all;
    of equals, what comes first in the text."""
    some = actives[actives.value > 0]
    if not len(some):
        return _entries(some, TOP)
    key = some.latent * len(text.start) + text.window(some.place)
    begin = np.flatnonzero(np.diff(key, prepend=-1))
    largest = np.maximum.reduceat(some.value, begin)
    of = np.repeat(np.arange(len(begin)), np.diff(begin, append=len(key)))
    highest = np.flatnonzero(some.value == largest[of])
    best = some[highest[np.diff(of[highest], prepend=-1) > 0]]
    order = np.lexsort((best.place, -best.value, best.latent))
    best = best[order]
    rank = _rank(best.latent)
    return _entries(best[rank < n], TOP, rank=rank[rank < n])


def samples(actives: Actives, first: int, quantiles: int, n: int, seed: int) -> Entries:
    """Of each quantile of a latent's values above 0 (equally many in each), n drawn at random.

    What is drawn follows from the seed, the place and the latent's number alone; `first` is that of
    the first latent.
    """
    some = actives[actives.value > 0]
    order = np.lexsort((some.place, some.value, some.latent))
    some = some[order]
    count = np.bincount(some.latent, minlength=1)
    group = _rank(some.latent) * quantiles // np.maximum(count[some.latent], 1)
    drawn = np.lexsort((_scattered(some.place, some.latent + first, seed), group, some.latent))
    some, group = some[drawn], group[drawn]
    rank = _rank(some.latent * quantiles + group)
    keep = rank < n
    return _entries(some[keep], SAMPLE, group[keep], rank[keep])


def silent(
    actives: Actives,
    candidates: Int64[ndarray, "latent candidate"],
    text: Text,
    width: int,
    n: int,
) -> Entries:
    """Of each latent's candidates, places or -1, the first n around which it does not fire at
    all."""
    latent = np.repeat(np.arange(len(candidates)), candidates.shape[1])
    place = candidates.ravel()
    latent, place = latent[place >= 0], place[place >= 0]
    first, last = _bounds(place, text, width)
    key = actives.latent * text.n_places + actives.place
    inside = np.searchsorted(key, latent * text.n_places + last) - np.searchsorted(
        key, latent * text.n_places + first
    )
    latent, place = latent[inside == 0], place[inside == 0]
    # A place may be the peak of several neighbours.
    _, once = np.unique(latent * text.n_places + place, return_index=True)
    once.sort()
    found = Actives(latent[once], place[once], np.zeros(len(once), np.float32))
    rank = _rank(found.latent)
    return _entries(found[rank < n], SILENT, rank=rank[rank < n])


def edges(actives: Actives, n_latents: int, quantiles: int) -> list[Float32[ndarray, " edge"]]:
    """Least value above 0, the values between the quantiles that `samples` takes, and the largest;
    nothing for a latent without such values."""
    some = actives[actives.value > 0]
    value = some.value[np.lexsort((some.value, some.latent))]
    count = np.bincount(some.latent, minlength=n_latents)
    begin = np.cumsum(count) - count
    # The first whose rank * quantiles // count is q has rank ceil(q * count / quantiles).
    at = -(-np.arange(quantiles + 1)[None] * count[:, None] // quantiles)
    at = begin[:, None] + np.minimum(at, count[:, None] - 1)
    return [value[row] if n else value[:0] for row, n in zip(at, count, strict=True)]


@dataclass(frozen=True, eq=False)
class InputTokens:
    """The tokens on which latents fire."""

    latent: Int64[ndarray, " some"]
    token: Int64[ndarray, " some"]
    share: Float64[ndarray, " some"]
    """Of the sum of the latent's positive values."""
    count: Int64[ndarray, " some"]


def input_tokens(actives: Actives, text: Text, n: int) -> InputTokens:
    """The n tokens of each latent with the largest sums of positive values; of equals, the one with
    the smaller number first."""
    some = actives[actives.value > 0]
    vocab = int(text.token.max()) + 1
    key, of = np.unique(some.latent * vocab + text.token[some.place], return_inverse=True)
    total = np.bincount(of, some.value.astype(np.float64), minlength=len(key))
    count = np.bincount(of, minlength=len(key))
    latent, token = np.divmod(key, vocab)
    whole = np.bincount(latent, total)
    order = np.lexsort((token, -total, latent))
    order = order[_rank(latent[order]) < n]
    return InputTokens(
        latent[order], token[order], total[order] / whole[latent[order]], count[order]
    )


@dataclass(frozen=True, eq=False)
class Cut:
    """Contexts cut out of the text; those of one end to end, `begin` has their bounds."""

    begin: Int64[ndarray, " entry_1"]
    at: Int64[ndarray, " entry"]
    act: Float32[ndarray, " entry"]
    tokens: Int[ndarray, " place"]
    acts: Float32[ndarray, " place"]


def cut(entries: Entries, actives: Actives, text: Text, width: int) -> Cut:
    """At most `width` tokens around each entry's place, which lies in the middle where its window
    allows; with the latent's values there."""
    first, last = _bounds(entries.place, text, width)
    begin = np.concatenate([[0], np.cumsum(last - first)])
    within = np.arange(begin[-1]) - np.repeat(begin[:-1], last - first)
    place = np.repeat(first, last - first) + within
    key = actives.latent * text.n_places + actives.place
    latent = np.repeat(entries.latent, last - first)
    acts = _values(key, actives.value, latent * text.n_places + place)
    act = _values(key, actives.value, entries.latent * text.n_places + entries.place)
    return Cut(begin, entries.place - first, act, text.token[place], acts)


def divided(a: Shaped[ndarray, " n"], b: Shaped[ndarray, " n"]) -> Float64[ndarray, " n"]:
    """a / b, NaN where b is 0."""
    return np.asarray(np.divide(a, b, out=np.full(len(a), np.nan), where=b != 0))


def _entries(
    actives: Actives, kind: int, group: ndarray | None = None, rank: ndarray | None = None
) -> Entries:
    nothing = np.zeros(len(actives), dtype=np.int64)
    return Entries(
        latent=actives.latent,
        kind=nothing + kind,
        group=nothing if group is None else group,
        rank=nothing if rank is None else rank,
        place=actives.place,
    )


def _bounds(place: ndarray, text: Text, width: int) -> tuple[ndarray, ndarray]:
    """First place of the context around each place, and that behind its last."""
    window = text.window(place)
    begin, end = text.start[window], text.start[window + 1]
    first = np.maximum(begin, np.minimum(place - width // 2, end - width))
    return first, np.minimum(first + width, end)


def _values(key: ndarray, value: ndarray, want: ndarray) -> Float32[ndarray, " want"]:
    """The values at the wanted keys, 0 where there is none. `key` rises."""
    if not len(key):
        return np.zeros(len(want), dtype=np.float32)
    at = np.minimum(np.searchsorted(key, want), len(key) - 1)
    return np.where(key[at] == want, value[at], np.float32(0))


def _rank(group: Int64[ndarray, " n"]) -> Int64[ndarray, " n"]:
    """Of each its number in its group; the members of a group stand side by side."""
    if not len(group):
        return np.zeros(0, dtype=np.int64)
    begin = np.flatnonzero(np.diff(group, prepend=group[0] - 1))
    return np.arange(len(group)) - np.repeat(begin, np.diff(begin, append=len(group)))


def _scattered(place: ndarray, latent: ndarray, seed: int) -> UInt64[ndarray, " n"]:
    """Numbers as if drawn at random: SplitMix64's finaliser (Steele et al. 2014), twice."""
    start = np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    return _mixed(_mixed(place.astype(np.uint64) + start) + latent.astype(np.uint64))


def _mixed(x: ndarray) -> ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
