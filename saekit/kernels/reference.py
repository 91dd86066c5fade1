"""Each op in plain PyTorch: the definition that every faster form must match, gradients included.

Axes: batch (rows of activations), d_in, d_out, d_sae (latents), k (latents kept a row).

A code is `values` and `indices`, of shape [batch, k]; or, where rows keep different numbers of
latents, of shape [kept], row after row, with `offsets` [batch + 1] that say where each row begins
and the last ends.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Code = tuple[Float[Tensor, "..."], Int[Tensor, "..."], Int[Tensor, " offsets"] | None]
"""Values, indices, offsets."""

Rule = Callable[
    [Float[Tensor, "batch d_sae"]], tuple[Int[Tensor, "..."], Int[Tensor, " offsets"] | None]
]
"""Which latents to keep, from the pre-activations: indices [batch, k] and None, or [kept] and
offsets. Called without gradients; it may not change what it is given."""


def encode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    rule: Rule,
) -> Code:
    """`relu(x @ W_enc + b_enc)` at the latents that `rule` chooses. Gradients reach those alone."""
    pre = x @ W_enc + b_enc
    with torch.no_grad():
        indices, offsets = rule(pre)
    if offsets is None:
        return pre.gather(1, indices).relu(), indices, None
    return pre[rows_of(offsets), indices].relu(), indices, offsets


def topk_encode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """The k largest of `relu(x @ W_enc + b_enc)` in each row, and which latents they are.

    A row with fewer than k positive pre-activations is filled with zeros. Order within a row is
    not defined.
    """
    values, indices = (x @ W_enc + b_enc).relu().topk(k, dim=-1, sorted=False)
    return values, indices


def batch_topk(
    pre: Float[Tensor, "batch d_sae"], n: int
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " offsets"]]:
    """The n largest positive entries of the whole matrix; all of them where there are fewer.

    Within a row, latents stand in ascending order. Which of equal entries are kept is not defined.
    """
    d_sae = pre.shape[1]
    values, flat = pre.flatten().topk(min(n, pre.numel()), sorted=False)
    flat = flat[values > 0].sort().values
    return flat % d_sae, row_offsets(flat // d_sae, pre.shape[0])


def column_topk(
    pre: Float[Tensor, "batch d_sae"], quotas: Int[Tensor, " d_sae"]
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " offsets"]]:
    """In column i, the `quotas[i]` largest positive entries; all of them where there are fewer.

    Within a row, latents stand in ascending order. Which of equal entries are kept is not defined.
    """
    place = pre.argsort(0, descending=True).argsort(0)
    rows, indices = ((place < quotas) & (pre > 0)).nonzero(as_tuple=True)
    return indices, row_offsets(rows, pre.shape[0])


def sparse_decode(
    values: Float[Tensor, "..."],
    indices: Int[Tensor, "..."],
    W_dec: Float[Tensor, "d_sae d_out"],
    offsets: Int[Tensor, " offsets"] | None = None,
) -> Float[Tensor, "batch d_out"]:
    """`sum_j values[b, j] * W_dec[indices[b, j]]`; repeated indices add up."""
    parts = values[..., None] * W_dec[indices]
    if offsets is None:
        return parts.sum(1)
    x_hat = parts.new_zeros(len(offsets) - 1, W_dec.shape[1])
    return x_hat.index_add(0, rows_of(offsets), parts)


def rows_of(offsets: Int[Tensor, " offsets"]) -> Int[Tensor, " kept"]:
    """The row of each entry of a code that has offsets."""
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    return rows.repeat_interleave(offsets.diff())


def row_offsets(rows: Int[Tensor, " kept"], batch: int) -> Int[Tensor, " offsets"]:
    """Offsets of entries whose rows, in ascending order, are `rows`."""
    return torch.searchsorted(rows, torch.arange(batch + 1, device=rows.device))


def matching_pursuit(
    x: Float[Tensor, "batch d"],
    W_dec: Float[Tensor, "d_sae d"],
    steps: int,
    residual: float = 0.0,
    signed: bool = False,
) -> tuple[Float[Tensor, "batch {steps}"], Int[Tensor, "batch {steps}"], Float[Tensor, "batch d"]]:
    """x taken apart greedily over atoms, the rows of W_dec, whose norm must be 1.

    A step takes the atom with the largest inner product with what is left of x (`signed`: the
    largest in absolute value), and that part away. A row stops where the product is not above 0
    (`signed`: is 0), and once what is left is no longer than a share `residual` of x.

    Returns the products and the atoms in the order of the steps, both 0 from where a row stopped,
    and what is left. An atom may come several times. Gradients pass through all steps; which atoms
    are taken, and when a row stops, counts as constant.
    """
    rest, values, indices = x, [], []
    enough = residual * x.norm(dim=1)
    done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for _ in range(steps):
        scores = rest @ W_dec.T
        best = (scores.abs() if signed else scores).argmax(1)
        value = scores.gather(1, best[:, None])[:, 0]
        # Asked so that NaN goes on, and is seen in what comes out.
        done = done | ((value == 0) if signed else (value <= 0)) | (rest.norm(dim=1) <= enough)
        value, best = value.masked_fill(done, 0), best.masked_fill(done, 0)
        rest = rest - value[:, None] * W_dec[best]
        values.append(value)
        indices.append(best)
    return torch.stack(values, 1), torch.stack(indices, 1), rest


def merge_repeats(
    values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"]
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """The same code with a latent's values added up in one slot; slots that this frees hold 0."""
    latent, order = indices.sort(dim=1, stable=True)
    slot = F.pad((latent[:, 1:] != latent[:, :-1]).long(), (1, 0)).cumsum(1)
    merged = torch.zeros_like(values).scatter_add(1, slot, values.gather(1, order))
    return merged, torch.zeros_like(indices).scatter(1, slot, latent)
