"""Choosing what a JumpReLU's training looks at, in Triton: the entries that fire, and those that do
not, but lie so near their latent's threshold that they move it.

    fires:  pre > threshold           kept:  pre > threshold - half

One reading of `pre` marks the groups of neighbouring entries with any that is kept, and counts;
only marked groups are read again, once the host knows how many entries there are.

Axes: batch, d_sae (latents), group, kept (entries of all rows, row after row).
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

from saekit.kernels.triton_index import power

_GROUP = 32
_ROWS, _AT_ONCE = 4, 32
"""Rows, and groups of each, that a program marks at a time: thresholds are read once for all of
the rows."""
_CHUNK = 8
"""Groups that a program looks into at a time, see `triton_batch_select`."""
_KEPT_BLOCK = 64
"""Kept entries of a row that are written at a time."""


@dataclass(frozen=True)
class JumpSearch:
    """What is known before entries are written; buffers are made once."""

    flags: Int[Tensor, "batch group"]
    """Whether a group has entries that are kept."""
    groups: Int[Tensor, "batch group"]
    """Those with entries that are kept, row after row."""
    n_groups: Int[Tensor, " batch"]
    """How many of them a row has."""
    kept: Int[Tensor, " batch"]
    fires: Int[Tensor, " batch"]
    """How many entries of a row are kept, and how many of these fire."""
    offsets: Int[Tensor, " offsets"]
    """Where rows begin."""
    ends: Int[Tensor, " batch"]
    """Where a row's entries that fire end, which come first."""
    totals: Int[Tensor, "2"]
    """Entries that are kept, and that fire."""

    @classmethod
    def of(cls, batch: int, d_sae: int, device: torch.device) -> "JumpSearch":
        n_groups = -(-d_sae // _GROUP)
        # One block of memory, so that there is one place for what is counted.
        counts = torch.zeros(3, batch, dtype=torch.int32, device=device)
        longs = torch.zeros(2 * batch + 3, dtype=torch.int64, device=device)
        groups = torch.int16 if n_groups < 1 << 15 else torch.int32
        return cls(
            torch.empty(batch, n_groups, dtype=torch.int8, device=device),
            torch.empty(batch, n_groups, dtype=groups, device=device),
            *counts,
            *longs.split((batch + 1, batch, 2)),
        )


def jump_search(
    pre: Float[Tensor, "batch d_sae"],
    level: Float[Tensor, " d_sae"],
    jump: Float[Tensor, "..."],
    into: JumpSearch,
) -> None:
    """Counts. Thresholds are `level * jump[0]`, and half of the window is `jump[1]`."""
    batch, d_sae = pre.shape
    n_groups = into.groups.shape[1]
    _mark_kernel[(-(-batch // _ROWS),)](
        pre,
        level,
        jump,
        into.flags,
        into.groups,
        into.n_groups,
        into.kept,
        into.fires,
        batch,
        d_sae,
        n_groups,
        ROWS=_ROWS,
        GROUP=_GROUP,
        AT_ONCE=min(_AT_ONCE, power(n_groups)),
        GROUPS_BLOCK=power(n_groups),
        num_warps=4,
    )
    torch.cumsum(into.kept, 0, dtype=torch.int64, out=into.offsets[1:])
    torch.add(into.offsets[:-1], into.fires, out=into.ends)
    into.totals[0] = into.offsets[-1]
    torch.sum(into.fires, 0, dtype=torch.int64, out=into.totals[1])


def jump_fill(
    pre: Float[Tensor, "batch d_sae"],
    level: Float[Tensor, " d_sae"],
    jump: Float[Tensor, "..."],
    search: JumpSearch,
    *,
    values: Float[Tensor, " places"],
    indices: Int[Tensor, " places"],
    rows: Int[Tensor, " places"],
    count: Int[Tensor, " d_sae"],
    rank: Int[Tensor, " places"],
    firing: Int[Tensor, " d_sae"],
) -> None:
    """Writes the entries that were counted, those of a row that fire first, each kind in ascending
    order of latents; the value of one that does not fire is 0. To `count` is added how many entries
    each latent has, `rank` is then each one's place among its latent's, in no repeatable order, and
    -1 where there is no entry; to `firing`, how many of them fire."""
    batch, d_sae = pre.shape
    n_groups = search.groups.shape[1]
    rank.fill_(-1)
    _fill_kernel[(batch,)](
        pre,
        level,
        jump,
        search.groups,
        search.n_groups,
        search.offsets,
        search.ends,
        values,
        indices,
        rows,
        count,
        rank,
        firing,
        d_sae,
        n_groups,
        GROUP=_GROUP,
        CHUNK=min(_CHUNK, power(n_groups)),
        KEPT_BLOCK=_KEPT_BLOCK,
        num_warps=1,
    )


@triton.jit
@no_type_check
def _mark_kernel(
    pre,
    level,
    jump,
    flags,
    groups,
    marked,
    kept,
    fires,
    batch,
    d_sae,
    n_groups,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    AT_ONCE: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
):
    begin = tl.program_id(0) * ROWS
    row = (begin + tl.arange(0, ROWS)).to(tl.int64)
    factor = tl.load(jump)
    half = tl.load(jump + 1)
    within = tl.arange(0, GROUP)
    n_kept = tl.zeros([ROWS, AT_ONCE], tl.int32)
    n_fires = tl.zeros([ROWS, AT_ONCE], tl.int32)
    for first in range(0, n_groups, AT_ONCE):
        group = first + tl.arange(0, AT_ONCE)
        latent = group[:, None] * GROUP + within[None, :]
        threshold = tl.load(level + latent, mask=latent < d_sae, other=0.0) * factor
        there = (row < batch)[:, None, None] & (latent < d_sae)[None, :, :]
        place = pre + row[:, None, None] * d_sae + latent[None, :, :]
        entry = tl.load(place, mask=there, other=0.0).to(tl.float32)
        keep = there & (entry > (threshold - half)[None, :, :])
        here = tl.sum(keep.to(tl.int32), axis=2)
        fire = there & (entry > threshold[None, :, :])
        n_kept += here
        n_fires += tl.sum(fire.to(tl.int32), axis=2)
        inside = (row < batch)[:, None] & (group < n_groups)[None, :]
        place = flags + row[:, None] * n_groups + group[None, :]
        tl.store(place, (here > 0).to(tl.int8), mask=inside)
    tl.store(kept + row, tl.sum(n_kept, axis=1), mask=row < batch)
    tl.store(fires + row, tl.sum(n_fires, axis=1), mask=row < batch)
    # Others wrote what is read now.
    tl.debug_barrier()
    group = tl.arange(0, GROUPS_BLOCK)
    for one in range(begin, tl.minimum(begin + ROWS, batch)):
        base = tl.cast(one, tl.int64) * n_groups
        mark = tl.load(flags + base + group, mask=group < n_groups, other=0) > 0
        before = tl.cumsum(mark.to(tl.int32), axis=0)
        tl.store(groups + base + before - 1, group.to(groups.dtype.element_ty), mask=mark)
        tl.store(marked + one, tl.max(before))


@triton.jit
@no_type_check
def _fill_kernel(
    pre,
    level,
    jump,
    groups,
    marked,
    offsets,
    ends,
    values,
    indices,
    rows,
    count,
    rank,
    firing,
    d_sae,
    n_groups,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    KEPT_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(jump)
    half = tl.load(jump + 1)
    n = tl.load(marked + row)
    out_fires = tl.load(offsets + row)
    out_others = tl.load(ends + row)
    for first in range(0, n, CHUNK):
        at = first + tl.arange(0, CHUNK)
        group = tl.load(groups + row * n_groups + at, mask=at < n, other=0).to(tl.int32)
        latent = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        latent = tl.reshape(latent, [CHUNK * GROUP])
        there = tl.reshape((at < n)[:, None] & (tl.arange(0, GROUP) >= 0)[None, :], [CHUNK * GROUP])
        there = there & (latent < d_sae)
        entry = tl.load(pre + row * d_sae + latent, mask=there, other=0.0).to(tl.float32)
        threshold = tl.load(level + latent, mask=there, other=0.0) * factor
        fire = there & (entry > threshold)
        keep = there & (entry > threshold - half)
        other = keep.to(tl.int32) - fire.to(tl.int32)
        # Both counts in one: so few entries that neither runs over.
        before = tl.cumsum((fire.to(tl.int32) << 16) + other, axis=0)
        place = tl.where(fire, out_fires + (before >> 16), out_others + (before & 0xFFFF)) - 1
        tl.store(indices + place, latent, mask=keep)
        last = tl.max(before)
        out_fires += last >> 16
        out_others += tl.sum(other)
    # Others wrote what is read now: few entries, one beside the other.
    tl.debug_barrier()
    for begin in range(tl.load(offsets + row), out_others, KEPT_BLOCK):
        at = begin + tl.arange(0, KEPT_BLOCK)
        there = at < out_others
        fire = at < out_fires
        latent = tl.load(indices + at, mask=there, other=0)
        entry = tl.load(pre + row * d_sae + latent, mask=fire, other=0.0)
        tl.store(values + at, entry.to(values.dtype.element_ty), mask=there)
        tl.store(rows + at, tl.zeros_like(latent) + row.to(tl.int32), mask=there)
        own = tl.atomic_add(count + latent, 1, mask=there, sem="relaxed")
        tl.store(rank + at, own, mask=there)
        tl.atomic_add(firing + latent, 1, mask=fire, sem="relaxed")
