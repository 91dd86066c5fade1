"""Learning rates over the course of a run."""


def warm_then_decay(step: int, n_steps: int, warmup: float, decay: float) -> float:
    """Factor on the peak rate: up from 0 over the first share of the steps, down to 0 over the
    last.

    `step` counts from 0; the factor of the first step is already above 0, that of the last still
    is.
    """
    up = (step + 1) / max(1, round(warmup * n_steps))
    down = (n_steps - step) / max(1, round(decay * n_steps))
    return min(1.0, up, down)
