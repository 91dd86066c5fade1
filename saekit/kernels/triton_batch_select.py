"""Choosing which entries a whole batch keeps, in Triton: exact and repeatable, with one reading of
`pre` as a whole.

That reading finds the largest of each group of neighbouring entries. A sample of `pre`, or the
batch before, gives a bound that somewhat more entries reach than are kept, and only groups whose
largest reaches it are looked into again: by a histogram of their entries' keys (see
`triton_select`), which says where to cut; then to count, and then to write, what each row keeps.
Where the bound misled, a second histogram looks into all groups with an entry above 0.

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
from saekit.kernels.triton_select import key_of, keys_of

_GROUP = 32
_AT_ONCE = 256
"""Groups whose largest a program finds at a time."""
_CHUNK = 8
"""Groups that a program looks into at a time. Of one warp, and so few that many programs run at a
time: what a row keeps is little, and what takes long is to wait for it."""
_KEPT_BLOCK = 64
"""Kept entries of a row that are written at a time."""
_BINS = 1 << 15
_SAMPLE = 1 << 18
_MARGIN = 8
"""Keys of bfloat16 below the last cut from which on a batch is looked into: about 6 %."""
_ROWS_AT_ONCE = 8_192


def batch_topk_select(
    pre: Float[Tensor, "batch d_sae"], n_kept: int
) -> tuple[Float[Tensor, " kept"], Int[Tensor, " kept"], Int[Tensor, " offsets"]]:
    """The n_kept largest entries above 0 of the whole matrix, all where there are fewer: values,
    latents (int32) and the offsets of the rows (int64). Of equal entries those of the first rows,
    and in a row of the first latents, are kept. The host waits once, for how many there are."""
    keys_of(pre)
    n_kept = min(n_kept, pre.numel())
    offsets = torch.zeros(len(pre) + 1, dtype=torch.int64, device=pre.device)
    if n_kept <= 0 or pre.numel() == 0:
        return pre.new_empty(0), pre.new_empty(0, dtype=torch.int32), offsets
    cut = torch.stack([_sampled_bound(pre, n_kept), pre.new_zeros((), dtype=torch.int32)])
    search = _search(pre, n_kept, offsets, cut, margin=0)
    total = int(offsets[-1])
    values = pre.new_empty(total)
    indices = torch.empty(total, dtype=torch.int32, device=pre.device)
    if total:
        _fill(pre, search, offsets, values, indices)
    return values, indices, offsets


def batch_topk_into(
    pre: Float[Tensor, "batch d_sae"],
    *,
    values: Float[Tensor, " most"],
    indices: Int[Tensor, " most"],
    rows: Int[Tensor, " most"],
    offsets: Int[Tensor, " offsets"],
    count: Int[Tensor, " d_sae"],
    rank: Int[Tensor, " most"],
    cut: Int[Tensor, "2"],
) -> None:
    """As `batch_topk_select` of `most` entries, into memory that is given, and without waiting for
    the device: where fewer are above 0, places from `offsets[-1]` on are left as they are, but for
    a rank of -1. `rows` says each entry's row; `count` and `rank` are as for
    `triton_select.topk_select`. `cut` (int32, zeros at first) is what the last batch was cut at:
    it says where this one is looked into, and not what is kept."""
    search = _search(pre, len(values), offsets, cut, margin=_MARGIN)
    rank.fill_(-1)
    _fill(pre, search, offsets, values, indices, rows, count, rank)


@dataclass(frozen=True)
class _Search:
    """What is known before entries are written."""

    groups: Int[Tensor, "batch group"]
    """Those that are looked into, row after row."""
    n_groups: Int[Tensor, " batch"]
    """How many of them a row has."""
    cut: Int[Tensor, "2"]
    """Key of the smallest entry that is kept, 0 where all above 0 are; how many lie above."""
    equal: Int[Tensor, " batch"]
    """How many entries with that key a row keeps."""


def _search(pre: Tensor, n_kept: int, offsets: Tensor, cut: Tensor, margin: int) -> _Search:
    """Writes the offsets of what is kept, and `cut`, which says before where to look: from `margin`
    keys of bfloat16 below on."""
    (batch, d_sae), device = pre.shape, pre.device
    keys = keys_of(pre)
    n_groups = -(-d_sae // _GROUP)
    largest = keys.new_empty(batch, n_groups)
    at_once = min(_AT_ONCE, power(n_groups))
    small = n_groups < 1 << 15
    groups = torch.empty(
        batch, n_groups, dtype=torch.int16 if small else torch.int32, device=device
    )
    # Keys have 15 bits that are told apart at once, and in float32 16 more.
    shift = 0 if pre.dtype.itemsize == 2 else 16
    fine = 1 << shift if shift else 0
    # One block of memory, so that all of it is cleared at once.
    counters = torch.zeros(3 * batch + 1 + _BINS + fine, dtype=torch.int32, device=device)
    sizes = (batch, batch, batch, 1, _BINS, fine)
    marked, larger, equal, found, bins, fine_bins = counters.split(sizes)
    looked = {"GROUP": _GROUP, "CHUNK": min(_CHUNK, power(n_groups)), "num_warps": 1}
    for again in (False, True):
        # The second does nothing where the first has found enough.
        begins = {"AGAIN": again, "SHIFT": shift, "MARGIN": margin << shift}
        _mark_kernel[(batch,)](
            keys,
            largest,
            groups,
            marked,
            found,
            cut,
            n_kept,
            d_sae,
            n_groups,
            GROUP=_GROUP,
            AT_ONCE=at_once,
            EVEN=d_sae % (_GROUP * at_once) == 0,
            GROUPS_BLOCK=power(n_groups),
            num_warps=4,
            **begins,
        )
        _histogram_kernel[(batch,)](
            keys, groups, marked, bins, found, cut, n_kept, d_sae, n_groups, **begins, **looked
        )
    _cut_kernel[(1,)](bins, cut, n_kept, N=_BINS, FINE=False, ROUGH=shift > 0, num_warps=16)
    if shift:
        # The rest of the bits, within the bin.
        _inside_kernel[(batch,)](
            keys, groups, marked, fine_bins, cut, d_sae, n_groups, SHIFT=shift, **looked
        )
        _cut_kernel[(1,)](fine_bins, cut, n_kept, N=fine, FINE=True, ROUGH=False, num_warps=16)
    _count_kernel[(batch,)](keys, groups, marked, cut, larger, equal, d_sae, n_groups, **looked)
    block = min(_ROWS_AT_ONCE, power(batch))
    _offsets_kernel[(1,)](larger, equal, cut, offsets, n_kept, batch, BLOCK=block, num_warps=8)
    return _Search(groups, marked, cut, equal)


def _fill(
    pre: Tensor,
    search: _Search,
    offsets: Tensor,
    values: Tensor,
    indices: Tensor,
    rows: Tensor | None = None,
    count: Tensor | None = None,
    rank: Tensor | None = None,
) -> None:
    keys = keys_of(pre)
    batch, n_groups = search.groups.shape
    _fill_kernel[(batch,)](
        keys,
        search.groups,
        search.n_groups,
        search.cut,
        search.equal,
        offsets,
        values.view(keys.dtype),
        indices,
        rows,
        count,
        rank,
        pre.shape[1],
        n_groups,
        GROUP=_GROUP,
        CHUNK=min(_CHUNK, power(n_groups)),
        KEPT_BLOCK=_KEPT_BLOCK,
        COUNT=count is not None,
        num_warps=1,
    )


def _sampled_bound(pre: Tensor, n_kept: int) -> Tensor:
    """A key that probably more than n_kept entries reach."""
    flat = pre.flatten()
    # Odd, so that the sample is not taken from a few columns alone.
    stride = flat.numel() // _SAMPLE | 1
    sample = flat[::stride]
    # Half as many again as wanted, so that a sample rarely gives too high a bound.
    place = 3 * n_kept // (2 * stride) + 16
    if place >= len(sample):
        return torch.ones((), dtype=torch.int32, device=pre.device)
    bound = sample.float().topk(place, sorted=False).values.min().to(pre.dtype)
    return keys_of(bound[None]).to(torch.int32)[0].clamp_min(1)


@triton.jit
@no_type_check
def _cut_kernel(bins, cut, n_kept, N: tl.constexpr, FINE: tl.constexpr, ROUGH: tl.constexpr):
    # The bin in which the n-th largest lies, -1 where there are fewer, and how many lie above.
    # FINE: within the bin that is given. ROUGH: where it is to be looked into yet.
    before = 0
    if FINE:
        before = tl.load(cut + 1)
    wanted = n_kept - before
    # From the top: first 256 parts, then the bins of the one in which it lies.
    part, within = tl.arange(0, 256), tl.arange(0, N // 256)
    at = (255 - part)[:, None] * (N // 256) + within[None, :]
    n = tl.sum(tl.load(bins + at).to(tl.int64), axis=1)
    short = tl.cumsum(n, axis=0) < wanted
    above = tl.sum(tl.where(short, n, 0))
    last = 255 - tl.sum(short.to(tl.int32))
    first = tl.maximum(last, 0) * (N // 256)
    n = tl.load(bins + first + N // 256 - 1 - within).to(tl.int64)
    short = above + tl.cumsum(n, axis=0) < wanted
    place = tl.where(last < 0, -1, first + N // 256 - 1 - tl.sum(short.to(tl.int32)))
    above = (above + tl.sum(tl.where(short & (last >= 0), n, 0))).to(tl.int32)
    if FINE:
        rough = tl.load(cut)
        place = tl.where((rough < 0) | (place < 0), 0, rough * N + place)
    elif not ROUGH:
        place = tl.maximum(place, 0)
    tl.store(cut, place)
    tl.store(cut + 1, before + above)


@triton.jit
@no_type_check
def _offsets_kernel(larger, equal, cut, offsets, n_kept, batch, BLOCK: tl.constexpr):
    # Of the equal ones as many as are missing are kept, from the first rows on.
    missing = (n_kept - tl.load(cut + 1)).to(tl.int64)
    missing = tl.where(tl.load(cut) == 0, 0, missing)
    total = tl.cast(0, tl.int64)
    tl.store(offsets, total)
    for first in range(0, batch, BLOCK):
        row = first + tl.arange(0, BLOCK)
        same = tl.load(equal + row, mask=row < batch, other=0).to(tl.int64)
        taken = tl.minimum(tl.maximum(missing - tl.cumsum(same, axis=0) + same, 0), same)
        tl.store(equal + row, taken.to(tl.int32), mask=row < batch)
        kept = taken + tl.load(larger + row, mask=row < batch, other=0)
        tl.store(offsets + 1 + row, total + tl.cumsum(kept, axis=0), mask=row < batch)
        total += tl.sum(kept)
        missing -= tl.sum(same)


@triton.jit
@no_type_check
def _bound(cut, SHIFT: tl.constexpr, MARGIN: tl.constexpr):
    # A bound inside a bin would leave part of it uncounted.
    return tl.maximum((tl.load(cut) - MARGIN) >> SHIFT << SHIFT, 1)


@triton.jit
@no_type_check
def _mark_kernel(
    keys,
    largest,
    groups,
    marked,
    found,
    cut,
    n_kept,
    d_sae,
    n_groups,
    AGAIN: tl.constexpr,
    SHIFT: tl.constexpr,
    MARGIN: tl.constexpr,
    GROUP: tl.constexpr,
    AT_ONCE: tl.constexpr,
    EVEN: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
):
    # Marks the groups with a key from the bound on; AGAIN: where too few keys were found, all with
    # one above 0.
    row = tl.program_id(0).to(tl.int64)
    least = _bound(cut, SHIFT, MARGIN)
    go = True
    if AGAIN:
        go = tl.load(found) < n_kept
        least = 1
    else:
        within = tl.arange(0, GROUP)
        for first in range(0, n_groups, AT_ONCE):
            group = first + tl.arange(0, AT_ONCE)
            latent = group[:, None] * GROUP + within[None, :]
            if EVEN:
                bits = tl.load(keys + row * d_sae + latent)
            else:
                bits = tl.load(keys + row * d_sae + latent, mask=latent < d_sae, other=0)
            tl.store(largest + row * n_groups + group, tl.max(bits, axis=1), mask=group < n_groups)
        # Others wrote what is read now.
        tl.debug_barrier()
    if go:
        group = tl.arange(0, GROUPS_BLOCK)
        there = group < n_groups
        top = tl.load(largest + row * n_groups + group, mask=there, other=0)
        mark = there & (key_of(top) >= least)
        before = tl.cumsum(mark.to(tl.int32), axis=0)
        place = groups + row * n_groups + before - 1
        tl.store(place, group.to(groups.dtype.element_ty), mask=mark)
        tl.store(marked + row, tl.max(before))


@triton.jit
@no_type_check
def _entries(
    keys, groups, row, first, n, d_sae, n_groups, GROUP: tl.constexpr, CHUNK: tl.constexpr
):
    # The keys of the next groups of a row, in order, and their latents; -1 where there is none.
    at = first + tl.arange(0, CHUNK)
    group = tl.load(groups + row * n_groups + at, mask=at < n, other=0).to(tl.int32)
    latent = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    there = (at < n)[:, None] & (latent < d_sae)
    bits = tl.load(keys + row * d_sae + latent, mask=there, other=0)
    key = tl.where(there, key_of(bits), -1)
    return tl.reshape(key, [CHUNK * GROUP]), tl.reshape(latent, [CHUNK * GROUP])


@triton.jit
@no_type_check
def _histogram_kernel(
    keys,
    groups,
    marked,
    bins,
    found,
    cut,
    n_kept,
    d_sae,
    n_groups,
    AGAIN: tl.constexpr,
    SHIFT: tl.constexpr,
    MARGIN: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # Counts keys from the bound on by their bits above SHIFT; AGAIN: those below it.
    row = tl.program_id(0).to(tl.int64)
    least = _bound(cut, SHIFT, MARGIN)
    most = 0x7F800001
    n = tl.load(marked + row)
    if AGAIN:
        most = least - 1
        least = 1
        n = tl.where(tl.load(found) < n_kept, n, 0)
    total = tl.zeros([CHUNK * GROUP], tl.int32)
    for first in range(0, n, CHUNK):
        key, _ = _entries(keys, groups, row, first, n, d_sae, n_groups, GROUP, CHUNK)
        counted = (key >= least) & (key <= most)
        tl.atomic_add(bins + (key >> SHIFT), 1, mask=counted, sem="relaxed")
        total += counted.to(tl.int32)
    if not AGAIN:
        tl.atomic_add(found, tl.sum(total), sem="relaxed")


@triton.jit
@no_type_check
def _inside_kernel(
    keys,
    groups,
    marked,
    bins,
    begins,
    d_sae,
    n_groups,
    SHIFT: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # Counts the keys that begin with the given bits by the rest of them.
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(marked + row)
    prefix = tl.load(begins)
    for first in range(0, n, CHUNK):
        key, _ = _entries(keys, groups, row, first, n, d_sae, n_groups, GROUP, CHUNK)
        counted = (key > 0) & (key >> SHIFT == prefix)
        tl.atomic_add(bins + (key & ((1 << SHIFT) - 1)), 1, mask=counted, sem="relaxed")


@triton.jit
@no_type_check
def _count_kernel(
    keys,
    groups,
    marked,
    cut,
    larger,
    equal,
    d_sae,
    n_groups,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(marked + row)
    bound = tl.load(cut)
    n_larger = tl.zeros([CHUNK * GROUP], tl.int32)
    n_equal = tl.zeros([CHUNK * GROUP], tl.int32)
    for first in range(0, n, CHUNK):
        key, _ = _entries(keys, groups, row, first, n, d_sae, n_groups, GROUP, CHUNK)
        n_larger += (key > bound).to(tl.int32)
        n_equal += (key == bound).to(tl.int32)
    tl.store(larger + row, tl.sum(n_larger))
    tl.store(equal + row, tl.sum(n_equal))


@triton.jit
@no_type_check
def _fill_kernel(
    keys,
    groups,
    marked,
    cut,
    equal,
    offsets,
    values,
    indices,
    rows,
    count,
    rank,
    d_sae,
    n_groups,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    KEPT_BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(marked + row)
    bound = tl.load(cut)
    missing = tl.load(equal + row)
    out = tl.load(offsets + row)
    for first in range(0, n, CHUNK):
        key, latent = _entries(keys, groups, row, first, n, d_sae, n_groups, GROUP, CHUNK)
        larger = (key > bound).to(tl.int32)
        same = (key == bound).to(tl.int32)
        # Both counts in one: so many entries at most that neither runs over.
        before = tl.cumsum((larger << 16) + same, axis=0)
        same_before = (before & 0xFFFF) - same
        kept = (larger > 0) | ((same > 0) & (same_before < missing))
        place = out + (before >> 16) - larger + tl.minimum(same_before, missing)
        tl.store(indices + place, latent, mask=kept)
        last = tl.max(before)
        taken = tl.minimum(missing, tl.sum(same))
        out += (last >> 16) + taken
        missing -= taken
    # Others wrote what is read now: few entries, one beside the other.
    tl.debug_barrier()
    for begin in range(tl.load(offsets + row), out, KEPT_BLOCK):
        at = begin + tl.arange(0, KEPT_BLOCK)
        there = at < out
        latent = tl.load(indices + at, mask=there, other=0)
        bits = tl.load(keys + row * d_sae + latent, mask=there, other=0)
        # As it was compared: of all NaN the one that is the largest.
        tl.store(values + at, key_of(bits).to(values.dtype.element_ty), mask=there)
        if COUNT:
            tl.store(rows + at, tl.zeros_like(latent) + row.to(tl.int32), mask=there)
            own = tl.atomic_add(count + latent, 1, mask=there, sem="relaxed")
            tl.store(rank + at, own, mask=there)
