"""Each op in plain PyTorch: the definition that every faster form must match, gradients included.

Axes: batch (rows of activations), d_in, d_out, d_sae (latents), k (latents kept a row).
"""

from jaxtyping import Float, Int
from torch import Tensor


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


def sparse_decode(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "d_sae d_out"],
) -> Float[Tensor, "batch d_out"]:
    """`sum_j values[b, j] * W_dec[indices[b, j]]`; repeated indices add up."""
    return (values[..., None] * W_dec[indices]).sum(1)
