"""Matching pursuit whose memory does not grow with the steps, in stock PyTorch operators; or by the
definition or in Triton (`triton_pursuit`), as `choose` says.

Forward, the inner products of all atoms with what is left of x are found in one of two ways. Either
by a product with W_dec in each step; or, after the first, from the atoms' inner products with each
other, since taking `a` times atom j away lowers them by `a * (W_dec @ W_dec.T)[j]`. In both, rows
go through all their steps a block at a time, so that a block's products stay in a cache.

Backward goes the steps in reverse, and finds what was left before each by putting back what was
taken: only the code and the last rest are kept, `[batch, steps]` and `[batch, d]`.

Axes: batch, block (some of its rows), d, d_sae.
"""

from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.kernels import reference
from saekit.kernels._choose import choose

_BLOCK = 2**22
_GRAM_BLOCK = 2**20
"""Products `[block, d_sae]` held at a time, in either way."""
_WIDTH = 64
"""Products of which the largest is found before the largest of those."""

_GRAM_BYTES = 2**30
"""What the inner products of all atoms with each other may take."""

_GRAM_STEPS = 1.5
"""Rows for each atom, counted in every step but the first, from which making those pays: 1.3 to 1.6
with 4,096 or 16,384 atoms of width 64 or 256, on one core of an AMD EPYC (Zen 4). A step then takes
2.5 ms in place of 6.3 (width 64) or 14.7 (256), for 512 rows and 4,096 atoms."""


class _MatchingPursuit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_dec: Tensor, steps: int, residual: float, signed: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        rest = x.clone()
        values = x.new_zeros(len(x), steps)
        indices = torch.zeros(len(x), steps, dtype=torch.long, device=x.device)
        size, gram = max(1, _BLOCK // len(W_dec)), None
        if gram_pays(len(x), len(W_dec), steps, W_dec.dtype):
            size, gram = max(1, _GRAM_BLOCK // len(W_dec)), (W_dec @ W_dec.T).to(x.dtype)
        for first in range(0, len(x), size):
            block = slice(first, first + size)
            _pursue(rest[block], values[block], indices[block], W_dec, gram, residual, signed)
        ctx.save_for_backward(W_dec, values, indices, rest)
        ctx.mark_non_differentiable(indices)
        return values, indices, rest

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        W_dec, values, indices, rest = ctx.saved_tensors
        d_values, _, d_rest = grads
        d_W = torch.zeros_like(W_dec) if ctx.needs_input_grad[1] else None
        d_x = torch.empty_like(rest)
        size = max(1, _BLOCK // (8 * W_dec.shape[1]))
        for first in range(0, len(rest), size):
            block = slice(first, first + size)
            d_x[block] = _back(
                values[block],
                indices[block],
                rest[block],
                d_values[block],
                d_rest[block],
                W_dec,
                d_W,
            )
        return d_x, d_W, None, None, None


def gram_pays(batch: int, d_sae: int, steps: int, dtype: torch.dtype) -> bool:
    """Whether to make the inner products of all atoms with each other first."""
    fits = d_sae**2 * dtype.itemsize <= _GRAM_BYTES
    return fits and (steps - 1) * batch > _GRAM_STEPS * d_sae


def _pursue(
    rest: Float[Tensor, "block d"],
    values: Float[Tensor, "block steps"],
    indices: Int[Tensor, "block steps"],
    W_dec: Float[Tensor, "d_sae d"],
    gram: Float[Tensor, "d_sae d_sae"] | None,
    residual: float,
    signed: bool,
) -> None:
    """Write the code of some rows. `rest` holds x, and at the end what is left of it.

    A row that stopped is looked at no more once a quarter of those with it have, too.
    """
    steps = values.shape[1]
    rows = torch.arange(len(rest), device=rest.device)
    now, enough = rest.clone(), residual * rest.norm(dim=1)
    taken, atom = values.clone(), indices.clone()
    done = torch.zeros(len(rest), dtype=torch.bool, device=rest.device)
    scores = now @ W_dec.T
    lower = scores.new_empty(0)
    if gram is not None:
        scores, lower = scores.to(gram.dtype), gram.new_empty(scores.shape)
    for step in range(steps):
        best = _largest(scores, signed)
        atoms = W_dec[best]
        # Anew, whatever the precision of the scores and what has gathered in them.
        value = (now * atoms).sum(1)
        done |= (value == 0) if signed else (value <= 0)
        if residual > 0:
            done |= now.norm(dim=1) <= enough
        value.masked_fill_(done, 0)
        now.addcmul_(value[:, None], atoms, value=-1)
        taken[:, step], atom[:, step] = value, best.masked_fill_(done, 0)
        if step + 1 == steps:
            break
        stopped = int(done.sum())
        if 4 * stopped > len(rows):
            rest[rows], values[rows], indices[rows] = now, taken, atom
            keep = (~done).nonzero().flatten()
            rows, now, enough, done = rows[keep], now[keep], enough[keep], done[keep]
            taken, atom, value, best = taken[keep], atom[keep], value[keep], best[keep]
            scores = scores[keep]
            if len(rows) == 0:
                return
        if gram is None:
            scores = now @ W_dec.T
        else:
            lower = lower[: len(rows)]
            torch.index_select(gram, 0, best, out=lower)
            scores.addcmul_(value[:, None], lower, value=-1)
    rest[rows], values[rows], indices[rows] = now, taken, atom


def _largest(scores: Float[Tensor, "rows d_sae"], signed: bool) -> Int[Tensor, " rows"]:
    """`argmax(1)`, of absolute values if `signed`: of equals the first. In two stages where there
    are many, because torch finds a maximum several times faster than its place."""
    whole = scores.shape[1] // _WIDTH * _WIDTH
    if whole < 8 * _WIDTH:
        return (scores.abs() if signed else scores).argmax(1)
    parts = scores[:, :whole].unflatten(1, (-1, _WIDTH))
    top = parts.amax(2)
    if signed:
        top = torch.maximum(top, -parts.amin(2))
    most, part = top.max(1)
    few = parts[torch.arange(len(scores), device=scores.device), part]
    best: Tensor = part * _WIDTH + (few.abs() if signed else few).argmax(1)
    if whole == scores.shape[1]:
        return best
    rest = scores[:, whole:]
    last, place = (rest.abs() if signed else rest).max(1)
    return torch.where(last > most, whole + place, best)


def _back(
    values: Float[Tensor, "block steps"],
    indices: Int[Tensor, "block steps"],
    rest: Float[Tensor, "block d"],
    d_values: Float[Tensor, "block steps"],
    d_rest: Float[Tensor, "block d"],
    W_dec: Float[Tensor, "d_sae d"],
    d_W: Float[Tensor, "d_sae d"] | None,
) -> Float[Tensor, "block d"]:
    """The gradient with respect to x of some rows; that with respect to W_dec is added to `d_W`.

    A step is `value = rest . atom`, `rest' = rest - value atom`.
    """
    rest, d_rest = rest.clone(), d_rest.clone()
    for step in reversed(range(values.shape[1])):
        atom = indices[:, step]
        value, atoms = values[:, step, None], W_dec[atom]
        rest.addcmul_(value, atoms)
        d_value = d_values[:, step, None] - (d_rest * atoms).sum(1, keepdim=True)
        # A step after a row stopped took nothing, and its atom is none.
        d_value.masked_fill_(value == 0, 0)
        if d_W is not None:
            d_W.index_add_(0, atom, d_value * rest - value * d_rest)
        d_rest.addcmul_(d_value, atoms)
    return d_rest


def matching_pursuit(
    x: Float[Tensor, "batch d"],
    W_dec: Float[Tensor, "d_sae d"],
    steps: int,
    residual: float = 0.0,
    signed: bool = False,
) -> tuple[Float[Tensor, "batch {steps}"], Int[Tensor, "batch {steps}"], Float[Tensor, "batch d"]]:
    """See `reference.matching_pursuit`."""
    out: tuple[Tensor, Tensor, Tensor]
    match choose(W_dec.device, W_dec.dtype, W_dec.shape[1]).backend:
        case "reference":
            out = reference.matching_pursuit(x, W_dec, steps, residual, signed)
        case "eager":
            out = _MatchingPursuit.apply(x, W_dec, steps, residual, signed)  # type: ignore[no-untyped-call]
        case "triton":
            # Imports Triton, which is not on every machine.
            triton_pursuit = import_module("saekit.kernels.triton_pursuit")
            out = triton_pursuit.matching_pursuit(x, W_dec, steps, residual, signed)
    return out
