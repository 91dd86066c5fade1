"""The parts of the ops that differ from backend to backend, in Triton. See `eager`."""

from jaxtyping import Float, Int
from torch import Tensor

from saekit.kernels.eager import column_topk
from saekit.kernels.triton_batch_select import batch_topk_select
from saekit.kernels.triton_decode import decode_gradients, weighted_rows
from saekit.kernels.triton_select import topk_select

__all__ = [
    "batch_topk",
    "column_topk",
    "decode_gradients",
    "topk",
    "transposed",
    "weighted_rows",
]


def transposed(
    values: Float[Tensor, "..."],
    indices: Int[Tensor, "..."],
    offsets: Int[Tensor, " offsets"] | None,
    x: Float[Tensor, "batch d"],
    d_sae: int,
) -> Float[Tensor, "{d_sae} d"]:
    """See `eager.transposed`."""
    # Of the table its shape is read alone.
    table = x.new_empty(1, 1).expand(d_sae, x.shape[1])
    _, out = decode_gradients(values, indices, offsets, table, x, want_values=False)
    assert out is not None
    return out


def topk(pre: Float[Tensor, "batch d_sae"], k: int) -> Int[Tensor, "batch {k}"]:
    """See `eager.topk`; of equal entries the first."""
    return topk_select(pre.contiguous(), k)[1].long()


def batch_topk(
    pre: Float[Tensor, "batch d_sae"], n: int
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " offsets"]]:
    """See `reference.batch_topk`; of equal entries the first."""
    _, indices, offsets = batch_topk_select(pre.contiguous(), n)
    return indices.long(), offsets
