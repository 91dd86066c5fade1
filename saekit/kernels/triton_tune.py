"""How the fused step is best gone about on this machine's GPU, by trying.

What is tried is what the kernels' modules name as candidates; each kernel is timed by itself, since
none depends on another's choice. The finding is kept (see `memory`), for one shape and GPU.
"""

import logging
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch

from saekit.kernels import memory
from saekit.kernels.bench_setting import milliseconds
from saekit.kernels.triton_decode import DecodeConfig, RowConfig
from saekit.kernels.triton_select import SelectConfig
from saekit.kernels.triton_step import FusedTopKStep, StepConfig, step_candidates, step_config

log = logging.getLogger(__name__)

_WARM_UPS, _ROUNDS = 3, 9


def tuned(
    device: torch.device, d_in: int, d_sae: int, k: int, moments: torch.dtype = torch.float32
) -> StepConfig | None:
    """What was found out for a shape, and a type of Adam's moments; None where nothing was."""
    name = _name(d_in, d_sae, k, moments)
    found = memory.recall(device, name) if device.type == "cuda" else None
    if found is None:
        return None
    return StepConfig(
        SelectConfig(**found["select"]),
        DecodeConfig(**found["decode"]),
        RowConfig(**found["row"]),
        found["heavy"],
    )


def tune(
    device: torch.device,
    d_in: int,
    d_sae: int,
    k: int,
    moments: torch.dtype,
    batch_size: int,
    split_master: bool,
) -> StepConfig:
    """Try the candidates on random data, keep the best and return it. Takes half a minute or so,
    most of it for compiling, and as much memory as the step; where that is not free, the usual
    configuration is returned, and kept."""
    log.info("looking for the best way to take steps of this shape on this GPU, once")
    best = step_config(d_in, d_sae, k, moments)
    try:
        best = _best(device, d_in, d_sae, k, moments, batch_size, split_master)
    except torch.OutOfMemoryError:
        log.warning("there is no memory to try other ways to take steps in")
    memory.remember(device, _name(d_in, d_sae, k, moments), asdict(best))
    log.info("found: %s", best)
    return best


def _best(
    device: torch.device,
    d_in: int,
    d_sae: int,
    k: int,
    moments: torch.dtype,
    batch_size: int,
    split_master: bool,
) -> StepConfig:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    W_dec = normal(d_sae, d_in)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    start = (W_dec.clone(), W_dec, 0.02 * normal(d_sae), 0.1 * normal(d_in))
    x = normal(batch_size, d_in)
    best = step_config(d_in, d_sae, k, moments)
    state: Any = None
    least: dict[str, float] = {}
    for candidate in [best, *step_candidates(d_in, d_sae, k, moments)]:
        try:
            step = FusedTopKStep(
                *start,
                k=k,
                batch_size=batch_size,
                deterministic=True,
                split_master=split_master,
                moments=moments,
                state=state,
                config=candidate,
            )
            state = step.state
            step(x)
            took = {
                part: median(milliseconds(call, device, _ROUNDS, _WARM_UPS))
                for part, call in step.parts(x).items()
            }
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # More registers or shared memory than this GPU has.
            log.info("%s cannot run here: %s", candidate, error)
            continue
        for part, ms in took.items():
            if ms < least.get(part, float("inf")):
                least[part] = ms
                best = replace(best, **{part: getattr(candidate, part)})
    return best


def _name(d_in: int, d_sae: int, k: int, moments: torch.dtype) -> str:
    narrow = "" if moments == torch.float32 else f", moments in {moments}"
    return f"step of {d_in} x {d_sae}, k {k}{narrow}"
