"""The same ops with gradients that touch only the k latents of each row, in stock PyTorch
operators.

What `reference.py` would do in `[batch, d_sae]` or `[batch, k, d]` is done here by
`embedding_bag`: it sums weighted rows of a table. Decoding sums decoder rows for each row of x;
its transpose sums rows of x (or of the gradient) for each latent, and is the same operator over
the codes sorted by latent.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class _TopKEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = torch.addmm(b_enc, x, W_enc).topk(k, dim=-1, sorted=False)
        values = values.relu_()
        ctx.save_for_backward(x, W_enc, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, W_enc, values, indices = ctx.saved_tensors
        d_pre = grads[0] * (values > 0)
        d_x = d_W = d_b = None
        if ctx.needs_input_grad[0]:
            d_x = _weighted_rows(d_pre, indices, W_enc.T)
        if ctx.needs_input_grad[1]:
            d_W = _transposed(d_pre, indices, x, W_enc.shape[1]).T
        if ctx.needs_input_grad[2]:
            zeros = d_pre.new_zeros(W_enc.shape[1])
            d_b = zeros.index_add_(0, indices.flatten(), d_pre.flatten())
        return d_x, d_W, d_b, None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, W_dec)
        return _weighted_rows(values, indices, W_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        values, indices, W_dec = ctx.saved_tensors
        d_values = d_W = None
        if ctx.needs_input_grad[0]:
            # torch's own gradient with respect to the weights, without its slow one for the table.
            with torch.enable_grad():
                weights = values.detach().requires_grad_()
                out = _weighted_rows(weights, indices, W_dec.detach())
            (d_values,) = torch.autograd.grad(out, weights, grads[0])
        if ctx.needs_input_grad[2]:
            d_W = _transposed(values, indices, grads[0], W_dec.shape[0])
        return d_values, None, d_W


def _weighted_rows(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    table: Float[Tensor, "d_sae d"],
) -> Float[Tensor, "batch d"]:
    """`out[b] = sum_j values[b, j] * table[indices[b, j]]`."""
    return F.embedding_bag(indices, table, per_sample_weights=values, mode="sum")


def _transposed(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    x: Float[Tensor, "batch d"],
    d_sae: int,
) -> Float[Tensor, "{d_sae} d"]:
    """`out[i] = sum of values[b, j] * x[b] over all (b, j) where indices[b, j] == i`."""
    latent, order = indices.flatten().sort(stable=True)
    offsets = torch.searchsorted(latent, torch.arange(d_sae, device=latent.device))
    return F.embedding_bag(
        order // indices.shape[1],
        x,
        offsets,
        per_sample_weights=values.flatten()[order],
        mode="sum",
    )


def topk_encode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
) -> tuple[Float[Tensor, "batch {k}"], Int[Tensor, "batch {k}"]]:
    """See `reference.topk_encode`."""
    values, indices = _TopKEncode.apply(x, W_enc, b_enc, k)  # type: ignore[no-untyped-call]
    return values, indices


def sparse_decode(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "d_sae d_out"],
) -> Float[Tensor, "batch d_out"]:
    """See `reference.sparse_decode`."""
    x_hat: Tensor = _SparseDecode.apply(values, indices, W_dec)  # type: ignore[no-untyped-call]
    return x_hat
