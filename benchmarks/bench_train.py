"""Training steps on this machine: each kind against plain PyTorch, and many SAEs on one reading.

    python benchmarks/bench_train.py                     # every kind; some minutes
    python benchmarks/bench_train.py --kinds topk relu
    python benchmarks/bench_train.py --kinds --pairs 9   # many SAEs on one reading alone
    python benchmarks/table.py                           # the page from what was written

Plain PyTorch is the same trainer with the definitions of `saekit.kernels.reference` in place of the
kernels: dense products, dense codes, autograd. Both take the same steps on the same batches in
turn, and their losses are compared before they are timed. "Together" is `train_many` on SAEs that
are also trained one after the other from the same cache, in turn first and second; at a small
width too, since the one reading saves a share of the time that falls with an SAE's own.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from _record import RESULTS, append, ratio, show, summary
from rich.progress import track

from saekit import ActivationCache, kernels
from saekit.activations_cache.planted import HOOK, planted_cache
from saekit.activations_cache.reader import Reader
from saekit.config import TrainConfig
from saekit.kernels import reference
from saekit.synthetic import Synthetic, SyntheticConfig
from saekit.trainers import RunSpec, kind, train_many
from saekit.trainers._kinds import names
from saekit.trainers._run import Run

NAME = "train"
REPLACED = (
    "encode",
    "topk_encode",
    "sparse_decode",
    "batch_topk",
    "column_topk",
    "matching_pursuit",
)
TOGETHER = 4
"""SAEs on one reading."""
TOGETHER_STEPS = 2**16
"""Steps of one of them times latents: as long at every width."""
L0 = 32
SPARSITY: dict[str, dict[str, Any]] = {
    "gated": {"target_l0": float(L0)},
    "group_bias": {"cap_high": 0.01, "cap_low": 0.001},
    "itda": {"steps": L0, "n_tokens": 1_000_000},
    "jumprelu": {"target_l0": float(L0)},
    "matching_pursuit": {"steps": L0},
    "relu": {"target_l0": float(L0)},
}


@contextmanager
def plain() -> Iterator[None]:
    """The trainers call the definitions."""
    held = {name: getattr(kernels, name) for name in REPLACED}
    try:
        for name in REPLACED:
            setattr(kernels, name, getattr(reference, name))
        yield
    finally:
        for name, function in held.items():
            setattr(kernels, name, function)


def config(name: str, args: argparse.Namespace) -> TrainConfig:
    sizes = {
        "d_sae": args.d_sae,
        "batch_size": args.batch,
        "n_tokens": 1_000 * args.batch,
        "life_windows": 0,
        "log_every": 10_000,
        "precision": args.precision,
    }
    return kind(name).Config.from_dict({**sizes, **SPARSITY.get(name, {"k": L0})})


def steps(name: str, args: argparse.Namespace, cache: ActivationCache) -> dict[str, Any]:
    """Ours and plain PyTorch in turn, from the same state, after enough steps that few latents
    fire."""
    run = Run(config(name, args), cache, HOOK, None, args.device)
    reader = Reader(
        cache, run.columns, args.batch, seed=0, epochs=None, drop_last=True, device=args.device
    )
    run.begin(lambda: torch.cat([next(reader)[HOOK] for _ in range(4)]))
    for _ in range(args.settle):
        run.advance(next(reader))
    batches = [next(reader) for _ in range(4)]
    if name != "itda":  # a step of it changes the dictionary, not weights
        _same_losses(run, batches[0], name)
    ours: list[float] = []
    theirs: list[float] = []
    for i in range(args.pairs + 1):
        for seconds, how in ((ours, nullcontext()), (theirs, plain())):
            with how:
                begun = time.perf_counter()
                run.advance(batches[i % 4])
                if args.device != "cpu":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - begun)
    return {
        "op": "step",
        "kind": name,
        "device": args.device,
        "d_in": args.d_in,
        "d_sae": args.d_sae,
        "batch": args.batch,
        "precision": args.precision,
        "threads": torch.get_num_threads(),
        "l0": round(run.trainer.metrics().get("l0", float("nan")), 2),
        "seconds": summary(ours[1:]),
        "plain_seconds": summary(theirs[1:]),
        "tokens_per_s": round(args.batch / summary(ours[1:])["median"]),
        **ratio(ours[1:], theirs[1:]),
    }


def _same_losses(run: Run, columns: dict[str, torch.Tensor], name: str) -> None:
    start = deepcopy(run.trainer.state_dict())
    noise = run.trainer.generator.get_state()
    found = []
    for how in (nullcontext(), plain()):
        with how:
            run.trainer.load_state_dict(start)
            run.trainer.generator.set_state(noise)
            found.append(run.trainer.losses(run._batch(columns))["mse"].item())
    run.trainer.load_state_dict(start)
    run.trainer.generator.set_state(noise)
    if abs(found[0] / found[1] - 1) > 1e-2:
        raise SystemExit(f"{name}: losses differ, {found[0]:.5g} and {found[1]:.5g}: nothing timed")


def together(args: argparse.Namespace, cache: ActivationCache, d_sae: int) -> dict[str, Any]:
    """Several SAEs from one reading of the cache, and one after the other."""
    cfg = config("topk", args)
    steps = max(20, TOGETHER_STEPS // d_sae)
    fields = {**cfg.to_dict(), "d_sae": d_sae, "n_tokens": steps * args.batch}
    of = type(cfg).from_dict
    specs = [RunSpec(config=of({**fields, "seed": seed})) for seed in range(TOGETHER)]
    one: list[float] = []
    apart: list[float] = []
    ways = [(one, [specs]), (apart, [[spec] for spec in specs])]
    for pair in range(args.pairs + 1):
        for seconds, trainings in ways if pair % 2 else reversed(ways):
            begun = time.perf_counter()
            for group in trainings:
                train_many(group, cache, device=args.device)
            seconds.append(time.perf_counter() - begun)
    return {
        "op": "together",
        "kind": "topk",
        "saes": len(specs),
        "device": args.device,
        "d_in": args.d_in,
        "d_sae": d_sae,
        "steps": steps,
        "batch": args.batch,
        "precision": args.precision,
        "seconds": summary(one[1:]),
        "apart_seconds": summary(apart[1:]),
        **ratio(one[1:], apart[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="*", default=[n for n in names() if n != "itda"])
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--together", type=int, nargs="*", default=[1024, 8192], help="widths")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--settle", type=int, default=30, help="steps before the first timed one")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    synthetic = Synthetic.from_config(
        SyntheticConfig(n_features=4 * args.d_in, d_in=args.d_in, p_max=0.1, p_min=0.005)
    )

    def gradient(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return x

    lines = []
    with tempfile.TemporaryDirectory() as folder:
        cache = planted_cache(Path(folder) / "cache", synthetic, 8 * args.batch, gradient=gradient)
        for name in track(args.kinds, "kinds"):
            lines.append(append(NAME, steps(name, args, cache), args.results))
        for d_sae in args.together:
            lines.append(append(NAME, together(args, cache, d_sae), args.results))
    show(
        f"{args.device}, d_in {args.d_in}, {args.d_sae} latents, batch {args.batch}",
        ("kind", "op", "ms", "plain or apart ms", "times as fast"),
        [
            (
                line["kind"],
                line["op"],
                f"{1e3 * line['seconds']['median']:,.0f}",
                f"{1e3 * (line.get('plain_seconds') or line['apart_seconds'])['median']:,.0f}",
                f"{line['ratio']:.2f}",
            )
            for line in lines
        ],
    )


if __name__ == "__main__":
    main()
