"""What matrices are multiplied in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from saekit.config import TrainConfig

Precision = Literal["float32", "bfloat16"]


def precision_on(device: str, cfg: TrainConfig) -> Precision:
    """What a config's precision means on a device."""
    if cfg.precision != "auto":
        return cfg.precision
    on_gpu = torch.device(device).type == "cuda"
    return (
        "bfloat16"
        if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        else "float32"
    )


@contextmanager
def multiplying_in(precision: Precision, device: str) -> Iterator[None]:
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
