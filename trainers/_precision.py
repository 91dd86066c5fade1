"""What matrices are multiplied in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch


@contextmanager
def multiplying_in(precision: Literal["float32", "bfloat16"], device: str) -> Iterator[None]:
    """Matrix products of float32 tensors in `precision`, summed in float32.

    On a CPU bfloat16 is what torch calls medium precision: operands are rounded inside the product.
    On a GPU it is autocast, so the forward pass alone needs to run in here.
    """
    if precision == "bfloat16" and torch.device(device).type == "cuda":
        with torch.autocast("cuda", torch.bfloat16):
            yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision == "bfloat16" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
