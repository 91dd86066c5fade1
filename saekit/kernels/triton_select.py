"""Choosing which latents a row keeps, in Triton: exact, repeatable, in few readings of `pre`.

A float above 0 has the order of its bits, so keys are the bits read as signed integers, and what is
negative (whose sign bit makes the integer negative) counts as 0. Of equal entries the first are
kept. NaN counts as the largest, unless its sign bit is set.

Axes: batch, d_sae (latents), k (latents kept a row), kept (entries of all rows, row after row).
"""

# Triton has no types, and is not on every machine.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false

from dataclasses import dataclass
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saekit.errors import ConfigError
from saekit.kernels.triton_index import power

_WHOLE = 4_096
"""Rows up to this width are selected from as they are, without groups."""

_MOST_CANDIDATES = 16_384
"""Entries of a row that are held at a time."""

_MOST_GROUPS = 32_768
"""Groups of a row: two counts of them fit into 32 bits."""

FAST_K = 2_048
"""The largest k of the way that reads a row once. Above it a row is read for every bit or so."""

_SCAN_BLOCK = 2_048


@dataclass(frozen=True)
class SelectConfig:
    """How `topk_select` goes about rows of one width."""

    group: int
    """Neighbouring entries of which the largest is found first; 0: the row is held whole; -1: it
    is read for every bit."""
    groups_at_once: int
    n_warps: int


_SCAN = SelectConfig(-1, 0, 4)


def select_config(
    d_sae: int, k: int, group: int | None = None, n_warps: int | None = None
) -> SelectConfig:
    """A choice by the shape; `group` and `n_warps` may be given."""
    if k > FAST_K and d_sae > _MOST_CANDIDATES:
        return _SCAN
    if d_sae <= _WHOLE:
        return SelectConfig(0, 0, 4)
    group = group or 32
    # Few groups would leave little out, and the k that are left must fit.
    while group > 8 and (power(k) * group > _MOST_CANDIDATES or d_sae < 4 * k * group):
        group //= 2
    if d_sae < k * group:
        return SelectConfig(0, 0, 8)
    while d_sae > _MOST_GROUPS * group:
        group *= 2
    if power(k) * group > _MOST_CANDIDATES:
        return _SCAN
    if power(k) * group > _MOST_CANDIDATES // 2:
        # More than fewer threads have registers for.
        n_warps = 16
    n_warps = n_warps or (8 if d_sae > 32_768 else 4)
    # 64 entries to a thread.
    at_once = min(power(-(-d_sae // group)), 2_048 * n_warps // group)
    return SelectConfig(group, at_once, n_warps)


def select_candidates(d_sae: int, k: int) -> list[SelectConfig]:
    """What an autotuner may try."""
    found = {
        select_config(d_sae, k, group, n_warps) for group in (16, 32, 64) for n_warps in (4, 8)
    }
    return sorted(found, key=lambda one: (one.group, one.n_warps))


def topk_select(
    pre: Float[Tensor, "batch d_sae"],
    k: int,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    count: Int[Tensor, " d_sae"] | None = None,
    rank: Int[Tensor, "batch {k}"] | None = None,
    config: SelectConfig | None = None,
) -> tuple[Float[Tensor, "batch {k}"], Int[Tensor, "batch {k}"]]:
    """The k largest of `relu(pre)` in each row, and (int32) which latents they are, in ascending
    order of the latents. Of equal entries the first are kept; zeros fill a row with fewer than k
    entries above 0, so that its latents differ, too.

    `out` is written where it is given. To `count` (int32) is added how many rows each latent fires
    on, with a value above 0; `rank` (int32) is then each entry's place among its latent's, in no
    repeatable order, and -1 where the value is 0.

    Raises ConfigError for a k outside 1..d_sae and for another dtype than bfloat16, float16 and
    float32.
    """
    batch, d_sae = pre.shape
    if not 0 < k <= d_sae:
        raise ConfigError(f"k={k} must lie in 1..d_sae={d_sae}: it is how many latents are kept")
    keys = keys_of(pre)
    if out is None:
        out = pre.new_empty(batch, k), pre.new_empty(batch, k, dtype=torch.int32)
    values, indices = out
    if batch == 0:
        return out
    if count is not None and rank is None:
        rank = torch.empty_like(indices)
    bits = values.view(keys.dtype)
    config = config or select_config(d_sae, k)
    if config == _SCAN:
        _topk_scan_kernel[(batch,)](
            keys, bits, indices, count, rank, d_sae, k, COUNT=count is not None, BLOCK=_SCAN_BLOCK
        )
        return out
    group = max(1, config.group)
    n_groups = -(-d_sae // group)
    largest = None if config.group == 0 else keys.new_empty(batch, n_groups)
    _topk_kernel[(batch,)](
        keys,
        bits,
        indices,
        count,
        rank,
        largest,
        d_sae,
        n_groups,
        K=k,
        K_BLOCK=power(k),
        GROUP=group,
        GROUPS_BLOCK=power(n_groups),
        AT_ONCE=config.groups_at_once,
        WHOLE=config.group == 0,
        EVEN=config.group > 0 and d_sae % (group * config.groups_at_once) == 0,
        COUNT=count is not None,
        num_warps=config.n_warps,
    )
    return out


def threshold_select(
    pre: Float[Tensor, "batch d_sae"], threshold: float | Float[Tensor, "..."]
) -> tuple[Float[Tensor, " kept"], Int[Tensor, " kept"], Int[Tensor, " offsets"]]:
    """Entries above a threshold, one for all or one for each latent: values, latents (int32) and
    the offsets of the rows (int64). The host waits once, for how many there are."""
    keys_of(pre)
    if not isinstance(threshold, Tensor):
        threshold = torch.tensor(threshold, dtype=torch.float32, device=pre.device)
    if threshold.shape not in ((), (pre.shape[1],)):
        raise ConfigError(
            f"a threshold of shape {tuple(threshold.shape)} fits no latents: it must be one "
            f"number, or one for each of the {pre.shape[1]}"
        )
    batch, d_sae = pre.shape
    bound = threshold.float().contiguous()
    kept = torch.zeros(batch, dtype=torch.int64, device=pre.device)
    options: dict[str, Any] = {"EACH": bound.ndim == 1, "BLOCK": _SCAN_BLOCK}
    if batch:
        _count_kernel[(batch,)](pre, bound, kept, d_sae, **options)
    offsets = row_ends(kept)
    total = int(offsets[-1])
    values = pre.new_empty(total)
    indices = torch.empty(total, dtype=torch.int32, device=pre.device)
    if total:
        _fill_kernel[(batch,)](pre, bound, offsets, values, indices, d_sae, **options)
    return values, indices, offsets


def row_ends(kept: Int[Tensor, " batch"]) -> Int[Tensor, " offsets"]:
    """Offsets of rows that keep so many entries each."""
    offsets = torch.zeros(len(kept) + 1, dtype=torch.int64, device=kept.device)
    torch.cumsum(kept, 0, out=offsets[1:])
    return offsets


def keys_of(pre: Tensor) -> Tensor:
    """The bits of `pre` as integers, or ConfigError."""
    kinds = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
    if pre.dtype not in kinds:
        raise ConfigError(
            f"entries of {pre.dtype} cannot be selected from: bfloat16, float16 or float32"
        )
    if not pre.is_contiguous():
        raise ConfigError("pre-activations must be contiguous: row after row")
    return pre.view(kinds[pre.dtype])


@triton.jit
@no_type_check
def key_of(bits):
    # All NaN alike: the largest integer has none above it, and one is needed.
    return tl.minimum(tl.maximum(bits.to(tl.int32), 0), 0x7F800001)


@triton.jit
@no_type_check
def search(keys, low, high, n):
    # The largest t in [low, high) that n keys reach; n reach low, and fewer high. Two thresholds a
    # turn, whose counts share one reduction.
    while high - low > 1:
        third = (high - low + 2) // 3
        one = low + third
        two = tl.minimum(low + 2 * third, high)
        counts = tl.sum((keys >= one).to(tl.int32) + ((keys >= two).to(tl.int32) << 16))
        reach_one = (counts & 0xFFFF) >= n
        # The upper count may reach the sign.
        reach_two = ((counts >> 16) & 0xFFFF) >= n
        high = tl.where(reach_two, high, tl.where(reach_one, two, one))
        low = tl.where(reach_two, two, tl.where(reach_one, one, low))
    return low


@triton.jit
@no_type_check
def places(keys, cut, n):
    # Which keys are among the n largest, the first of equal ones, and their places in order.
    larger = (keys > cut).to(tl.int32)
    equal = (keys == cut).to(tl.int32)
    before = tl.cumsum((larger << 16) + equal, axis=0)
    missing = n - tl.sum(larger)
    equal_before = (before & 0xFFFF) - equal
    kept = (larger > 0) | ((equal > 0) & (equal_before < missing))
    return kept, (before >> 16) - larger + tl.minimum(equal_before, missing)


@triton.jit
@no_type_check
def _topk_kernel(
    pre,
    values,
    indices,
    count,
    rank,
    largest,
    d_sae,
    n_groups,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    COUNT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = pre + row * d_sae
    out = row * K
    if WHOLE:
        latent = tl.arange(0, GROUPS_BLOCK)
        there = latent < d_sae
        key = tl.where(there, key_of(tl.load(base + latent, mask=there, other=0)), -1)
        high = tl.max(key) + 1
        low = tl.minimum(high, 0)
    else:
        within = tl.arange(0, GROUP)
        for first in range(0, n_groups, AT_ONCE):
            group = first + tl.arange(0, AT_ONCE)
            latent = group[:, None] * GROUP + within[None, :]
            if EVEN:
                bits = tl.load(base + latent)
            else:
                bits = tl.load(base + latent, mask=latent < d_sae, other=0)
            # In the width of the bits, so that they are compared as they come.
            tl.store(largest + row * n_groups + group, tl.max(bits, axis=1), mask=group < n_groups)
        # Others wrote what is read now.
        tl.debug_barrier()
        group = tl.arange(0, GROUPS_BLOCK)
        there = group < n_groups
        most = tl.load(largest + row * n_groups + group, mask=there, other=0)
        most = tl.where(there, key_of(most), -1)
        high = tl.max(most) + 1
        # The K largest lie in the K groups with the largest, and the first of equal ones in the
        # first of those: groups stand in the order of their entries.
        low = search(most, tl.minimum(high, 0), high, K)
        kept, place = places(most, low, K)
        # The output holds them until they are read again.
        tl.store(indices + out + place, group, mask=kept)
        tl.debug_barrier()
        slot = tl.arange(0, K_BLOCK)
        chosen = tl.load(indices + out + slot, mask=slot < K, other=0)
        latent = chosen[:, None] * GROUP + within[None, :]
        there = (slot < K)[:, None] & (latent < d_sae)
        key = tl.where(there, key_of(tl.load(base + latent, mask=there, other=0)), -1)
        key = tl.reshape(key, [K_BLOCK * GROUP])
        latent = tl.reshape(latent, [K_BLOCK * GROUP])
        # All have read the groups before any writes over them.
        tl.debug_barrier()
    cut = search(key, low, high, K)
    kept, place = places(key, cut, K)
    tl.store(indices + out + place, latent, mask=kept)
    tl.store(values + out + place, key.to(values.dtype.element_ty), mask=kept)
    if COUNT:
        tl.debug_barrier()
        place = tl.arange(0, K_BLOCK)
        latent = tl.load(indices + out + place, mask=place < K, other=0)
        fires = tl.load(values + out + place, mask=place < K, other=0) > 0
        at = tl.atomic_add(count + latent, 1, mask=fires, sem="relaxed")
        tl.store(rank + out + place, tl.where(fires, at, -1), mask=place < K)


@triton.jit
@no_type_check
def _topk_scan_kernel(
    pre, values, indices, count, rank, d_sae, k, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    base = pre + row * d_sae
    latent = tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], tl.int32)
    for first in range(0, d_sae, BLOCK):
        there = first + latent < d_sae
        most = tl.maximum(most, key_of(tl.load(base + first + latent, mask=there, other=0)))
    high = tl.max(most) + 1
    low = tl.minimum(high, 0)
    while high - low > 1:
        middle = low + (high - low) // 2
        reach = tl.zeros([BLOCK], tl.int32)
        for first in range(0, d_sae, BLOCK):
            there = first + latent < d_sae
            key = key_of(tl.load(base + first + latent, mask=there, other=0))
            reach += (there & (key >= middle)).to(tl.int32)
        enough = tl.sum(reach) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    above = tl.zeros([BLOCK], tl.int32)
    for first in range(0, d_sae, BLOCK):
        there = first + latent < d_sae
        key = key_of(tl.load(base + first + latent, mask=there, other=0))
        above += (there & (key > low)).to(tl.int32)
    missing = k - tl.sum(above)
    out = row * k
    for first in range(0, d_sae, BLOCK):
        there = first + latent < d_sae
        key = key_of(tl.load(base + first + latent, mask=there, other=0))
        larger = (there & (key > low)).to(tl.int32)
        equal = (there & (key == low)).to(tl.int32)
        equal_before = tl.cumsum(equal, axis=0) - equal
        kept = (larger > 0) | ((equal > 0) & (equal_before < missing))
        place = out + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(indices + place, first + latent, mask=kept)
        tl.store(values + place, key.to(values.dtype.element_ty), mask=kept)
        if COUNT:
            fires = kept & (key > 0)
            at = tl.atomic_add(count + first + latent, 1, mask=fires, sem="relaxed")
            tl.store(rank + place, tl.where(fires, at, -1), mask=kept)
        missing -= tl.minimum(missing, tl.sum(equal))
        out += tl.sum(kept.to(tl.int32))


@triton.jit
@no_type_check
def _count_kernel(pre, threshold, above, d_sae, EACH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    found = tl.zeros([BLOCK], tl.int32)
    for first in range(0, d_sae, BLOCK):
        latent = first + tl.arange(0, BLOCK)
        there = latent < d_sae
        entry = tl.load(pre + row * d_sae + latent, mask=there, other=0).to(tl.float32)
        bound = tl.load(threshold + latent, mask=there, other=0) if EACH else tl.load(threshold)
        found += (there & (entry > bound)).to(tl.int32)
    tl.store(above + row, tl.sum(found).to(tl.int64))


@triton.jit
@no_type_check
def _fill_kernel(
    pre, threshold, offsets, values, indices, d_sae, EACH: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    out = tl.load(offsets + row)
    for first in range(0, d_sae, BLOCK):
        latent = first + tl.arange(0, BLOCK)
        there = latent < d_sae
        stored = tl.load(pre + row * d_sae + latent, mask=there, other=0)
        bound = tl.load(threshold + latent, mask=there, other=0) if EACH else tl.load(threshold)
        kept = there & (stored.to(tl.float32) > bound)
        before = tl.cumsum(kept.to(tl.int32), axis=0)
        tl.store(values + out + before - 1, stored, mask=kept)
        tl.store(indices + out + before - 1, latent, mask=kept)
        out += tl.max(before).to(tl.int64)
