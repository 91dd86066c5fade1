"""The ops with gradients that touch only the latents that fired, on whichever backend `choose`
names.

A backend is a module with `weighted_rows`, `transposed`, `decode_gradients`, `topk`, `batch_topk`
and `column_topk`: `eager`, whose docstrings say what each does, and `triton_backend`.
"""

from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.kernels import eager, reference
from saekit.kernels._choose import choose, triton_backend
from saekit.kernels.reference import Code, Rule, rows_of


def _backend(on: Tensor, width: int = 1) -> ModuleType | None:
    """None: the definitions."""
    match choose(on.device, on.dtype, width).backend:
        case "reference":
            return None
        case "eager":
            return eager
        case "triton":
            return triton_backend()


def encode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    rule: Rule,
) -> Code:
    """See `reference.encode`."""
    backend = _backend(W_enc, len(W_enc))
    if backend is None:
        return reference.encode(x, W_enc, b_enc, rule)
    code: Code = _Encode.apply(x, W_enc, b_enc, rule, backend)  # type: ignore[no-untyped-call]
    return code


def topk_encode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
) -> tuple[Float[Tensor, "batch {k}"], Int[Tensor, "batch {k}"]]:
    """See `reference.topk_encode`."""
    backend = _backend(W_enc, len(W_enc))
    if backend is None:
        return reference.topk_encode(x, W_enc, b_enc, k)
    values, indices, _ = encode(x, W_enc, b_enc, lambda pre: (backend.topk(pre, k), None))
    return values, indices


def sparse_decode(
    values: Float[Tensor, "..."],
    indices: Int[Tensor, "..."],
    W_dec: Float[Tensor, "d_sae d_out"],
    offsets: Int[Tensor, " offsets"] | None = None,
) -> Float[Tensor, "batch d_out"]:
    """See `reference.sparse_decode`."""
    backend = _backend(W_dec, W_dec.shape[1])
    if backend is None:
        return reference.sparse_decode(values, indices, W_dec, offsets)
    x_hat: Tensor = _SparseDecode.apply(values, indices, offsets, W_dec, backend)  # type: ignore[no-untyped-call]
    return x_hat


def batch_topk(
    pre: Float[Tensor, "batch d_sae"], n: int
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " offsets"]]:
    """See `reference.batch_topk`."""
    found: tuple[Tensor, Tensor] = (_backend(pre) or reference).batch_topk(pre, n)
    return found


def column_topk(
    pre: Float[Tensor, "batch d_sae"], quotas: Int[Tensor, " d_sae"]
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " offsets"]]:
    """See `reference.column_topk`."""
    found: tuple[Tensor, Tensor] = (_backend(pre) or reference).column_topk(pre, quotas)
    return found


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, rule: Rule, backend: ModuleType
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        pre = torch.addmm(b_enc, x, W_enc)
        indices, offsets = rule(pre)
        kept = pre.gather(1, indices) if offsets is None else pre[rows_of(offsets), indices]
        # In the precision of the weights, whatever the product was made in.
        values = kept.to(W_enc.dtype).relu_()
        ctx.save_for_backward(x, W_enc, values, indices, offsets)
        ctx.backend = backend
        ctx.mark_non_differentiable(indices)
        if offsets is not None:
            ctx.mark_non_differentiable(offsets)
        return values, indices, offsets

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, W_enc, values, indices, offsets = ctx.saved_tensors
        d_pre = grads[0] * (values > 0)
        d_x = d_W = d_b = None
        if ctx.needs_input_grad[0]:
            d_x = ctx.backend.weighted_rows(d_pre, indices, offsets, W_enc.T)
        if ctx.needs_input_grad[1]:
            d_W = ctx.backend.transposed(d_pre, indices, offsets, x, W_enc.shape[1]).T
        if ctx.needs_input_grad[2]:
            zeros = d_pre.new_zeros(W_enc.shape[1])
            d_b = zeros.index_add_(0, indices.flatten(), d_pre.flatten())
        return d_x, d_W, d_b, None, None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        indices: Tensor,
        offsets: Tensor | None,
        W_dec: Tensor,
        backend: ModuleType,
    ) -> Tensor:
        ctx.save_for_backward(values, indices, offsets, W_dec)
        ctx.backend = backend
        x_hat: Tensor = backend.weighted_rows(values, indices, offsets, W_dec)
        return x_hat

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        values, indices, offsets, W_dec = ctx.saved_tensors
        d_values, d_W = ctx.backend.decode_gradients(
            values,
            indices,
            offsets,
            W_dec,
            grads[0],
            want_values=ctx.needs_input_grad[0],
            want_table=ctx.needs_input_grad[3],
        )
        return d_values, None, None, d_W, None
