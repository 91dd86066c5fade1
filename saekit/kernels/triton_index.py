"""The entries of a code, latent by latent, in Triton: a counting sort, whose counts the selection
has made.

Axes: d_sae (latents), chunk (some entries of a latent that has many).
"""

# Triton has no types, and is not on every machine.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

HEAVY = 256
"""A latent with more entries than this is shared among programs, so many entries each."""

_SEGMENT_BLOCK = 1_024
_SORTED_AT_ONCE = 8
_SHORT = 16
_MAP_BLOCK = 1_024


class LatentIndex:
    """The entries of a code, latent by latent: `row`, `value` and `position` (in the code) of those
    of latent i stand from `start[i]` on, `count[i]` of them. Latents need not stand in order.

    Those of a latent that has more than `heavy` are cut into chunks of so many, which begin with
    chunk `first_chunk[i]`. Where `deterministic`, a latent's entries are in the order of the code,
    else in any. With `distinct`, which says how many rows a code has, no latent stands twice in a
    row, and those of the latents that have many are put in order quicker. Buffers are made once;
    nothing waits for the device.
    """

    def __init__(
        self,
        d_sae: int,
        n_entries: int,
        device: torch.device,
        *,
        deterministic: bool = False,
        distinct: int = 0,
        ragged: bool = False,
        heavy: int | None = None,
    ) -> None:
        def integers(n: int) -> Tensor:
            return torch.zeros(n, dtype=torch.int32, device=device)

        self.d_sae, self.n_entries, self.heavy = d_sae, n_entries, heavy or HEAVY
        self.deterministic = deterministic
        self.n_chunks = 2 * n_entries // self.heavy + 1
        # One block of memory, so that all of it is cleared at once.
        self._counters = integers(d_sae + 2)
        self.count, self.totals = self._counters[:d_sae], self._counters[d_sae:]
        self.start, self.first_chunk = integers(d_sae), integers(d_sae)
        self.row, self.position = integers(n_entries), integers(n_entries)
        self.value = torch.zeros(n_entries, device=device)
        self.rank = integers(n_entries)
        self._unsorted = integers(n_entries if deterministic else 0)
        self._chunk_latent = integers(self.n_chunks)
        self._chunk_start = integers(self.n_chunks)
        self._chunk_length = integers(self.n_chunks)
        self._programs = multiprocessors(device)
        # Of each latent with chunks, by its first: which entry of a row it is, counted from 1.
        small = not ragged and n_entries < 256 * distinct
        places = torch.uint8 if small else torch.int32
        self._map = torch.zeros(
            self.n_chunks if deterministic else 0, distinct, dtype=places, device=device
        )

    def clear(self) -> None:
        """Before `count` and `rank` are written anew."""
        self._counters.zero_()

    def entries(self) -> tuple[Tensor, Tensor]:
        return self.row, self.value

    def chunks(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """How many there are, at [1] of the first; latents, first entries and lengths."""
        return self.totals, self._chunk_latent, self._chunk_start, self._chunk_length

    def of(
        self,
        values: Float[Tensor, "..."],
        indices: Int[Tensor, "..."],
        *,
        k: int = 0,
        rows: Int[Tensor, " kept"] | None = None,
    ) -> None:
        """Of all entries of a code, whatever their values: with k a row, or of the given rows."""
        grid = (-(-self.n_entries // _SEGMENT_BLOCK),)
        _rank_kernel[grid](indices, self.count, self.rank, self.n_entries, BLOCK=_SEGMENT_BLOCK)
        self.build(values, indices, k=k, rows=rows)

    def build(
        self,
        values: Float[Tensor, "..."],
        indices: Int[Tensor, "..."],
        *,
        k: int = 0,
        rows: Int[Tensor, " kept"] | None = None,
        dead: tuple[Int[Tensor, " d_sae"], Int[Tensor, " d_sae"], int] | None = None,
        firing: Int[Tensor, " d_sae"] | None = None,
    ) -> None:
        """From `count` and `rank`, as they were filled since `clear`; entries of rank -1 are left
        out. With `dead`, `since` (int64) grows by so many rows, and is 0 where a latent has
        entries, whose number is added to `fired` (int64). `firing` says how many of a latent's
        entries count so; not given, all do."""
        since, fired, n_rows = dead or (None, None, 0)
        _segment_kernel[(-(-self.d_sae // _SEGMENT_BLOCK),)](
            self.count,
            self.start,
            self.totals,
            self.first_chunk,
            self._chunk_latent,
            self._chunk_start,
            self._chunk_length,
            since,
            fired,
            self.count if firing is None else firing,
            n_rows,
            self.d_sae,
            HEAVY=self.heavy,
            DEAD=dead is not None,
            BLOCK=_SEGMENT_BLOCK,
        )
        grid = (-(-self.n_entries // _SEGMENT_BLOCK),)
        target = self._unsorted if self.deterministic else self.position
        code = {"K": k, "RAGGED": rows is not None}
        mapped = self._map.numel() > 0
        _scatter_kernel[grid](
            values,
            indices,
            self.rank,
            rows,
            self.start,
            target,
            self.row,
            self.value,
            self.count,
            self.first_chunk,
            self._map,
            self._map.shape[1],
            self.n_entries,
            HEAVY=self.heavy,
            MAPPED=mapped,
            ONLY_POSITIONS=self.deterministic,
            BLOCK=_SEGMENT_BLOCK,
            **code,
        )
        if not self.deterministic:
            return
        out = values, rows, self.position, self.row, self.value
        _sort_kernel[(-(-self.d_sae // _SORTED_AT_ONCE),)](
            target,
            *out,
            self.start,
            self.count,
            self.d_sae,
            HEAVY=self.heavy,
            LATENTS=_SORTED_AT_ONCE,
            SHORT=_SHORT,
            num_warps=1,
            **code,
        )
        if mapped:
            _unmap_kernel[(8 * self._programs,)](
                *out,
                self.start,
                self._map,
                self._map.shape[1],
                *self.chunks(),
                BLOCK=_MAP_BLOCK,
                num_warps=4,
                **code,
            )
            return
        _sort_chunks_kernel[(8 * self._programs,)](
            target, *out, self.start, self.count, *self.chunks(), num_warps=4, **code
        )


def power(n: int) -> int:
    """The power of two that is n or next above."""
    return 1 << max(0, n - 1).bit_length()


def multiprocessors(device: torch.device) -> int:
    """Of the GPU; in the interpreter a few."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit
@no_type_check
def _rank_kernel(indices, count, rank, n_entries, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    latent = tl.load(indices + at, mask=at < n_entries, other=0)
    place = tl.atomic_add(count + latent, 1, mask=at < n_entries, sem="relaxed")
    tl.store(rank + at, place, mask=at < n_entries)


@triton.jit
@no_type_check
def _segment_kernel(
    count,
    start,
    totals,
    first_chunk,
    chunk_latent,
    chunk_start,
    chunk_length,
    since,
    fired,
    firing,
    n_rows,
    d_sae,
    HEAVY: tl.constexpr,
    DEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A block of latents takes the next free places, whichever block comes first.
    latent = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = latent < d_sae
    n = tl.load(count + latent, mask=there, other=0)
    first = tl.atomic_add(totals, tl.sum(n), sem="relaxed") + tl.cumsum(n, axis=0) - n
    tl.store(start + latent, first, mask=there)
    chunks = tl.where(n > HEAVY, (n + HEAVY - 1) // HEAVY, 0)
    most = tl.max(chunks)
    if most > 0:
        chunk = tl.atomic_add(totals + 1, tl.sum(chunks), sem="relaxed")
        chunk += tl.cumsum(chunks, axis=0) - chunks
        tl.store(first_chunk + latent, chunk, mask=there)
        for i in range(0, most):
            tl.store(chunk_latent + chunk + i, latent, mask=i < chunks)
            tl.store(chunk_start + chunk + i, first + i * HEAVY, mask=i < chunks)
            length = tl.minimum(n - i * HEAVY, HEAVY)
            tl.store(chunk_length + chunk + i, length, mask=i < chunks)
    if DEAD:
        rows = tl.load(firing + latent, mask=there, other=0)
        quiet = tl.load(since + latent, mask=there, other=0) + n_rows
        tl.store(since + latent, tl.where(rows > 0, 0, quiet), mask=there)
        before = tl.load(fired + latent, mask=there, other=0)
        tl.store(fired + latent, before + rows, mask=there)


@triton.jit
@no_type_check
def _put(
    at, place, there, values, rows, position, row, value, K: tl.constexpr, RAGGED: tl.constexpr
):
    # The entries at these positions of the code, to their places in the index.
    which = tl.load(rows + at, mask=there, other=0) if RAGGED else at // K
    entry = tl.load(values + at, mask=there, other=0.0).to(tl.float32)
    tl.store(position + place, at, mask=there)
    tl.store(row + place, which, mask=there)
    tl.store(value + place, entry, mask=there)


@triton.jit
@no_type_check
def _scatter_kernel(
    values,
    indices,
    rank,
    rows,
    start,
    position,
    row,
    value,
    count,
    first_chunk,
    places,
    n_rows,
    n_entries,
    K: tl.constexpr,
    RAGGED: tl.constexpr,
    HEAVY: tl.constexpr,
    MAPPED: tl.constexpr,
    ONLY_POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(rank + at, mask=at < n_entries, other=-1)
    there = place >= 0
    latent = tl.load(indices + at, mask=there, other=0)
    place += tl.load(start + latent, mask=there, other=0)
    if MAPPED:
        heavy = there & (tl.load(count + latent, mask=there, other=0) > HEAVY)
        # The row, and where in it; a ragged code has rows of any length.
        which = tl.load(rows + at, mask=heavy, other=0) if RAGGED else at // K
        within = at if RAGGED else at % K
        chunk = tl.load(first_chunk + latent, mask=heavy, other=0).to(tl.int64)
        tl.store(
            places + chunk * n_rows + which, (within + 1).to(places.dtype.element_ty), mask=heavy
        )
        there = there & ~heavy
    if ONLY_POSITIONS:
        tl.store(position + place, at, mask=there)
    else:
        _put(at, place, there, values, rows, position, row, value, K, RAGGED)


@triton.jit
@no_type_check
def _sort_span(
    unsorted,
    values,
    rows,
    position,
    row,
    value,
    start,
    n,
    first,
    stop,
    K: tl.constexpr,
    RAGGED: tl.constexpr,
    MINE: tl.constexpr,
    OTHERS: tl.constexpr,
):
    # Entries first..stop of a latent's n, each to the place that so many others come before.
    for begin in range(first, stop, MINE):
        i = begin + tl.arange(0, MINE)
        mine = tl.load(unsorted + start + i, mask=i < stop, other=0)
        place = tl.zeros([MINE], tl.int32)
        for other in range(0, n, OTHERS):
            j = other + tl.arange(0, OTHERS)
            others = tl.load(unsorted + start + j, mask=j < n, other=0x7FFFFFFF)
            place += tl.sum((others[None, :] < mine[:, None]).to(tl.int32), axis=1)
        _put(mine, start + place, i < stop, values, rows, position, row, value, K, RAGGED)


@triton.jit
@no_type_check
def _sort_kernel(
    unsorted,
    values,
    rows,
    position,
    row,
    value,
    start,
    count,
    d_sae,
    HEAVY: tl.constexpr,
    LATENTS: tl.constexpr,
    SHORT: tl.constexpr,
    K: tl.constexpr,
    RAGGED: tl.constexpr,
):
    # Most latents have few entries: several at a time.
    first = tl.program_id(0) * LATENTS
    latent = first + tl.arange(0, LATENTS)
    n = tl.load(count + latent, mask=latent < d_sae, other=0)
    begin = tl.load(start + latent, mask=latent < d_sae, other=0)
    i = tl.arange(0, SHORT)
    there = (i[None, :] < n[:, None]) & (n <= SHORT)[:, None]
    at = tl.load(unsorted + begin[:, None] + i[None, :], mask=there, other=0x7FFFFFFF)
    place = tl.sum((at[:, None, :] < at[:, :, None]).to(tl.int32), axis=2)
    _put(at, begin[:, None] + place, there, values, rows, position, row, value, K, RAGGED)
    if tl.max(n) > SHORT:
        for one in range(first, tl.minimum(first + LATENTS, d_sae)):
            n_one = tl.load(count + one)
            if (n_one > SHORT) & (n_one <= HEAVY):
                _sort_span(
                    unsorted,
                    values,
                    rows,
                    position,
                    row,
                    value,
                    tl.load(start + one),
                    n_one,
                    0,
                    n_one,
                    K,
                    RAGGED,
                    32,
                    32,
                )


@triton.jit
@no_type_check
def _sort_chunks_kernel(
    unsorted,
    values,
    rows,
    position,
    row,
    value,
    start,
    count,
    totals,
    chunk_latent,
    chunk_start,
    chunk_length,
    K: tl.constexpr,
    RAGGED: tl.constexpr,
):
    for chunk in range(tl.program_id(0), tl.load(totals + 1), tl.num_programs(0)):
        latent = tl.load(chunk_latent + chunk)
        begin = tl.load(start + latent)
        first = tl.load(chunk_start + chunk) - begin
        _sort_span(
            unsorted,
            values,
            rows,
            position,
            row,
            value,
            begin,
            tl.load(count + latent),
            first,
            first + tl.load(chunk_length + chunk),
            K,
            RAGGED,
            128,
            64,
        )


@triton.jit
@no_type_check
def _unmap_kernel(
    values,
    rows,
    position,
    row,
    value,
    start,
    places,
    n_rows,
    totals,
    chunk_latent,
    chunk_start,
    chunk_length,
    K: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The entries of latents with chunks, row after row; the map is left empty.
    for chunk in range(tl.program_id(0), tl.load(totals + 1), tl.num_programs(0)):
        place = tl.load(chunk_start + chunk)
        if place == tl.load(start + tl.load(chunk_latent + chunk)):
            base = places + tl.cast(chunk, tl.int64) * n_rows
            for first in range(0, n_rows, BLOCK):
                i = first + tl.arange(0, BLOCK)
                within = tl.load(base + i, mask=i < n_rows, other=0).to(tl.int32)
                tl.store(base + i, tl.zeros([BLOCK], places.dtype.element_ty), mask=i < n_rows)
                there = within > 0
                before = tl.cumsum(there.to(tl.int32), axis=0)
                at = within - 1 if RAGGED else i * K + within - 1
                _put(at, place + before - 1, there, values, rows, position, row, value, K, RAGGED)
                place += tl.max(before)
