"""A training step of a TopK SAE on a CPU, as each library's own trainer takes it, with and without
dead latents: tokens a second, and memory.

    python benchmarks/bench_cpu.py                        # this library and plain PyTorch
    python benchmarks/bench_cpu.py --peers                # and the libraries installed here
    taskset -c 0,1 python benchmarks/bench_cpu.py --peers # on two cores
    python benchmarks/table.py                            # the page from what was written

Every case is timed in a process of its own, in several turns, so that a machine whose speed drifts
is fair to all; a line holds all turns of a case. Everybody gets the same planted activations.
"Dead": the first 30 % of the latents are below 0 on every row and have not fired for long, and the
library's own auxiliary loss (AuxK) is on. Memory is the most resident memory of a process above
what it held when the batches were made and all was imported.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _record import MIB, RESULTS, append, show, summary
from bench_kind_steps import planted

from saekit.kernels import bench_peers
from saekit.trainers._base import Batch
from saekit.trainers._run import _optimiser
from saekit.trainers._step import EagerStep
from saekit.trainers.topk import TopKConfig, TopKTrainer

NAME = "cpu"
DEAD = 0.3
OURS, PLAIN = "saekit", "plain torch"
Step = Callable[[], object]


def own(args: argparse.Namespace, precision: Any, rows: Callable[[], torch.Tensor]) -> Step:
    cfg = TopKConfig(
        d_sae=args.d_sae,
        k=args.k,
        batch_size=args.batch_size,
        n_tokens=100_000 * args.batch_size,
        lr=1e-4,
        precision=precision,
    )
    torch.manual_seed(0)
    trainer = TopKTrainer(cfg, args.d_in)
    trainer.to_device("cpu")
    trainer.initialise(rows())
    optimiser = _optimiser(cfg, list(trainer.parameters()))
    assert optimiser is not None
    n_dead = round(args.dead * args.d_sae)
    with torch.no_grad():
        trainer.W_enc[:, :n_dead] *= 0.01
        trainer.b_enc[:n_dead] = -1
    trainer.dead.since[:n_dead] = 10 * cfg.dead_after
    step = trainer.fused_step(optimiser, "cpu") or EagerStep(cfg, trainer, optimiser, "cpu")
    return lambda: step(Batch(rows()), cfg.lr)


def plain(args: argparse.Namespace, rows: Callable[[], torch.Tensor]) -> Step:
    """Our trainer on the definitions: dense products, dense codes, autograd."""
    os.environ["SAEKIT_KERNELS"] = "reference"
    return own(args, "float32", rows)


def cases(
    args: argparse.Namespace, rows: Callable[[], torch.Tensor]
) -> dict[str, Callable[[], Step]]:
    """What makes each step, by name."""
    found: dict[str, Callable[[], Step]] = {
        f"{OURS}, float32": partial(own, args, "float32", rows),
        f"{OURS}, bfloat16": partial(own, args, "bfloat16", rows),
        PLAIN: partial(plain, args, rows),
    }
    if not args.peers:
        return found
    n_dead = round(args.dead * args.d_sae)
    for autocast in (False, True):
        sizes = args.d_in, args.d_sae, args.k, args.batch_size
        for name, mode, make in bench_peers.peers(*sizes, rows, n_dead=n_dead, autocast=autocast):
            # A compiler that takes minutes for a step of seconds is no case of its own here.
            if not mode.endswith(("compiled", "fused Adam")):
                found[f"{name} {mode}"] = partial(_peer, make)
    return found


def _peer(make: bench_peers.Make) -> Step:
    return make()[0]


def one_case(args: argparse.Namespace) -> None:
    """Of a process of its own: prints seconds of steps and memory as JSON."""
    draw = planted(args.d_in, args.k, args.batch_size, "cpu")
    held: list[torch.Tensor] = [draw() for _ in range(4)]
    number = [0]

    def rows() -> torch.Tensor:
        number[0] += 1
        return held[number[0] % len(held)]

    # Once small, so that what is imported and compiled on the way is not a step's own memory.
    small = argparse.Namespace(**{**vars(args), "d_in": 16, "d_sae": 64, "k": 2, "batch_size": 16})
    cases(small, lambda: torch.randn(16, 16))[args.case]()()
    make = cases(args, rows)[args.case]
    forget_peak()
    before = resident()
    step = make()
    seconds = []
    for _ in range(args.warm_ups + args.steps):
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    print(
        json.dumps(
            {
                "seconds": seconds[args.warm_ups :],
                "peak_mib": round((peak() - before) / MIB),
                "threads": torch.get_num_threads(),
            }
        )
    )


def resident() -> int:
    """Bytes of this process that are in memory, by the system's own count."""
    return _status("VmRSS:")


def peak() -> int:
    """The most that `resident` was since `forget_peak`."""
    return _status("VmHWM:")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) << 10
    raise SystemExit(f"/proc/self/status has no {key}: this benchmark needs Linux")


def measured(args: argparse.Namespace, case: str, dead: float) -> dict[str, Any]:
    flags = ["--case", case, "--dead", str(dead), *(["--peers"] if args.peers else [])]
    for name in ("d_in", "d_sae", "k", "batch_size", "steps", "warm_ups"):
        flags += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    done = subprocess.run(
        [sys.executable, __file__, *flags],
        # Its kernels would be compiled for a GPU.
        env=os.environ | {"SPARSIFY_DISABLE_TRITON": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr[-2_000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=8_192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4_096)
    parser.add_argument("--steps", type=int, default=4, help="timed ones of a turn")
    parser.add_argument("--warm-ups", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--dead", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    if args.case:
        one_case(args)
        return
    named = argparse.Namespace(**{**vars(args), "dead": 0.0})
    names = list(cases(named, lambda: torch.empty(0)))
    turns: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for turn in range(args.turns):
        for dead in (0.0, DEAD):
            for name in names:
                turns.setdefault((name, dead), []).append(measured(args, name, dead))
                last = turns[name, dead][-1]
                print(turn, name, dead, f"{median(last['seconds']):.3f} s", flush=True)
    lines = []
    for (name, dead), found in turns.items():
        seconds = [second for one in found for second in one["seconds"]]
        line = {
            "op": "topk step",
            "impl": name,
            "dead": dead,
            "d_in": args.d_in,
            "d_sae": args.d_sae,
            "k": args.k,
            "batch": args.batch_size,
            "threads": found[0]["threads"],
            "seconds": summary(seconds),
            "tokens_per_s": round(args.batch_size / median(seconds)),
            "peak_mib": max(one["peak_mib"] for one in found),
        }
        lines.append(append(NAME, line, args.results))
    show(
        "a TopK step on the CPU",
        ("case", "dead", "tokens/s", "MiB"),
        [
            (x["impl"], f"{x['dead']:.0%}", f"{x['tokens_per_s']:,}", f"{x['peak_mib']:,}")
            for x in lines
        ],
    )


if __name__ == "__main__":
    main()
