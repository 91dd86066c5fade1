"""The parts of the ops that differ from backend to backend, in stock PyTorch operators.

What `reference.py` would do in `[batch, d_sae]` or `[batch, k, d]` is done here by
`embedding_bag`: it sums weighted rows of a table. Decoding sums decoder rows for each row of x;
its transpose sums rows of x (or of the gradient) for each latent, and is the same operator over
the codes sorted by latent.
"""

import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from saekit.kernels.reference import row_offsets, rows_of


def weighted_rows(
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


def transposed(
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
    return weighted_rows(values.flatten()[order], rows, bags, x)


def decode_gradients(
    values: Float[Tensor, "..."],
    indices: Int[Tensor, "..."],
    offsets: Int[Tensor, " offsets"] | None,
    table: Float[Tensor, "d_sae d"],
    grad: Float[Tensor, "batch d"],
    *,
    want_values: bool = True,
    want_table: bool = True,
) -> tuple[Float[Tensor, "..."] | None, Float[Tensor, "d_sae d"] | None]:
    """Of `weighted_rows`, with respect to the values and to the table."""
    d_values = d_table = None
    if want_values:
        d_values = products(indices, offsets, grad, table)
    if want_table:
        d_table = transposed(values, indices, offsets, grad, len(table))
    return d_values, d_table


BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
"""Integers of the size of each float: positive floats have the order of their bits, and integers
are compared in less time."""


def topk(pre: Float[Tensor, "batch d_sae"], k: int) -> Int[Tensor, "batch {k}"]:
    """Where the k largest entries of each row are, of those above 0; any others where there are
    fewer. NaN counts as the largest."""
    if pre.device.type != "cpu":
        return pre.topk(k, dim=-1, sorted=False).indices
    batch, n = pre.shape
    if n < 8 * k or n % 4:
        return _largest(pre.relu(), k)
    # They all lie where the k largest of the maxima of four entries each lie.
    fours = pre.view(batch, 4, n // 4)
    column = topk(fours.amax(1), k)
    among = fours.gather(2, column[:, None].expand(batch, 4, k)).view(batch, 4 * k)
    place = _largest(among.relu_(), k)
    return column.gather(1, place % k).add_(place // k, alpha=n // 4)


def _largest(entries: Float[Tensor, "batch n"], k: int) -> Int[Tensor, "batch {k}"]:
    """Of entries that are not below 0, and may be changed."""
    # NaN may have a sign, which would hide it.
    return entries.abs_().view(BITS[entries.dtype]).topk(k, dim=1, sorted=False).indices


def products(
    indices: Int[Tensor, "..."],
    offsets: Int[Tensor, " offsets"] | None,
    rows: Float[Tensor, "batch d"],
    table: Float[Tensor, "d_sae d"],
) -> Float[Tensor, "..."]:
    """`out[b, j] = rows[b] . table[indices[b, j]]`, which is the gradient of `weighted_rows` with
    respect to the values."""
    if rows.device.type != "cpu" or rows.dtype not in (torch.float32, torch.float64):
        # Without torch's slow gradient for the table.
        with torch.enable_grad():
            weights = rows.new_zeros(indices.shape, requires_grad=True)
            out = weighted_rows(weights, indices, offsets, table.detach())
        (wanted,) = torch.autograd.grad(out, weights, rows)
        return wanted
    if offsets is None:
        offsets = torch.arange(len(rows) + 1, dtype=indices.dtype).mul_(indices.shape[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        pattern = torch.sparse_csr_tensor(
            offsets,
            indices.flatten(),
            rows.new_zeros(indices.numel()),
            (len(rows), len(table)),
            check_invariants=False,
        )
    found: Tensor = torch.sparse.sampled_addmm(pattern, rows.contiguous(), table.T, beta=0).values()
    return found.view(indices.shape)


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
