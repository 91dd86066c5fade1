"""Where a run stands: one file, replaced in one step, from which it goes on exactly as if never
stopped."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from saekit.errors import CheckpointError
from saekit.files import write_atomic
from saekit.trainers._base import Trainer
from saekit.trainers._life import LifeHistory

FILE = Path("train_state") / "state.safetensors"


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    step: int
    scale: float
    """Of the input (see TrainConfig.input_scaling)."""
    log_bytes: int = 0
    """Length of metrics.jsonl; what was logged after this state was written is logged again."""
    clipped: int = 0
    """Steps since the last line of the log whose gradient was clipped."""


def save(
    run: Path,
    at: Position,
    trainer: Trainer,
    optimiser: torch.optim.Optimizer | None,
    life: LifeHistory,
) -> None:
    tensors = {f"trainer/{name}": t for name, t in trainer.state_dict().items()}
    tensors |= {f"life/{name}": t for name, t in life.tensors().items()}
    tensors["generator"] = trainer.generator.get_state()
    if optimiser is not None:
        for i, slot in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{i}/{name}": t for name, t in slot.items()}
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    metadata = {"position": json.dumps(at.__dict__)}
    write_atomic(run / FILE, lambda path: save_file(contiguous, path, metadata))


def load(
    run: Path, trainer: Trainer, optimiser: torch.optim.Optimizer | None, life: LifeHistory
) -> Position | None:
    """Put the saved state into trainer, optimiser and history; None where nothing was saved yet."""
    path = run / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            at = Position(**json.loads(file.metadata()["position"]))
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): it was altered. Delete {path.parent} to train from "
            "the start"
        ) from error
    trainer.load_state_dict(_under("trainer/", tensors))
    trainer.generator.set_state(tensors["generator"])
    life.restore(_under("life/", tensors))
    if optimiser is not None:
        _load_optimiser(optimiser, _under("optimiser/", tensors))
    return at


def _load_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, key = name.split("/")
        slots.setdefault(int(number), {})[key] = tensor
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for i, slot in slots.items():
        for key, tensor in slot.items():
            if tensor.shape == parameters[i].shape:
                # As their parameter lies in memory, or sums would round differently.
                slot[key] = torch.empty_like(parameters[i], requires_grad=False).copy_(tensor)
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": slots, "param_groups": groups})


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
