"""Learning rates over the course of a run."""

import math
from typing import Literal


def warm_then_decay(
    step: int,
    n_steps: int,
    warmup: float,
    decay: float,
    shape: Literal["linear", "cosine"] = "linear",
) -> float:
    """Factor on the peak rate: up from 0 over the first share of the steps, down to 0 over the
    last, along a line or half a cosine wave.

    `step` counts from 0; the factor of the first step is already above 0, that of the last still
    is.
    """
    up = (step + 1) / max(1, round(warmup * n_steps))
    down = min(1.0, (n_steps - step) / max(1, round(decay * n_steps)))
    if shape == "cosine":
        down = (1 - math.cos(math.pi * down)) / 2
    return min(1.0, up, down)
