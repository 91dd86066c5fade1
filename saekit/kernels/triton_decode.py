"""Sums of weighted rows of a table, and their gradients, in Triton.

Forward, a row's latents are read from the table a slice of d at a time, all rows for the first
slice first, so that a slice of the whole table stays in a GPU's second-level cache. Backward goes
latent by latent, over an index of the entries that belong to each: a latent's row of the gradient
is summed up in registers and written once, and nothing of shape [batch * k, d] is made.

Sums are in float32. Axes: batch, k (entries a row), kept (entries of all rows, row after row),
d_sae (latents), d, chunk (some entries of a latent that has many).
"""

# Triton has no types, and is not on every machine.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false

from dataclasses import dataclass
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


@dataclass(frozen=True)
class DecodeConfig:
    """How a row is decoded: so many columns a program, so many entries a turn. One warp each: with
    several, each turn's sum would have to cross from warp to warp."""

    columns: int
    entries: int


@dataclass(frozen=True)
class RowConfig:
    """How programs that hold whole rows of width d go about them."""

    n_warps: int
    n_stages: int
    """Entries of a latent on their way from memory at a time."""
    programs: int
    """For each multiprocessor."""
    max_registers: int | None = None
    """Of a thread, where fewer than the compiler would take let more programs run at a time."""


def decode_config(d: int, k: int) -> DecodeConfig:
    """What was quickest on an H200 for widths of 768, 2,048 and 4,096."""
    entries = 16 if d <= 1_024 else 64 if d < 4_096 else 32
    return DecodeConfig(min(128 if d >= 4_096 else 256, power(d)), max(1, min(entries, power(k))))


def decode_candidates(d: int, k: int) -> list[DecodeConfig]:
    """What an autotuner may try."""
    widths = [width for width in (64, 128, 256) if width <= power(d)] or [power(d)]
    return [DecodeConfig(width, n) for width in widths for n in (16, 32, 64) if n <= power(k)]


def row_config(d: int) -> RowConfig:
    """What was quickest on an H200 for widths of 768, 2,048 and 4,096: 32 elements of a row to a
    thread. With more they no longer fit into registers, and with fewer the sums over d cross too
    many warps."""
    n_warps = max(1, power(d) // 1_024)
    n_stages = 4 if d <= 2_048 else 3
    return RowConfig(n_warps, n_stages, max(1, 32 // n_warps), 168 if n_warps == 1 else None)


def row_candidates(d: int) -> list[RowConfig]:
    """What an autotuner may try."""
    n_warps = row_config(d).n_warps
    return [
        RowConfig(warps, n_stages, max(1, 32 // warps), max_registers)
        for warps, max_registers in ((n_warps, None), (n_warps, 168), (2 * n_warps, None))
        for n_stages in (2, 3, 4)
    ]


def weighted_rows(
    values: Float[Tensor, "..."],
    indices: Int[Tensor, "..."],
    offsets: Int[Tensor, " offsets"] | None,
    table: Float[Tensor, "d_sae d"],
    config: DecodeConfig | None = None,
) -> Float[Tensor, "batch d"]:
    """`out[b] = sum_j values[b, j] * table[indices[b, j]]`, in the table's dtype. Indices may be
    int32 or int64."""
    batch = len(indices) if offsets is None else len(offsets) - 1
    out = table.new_empty(batch, table.shape[1])
    _decode(values, indices, offsets, table, None, None, out, None, 1.0, config)
    return out


def decode_residual(
    values: Float[Tensor, "..."],
    indices: Int[Tensor, "..."],
    offsets: Int[Tensor, " offsets"] | None,
    table: Float[Tensor, "d_sae d"],
    b_dec: Float[Tensor, " d"],
    x: Float[Tensor, "batch d"],
    out: Float[Tensor, "batch d"],
    loss: Float[Tensor, "slice batch"],
    *,
    scale: float,
    config: DecodeConfig,
) -> None:
    """`out = decoded + b_dec - x`; `loss` adds up to `scale` times its squares."""
    _decode(values, indices, offsets, table, b_dec, x, out, loss, scale, config)


def _decode(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    table: Tensor,
    b_dec: Tensor | None,
    x: Tensor | None,
    out: Tensor,
    loss: Tensor | None,
    scale: float,
    config: DecodeConfig | None,
) -> None:
    batch, d = out.shape
    if out.numel() == 0:
        return
    k = 0 if offsets is not None else indices.shape[1]
    config = config or decode_config(d, k or 32)
    _decode_kernel[(batch, -(-d // config.columns))](
        values.contiguous(),
        indices.contiguous(),
        offsets,
        table.contiguous(),
        b_dec,
        x,
        out,
        loss,
        scale,
        D=d,
        K=k,
        RAGGED=offsets is not None,
        # Few turns are written out when this is compiled.
        LOOP=offsets is not None or k > 8 * config.entries,
        ENTRIES=config.entries,
        COLUMNS=config.columns,
        RESIDUAL=x is not None,
        num_warps=1,
    )


def decode_gradients(
    values: Float[Tensor, "..."],
    indices: Int[Tensor, "..."],
    offsets: Int[Tensor, " offsets"] | None,
    table: Float[Tensor, "d_sae d"],
    grad: Float[Tensor, "batch d"],
    *,
    want_values: bool = True,
    want_table: bool = True,
    deterministic: bool = True,
    config: RowConfig | None = None,
) -> tuple[Float[Tensor, "..."] | None, Float[Tensor, "d_sae d"] | None]:
    """Of `weighted_rows`, with respect to the values and to the table. Where `deterministic`, the
    same bits each time."""
    d_values = torch.empty_like(values) if want_values else None
    d_table = table.new_empty(table.shape) if want_table else None
    if values.numel() == 0 and d_table is not None:
        d_table.zero_()
    if values.numel() == 0 or table.shape[1] == 0 or not (want_values or want_table):
        return None if d_values is None else d_values.zero_(), d_table
    d_sae, d = table.shape
    # A latent's sum of its entries' order alone differs from time to time.
    index = LatentIndex(
        d_sae, values.numel(), values.device, deterministic=deterministic and want_table
    )
    index.clear()
    if offsets is None:
        index.of(values.contiguous(), indices.contiguous(), k=indices.shape[1])
    else:
        rows = torch.arange(len(offsets) - 1, dtype=torch.int32, device=values.device)
        rows = rows.repeat_interleave(offsets.diff(), output_size=values.numel())
        index.of(values.contiguous(), indices.contiguous(), rows=rows)
    config = config or row_config(d)
    block = power(d)
    parts = torch.empty(index.n_chunks if want_table else 1, d, device=values.device)
    programs = multiprocessors(values.device) * config.programs
    shared = {
        "D": d,
        "BLOCK": block,
        "STAGES": config.n_stages,
        "VALUES": want_values,
        "TABLE": want_table,
        "num_warps": config.n_warps,
    }
    grad = grad.contiguous()
    if want_values:
        table = table.contiguous()
    _chunk_gradient_kernel[(programs,)](
        *index.entries(),
        index.position,
        *index.chunks(),
        grad,
        table,
        d_values,
        parts,
        **shared,
    )
    _gradient_kernel[(programs,)](
        *index.entries(),
        index.position,
        index.start,
        index.count,
        index.first_chunk,
        grad,
        table,
        d_values,
        d_table,
        parts,
        d_sae,
        HEAVY=index.heavy,
        **shared,
    )
    return d_values, d_table


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
    ) -> None:
        """From `count` and `rank`, as they were filled since `clear`; entries of rank -1 are left
        out. With `dead`, `since` (int64) grows by so many rows, and is 0 where a latent has
        entries, whose number is added to `fired` (int64)."""
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
def _decode_kernel(
    values,
    indices,
    offsets,
    table,
    b_dec,
    x,
    out,
    loss,
    scale,
    D: tl.constexpr,
    K: tl.constexpr,
    RAGGED: tl.constexpr,
    LOOP: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    # Without a mask where none is needed: D is known when this is compiled.
    inside = column < D
    entry = tl.arange(0, ENTRIES)
    total = tl.zeros([COLUMNS], tl.float32)
    if LOOP:
        begin = tl.load(offsets + row) if RAGGED else row * K
        stop = tl.load(offsets + row + 1) if RAGGED else row * K + K
        for first in range(begin, stop, ENTRIES):
            at = first + entry
            latent = tl.load(indices + at, mask=at < stop, other=0).to(tl.int64)
            value = tl.load(values + at, mask=at < stop, other=0.0).to(tl.float32)
            there = (at < stop)[:, None] & inside[None, :]
            rows = tl.load(table + latent[:, None] * D + column[None, :], mask=there, other=0.0)
            total += tl.sum(rows.to(tl.float32) * value[:, None], axis=0)
    else:
        for first in tl.static_range(0, K, ENTRIES):
            at = first + entry
            latent = tl.load(indices + row * K + at, mask=at < K, other=0).to(tl.int64)
            value = tl.load(values + row * K + at, mask=at < K, other=0.0).to(tl.float32)
            place = table + latent[:, None] * D + column[None, :]
            if D % COLUMNS == 0:
                rows = tl.load(place)
            else:
                rows = tl.load(place, mask=inside[None, :], other=0.0)
            total += tl.sum(rows.to(tl.float32) * value[:, None], axis=0)
    if RESIDUAL:
        total += tl.load(b_dec + column, mask=inside, other=0.0)
        target = tl.load(
            x + row * D + column, mask=inside, other=0.0, eviction_policy="evict_first"
        )
        total -= target.to(tl.float32)
        part = loss + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + row
        tl.store(part, tl.sum(total * total) * scale)
    tl.store(out + row * D + column, total.to(out.dtype.element_ty), mask=inside)


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
        quiet = tl.load(since + latent, mask=there, other=0) + n_rows
        tl.store(since + latent, tl.where(n > 0, 0, quiet), mask=there)
        before = tl.load(fired + latent, mask=there, other=0)
        tl.store(fired + latent, before + n, mask=there)


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


@triton.jit
@no_type_check
def _sum_entries(
    first,
    n,
    row,
    value,
    position,
    grad,
    weight,
    d_values,
    column,
    inside,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    VALUES: tl.constexpr,
):
    # A latent's entries [first, first + n): their part of its row of the table's gradient. Writes
    # the gradient of each entry's value.
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.range(first, first + n, num_stages=STAGES):
        which = tl.load(row + i).to(tl.int64)
        upstream = tl.load(grad + which * D + column, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(value + i) * upstream
        if VALUES:
            along = tl.sum(upstream * weight)
            tl.store(d_values + tl.load(position + i), along.to(d_values.dtype.element_ty))
    return total


@triton.jit
@no_type_check
def _chunk_gradient_kernel(
    row,
    value,
    position,
    totals,
    chunk_latent,
    chunk_start,
    chunk_length,
    grad,
    table,
    d_values,
    parts,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    VALUES: tl.constexpr,
    TABLE: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < D
    for chunk in range(tl.program_id(0), tl.load(totals + 1), tl.num_programs(0)):
        latent = tl.load(chunk_latent + chunk).to(tl.int64)
        weight = tl.zeros([BLOCK], tl.float32)
        if VALUES:
            weight = tl.load(table + latent * D + column, mask=inside, other=0.0).to(tl.float32)
        total = _sum_entries(
            tl.load(chunk_start + chunk),
            tl.load(chunk_length + chunk),
            row,
            value,
            position,
            grad,
            weight,
            d_values,
            column,
            inside,
            D,
            BLOCK,
            STAGES,
            VALUES,
        )
        if TABLE:
            tl.store(parts + tl.cast(chunk, tl.int64) * D + column, total, mask=inside)


@triton.jit
@no_type_check
def _gradient_kernel(
    row,
    value,
    position,
    start,
    count,
    first_chunk,
    grad,
    table,
    d_values,
    d_table,
    parts,
    d_sae,
    HEAVY: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    VALUES: tl.constexpr,
    TABLE: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < D
    for latent in range(tl.program_id(0), d_sae, tl.num_programs(0)):
        n = tl.load(count + latent)
        place = tl.cast(latent, tl.int64) * D + column
        if n > HEAVY:
            total = tl.zeros([BLOCK], tl.float32)
            if TABLE:
                chunk = tl.load(first_chunk + latent).to(tl.int64)
                # In one order, whichever program made which.
                for i in range(0, (n + HEAVY - 1) // HEAVY):
                    total += tl.load(parts + (chunk + i) * D + column, mask=inside, other=0.0)
        else:
            weight = tl.zeros([BLOCK], tl.float32)
            if VALUES:
                weight = tl.load(table + place, mask=inside, other=0.0).to(tl.float32)
            total = _sum_entries(
                tl.load(start + latent),
                n,
                row,
                value,
                position,
                grad,
                weight,
                d_values,
                column,
                inside,
                D,
                BLOCK,
                STAGES,
                VALUES,
            )
        if TABLE:
            tl.store(d_table + place, total.to(d_table.dtype.element_ty), mask=inside)
