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

from saekit.kernels.triton_index import LatentIndex, multiprocessors, power


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


def row_config(d: int, narrow: bool = False) -> RowConfig:
    """What was quickest on an H200 for widths of 768, 2,048 and 4,096: 32 elements of a row to a
    thread. With more they no longer fit into registers, and with fewer the sums over d cross too
    many warps. `narrow`: of a step whose moments take half of the memory."""
    n_warps = max(1, power(d) // 1_024)
    n_stages = 4 if d <= 2_048 else 3
    if narrow and n_warps == 2:
        return RowConfig(4, n_stages, 8, 128)
    return RowConfig(n_warps, n_stages, max(1, 32 // n_warps), 168 if n_warps == 1 else None)


def row_candidates(d: int) -> list[RowConfig]:
    """What an autotuner may try."""
    n_warps = row_config(d).n_warps
    return [
        RowConfig(warps, n_stages, max(1, 32 // warps), max_registers)
        for warps, max_registers in (
            (n_warps, None),
            (n_warps, 168),
            (2 * n_warps, None),
            (2 * n_warps, 128),
        )
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
    ends: Int[Tensor, " batch"] | None = None,
) -> None:
    """`out = decoded + b_dec - x`; `loss` adds up to `scale` times its squares. With `ends`, a
    row's entries are read up to there, not up to the next row's."""
    _decode(values, indices, offsets, table, b_dec, x, out, loss, scale, config, ends)


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
    ends: Tensor | None = None,
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
        offsets[1:] if ends is None and offsets is not None else ends,
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


@triton.jit
@no_type_check
def _decode_kernel(
    values,
    indices,
    offsets,
    ends,
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
        stop = tl.load(ends + row) if RAGGED else row * K + K
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
