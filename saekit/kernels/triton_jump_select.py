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
_AT_ONCE = 128
"""Groups that a program marks at a time."""
_CHUNK = 64
"""Groups that a program looks into at a time."""


@dataclass(frozen=True)
class JumpSearch:
    """What is known before entries are written; buffers are made once."""

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
    _mark_kernel[(batch,)](
        pre,
        level,
        jump,
        into.groups,
        into.n_groups,
        into.kept,
        into.fires,
        d_sae,
        n_groups,
        GROUP=_GROUP,
        AT_ONCE=min(_AT_ONCE, power(n_groups)),
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
    )


@triton.jit
@no_type_check
def _near(pre, level, row, latent, there, factor, half, d_sae):
    # Entries of a row, which of them fire, and which are kept.
    entry = tl.load(pre + row * d_sae + latent, mask=there, other=0.0).to(tl.float32)
    threshold = tl.load(level + latent, mask=there, other=0.0) * factor
    return entry, there & (entry > threshold), there & (entry > threshold - half)


@triton.jit
@no_type_check
def _mark_kernel(
    pre,
    level,
    jump,
    groups,
    marked,
    kept,
    fires,
    d_sae,
    n_groups,
    GROUP: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(jump)
    half = tl.load(jump + 1)
    within = tl.arange(0, GROUP)
    n_marked = 0
    n_kept = tl.zeros([AT_ONCE], tl.int32)
    n_fires = tl.zeros([AT_ONCE], tl.int32)
    for first in range(0, n_groups, AT_ONCE):
        group = first + tl.arange(0, AT_ONCE)
        latent = group[:, None] * GROUP + within[None, :]
        _, fire, keep = _near(pre, level, row, latent, latent < d_sae, factor, half, d_sae)
        here = tl.sum(keep.to(tl.int32), axis=1)
        n_kept += here
        n_fires += tl.sum(fire.to(tl.int32), axis=1)
        mark = here > 0
        before = tl.cumsum(mark.to(tl.int32), axis=0)
        place = groups + row * n_groups + n_marked + before - 1
        tl.store(place, group.to(groups.dtype.element_ty), mask=mark)
        n_marked += tl.max(before)
    tl.store(marked + row, n_marked)
    tl.store(kept + row, tl.sum(n_kept))
    tl.store(fires + row, tl.sum(n_fires))


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
        there = (at < n)[:, None] & (latent < d_sae)
        entry, fire, keep = _near(pre, level, row, latent, there, factor, half, d_sae)
        latent = tl.reshape(latent, [CHUNK * GROUP])
        entry = tl.reshape(entry, [CHUNK * GROUP])
        fire = tl.reshape(fire.to(tl.int32), [CHUNK * GROUP])
        keep = tl.reshape(keep.to(tl.int32), [CHUNK * GROUP])
        other = keep - fire
        # Both counts in one: so few entries that neither runs over.
        before = tl.cumsum((fire << 16) + other, axis=0)
        place = tl.where(
            fire > 0, out_fires + (before >> 16) - 1, out_others + (before & 0xFFFF) - 1
        )
        there = keep > 0
        tl.store(indices + place, latent, mask=there)
        value = tl.where(fire > 0, entry, 0.0)
        tl.store(values + place, value.to(values.dtype.element_ty), mask=there)
        tl.store(rows + place, tl.zeros_like(latent) + row.to(tl.int32), mask=there)
        own = tl.atomic_add(count + latent, 1, mask=there, sem="relaxed")
        tl.store(rank + place, own, mask=there)
        tl.atomic_add(firing + latent, 1, mask=fire > 0, sem="relaxed")
        last = tl.max(before)
        out_fires += last >> 16
        out_others += tl.sum(other)
