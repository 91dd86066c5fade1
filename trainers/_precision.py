"""What matrices are multiplied in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from saekit import kernels
from saekit.config import TrainConfig

Precision = Literal["float32", "bfloat16"]


def precision_on(device: str, cfg: TrainConfig) -> Precision:
    """What a config's precision means on a device."""
    if cfg.precision != "auto":
        return cfg.precision
    return kernels.usual_precision(torch.device(device))


@contextmanager
def multiplying_in(precision: Precision, device: str) -> Iterator[None]:
    """Matrix products of float32 tensors in `precision`, summed in float32.

    On a GPU bfloat16 is autocast, so the forward pass alone needs to run in here; and on a CPU that
    multiplies bfloat16 without tiles (AMX). With them, and where float32 is as quick, it is what
    torch calls medium precision: operands are rounded inside the product, or not at all.
    """
    kind = torch.device(device).type
    if precision == "bfloat16" and (kind == "cuda" or (kind == "cpu" and _multiplies_bfloat16())):
        with torch.autocast(kind, torch.bfloat16):
            yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision == "bfloat16" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _multiplies_bfloat16() -> bool:
    # Torch has no public way to ask. With AMX its medium precision is as quick, and rounds less.
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
