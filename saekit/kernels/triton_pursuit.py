"""Matching pursuit in Triton. See `reference.matching_pursuit`.

Forward, a program carries a row through its steps. It begins with the row's inner products with all
atoms, its scores, from one matrix product. From step to step they are lowered by the row of
`W_dec @ W_dec.T` that belongs to the atom taken, in memory that stays in a GPU's second-level
cache; or, where that Gram matrix does not fit or does not pay, they are made anew by a product for
each step. Scores may be rounded, and say only which atom is taken: how much of it is found in
float32 from what is left of x, and so errors of the scores do not get into values.

Backward, a program goes a row's steps in reverse, and finds what was left before each by putting
back what was taken. What a step adds to the gradient of its atom is written for a block of rows at
a time, and summed up atom by atom: no atomics, the same bits each time.

Axes: batch, block (some of its rows), steps, d, d_sae, entry (a step of a row of a block).
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

from saekit.kernels.triton_decode import row_config
from saekit.kernels.triton_index import LatentIndex, multiprocessors, power

GRAM_ROWS = 0.6
"""Rows for each atom, counted in every step but the first, from which the Gram matrix pays.
`python benchmarks/bench_pursuit.py --only crossover` measures it. Reckoned from what the parts take
on an H200 in bfloat16 it is 0.65 with 65,536 atoms of width 2,048, 0.9 with 24,576 of width 768."""

GRAM_SHARE = 0.5
"""Of a GPU's free memory, what the Gram matrix may take."""

REFRESH = 32
"""Steps after which scores are made anew even with the Gram matrix. Each step rounds them, to 8
bits where they are bfloat16, and these errors add up."""

_SCORE_BYTES = 2**30
"""Of scores `[block, d_sae]` that are made at a time."""
_ENTRY_BYTES = 2**31
"""Of `[entry, d]`, parts of the gradient of W_dec that are held at a time."""
_GRAM_BYTES_HERE = 2**30
"""What the Gram matrix may take in the interpreter, which runs on a CPU."""
_REGISTERS = 65_536
"""Of a multiprocessor."""
_PANELS = 16
_TILE = 128
_RANK_BLOCK = 1_024


@dataclass(frozen=True)
class PursuitConfig:
    """How a program goes about a row's scores."""

    chunk: int
    """Scores a turn."""
    n_warps: int
    programs: int
    """For each multiprocessor, which run at a time. With the Gram matrix each has a row of scores
    in the cache, and there are no others."""
    n_stages: int = 1
    """Turns whose scores are on their way from memory at a time."""


def pursuit_config(d_sae: int, d: int, gram: bool) -> PursuitConfig:
    """16 scores to a thread, which was quickest on an H200 with the Gram matrix of 65,536 atoms;
    no more elements of what is left of a row."""
    # A few turns a row, and not much more in the last than there is.
    chunk = max(min(2_048, power(d_sae)), min(16_384 if gram else 4_096, power(d_sae) // 4))
    while chunk > 2_048 and -d_sae % chunk > d_sae // 16:
        chunk //= 2
    n_warps = min(32, max(4, chunk // 512, power(d) // 512))
    return PursuitConfig(chunk, n_warps, 32 // n_warps)


def pursuit_candidates(d_sae: int, d: int, gram: bool) -> list[PursuitConfig]:
    """What an autotuner may try."""
    found = {pursuit_config(d_sae, d, gram)}
    for chunk in (2_048, 4_096, 8_192, 16_384):
        for n_warps in (chunk // 512, min(32, chunk // 256)):
            if chunk <= power(d_sae) and power(d) <= 1_024 * n_warps:
                found |= {PursuitConfig(chunk, n_warps, 32 // n_warps, n) for n in (1, 2, 3)}
    return sorted(found, key=lambda one: (one.chunk, one.n_warps, one.programs, one.n_stages))


def gram_pays(batch: int, d_sae: int, steps: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether to make the Gram matrix, in this dtype: it must fit, and enough rows share it."""
    if (steps - 1) * batch <= GRAM_ROWS * d_sae:
        return False
    n_bytes = d_sae**2 * dtype.itemsize
    if device.type != "cuda":
        return n_bytes <= _GRAM_BYTES_HERE
    # What torch holds without using it is free, too.
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return n_bytes <= GRAM_SHARE * (torch.cuda.mem_get_info(device)[0] + held)


def matching_pursuit(
    x: Float[Tensor, "batch d"],
    W_dec: Float[Tensor, "d_sae d"],
    steps: int,
    residual: float = 0.0,
    signed: bool = False,
    *,
    gram: bool | None = None,
    config: PursuitConfig | None = None,
) -> tuple[Float[Tensor, "batch {steps}"], Int[Tensor, "batch {steps}"], Float[Tensor, "batch d"]]:
    """See `reference.matching_pursuit`. Scores are in the dtype of autocast where that is on, else
    in that of W_dec. `gram` says whether to make the Gram matrix, rather than `gram_pays`."""
    out: tuple[Tensor, Tensor, Tensor] = _MatchingPursuit.apply(  # type: ignore[no-untyped-call]
        x, W_dec, steps, residual, signed, gram, config
    )
    return out


class _MatchingPursuit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_dec: Tensor,
        steps: int,
        residual: float,
        signed: bool,
        gram: bool | None,
        config: PursuitConfig | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        values, indices, rest = pursue(x, W_dec, steps, residual, signed, gram, config)
        ctx.save_for_backward(W_dec, values, indices, rest)
        ctx.mark_non_differentiable(indices)
        return values.to(x.dtype), indices, rest.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        d_values, _, d_rest = grads
        W_dec, values, indices, rest = ctx.saved_tensors
        d_x, d_W = gradients(
            W_dec, values, indices, rest, d_values, d_rest, want_atoms=ctx.needs_input_grad[1]
        )
        return d_x, d_W, None, None, None, None, None


@torch.no_grad()
def pursue(
    x: Float[Tensor, "batch d"],
    W_dec: Float[Tensor, "d_sae d"],
    steps: int,
    residual: float,
    signed: bool,
    gram: bool | None = None,
    config: PursuitConfig | None = None,
) -> tuple[Float[Tensor, "batch steps"], Int[Tensor, "batch steps"], Float[Tensor, "batch d"]]:
    """The forward pass; values and what is left are float32."""
    batch, (d_sae, d) = len(x), W_dec.shape
    dtype = score_dtype(W_dec)
    rest = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    values = torch.zeros(batch, steps, device=x.device)
    indices = torch.zeros(batch, steps, dtype=torch.long, device=x.device)
    if batch == 0 or steps == 0:
        return values, indices, rest
    enough = residual * rest.norm(dim=1)
    W_dec = W_dec.contiguous()
    table = W_dec.to(dtype)
    if gram is None:
        gram = gram_pays(batch, d_sae, steps, dtype, x.device)
    products = gram_matrix(table) if gram else None
    config = config or pursuit_config(d_sae, d, gram)
    span = REFRESH if gram else 1
    size = min(batch, max(1, _SCORE_BYTES // (d_sae * dtype.itemsize)))
    programs = min(size, multiprocessors(x.device) * config.programs) if gram else size
    # Of a thread, so that all programs find room.
    registers = min(255, _REGISTERS // (32 * config.n_warps * config.programs)) if gram else None
    scores = table.new_empty(size, d_sae)
    scratch = table.new_empty(programs if gram else 0, d_sae)
    for begin in range(0, batch, size):
        block = slice(begin, begin + size)
        now = scores[: len(rest[block])]
        for first in range(0, steps, span):
            torch.mm(rest[block].to(dtype), table.T, out=now)
            _pursue_kernel[(min(programs, len(now)),)](
                now,
                products,
                scratch,
                W_dec,
                enough[block],
                rest[block],
                values[block],
                indices[block],
                len(now),
                d_sae,
                first,
                min(first + span, steps),
                STEPS=steps,
                D=d,
                BLOCK=power(d),
                CHUNK=config.chunk,
                BEGUN=first > 0,
                GRAM=gram,
                SIGNED=signed,
                SHARE=residual > 0,
                STAGES=config.n_stages,
                num_warps=config.n_warps,
                maxnreg=registers,
            )
    return values, indices, rest


def score_dtype(W_dec: Tensor) -> torch.dtype:
    """What a product with W_dec is made in here."""
    kind = W_dec.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else W_dec.dtype


@torch.no_grad()
def gram_matrix(W_dec: Float[Tensor, "d_sae d"]) -> Float[Tensor, "d_sae d_sae"]:
    """`W_dec @ W_dec.T`, of which little more than the half above the diagonal is multiplied."""
    d_sae = len(W_dec)
    out = W_dec.new_empty(d_sae, d_sae)
    panel = -(-d_sae // (_PANELS * _TILE)) * _TILE
    for first in range(0, d_sae, panel):
        rows = slice(first, first + panel)
        torch.mm(W_dec[rows], W_dec[first:].T, out=out[rows, first:])
    tiles = -(-d_sae // _TILE)
    if panel < d_sae:
        _mirror_kernel[(tiles, tiles)](out, d_sae, panel, TILE=_TILE, num_warps=8)
    return out


@torch.no_grad()
def gradients(
    W_dec: Float[Tensor, "d_sae d"],
    values: Float[Tensor, "batch steps"],
    indices: Int[Tensor, "batch steps"],
    rest: Float[Tensor, "batch d"],
    d_values: Float[Tensor, "batch steps"],
    d_rest: Float[Tensor, "batch d"],
    *,
    want_atoms: bool = True,
    deterministic: bool = True,
) -> tuple[Float[Tensor, "batch d"], Float[Tensor, "d_sae d"] | None]:
    """With respect to x, in the dtype of `d_rest`, and to W_dec, from what `pursue` returned. Where
    `deterministic`, the same bits each time.

    A step is `value = rest . atom`, `rest' = rest - value atom`; so
    `d_value = d_value' - d_rest' . atom`, `d_atom = d_value rest - value d_rest'` and
    `d_rest = d_rest' + d_value atom`.
    """
    (batch, steps), (d_sae, d) = values.shape, W_dec.shape
    if values.numel() == 0:
        return d_rest.clone(), torch.zeros_like(W_dec) if want_atoms else None
    W_dec, d_values, d_rest = W_dec.contiguous(), d_values.contiguous(), d_rest.contiguous()
    d_x = torch.empty_like(d_rest)
    size = min(batch, max(1, _ENTRY_BYTES // (4 * steps * d)) if want_atoms else batch)
    parts = values.new_empty(size * steps if want_atoms else 0, d)
    d_W = None
    for begin in range(0, batch, size):
        block = slice(begin, begin + size)
        n_rows = len(values[block])
        _back_kernel[(n_rows,)](
            W_dec,
            values[block],
            indices[block],
            rest[block],
            d_values[block],
            d_rest[block],
            d_x[block],
            parts,
            STEPS=steps,
            STEPS_BLOCK=power(steps),
            D=d,
            BLOCK=power(d),
            ATOMS=want_atoms,
            STAGES=2,
            # 16 elements of a row to a thread: three rows are held.
            num_warps=min(32, max(1, power(d) // 512)),
        )
        if want_atoms:
            entries = parts[: n_rows * steps]
            # In float32 until all blocks are in.
            d_W = _by_atom(values[block], indices[block], entries, d_sae, d_W, deterministic)
    return d_x, None if d_W is None else d_W.to(W_dec.dtype)


def _by_atom(
    values: Float[Tensor, "block steps"],
    indices: Int[Tensor, "block steps"],
    parts: Float[Tensor, "entry d"],
    d_sae: int,
    d_W: Float[Tensor, "d_sae d"] | None,
    deterministic: bool,
) -> Float[Tensor, "d_sae d"]:
    """Adds the parts of the steps that took something to the rows of their atoms; to new ones where
    `d_W` is None."""
    n_entries, d = parts.shape
    add = d_W is not None
    d_W = parts.new_empty(d_sae, d) if d_W is None else d_W
    index = LatentIndex(d_sae, n_entries, parts.device, deterministic=deterministic)
    index.clear()
    grid = (-(-n_entries // _RANK_BLOCK),)
    _rank_kernel[grid](values, indices, index.count, index.rank, n_entries, BLOCK=_RANK_BLOCK)
    index.build(values, indices, k=1)
    config = row_config(d)
    programs = multiprocessors(parts.device) * config.programs
    shared = {
        "D": d,
        "BLOCK": power(d),
        "STAGES": config.n_stages,
        "num_warps": config.n_warps,
    }
    shares = parts.new_empty(index.n_chunks, d)
    _chunk_sum_kernel[(programs,)](index.position, *index.chunks(), parts, shares, **shared)
    _sum_kernel[(programs,)](
        index.position,
        index.start,
        index.count,
        index.first_chunk,
        parts,
        shares,
        d_W,
        d_sae,
        HEAVY=index.heavy,
        ADD=add,
        **shared,
    )
    return d_W


@triton.jit
@no_type_check
def _larger(score, at, most, place, SIGNED: tl.constexpr):
    # Of equal scores the first stays.
    if SIGNED:
        score = tl.abs(score)
    more = score > most
    return tl.where(more, score, most), tl.where(more, at, place)


# One form for all steps.
@triton.jit(do_not_specialize=["first", "last"])
@no_type_check
def _pursue_kernel(
    scores,
    gram,
    scratch,
    W_dec,
    enough,
    rest,
    values,
    indices,
    n_rows,
    d_sae,
    first,
    last,
    STEPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BEGUN: tl.constexpr,
    GRAM: tl.constexpr,
    SIGNED: tl.constexpr,
    SHARE: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Steps first..last of rows, whose scores before them are given.
    column = tl.arange(0, BLOCK)
    inside = column < D
    lane = tl.arange(0, CHUNK)
    # Never the first of the largest.
    outside = 0.0 if SIGNED else float("-inf")
    mine = scratch + tl.program_id(0).to(tl.int64) * d_sae
    for which in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row = tl.cast(which, tl.int64)
        step = first
        if BEGUN:
            # Only where a row stopped is a value 0.
            step = tl.where(tl.load(values + row * STEPS + first - 1) == 0, last, first)
        if step < last:
            left = tl.load(rest + row * D + column, mask=inside, other=0.0)
            most = tl.full([CHUNK], float("-inf"), tl.float32)
            place = lane
            for begin in tl.range(0, d_sae, CHUNK, num_stages=STAGES):
                at = begin + lane
                score = tl.load(
                    scores + row * d_sae + at,
                    mask=at < d_sae,
                    other=outside,
                    eviction_policy="evict_first",
                )
                if GRAM:
                    tl.store(mine + at, score, mask=at < d_sae, eviction_policy="evict_last")
                score = score.to(tl.float32)
                # NaN is taken, as torch's argmax has it, and is then in all that is left.
                score = tl.where(score != score, float("inf"), score)
                most, place = _larger(score, at, most, place, SIGNED)
            while step < last:
                top = tl.max(most)
                best = tl.min(tl.where(most == top, place, 0x7FFFFFFF)).to(tl.int64)
                atom = tl.load(W_dec + best * D + column, mask=inside, other=0.0).to(tl.float32)
                value = tl.sum(left * atom)
                # False for NaN, which goes on.
                stops = value == 0 if SIGNED else value <= 0
                if SHARE:
                    stops = stops | (tl.sqrt(tl.sum(left * left)) <= tl.load(enough + row))
                if stops:
                    step = last
                else:
                    left -= value * atom
                    tl.store(values + row * STEPS + step, value)
                    tl.store(indices + row * STEPS + step, best)
                    step += 1
                    if GRAM:
                        # Others wrote what is read now.
                        tl.debug_barrier()
                        n_left = tl.where(step < last, d_sae, 0)
                        most = tl.full([CHUNK], float("-inf"), tl.float32)
                        place = lane
                        for begin in tl.range(0, n_left, CHUNK, num_stages=STAGES):
                            at = begin + lane
                            there = at < d_sae
                            score = tl.load(
                                mine + at, mask=there, other=outside, eviction_policy="evict_last"
                            )
                            lower = tl.load(
                                gram + best * d_sae + at,
                                mask=there,
                                other=0.0,
                                eviction_policy="evict_first",
                            )
                            score = score.to(tl.float32) - value * lower.to(tl.float32)
                            tl.store(
                                mine + at,
                                score.to(scratch.dtype.element_ty),
                                mask=there,
                                eviction_policy="evict_last",
                            )
                            most, place = _larger(score, at, most, place, SIGNED)
            tl.store(rest + row * D + column, left, mask=inside)
            # Nobody begins the next row before all have left this one.
            tl.debug_barrier()


@triton.jit
@no_type_check
def _mirror_kernel(gram, d_sae, panel, TILE: tl.constexpr):
    # Writes the tiles left of the panels that were multiplied. A panel is whole tiles wide.
    row = tl.program_id(0) * TILE
    column = tl.program_id(1) * TILE
    if column < row // panel * panel:
        i = column + tl.arange(0, TILE)
        j = row + tl.arange(0, TILE)
        above = tl.cast(i, tl.int64)[:, None] * d_sae + j[None, :]
        below = tl.cast(j, tl.int64)[:, None] * d_sae + i[None, :]
        # All of i is inside: it lies before a panel that begins inside.
        tile = tl.load(gram + above, mask=(j < d_sae)[None, :], other=0.0)
        tl.store(gram + below, tl.trans(tile), mask=(j < d_sae)[:, None])


@triton.jit
@no_type_check
def _back_kernel(
    W_dec,
    values,
    indices,
    rest,
    d_values,
    d_rest,
    d_x,
    parts,
    STEPS: tl.constexpr,
    STEPS_BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ATOMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    step = tl.arange(0, STEPS_BLOCK)
    value = tl.load(values + row * STEPS + step, mask=step < STEPS, other=0.0)
    n_taken = tl.sum((value != 0).to(tl.int32))
    left = tl.load(rest + row * D + column, mask=inside, other=0.0)
    d_left = tl.load(d_rest + row * D + column, mask=inside, other=0.0).to(tl.float32)
    for i in tl.range(0, n_taken, num_stages=STAGES):
        at = row * STEPS + n_taken - 1 - i
        atom = tl.load(indices + at)
        weights = tl.load(W_dec + atom * D + column, mask=inside, other=0.0).to(tl.float32)
        one = tl.load(values + at)
        d_one = tl.load(d_values + at).to(tl.float32) - tl.sum(d_left * weights)
        left += one * weights
        if ATOMS:
            tl.store(parts + at * D + column, d_one * left - one * d_left, mask=inside)
        d_left += d_one * weights
    tl.store(d_x + row * D + column, d_left.to(d_x.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _rank_kernel(values, indices, count, rank, n_entries, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < n_entries
    took = there & (tl.load(values + at, mask=there, other=0.0) != 0)
    atom = tl.load(indices + at, mask=there, other=0)
    place = tl.atomic_add(count + atom, 1, mask=took, sem="relaxed")
    tl.store(rank + at, tl.where(took, place, -1), mask=there)


@triton.jit
@no_type_check
def _sum_span(
    first,
    n,
    position,
    parts,
    column,
    inside,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.range(first, first + n, num_stages=STAGES):
        entry = tl.load(position + i).to(tl.int64)
        total += tl.load(parts + entry * D + column, mask=inside, other=0.0)
    return total


@triton.jit
@no_type_check
def _chunk_sum_kernel(
    position,
    totals,
    chunk_latent,
    chunk_start,
    chunk_length,
    parts,
    shares,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < D
    for chunk in range(tl.program_id(0), tl.load(totals + 1), tl.num_programs(0)):
        first, n = tl.load(chunk_start + chunk), tl.load(chunk_length + chunk)
        total = _sum_span(first, n, position, parts, column, inside, D, BLOCK, STAGES)
        tl.store(shares + tl.cast(chunk, tl.int64) * D + column, total, mask=inside)


@triton.jit
@no_type_check
def _sum_kernel(
    position,
    start,
    count,
    first_chunk,
    parts,
    shares,
    d_W,
    d_sae,
    HEAVY: tl.constexpr,
    ADD: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < D
    for atom in range(tl.program_id(0), d_sae, tl.num_programs(0)):
        n = tl.load(count + atom)
        if (n > 0) | (not ADD):
            out = d_W + tl.cast(atom, tl.int64) * D + column
            if n > HEAVY:
                total = tl.zeros([BLOCK], tl.float32)
                chunk = tl.load(first_chunk + atom).to(tl.int64)
                # In one order, whichever program made which.
                for i in range(0, (n + HEAVY - 1) // HEAVY):
                    total += tl.load(shares + (chunk + i) * D + column, mask=inside, other=0.0)
            else:
                first = tl.load(start + atom)
                total = _sum_span(first, n, position, parts, column, inside, D, BLOCK, STAGES)
            if ADD:
                total += tl.load(out, mask=inside, other=0.0)
            tl.store(out, total, mask=inside)
