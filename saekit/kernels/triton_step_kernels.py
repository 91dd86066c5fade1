"""The kernels of a fused step (`triton_step`) that are its own: what the rate comes to, x centred,
and everything that a latent's rows, b_enc and b_dec go through from entries to Adam.

Axes: batch, d_in, d_sae, chunk (some entries of a latent that has many), program (of a launch).
"""

# Triton has no types, and is not on every machine.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false

from typing import no_type_check

import triton
import triton.language as tl

from saekit.kernels.triton_candidates import put_low


@triton.jit
@no_type_check
def schedule_kernel(step_0, step_1, step_2, step_3, step_4, lr, constants, hyper):
    step = tl.load(step_0) + 1
    tl.store(step_0, step)
    tl.store(step_1, step)
    tl.store(step_2, step)
    tl.store(step_3, step)
    if step_4 is not None:
        tl.store(step_4, step)
    power_1 = tl.exp(step.to(tl.float64) * tl.load(constants))
    power_2 = tl.exp(step.to(tl.float64) * tl.load(constants + 1))
    rate = tl.load(lr)
    tl.store(hyper, (rate / (1 - power_1)).to(tl.float32))
    tl.store(hyper + 1, (1 / tl.sqrt(1 - power_2)).to(tl.float32))
    tl.store(hyper + 2, (1 - rate * tl.load(constants + 2)).to(tl.float32))
    tl.store(hyper + 4, step)


@triton.jit
@no_type_check
def centre_kernel(x, b_dec, centred, numel, D: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < numel
    entry = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    entry -= tl.load(b_dec + at % D, mask=there, other=0.0)
    tl.store(centred + at, entry.to(centred.dtype.element_ty), mask=there)


@triton.jit
@no_type_check
def _weights(full, high, low, at, inside, SPLIT: tl.constexpr):
    # A row of a matrix in float32.
    if SPLIT:
        upper = tl.load(high + at, mask=inside, other=0, eviction_policy="evict_first")
        lower = tl.load(low + at, mask=inside, other=0, eviction_policy="evict_first")
        bits = (upper.to(tl.int32) << 16) + lower.to(tl.int32)
        weight = bits.to(tl.float32, bitcast=True)
    else:
        weight = tl.load(full + at, mask=inside, other=0.0, eviction_policy="evict_first")
    return weight


@triton.jit
@no_type_check
def _put_weights(weight, full, high, low, at, inside, SPLIT: tl.constexpr, COPY: tl.constexpr):
    if SPLIT:
        bits = weight.to(tl.int32, bitcast=True)
        # To the nearest, and up from the middle, so that what is left fits 16 bits.
        upper = (bits + 0x8000) >> 16
        lower = bits - (upper << 16)
        tl.store(high + at, upper.to(tl.int16), mask=inside, cache_modifier=".cs")
        tl.store(low + at, lower.to(tl.int16), mask=inside, cache_modifier=".cs")
    else:
        tl.store(full + at, weight, mask=inside, cache_modifier=".cs")
        if COPY:
            tl.store(high + at, weight.to(tl.bfloat16), mask=inside, cache_modifier=".cs")


@triton.jit
@no_type_check
def _sum_entries(
    weight,
    first,
    n,
    row,
    value,
    residual,
    centred,
    column,
    inside,
    near,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    JUMP: tl.constexpr,
):
    # Of a latent's entries [first, first + n), before scaling: its gradients in W_dec, W_enc and
    # b_enc, and the product of the first with its row. JUMP: of entries of value 0 only what they
    # say of the threshold counts; of those from 0 up to `near`, the sum of d_z, and their number.
    d_dec = tl.zeros([BLOCK], tl.float32)
    d_enc = tl.zeros([BLOCK], tl.float32)
    d_bias = 0.0
    along = 0.0
    pull = 0.0
    n_near = 0.0
    for i in tl.range(first, first + n, num_stages=STAGES):
        at = tl.load(row + i).to(tl.int64) * D + column
        z = tl.load(value + i)
        error = tl.load(residual + at, mask=inside, other=0.0, eviction_policy="evict_last")
        needed = inside
        if JUMP:
            needed = column < tl.where(z > 0, D, 0)
        entry = tl.load(centred + at, mask=needed, other=0.0, eviction_policy="evict_last")
        error = error.to(tl.float32)
        d_z = tl.sum(error * weight)
        if JUMP:
            pull += tl.where(z < near, d_z, 0.0)
            n_near += tl.where(z < near, 1.0, 0.0)
            d_z = tl.where(z > 0, d_z, 0.0)
        d_dec += z * error
        d_enc += d_z * entry.to(tl.float32)
        d_bias += d_z
        along += d_z * z
    return d_dec, d_enc, d_bias, along, pull, n_near


@triton.jit
@no_type_check
def _near_threshold(level, jump, latent, JUMP: tl.constexpr):
    # Up to where entries move a latent's threshold.
    near = 0.0
    if JUMP:
        near = tl.load(level + latent) * tl.load(jump) + tl.load(jump + 1)
    return near


@triton.jit
@no_type_check
def chunk_kernel(
    W_dec,
    dec_high,
    dec_low,
    row,
    value,
    totals,
    chunk_latent,
    chunk_start,
    chunk_length,
    residual,
    centred,
    chunk_rows,
    chunk_sums,
    level,
    jump,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    JUMP: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < D
    for chunk in range(tl.program_id(0), tl.load(totals + 1), tl.num_programs(0)):
        latent = tl.load(chunk_latent + chunk)
        at = latent.to(tl.int64) * D + column
        d_dec, d_enc, d_bias, along, pull, n_near = _sum_entries(
            _weights(W_dec, dec_high, dec_low, at, inside, SPLIT),
            tl.load(chunk_start + chunk),
            tl.load(chunk_length + chunk),
            row,
            value,
            residual,
            centred,
            column,
            inside,
            _near_threshold(level, jump, latent, JUMP),
            D,
            BLOCK,
            STAGES,
            JUMP,
        )
        out = chunk_rows + tl.cast(chunk, tl.int64) * (2 * D) + column
        tl.store(out, d_dec, mask=inside)
        tl.store(out + D, d_enc, mask=inside)
        tl.store(chunk_sums + 4 * chunk, d_bias)
        tl.store(chunk_sums + 4 * chunk + 1, along)
        if JUMP:
            tl.store(chunk_sums + 4 * chunk + 2, pull)
            tl.store(chunk_sums + 4 * chunk + 3, n_near)


@triton.jit
@no_type_check
def _moment(moments, at, inside):
    held = tl.load(moments + at, mask=inside, other=0.0, eviction_policy="evict_first")
    return held.to(tl.float32)


@triton.jit
@no_type_check
def _put_moments(means, squares, at, mean, square, inside, seed):
    if means.dtype.element_ty == tl.bfloat16:
        # 16 random bits for each, below which a float32 is cut off: up as often as it is near.
        noise = at.to(tl.uint32) ^ (seed.to(tl.uint32) * 0x9E3779B1)
        noise = (noise ^ (noise >> 16)) * 0x7FEB352D
        noise = (noise ^ (noise >> 15)) * 0x846CA68B
        noise = noise ^ (noise >> 16)
        up = mean.to(tl.uint32, bitcast=True) + (noise & 0xFFFF)
        mean = (up & 0xFFFF0000).to(tl.float32, bitcast=True)
        up = square.to(tl.uint32, bitcast=True) + (noise >> 16)
        square = (up & 0xFFFF0000).to(tl.float32, bitcast=True)
    tl.store(means + at, mean.to(means.dtype.element_ty), mask=inside, cache_modifier=".cs")
    tl.store(squares + at, square.to(squares.dtype.element_ty), mask=inside, cache_modifier=".cs")


@triton.jit
@no_type_check
def _adam(weight, mean, square, grad, rate, root, decay, b_1, c_1, b_2, c_2, eps):
    mean = b_1 * mean + c_1 * grad
    square = b_2 * square + c_2 * grad * grad
    return weight * decay - rate * mean / (tl.sqrt(square) * root + eps), mean, square


@triton.jit
@no_type_check
def latent_kernel(
    W_dec,
    dec_high,
    dec_low,
    dec_mean,
    dec_square,
    W_enc,
    enc_high,
    enc_low,
    enc_mean,
    enc_square,
    b_enc,
    b_enc_copy,
    bias_mean,
    bias_square,
    row,
    value,
    start,
    count,
    first_chunk,
    residual,
    centred,
    chunk_rows,
    chunk_sums,
    pre_bias,
    squares,
    hyper,
    aux_slot,
    aux_rows,
    aux_bias,
    enc_float8,
    enc_unit,
    level,
    level_mean,
    level_square,
    jump,
    d_sae,
    scale,
    b_1,
    c_1,
    b_2,
    c_2,
    eps,
    HEAVY: tl.constexpr,
    COPY: tl.constexpr,
    NORM: tl.constexpr,
    SUMS: tl.constexpr,
    AUX: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    JUMP: tl.constexpr,
):
    # NORM: only the sum of the gradients' squares. SUMS: also db_enc @ W_enc.T, for b_dec.
    # AUX: adds the gradients of AuxK, which has none for b_dec. JUMP: thresholds learn, too; `jump`
    # says what makes them of levels, half of the window, and the penalty's weight by batch.
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < D
    through = tl.zeros([BLOCK], tl.float32)
    squared = 0.0
    rate = tl.load(hyper)
    root = tl.load(hyper + 1)
    decay = tl.load(hyper + 2)
    seed = tl.load(hyper + 4).to(tl.int32)
    share = 1.0
    if not NORM:
        share = tl.load(hyper + 3)
    scale *= share
    for latent in range(program, d_sae, tl.num_programs(0)):
        at = tl.cast(latent, tl.int64) * D + column
        n = tl.load(count + latent)
        first = tl.load(start + latent)
        dec = _weights(W_dec, dec_high, dec_low, at, inside, SPLIT)
        if n > HEAVY:
            d_dec = tl.zeros([BLOCK], tl.float32)
            d_enc = tl.zeros([BLOCK], tl.float32)
            d_bias = 0.0
            along = 0.0
            pull = 0.0
            n_near = 0.0
            chunk = tl.load(first_chunk + latent)
            # In one order, whichever program made which.
            for i in range(chunk, chunk + (n + HEAVY - 1) // HEAVY):
                part = chunk_rows + tl.cast(i, tl.int64) * (2 * D) + column
                d_dec += tl.load(part, mask=inside, other=0.0)
                d_enc += tl.load(part + D, mask=inside, other=0.0)
                d_bias += tl.load(chunk_sums + 4 * i)
                along += tl.load(chunk_sums + 4 * i + 1)
                if JUMP:
                    pull += tl.load(chunk_sums + 4 * i + 2)
                    n_near += tl.load(chunk_sums + 4 * i + 3)
        else:
            d_dec, d_enc, d_bias, along, pull, n_near = _sum_entries(
                dec,
                first,
                n,
                row,
                value,
                residual,
                centred,
                column,
                inside,
                _near_threshold(level, jump, latent, JUMP),
                D,
                BLOCK,
                STAGES,
                JUMP,
            )
        if SUMS or not NORM:
            enc = _weights(W_enc, enc_high, enc_low, at, inside, SPLIT)
        if SUMS:
            through += d_bias * enc
        # Off the row, along which it would only change the norm.
        d_dec = (d_dec - along * dec) * scale
        d_enc = d_enc * scale
        d_bias = d_bias * scale
        if AUX:
            slot = tl.load(aux_slot + latent)
            if slot >= 0:
                part = aux_rows + tl.cast(slot, tl.int64) * (2 * D) + column
                more = tl.load(part, mask=inside, other=0.0)
                d_dec += share * (more - tl.sum(more * dec) * dec)
                d_enc += share * tl.load(part + D, mask=inside, other=0.0)
                d_bias += share * tl.load(aux_bias + slot)
        if JUMP:
            factor = tl.load(jump)
            own = tl.load(level + latent)
            # -1 / width is the step's straight-through derivative, times its threshold the jump's.
            pull = own * factor * scale * pull + share * tl.load(jump + 2) * n_near
            d_level = -factor * pull / (2 * tl.load(jump + 1))
            if NORM:
                squared += d_level * d_level
            else:
                own, mean_1, square_1 = _adam(
                    own,
                    tl.load(level_mean + latent),
                    tl.load(level_square + latent),
                    d_level,
                    rate,
                    root,
                    decay,
                    b_1,
                    c_1,
                    b_2,
                    c_2,
                    eps,
                )
                tl.store(level_mean + latent, mean_1)
                tl.store(level_square + latent, square_1)
                tl.store(level + latent, tl.maximum(own, 0.0))
        if NORM:
            squared += tl.sum(d_dec * d_dec + d_enc * d_enc) + d_bias * d_bias
        else:
            mean = _moment(dec_mean, at, inside)
            square = _moment(dec_square, at, inside)
            dec, mean, square = _adam(
                dec, mean, square, d_dec, rate, root, decay, b_1, c_1, b_2, c_2, eps
            )
            _put_moments(dec_mean, dec_square, at, mean, square, inside, 2 * seed)
            dec = tl.where(inside, dec, 0.0)
            dec = dec * (1 / tl.sqrt(tl.sum(dec * dec)))
            _put_weights(dec, W_dec, dec_high, dec_low, at, inside, SPLIT, COPY)
            mean = _moment(enc_mean, at, inside)
            square = _moment(enc_square, at, inside)
            enc, mean, square = _adam(
                enc, mean, square, d_enc, rate, root, decay, b_1, c_1, b_2, c_2, eps
            )
            _put_moments(enc_mean, enc_square, at, mean, square, inside, 2 * seed + 1)
            _put_weights(enc, W_enc, enc_high, enc_low, at, inside, SPLIT, COPY)
            if enc_float8 is not None:
                row_at = tl.cast(latent, tl.int64)
                put_low(enc, enc_float8, enc_unit, row_at, column, inside, D)
            bias, mean_1, square_1 = _adam(
                tl.load(b_enc + latent),
                tl.load(bias_mean + latent),
                tl.load(bias_square + latent),
                d_bias,
                rate,
                root,
                decay,
                b_1,
                c_1,
                b_2,
                c_2,
                eps,
            )
            tl.store(bias_mean + latent, mean_1)
            tl.store(bias_square + latent, square_1)
            tl.store(b_enc + latent, bias)
            if COPY:
                tl.store(b_enc_copy + latent, bias.to(tl.bfloat16))
    if SUMS:
        tl.store(pre_bias + program * D + column, through, mask=inside)
    if NORM:
        tl.store(squares + program, squared)


@triton.jit
@no_type_check
def column_sum_kernel(
    x,
    parts,
    n_rows,
    rows_each,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.program_id(1) * rows_each
    stop = tl.minimum(begin + rows_each, n_rows)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows_each, ROWS):
        i = begin + first + tl.arange(0, ROWS)
        there = (i < stop)[:, None] & (column < D)[None, :]
        at = i[:, None].to(tl.int64) * D + column[None, :]
        total += tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    out = parts + tl.program_id(1) * D + column
    tl.store(out, tl.sum(total, axis=0), mask=column < D)


@triton.jit
@no_type_check
def b_dec_kernel(
    parts,
    b_dec,
    mean,
    square,
    squares,
    hyper,
    scale,
    b_1,
    c_1,
    b_2,
    c_2,
    eps,
    D: tl.constexpr,
    ADDED: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORM: tl.constexpr,
):
    # The residual's sum, less what reaches b_dec through the encoder.
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < D
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, PARTS, ROWS):
        i = first + tl.arange(0, ROWS)
        there = (i < PARTS)[:, None] & inside[None, :]
        part = tl.load(parts + i[:, None] * D + column[None, :], mask=there, other=0.0)
        total += tl.where((i < ADDED)[:, None], part, -part)
    grad = tl.sum(total, axis=0) * scale
    if NORM:
        tl.store(squares + tl.program_id(0), tl.sum(tl.where(inside, grad * grad, 0.0)))
    else:
        bias, mean_1, square_1 = _adam(
            tl.load(b_dec + column, mask=inside, other=0.0),
            tl.load(mean + column, mask=inside, other=0.0),
            tl.load(square + column, mask=inside, other=0.0),
            grad * tl.load(hyper + 3),
            tl.load(hyper),
            tl.load(hyper + 1),
            tl.load(hyper + 2),
            b_1,
            c_1,
            b_2,
            c_2,
            eps,
        )
        tl.store(mean + column, mean_1, mask=inside)
        tl.store(square + column, square_1, mask=inside)
        tl.store(b_dec + column, bias, mask=inside)


@triton.jit
@no_type_check
def clip_kernel(squares, hyper, clipped, n, clip_norm, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(squares + i, mask=i < n, other=0.0)
    norm = tl.sqrt(tl.sum(total))
    share = clip_norm / (norm + 1e-6)
    # As torch.nn.utils.clip_grad_norm_ has it; what is no number stays so.
    tl.store(hyper + 3, tl.where(share > 1, 1.0, share))
    tl.store(clipped, tl.load(clipped) + (norm > clip_norm).to(tl.int64))
