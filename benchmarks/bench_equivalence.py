"""Whether fused steps train as those of autograd in float32 do: the same runs both ways.

    python benchmarks/bench_equivalence.py             # needs a GPU; about five minutes on an H200
    python benchmarks/bench_equivalence.py --seeds 1 --data planted --steps 200

Training is chaotic, so that two runs which begin a rounding error apart end a little apart, too.
How far is seen from a twin: the eager run once more, its encoder changed by a part in a million.
What fused steps do to the loss is judged beside that. Every run of a seed sees the same rows in the
same order. One line for each: its loss every ten steps, and the share of latents that are dead at
last. `python benchmarks/table.py` makes the table.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _record import RESULTS, append
from rich.progress import track

from saekit import ActivationCache, HarvestConfig, harvest
from saekit.activations_cache.planted import planted_cache
from saekit.activations_cache.reader import Reader
from saekit.synthetic import Synthetic, SyntheticConfig
from saekit.trainers._loop import SAMPLE_ROWS
from saekit.trainers._run import Run
from saekit.trainers.batch_topk import BatchTopKConfig
from saekit.trainers.topk import TopKConfig

NAME = "equivalence"
EVERY = 10
PERTURBED = 1e-6

VARIANTS: dict[str, dict[str, Any]] = {
    "eager, float32": {"backend": "eager", "precision": "float32"},
    "its twin": {"backend": "eager", "precision": "float32", "perturbed": True},
    "eager, bfloat16": {"backend": "eager", "precision": "bfloat16"},
    "fused, float32": {"backend": "triton", "precision": "float32"},
    "fused, bfloat16": {"backend": "triton", "precision": "bfloat16"},
    "fused, economy": {"backend": "triton", "precision": "bfloat16", "economy": True},
}
KINDS = {"topk": TopKConfig, "batch_topk": BatchTopKConfig}
SIZES: dict[str, dict[str, int]] = {
    "planted": {"d_sae": 16_384, "k": 32, "batch_size": 4_096},
    "demo": {"d_sae": 4_096, "k": 32, "batch_size": 2_048},
}
LR = {"planted": 1e-4, "demo": 1e-3}
"""At 1e-3 planted runs are chaotic: the twin's loss came out a third higher."""


def cache_of(data: str, folder: Path) -> ActivationCache:
    if data == "demo":
        config = HarvestConfig(hooks=("resid_post.2",), n_tokens=1_000_000)
        return harvest(config, folder / data, progress=True)
    path = folder / data
    if (path / "manifest.json").exists():
        return ActivationCache.open(path)
    # As wide as rows must be for candidates in float8 to be looked for.
    features = SyntheticConfig(n_features=8_192, d_in=2_048, p_max=0.05, p_min=1e-3)
    return planted_cache(path, Synthetic.from_config(features), 400_000)


def runs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for data in args.data:
        cache = cache_of(data, args.out)
        for seed in range(args.seeds):
            for kind in args.kinds:
                for variant in args.variants:
                    yield {"data": data, "cache": cache, "seed": seed} | {
                        "kind": kind,
                        "variant": variant,
                    }


def fit(
    cache: ActivationCache, data: str, seed: int, kind: str, variant: str, steps: int, device: str
) -> dict[str, Any]:
    how = dict(VARIANTS[variant])
    os.environ["SAEKIT_KERNELS"] = how.pop("backend")
    perturbed = how.pop("perturbed", False)
    sizes = SIZES[data]
    cfg = KINDS[kind](
        d_sae=sizes["d_sae"],
        k=sizes["k"],
        batch_size=sizes["batch_size"],
        n_tokens=steps * sizes["batch_size"],
        lr=LR[data],
        dead_after=200_000,
        log_every=EVERY,
        seed=seed,
        shuffle_seed=seed,
        life_windows=0,
        **how,
    )
    run = Run(cfg, cache, None, None, device)
    hook = run.hook

    def batches() -> Reader:
        return Reader(
            cache, (hook,), cfg.batch_size, seed=seed, epochs=None, drop_last=True, device=device
        )

    def sample() -> torch.Tensor:
        reader = batches()
        return torch.cat([next(reader)[hook] for _ in range(-(-SAMPLE_ROWS // cfg.batch_size))])

    run.begin(sample)
    if perturbed:
        generator = torch.Generator().manual_seed(seed)
        W_enc = run.trainer.get_parameter("W_enc")
        noise = torch.randn(W_enc.shape, generator=generator).to(W_enc)
        with torch.no_grad():
            W_enc.mul_(1 + PERTURBED * noise)
    lines = []
    for batch in batches():
        if line := run.advance(batch):
            lines.append(line)
        if run.done:
            break
    return {
        "op": "train",
        "impl": "saekit",
        "data": data,
        "kind": kind,
        "variant": variant,
        "seed": seed,
        "d_in": run.d_in,
        **sizes,
        "steps": steps,
        "config": cfg.to_dict(),
        "loss": [round(line["mse"], 6) for line in lines],
        "dead": lines[-1]["dead"],
        "l0": lines[-1]["l0"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("bench-equivalence"), help="for caches")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    for one in track(list(runs(args)), "runs"):
        append(NAME, fit(**one, steps=args.steps, device=args.device), args.results)


if __name__ == "__main__":
    main()
