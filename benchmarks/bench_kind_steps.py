"""What a training step of each kind with fused steps takes beside TopK's, as a run takes it: AuxK,
count of dead latents, schedule of the penalty, thresholds. Needs a GPU.

    python benchmarks/bench_kind_steps.py
    python benchmarks/bench_kind_steps.py --shapes S --kinds topk jumprelu --settle 300

Each kind first learns from planted features for a while, because what its step takes depends on how
many latents fire, and, of JumpReLU, lie near their thresholds: both fall while it learns. Then its
steps are timed, and after them the eager steps of the same SAE, on Triton's ops. Medians of the
GPU's own clock; batches are on the GPU already. `python benchmarks/table.py` makes the table.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _record import RESULTS, append, show, summary

from saekit.kernels import bench_setting
from saekit.trainers._base import Batch, Step, Trainer
from saekit.trainers._kinds import kind
from saekit.trainers._run import _optimiser
from saekit.trainers._step import EagerStep

NAME = "kind_steps"
SHAPES = {name: bench_setting.SHAPES[name] for name in ("S", "M")}
KINDS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "topk": ("topk", lambda k: {"k": k}),
    "batch_topk": ("batch_topk", lambda k: {"k": k}),
    "mutual_choice": ("mutual_choice", lambda k: {"k": k}),
    "mutual_choice, zipf=False": ("mutual_choice", lambda k: {"k": k, "zipf": False}),
    "jumprelu": ("jumprelu", lambda k: {"target_l0": float(k), "target_by": 0.5}),
    "jumprelu, bandwidth=0.3": (
        "jumprelu",
        lambda k: {"target_l0": float(k), "target_by": 0.5, "bandwidth": 0.3},
    ),
}


def planted(d_in: int, k: int, batch_size: int, device: str) -> Callable[[], torch.Tensor]:
    """Batches of about k features a row, whose rates fall by Zipf's law, scaled as runs scale."""
    generator = torch.Generator(device).manual_seed(0)
    n = 8 * d_in
    features = torch.randn(n, d_in, generator=generator, device=device)
    features /= features.norm(dim=1, keepdim=True)
    rate = torch.arange(1, n + 1, device=device) ** -0.5
    rate *= k / rate.sum()

    def rows() -> torch.Tensor:
        fires = torch.rand(batch_size, n, generator=generator, device=device) < rate
        size = 1 + 0.25 * torch.randn(batch_size, n, generator=generator, device=device)
        noise = torch.randn(batch_size, d_in, generator=generator, device=device)
        return scale * ((fires * size) @ features + 0.02 * noise)

    scale = 1.0
    scale = d_in**0.5 / float(rows().norm(dim=1).mean())
    return rows


def settled(
    name: str, shape: bench_setting.Shape, args: argparse.Namespace
) -> tuple[Trainer, torch.optim.Optimizer, Step, Callable[[], torch.Tensor]]:
    """A trainer after its first steps, what takes its next, and batches."""
    of, options = KINDS[name]
    cfg = kind(of).Config(
        d_sae=shape.d_sae,
        batch_size=args.batch_size,
        # As long as what is measured; longer runs would be tuned.
        n_tokens=(args.settle + 200) * args.batch_size,
        lr=3e-4,
        # In so short a run a latent is not dead for having been silent.
        dead_after=10 * args.settle * args.batch_size,
        **options(shape.k),
    )
    torch.manual_seed(0)
    trainer = kind(of)(cfg, shape.d_in)
    trainer.to_device(args.device)
    rows = planted(shape.d_in, shape.k, args.batch_size, args.device)
    trainer.initialise(rows())
    optimiser = _optimiser(cfg, list(trainer.parameters()))
    assert optimiser is not None
    step = trainer.fused_step(optimiser, args.device)
    assert step is not None, f"{name} has no fused step here; the log says why"
    for number in range(args.settle):
        trainer.step = number
        step(Batch(rows()), cfg.lr)
    return trainer, optimiser, step, rows


def timed(
    step: Step, trainer: Trainer, rows: Callable[[], torch.Tensor], args: argparse.Namespace
) -> list[float]:
    held = [Batch(rows()) for _ in range(4)]

    def take() -> None:
        trainer.step += 1
        step(held[trainer.step % len(held)], trainer.cfg.lr)

    return bench_setting.milliseconds(take, torch.device(args.device), args.rounds, args.warm_ups)


def measured(
    name: str, label: str, shape: bench_setting.Shape, args: argparse.Namespace
) -> dict[str, Any]:
    bench_setting.forget(torch.device(args.device))
    trainer, optimiser, step, rows = settled(name, shape, args)
    took = timed(step, trainer, rows, args)
    step.settle()
    figures = trainer.metrics()
    if "density" in trainer.state_dict():
        # Of one row: what fires or moves a threshold.
        figures["kept"] = float(trainer.get_buffer("density")) * shape.d_sae
    del step
    eager = timed(EagerStep(trainer.cfg, trainer, optimiser, args.device), trainer, rows, args)
    return {
        "op": "step",
        "impl": name,
        "shape": label,
        **vars(shape),
        "batch": args.batch_size,
        "settle": args.settle,
        "ms": summary(took),
        "eager_ms": summary(eager),
        "figures": {key: round(value, 4) for key, value in figures.items()},
        "device": args.device,
        "triton": bench_setting.versions().get("triton"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--shape", nargs=3, type=int, metavar=("D_IN", "D_SAE", "K"))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--batch-size", type=int, default=8_192)
    parser.add_argument("--settle", type=int, default=1_000, help="steps before any is timed")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warm-ups", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    os.environ["SAEKIT_KERNELS"] = "triton"
    shapes = {name: SHAPES[name] for name in args.shapes}
    if args.shape is not None:
        shapes = {"": bench_setting.Shape(*args.shape)}
    shown = []
    for label, shape in shapes.items():
        for name in args.kinds:
            line = append(NAME, measured(name, label, shape, args), args.results)
            said = ", ".join(f"{key} {value:g}" for key, value in line["figures"].items())
            ms, eager = line["ms"]["median"], line["eager_ms"]["median"]
            shown.append((label, name, f"{ms:.3f}", f"{eager:.3f}", said))
            print(shown[-1], flush=True)
    show("a step of each kind", ("shape", "kind", "ms", "eager ms", "at the end"), shown)


if __name__ == "__main__":
    main()
