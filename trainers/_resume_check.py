"""Whether a run that was stopped ends as it would have: tried out, on the machine at hand."""

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from saekit.activations_cache.store import ActivationCache
from saekit.config import TrainConfig
from saekit.sae import SAE
from saekit.trainers._loop import train
from saekit.trainers._run import Callback

_STEPS, _CHECKPOINT, _STOP = 24, 7, 17


@dataclass(frozen=True)
class Difference:
    """A tensor that came out otherwise."""

    name: str
    largest: float
    """Largest difference of an element."""


class _Stopped(Exception):
    pass


def check_resume(
    cfg: TrainConfig, cache: ActivationCache, *, hook: str | None = None, device: str = "cpu"
) -> list[Difference]:
    """Train a short run of this config straight through and once stopped on the way; returns what
    differs, bit for bit, in the SAEs that come out. An empty list is what there should be.

    The run has 24 steps; latents count as dead after four batches, so that reviving them is part of
    it. It is stopped after 17 steps, and goes on from its checkpoint after 14.
    """
    dead_after = min(cfg.dead_after, 4 * cfg.batch_size)
    short = replace(
        cfg,
        n_tokens=_STEPS * cfg.batch_size,
        checkpoint_every=_CHECKPOINT,
        dead_after=dead_after,
    )

    def stop(_: SAE) -> dict[str, float]:
        raise _Stopped

    with TemporaryDirectory(prefix="saekit-resume-") as folder:
        whole, halved = Path(folder, "whole"), Path(folder, "halved")
        straight = train(short, cache, hook=hook, out=whole, device=device)
        try:
            stopping = Callback(every=_STOP, call=stop)
            train(short, cache, hook=hook, out=halved, device=device, callbacks=[stopping])
        except _Stopped:
            resumed = train(short, cache, hook=hook, out=halved, device=device)
        else:
            raise AssertionError("the run was not stopped")
        return _differences(straight.tensors(), resumed.tensors())


def _differences(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[Difference]:
    return [
        Difference(name, float((tensor - second[name]).abs().max()))
        for name, tensor in first.items()
        if not tensor.equal(second[name])
    ]
