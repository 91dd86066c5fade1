"""Where a run stands: one file, replaced in one step, from which it goes on exactly as if never
stopped.

Where several processes share out the latents, what has latents lies in files beside it, one a
slice, which are there before the one file names them. Any number of processes can go on from it.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from saekit.errors import CheckpointError
from saekit.files import write_atomic
from saekit.trainers._base import Trainer
from saekit.trainers._life import COMMON, PENDING, LifeHistory

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
    metadata = {"position": json.dumps(at.__dict__)}
    mesh, parts = trainer.mesh, list[Path]()
    if mesh.latent > 1:
        axes = _axes(trainer, tensors)
        parts = [run / FILE.parent / _part(at.step, n, mesh.latent) for n in range(mesh.latent)]
        metadata["parts"] = json.dumps([part.name for part in parts])
        if mesh.data_rank == 0:
            _write(parts[mesh.latent_rank], {n: t for n, t in tensors.items() if n in axes}, {})
        tensors = {n: t for n, t in tensors.items() if n not in axes}
        mesh.barrier()
    if mesh.rank == 0:
        _write(run / FILE, tensors, metadata)
        for path in (run / FILE).parent.glob("part-*"):
            # One of a later step is on its way to the next checkpoint.
            if path not in parts and path.name < _part(at.step + 1, 0, 1):
                path.unlink()


def _part(step: int, number: int, of: int) -> str:
    return f"part-{step:09d}-{number}-of-{of}.safetensors"


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_atomic(path, lambda temporary: save_file(contiguous, temporary, metadata))


def _axes(trainer: Trainer, names: Iterable[str]) -> dict[str, int]:
    """Of the stored tensors that have latents, along which axis."""
    learning = [name for name, p in trainer.named_parameters() if p.requires_grad]
    axes = {}
    for name in names:
        owner, _, rest = name.partition("/")
        axis = None
        if owner == "trainer":
            axis = trainer.LATENTS.get(rest)
        elif owner == "optimiser":
            number, key = rest.split("/")
            # Adam counts the steps of each parameter in a single number.
            axis = None if key == "step" else trainer.LATENTS.get(learning[int(number)])
        elif owner == "life" and rest not in COMMON:
            axis = 0 if rest == PENDING else 1
        if axis is not None:
            axes[name] = axis
    return axes


def load(
    run: Path, trainer: Trainer, optimiser: torch.optim.Optimizer | None, life: LifeHistory
) -> Position | None:
    """Put the saved state into trainer, optimiser and history; None where nothing was saved yet."""
    path = run / FILE
    if not path.exists():
        return None
    try:
        with ExitStack() as stack:
            file = stack.enter_context(safe_open(path, framework="pt"))
            metadata = file.metadata()
            at = Position(**json.loads(metadata["position"]))
            names = [path.parent / name for name in json.loads(metadata.get("parts", "[]"))]
            parts = [stack.enter_context(safe_open(part, framework="pt")) for part in names]
            tensors = _held_here(file, parts, trainer)
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


def _held_here(file: Any, parts: list[Any], trainer: Trainer) -> dict[str, Tensor]:
    """The tensors of a checkpoint; of the latents, those that this process holds."""
    common = list(file.keys())
    sliced = list(parts[0].keys()) if parts else common
    tensors = {}
    axes = _axes(trainer, sliced)
    for name in {**dict.fromkeys(common), **dict.fromkeys(sliced)}:
        if name not in axes:
            tensors[name] = file.get_tensor(name).clone()
            continue
        axis, pieces = axes[name], [one.get_slice(name) for one in parts or [file]]
        sizes = [piece.get_shape()[axis] for piece in pieces]
        held = trainer.mesh.held(sum(sizes))
        found, first = [], 0
        for piece, size in zip(pieces, sizes, strict=True):
            ours = slice(max(0, held.start - first), max(0, min(size, held.stop - first)))
            if ours.start < ours.stop:
                found.append(piece[(slice(None),) * axis + (ours,)])
            first += size
        tensors[name] = torch.cat(found, axis)
    return tensors


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
