"""Whether training waits for the cache: steps on batches from files beside the same steps on
batches that are on the GPU already. Needs a GPU.

    python benchmarks/bench_end_to_end.py                 # S and M; some minutes
    python benchmarks/bench_end_to_end.py --shapes M --gib 8 --out /some/disk

The steps are those of `saekit train topk`, log lines included. The cache holds bfloat16 rows as a
harvest stores them, once as they were written, from which batches are drawn at random, and once
shuffled, from which they are read in order. Its files are warm: they were just written, and lie in
the system's page cache where it has room for them; `disk_mb_per_s` is a plain write beside.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _record import MIB, RESULTS, append, clear, file_system, show, summary, write_seconds

from saekit import ActivationCache
from saekit.activations_cache.planted import HOOK, cache_of
from saekit.activations_cache.reader import Reader
from saekit.activations_cache.shuffle import shuffle
from saekit.kernels.bench_setting import SHAPES, Shape
from saekit.trainers._run import Run
from saekit.trainers.topk import TopKConfig

NAME = "end_to_end"
SHARD_ROWS = 65_536
Columns = dict[str, torch.Tensor]


def parts(shape: Shape, n_rows: int) -> Iterator[tuple[torch.Tensor, None]]:
    """Shards of random rows."""
    generator = torch.Generator("cuda").manual_seed(0)
    for _ in range(-(-n_rows // SHARD_ROWS)):
        rows = torch.randn(SHARD_ROWS, shape.d_in, generator=generator, device="cuda")
        yield rows.to(torch.bfloat16).cpu(), None


def run_of(shape: Shape, cache: ActivationCache, batch_size: int, steps: int) -> Run:
    cfg = TopKConfig(
        d_sae=shape.d_sae,
        k=shape.k,
        batch_size=batch_size,
        n_tokens=steps * batch_size,
        life_windows=0,
    )
    return Run(cfg, cache, HOOK, None, "cuda")


def turns(args: argparse.Namespace, shape: Shape, cache: ActivationCache) -> dict[str, Any]:
    """Stretches of steps in turn: on held batches, and on batches from the cache."""
    size, steps = args.batch_size, args.steps
    run = run_of(shape, cache, size, 10 * args.turns * steps)
    with Reader(cache, run.columns, size, epochs=None, drop_last=True, device="cuda") as reader:
        held = [next(reader) for _ in range(4)]
        run.begin(lambda: torch.cat([columns[HOOK] for columns in held]))
        # Compiled, captured, and warm: a log line, too.
        again = itertools.cycle(held).__next__
        for _ in range(run.cfg.log_every + 5):
            run.advance(again())

        on_gpu, read = [], []
        for _ in range(args.turns):
            on_gpu.append(stretch(run, again, steps))
            read.append(stretch(run, lambda: next(reader), steps))
    pairs = [a / b for a, b in zip(on_gpu, read, strict=True)]
    return {
        "ms": summary([1e3 * seconds / steps for seconds in read]),
        "held_ms": summary([1e3 * seconds / steps for seconds in on_gpu]),
        "tokens_per_s": round(size * steps / summary(read)["median"]),
        "share": summary(pairs),
    }


def stretch(run: Run, following: Callable[[], Columns], steps: int) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(steps):
        run.advance(following())
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def measured(args: argparse.Namespace, name: str) -> Iterator[dict[str, Any]]:
    shape = SHAPES[name]
    n_rows = int(args.gib * (1 << 30) / (2 * shape.d_in))
    n_bytes = -(-n_rows // SHARD_ROWS) * SHARD_ROWS * 2 * shape.d_in
    clear(args.out)
    disk = n_bytes / write_seconds(args.out, min(n_bytes, 2 << 30)) * min(1, (2 << 30) / n_bytes)
    clear(args.out)
    cache = cache_of(parts(shape, n_rows), args.out / "cache", about={"dtype": "bfloat16"})
    for order in ("as written", "shuffled"):
        if order == "shuffled":
            cache = shuffle(cache, args.out / "shuffled")
        yield {
            "op": "train",
            "impl": "saekit",
            "shape": name,
            **vars(shape),
            "batch": args.batch_size,
            "order": order,
            "cache_gib": round(n_bytes / (1 << 30), 2),
            "file_system": file_system(args.out),
            "disk_mb_per_s": round(disk / MIB),
            "steps": args.steps,
            **turns(args, shape, cache),
        }
    clear(args.out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["S", "M"], choices=list(SHAPES))
    parser.add_argument("--batch-size", type=int, default=8_192)
    parser.add_argument("--gib", type=float, default=3.0, help="size of a cache")
    parser.add_argument("--steps", type=int, default=200, help="of a stretch that is timed")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench-end-to-end"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    lines = [
        append(NAME, line, args.results) for name in args.shapes for line in measured(args, name)
    ]
    show(
        "training from a cache",
        ("shape", "order", "ms", "held ms", "tokens/s", "share"),
        [
            (
                line["shape"],
                line["order"],
                f"{line['ms']['median']:.2f}",
                f"{line['held_ms']['median']:.2f}",
                f"{line['tokens_per_s']:,}",
                f"{line['share']['median']:.2f}",
            )
            for line in lines
        ],
    )


if __name__ == "__main__":
    main()
