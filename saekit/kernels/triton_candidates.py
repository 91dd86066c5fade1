"""The encoder's selection with most of its work in float8, in Triton.

A product in float8 (e4m3, a scale for each row of x and each latent) costs half of one in bfloat16.
Its pre-activations are off by a few hundredths of their spread: too much to be values, and enough
to say which few latents can be among the k largest. Those candidates' pre-activations are made
again in bfloat16, summed in float32, and chosen from. A latent is missed only where it is among the
k largest and not among the candidates.

Axes: batch, d_in, d_sae, candidates, slice (of d_in).
"""

# Triton has no types, and is not on every machine.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saekit.kernels.triton_index import power
from saekit.kernels.triton_select import SelectConfig, places, search, select_config

CAPABILITY = (9, 0)
"""The oldest GPUs whose products in float8 take a scale for each row."""

LEAST_WIDTH = 2_048
"""Width of x from which on it pays: on an H200 a step with rows of 768 was no quicker by it."""

_COLUMNS = 128
_ENTRIES = 32


def candidates_of(k: int) -> int:
    """How many latents of a row are looked at again: at twice the noise's reach beyond the k-th."""
    return k + max(32, k // 2)


def served(device: torch.device, d_in: int) -> bool:
    """Whether a GPU has the product, and rows are as long as it asks: a multiple of 16."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= CAPABILITY
        and d_in % 16 == 0
    )


def choice_of(d_sae: int, n: int) -> SelectConfig:
    """How n candidates are chosen: on an H200 quickest from 4,096 groups by 4 warps each row, for
    65,536 and 131,072 latents."""
    return select_config(d_sae, n, max(16, power(d_sae) // 4_096), 4)


def quantise(rows: Float[Tensor, "n d_in"], low: Tensor, scale: Float[Tensor, " n"]) -> None:
    """Writes rows in float8, and the scale of each: its largest entry comes to the largest that
    e4m3 holds. What the fused step's own kernel writes after each update, bit for bit."""
    n, d_in = rows.shape
    _quantise_kernel[(n,)](
        rows, low, scale, D=d_in, BLOCK=power(d_in), num_warps=max(1, min(8, power(d_in) // 512))
    )


def centre(
    x: Float[Tensor, "batch d_in"],
    b_dec: Float[Tensor, " d_in"],
    centred: Float[Tensor, "batch d_in"],
    low: Tensor,
    scale: Float[Tensor, " batch"],
) -> None:
    """`centred = x - b_dec`, and the same in float8 with a scale for each row."""
    d_in = x.shape[1]
    _centre_kernel[(len(x),)](
        x,
        b_dec,
        centred,
        low,
        scale,
        D=d_in,
        BLOCK=power(d_in),
        num_warps=max(1, min(8, d_in // 512)),
    )


def product(
    low: Tensor,
    scale: Float[Tensor, " batch"],
    W_low: Tensor,
    W_scale: Float[Tensor, " d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    out: Float[Tensor, "batch d_sae"],
) -> None:
    """Pre-activations in bfloat16 from what is in float8."""
    # Torch has no public form of it yet.
    torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        low,
        W_low.t(),
        scale_a=scale[:, None],
        scale_b=W_scale[None, :],
        bias=b_enc,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
        out=out,
    )


def rescore(
    centred: Float[Tensor, "batch d_in"],
    W_enc_T: Float[Tensor, "d_sae d_in"],
    candidates: Int[Tensor, "batch candidates"],
    parts: Float[Tensor, "slice batch candidates"],
) -> None:
    """The candidates' inner products with the rows, a slice of d_in each. All rows for the first
    slice first, so that a slice of W_enc stays in the second-level cache."""
    batch, n = candidates.shape
    d_in = centred.shape[1]
    _rescore_kernel[(batch, len(parts))](
        centred,
        W_enc_T,
        candidates,
        parts,
        D=d_in,
        N=n,
        ENTRIES=min(_ENTRIES, power(n)),
        COLUMNS=columns(d_in),
        num_warps=1,
    )


def columns(d_in: int) -> int:
    """Of a slice."""
    return min(power(d_in), _COLUMNS)


def reselect(
    parts: Float[Tensor, "slice batch candidates"],
    b_enc: Float[Tensor, " d_sae"],
    candidates: Int[Tensor, "batch candidates"],
    *,
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    count: Int[Tensor, " d_sae"],
    rank: Int[Tensor, "batch k"],
) -> None:
    """Of each row's candidates, which stand in ascending order, the k largest; as
    `triton_select.topk_select` has it."""
    n_slices, batch, n = parts.shape
    _reselect_kernel[(batch,)](
        parts,
        b_enc,
        candidates,
        values,
        indices,
        count,
        rank,
        batch,
        N=n,
        BLOCK=power(n),
        K=values.shape[1],
        K_BLOCK=power(values.shape[1]),
        SLICES=n_slices,
        num_warps=1,
    )


@triton.jit
@no_type_check
def put_low(entry, low, scale, row, column, inside, D: tl.constexpr):
    unit = tl.maximum(tl.max(tl.where(inside, tl.abs(entry), 0.0)) / 448.0, 1e-30)
    tl.store(scale + row, unit)
    tl.store(low + row * D + column, (entry / unit).to(low.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _quantise_kernel(rows, low, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    entry = tl.load(rows + row * D + column, mask=inside, other=0.0).to(tl.float32)
    put_low(entry, low, scale, row, column, inside, D)


@triton.jit
@no_type_check
def _centre_kernel(x, b_dec, centred, low, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    entry = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
    entry -= tl.load(b_dec + column, mask=inside, other=0.0)
    tl.store(centred + row * D + column, entry.to(centred.dtype.element_ty), mask=inside)
    put_low(entry, low, scale, row, column, inside, D)


@triton.jit
@no_type_check
def _rescore_kernel(
    centred,
    W_enc,
    candidates,
    parts,
    D: tl.constexpr,
    N: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < D
    x = tl.load(centred + row * D + column, mask=inside, other=0.0).to(tl.float32)
    out = parts + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + row) * N
    for first in tl.static_range(0, N, ENTRIES):
        at = first + tl.arange(0, ENTRIES)
        latent = tl.load(candidates + row * N + at, mask=at < N, other=0).to(tl.int64)
        weights = tl.load(
            W_enc + latent[:, None] * D + column[None, :], mask=inside[None, :], other=0.0
        )
        tl.store(out + at, tl.sum(weights.to(tl.float32) * x[None, :], axis=1), mask=at < N)


@triton.jit
@no_type_check
def _reselect_kernel(
    parts,
    b_enc,
    candidates,
    values,
    indices,
    count,
    rank,
    batch,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    SLICES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < N
    latent = tl.load(candidates + row * N + at, mask=there, other=0)
    pre = tl.load(b_enc + latent, mask=there, other=0.0).to(tl.float32)
    for i in range(SLICES):
        part = (tl.cast(i, tl.int64) * batch + row) * N + at
        pre += tl.load(parts + part, mask=there, other=0.0)
    key = tl.maximum(pre.to(tl.int32, bitcast=True), 0)
    key = tl.where(there, tl.minimum(key, 0x7F800001), -1)
    high = tl.max(key) + 1
    cut = search(key, tl.minimum(high, 0), high, K)
    kept, place = places(key, cut, K)
    out = row * K
    tl.store(indices + out + place, latent, mask=kept)
    value = tl.maximum(key, 0).to(tl.float32, bitcast=True)
    tl.store(values + out + place, value.to(values.dtype.element_ty), mask=kept)
    # Counted once, in the order of the code.
    tl.debug_barrier()
    place = tl.arange(0, K_BLOCK)
    latent = tl.load(indices + out + place, mask=place < K, other=0)
    fires = tl.load(values + out + place, mask=place < K, other=0) > 0
    at = tl.atomic_add(count + latent, 1, mask=fires, sem="relaxed")
    tl.store(rank + out + place, tl.where(fires, at, -1), mask=place < K)
