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

from saekit.kernels.reference import Code, Rule, row_offsets, rows_of


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        pre = torch.addmm(b_enc, x, W_enc)
        indices, offsets = rule(pre)
        kept = pre.gather(1, indices) if offsets is None else pre[rows_of(offsets), indices]
        # In the precision of the weights, whatever the product was made in.
        values = kept.to(W_enc.dtype).relu_()
        ctx.save_for_backward(x, W_enc, values, indices, offsets)
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
            d_x = _weighted_rows(d_pre, indices, offsets, W_enc.T)
        if ctx.needs_input_grad[1]:
            d_W = _transposed(d_pre, indices, offsets, x, W_enc.shape[1]).T
        if ctx.needs_input_grad[2]:
            zeros = d_pre.new_zeros(W_enc.shape[1])
            d_b = zeros.index_add_(0, indices.flatten(), d_pre.flatten())
        return d_x, d_W, d_b, None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, indices: Tensor, offsets: Tensor | None, W_dec: Tensor
    ) -> Tensor:
        ctx.save_for_backward(values, indices, offsets, W_dec)
        return _weighted_rows(values, indices, offsets, W_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        values, indices, offsets, W_dec = ctx.saved_tensors
        d_values = d_W = None
        if ctx.needs_input_grad[0]:
            # torch's own gradient with respect to the weights, without its slow one for the table.
            with torch.enable_grad():
                weights = values.detach().requires_grad_()
                out = _weighted_rows(weights, indices, offsets, W_dec.detach())
            (d_values,) = torch.autograd.grad(out, weights, grads[0])
        if ctx.needs_input_grad[3]:
            d_W = _transposed(values, indices, offsets, grads[0], W_dec.shape[0])
        return d_values, None, None, d_W


def _weighted_rows(
    values: Float[Tensor, "..."],
    indices: Int[Tensor, "..."],
    offsets: Int[Tensor, " offsets"] | None,
    table: Float[Tensor, "d_sae d"],
) -> Float[Tensor, "batch d"]:
    """`out[b] = sum_j values[b, j] * table[indices[b, j]]`."""
    return F.embedding_bag(
        indices,
        table,
        offsets,
        per_sample_weights=values,
        mode="sum",
        include_last_offset=offsets is not None,
    )


def _transposed(
    values: Float[Tensor, "..."],
    indices: Int[Tensor, "..."],
    offsets: Int[Tensor, " offsets"] | None,
    x: Float[Tensor, "batch d"],
    d_sae: int,
) -> Float[Tensor, "{d_sae} d"]:
    """`out[i] = sum of values[b, j] * x[b] over all (b, j) where indices[b, j] == i`."""
    latent, order = indices.flatten().sort(stable=True)
    rows = order // indices.shape[1] if offsets is None else rows_of(offsets)[order]
    bags = row_offsets(latent, d_sae)
    return _weighted_rows(values.flatten()[order], rows, bags, x)


def encode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    rule: Rule,
) -> Code:
    """See `reference.encode`."""
    code: Code = _Encode.apply(x, W_enc, b_enc, rule)  # type: ignore[no-untyped-call]
    return code


def topk_encode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
) -> tuple[Float[Tensor, "batch {k}"], Int[Tensor, "batch {k}"]]:
    """See `reference.topk_encode`."""

    def largest(pre: Tensor) -> tuple[Tensor, None]:
        return pre.topk(k, dim=-1, sorted=False).indices, None

    values, indices, _ = encode(x, W_enc, b_enc, largest)
    return values, indices


def sparse_decode(
    values: Float[Tensor, "..."],
    indices: Int[Tensor, "..."],
    W_dec: Float[Tensor, "d_sae d_out"],
    offsets: Int[Tensor, " offsets"] | None = None,
) -> Float[Tensor, "batch d_out"]:
    """See `reference.sparse_decode`."""
    x_hat: Tensor = _SparseDecode.apply(values, indices, offsets, W_dec)  # type: ignore[no-untyped-call]
    return x_hat


def batch_topk(
    pre: Float[Tensor, "batch d_sae"], n: int
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " offsets"]]:
    """See `reference.batch_topk`.

    Only what exceeds a bound is sorted out, and the bound is one that more than n entries exceed:
    a sample of the entries gives it. Where the sample misled, the whole matrix is looked at.
    """
    d_sae = pre.shape[1]
    flat = pre.flatten()
    # Odd, so that the sample is not taken from a few columns alone.
    stride = flat.numel() // _SAMPLE | 1
    sample = flat[::stride]
    # Half as many again as wanted, so that a sample rarely gives too high a bound.
    place = 3 * n // (2 * stride) + 16
    bound = flat.new_zeros(())
    if place < len(sample):
        bound = sample.topk(place, sorted=False).values.min().clamp_min(0)
    above = (flat > bound).nonzero().flatten()
    if len(above) < n and bound > 0:
        above = (flat > 0).nonzero().flatten()
    if len(above) > n:
        above = above[flat[above].topk(n, sorted=False).indices].sort().values
    return above % d_sae, row_offsets(above // d_sae, pre.shape[0])


_SAMPLE = 1 << 18


def column_topk(
    pre: Float[Tensor, "batch d_sae"], quotas: Int[Tensor, " d_sae"]
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " offsets"]]:
    """See `reference.column_topk`. Entries are compared in float32.

    As `batch_topk`, with a bound for each column, from a sample of the rows.
    """
    batch, d_sae = pre.shape
    if batch == 0:
        return quotas.new_empty(0), quotas.new_zeros(1)
    stride = max(1, batch // _SAMPLE_ROWS)
    # Half as many again as wanted, and a few more for the quotas that are small.
    bound = _by_place(pre[::stride].T.contiguous(), 3 * quotas // (2 * stride) + 3).clamp_min_(0)
    bound.masked_fill_(quotas == 0, torch.inf)
    above = (pre > bound).flatten().nonzero().flatten()
    found = torch.bincount(above % d_sae, minlength=d_sae)
    misled = ((found < quotas) & (bound > 0)).nonzero().flatten()
    if len(misled):
        missing = (pre[:, misled] > 0) & (pre[:, misled] <= bound[misled])
        rows, columns = missing.nonzero(as_tuple=True)
        above = torch.cat([above, rows * d_sae + misled[columns]])
        found = torch.bincount(above % d_sae, minlength=d_sae)
    # Column by column, the largest first. Positive floats have the order of their bits, and
    # integers are sorted many times faster.
    bits = pre.flatten()[above].float().view(torch.int32)
    order = ((above % d_sae << 32) - bits).argsort()
    first = (found.cumsum(0) - found).repeat_interleave(found)
    within = torch.arange(len(above), device=pre.device) - first < quotas.repeat_interleave(found)
    kept = above[order[within]].sort().values
    return kept % d_sae, row_offsets(kept // d_sae, batch)


_SAMPLE_ROWS = 512
_FIRST_PLACES = 16


def _by_place(
    entries: Float[Tensor, "d_sae row"], place: Int[Tensor, " d_sae"]
) -> Float[Tensor, " d_sae"]:
    """Of each row, the entry that so many are larger than; 0 where the row has no more."""
    found, rows = entries.new_zeros(len(place)), entries.shape[1]
    # Most quotas are small, and the first few places are found without sorting all.
    for which, places in (
        (place < _FIRST_PLACES, _FIRST_PLACES),
        ((place >= _FIRST_PLACES) & (place < rows), rows),
    ):
        latents = (which & (place < rows)).nonzero().flatten()
        ranked = entries[latents].topk(min(places, rows), dim=1).values
        found[latents] = ranked.gather(1, place[latents, None])[:, 0]
    return found
