"""What each kind of SAE reaches on the same activations: the evidence behind docs/kinds.md.

    python benchmarks/bench_kinds.py                     # everything; hours on two cores
    python benchmarks/bench_kinds.py --only tree         # experiments by name; --data: by data
    python benchmarks/bench_kinds.py --workers 8         # as many runs at a time, of a core each
    python benchmarks/table.py                           # the page from what was written

Planted data (`saekit.synthetic`) has a known dictionary: beside explained variance it says how many
features were found (one-to-one matching) and how well latents tell when theirs is there (F1). The
embedded model's residual stream has a loss: it says how much of it the SAE keeps. Every figure is
of the SAE as exported, on held-out rows. One line for each run; a run whose line is there already,
under the same config, is not made again, so a stopped benchmark goes on. Runs beside others
(`workers` above 1) say nothing of speed.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from _kinds_data import (
    CACHES,
    NAME,
    SEEDS,
    TRUE_L0,
    Experiment,
    Line,
    config_of,
    figures_of,
    of_today,
    open_data,
    trained_line,
    trained_lines,
)
from _record import RESULTS, append
from rich.progress import track

from saekit import train


def experiments() -> Iterator[Experiment]:
    yield from _all_kinds("zipf", TRUE_L0)
    yield from _all_kinds("correlated", TRUE_L0)
    yield from _all_kinds("hierarchy", TRUE_L0)
    yield from _all_kinds("demo", 32)
    for beta in (0.0, 0.1, 0.3, 1.0, 3.0, 10.0):
        yield Experiment("gradient", "demo", "gradient_topk", {"k": 32, "beta": beta})
        yield Experiment("gradient", "zipf", "gradient_topk", {"k": TRUE_L0, "beta": beta})
    pursuit = {"steps": 2, "b_dec_init": "zero", "learn_b_dec": False}
    for level in (0, 4, 8):
        for lr in (3e-3, 1e-2, 3e-2):
            yield Experiment("tree", f"tree{level}", "matching_pursuit", {**pursuit, "lr": lr})
            yield Experiment("tree", f"tree{level}", "topk", {"k": 2, "lr": lr})
            yield Experiment("tree", f"tree{level}", "batch_topk", {"k": 2, "lr": lr})
            yield Experiment("tree", f"tree{level}", "relu", {"target_l0": 1.36, "lr": lr})
    for revive in ("none", "auxk"):
        yield Experiment("variational", "demo", "topk", {"k": 32, "revive": revive})
        for variance in ("fixed", "learned"):
            for coef in (0.01, 0.1, 1.0):
                options = {"k": 32, "variance": variance, "kl_coef": coef, "revive": revive}
                yield Experiment("variational", "demo", "variational", options)
    for k in (4, TRUE_L0, 10, 14, 20):
        yield Experiment("wrong_k", "zipf", "topk", {"k": k})
        yield Experiment("wrong_k", "zipf", "batch_topk", {"k": k})
    for k in (2, 4, 12, 32):
        yield Experiment("wrong_k", "apart", "topk", {"k": k})
        yield Experiment("wrong_k", "apart", "batch_topk", {"k": k})
    for high, low in ((0.3, 0.01), (0.1, 0.01), (0.05, 0.005)):
        options = {"cap_high": high, "cap_low": low}
        yield Experiment("wrong_k", "zipf", "group_bias", options)
        yield Experiment("wrong_k", "apart", "group_bias", options)
    for lr in (3e-4, 1e-3, 2e-3, 4e-3, 8e-3):
        for name in ("topk", "batch_topk"):
            yield Experiment("lr", "demo", name, {"k": 32, "lr": lr})
        for name in ("jumprelu", "relu"):
            yield Experiment("lr", "demo", name, {"target_l0": 32.0, "lr": lr})
    for norm in (1.0, 0.25, 0.1):
        for name in ("topk", "batch_topk"):
            yield Experiment("encoder", "demo", name, {"k": 32, "encoder_norm": norm})
            yield Experiment("encoder", "zipf", name, {"k": TRUE_L0, "encoder_norm": norm})
    for start in (0.1, 0.3, 1.0):
        options = {"target_l0": 32.0, "threshold_init": start}
        yield Experiment("thresholds", "demo", "jumprelu", options)
    for tau in (0.05, 0.1, 0.2):
        options = {"steps": 32, "tau": tau, "n_tokens": 100_000}
        yield Experiment("itda", "demo", "itda", options)
    for n_tokens in (50_000, 200_000, 1_000_000, 4_000_000):
        yield Experiment("itda", "demo", "topk", {"k": 32, "n_tokens": n_tokens})


def _all_kinds(data: str, l0: int) -> Iterator[Experiment]:
    """Every kind at the same L0; group bias has caps instead, which cannot ask for one."""
    for name in ("topk", "batch_topk", "mutual_choice", "feature_choice", "matryoshka"):
        yield Experiment("kinds", data, name, {"k": l0})
    yield Experiment("kinds", data, "gradient_topk", {"k": l0})
    yield Experiment("kinds", data, "variational", {"k": l0, "kl_coef": 0.01})
    for name in ("relu", "jumprelu", "gated"):
        yield Experiment("kinds", data, name, {"target_l0": float(l0)})
    yield Experiment("kinds", data, "matching_pursuit", {"steps": l0})
    yield Experiment("kinds", data, "itda", {"steps": l0, "n_tokens": 100_000})
    yield Experiment("kinds", data, "group_bias", {"cap_high": 0.3, "cap_low": 1e-3})
    yield Experiment("kinds", data, "topk", {"k": l0, "freeze": "all"})
    yield Experiment("kinds", data, "topk", {"k": l0, "freeze": "decoder"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="experiments by name")
    parser.add_argument("--data", nargs="*", help="what they are on, by name")
    parser.add_argument("--kinds", nargs="*", help="kinds by name")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=CACHES, help="for the caches")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    wanted = [
        (experiment, seed)
        for seed in range(args.seeds)
        for experiment in experiments()
        if (not args.only or experiment.name in args.only)
        and (not args.data or experiment.data in args.data)
        and (not args.kinds or experiment.kind in args.kinds)
    ]
    done = trained_lines(args.results)
    wanted = [
        (e, seed)
        for e, seed in wanted
        if not of_today(done.get(("saekit", e.key, seed)), config_of(e, seed))
    ]
    # Made here, so that no two workers make one.
    for name in sorted({experiment.data for experiment, _ in wanted}):
        open_data(name, args.out)
    if args.workers == 1:
        lines = (_run(e, seed, args.out, args.device) for e, seed in wanted)
        for line in track(lines, "runs", len(wanted)):
            append(NAME, line, args.results)
        return
    # Not forked: a process that has a GPU's context cannot be.
    workers = multiprocessing.get_context("spawn").Pool(
        args.workers, torch.set_num_threads, (max(1, (os.cpu_count() or 1) // args.workers),)
    )
    with workers:
        jobs = [workers.apply_async(_run, (e, seed, args.out, args.device)) for e, seed in wanted]
        for job in track(jobs, "runs"):
            append(NAME, {**job.get(), "workers": args.workers}, args.results)


def _run(experiment: Experiment, seed: int, folder: Path, device: str) -> Line:
    data = open_data(experiment.data, folder)
    config = config_of(experiment, seed)
    begun = time.perf_counter()
    sae = train(config, data.cache, device=device)
    seconds = time.perf_counter() - begun
    return {
        **trained_line("saekit", experiment, config, device, sae),
        "config": config.to_dict(),
        "seconds": round(seconds, 2),
        "tokens_per_s": round(config.n_tokens / seconds),
        **figures_of(sae, data),
    }


if __name__ == "__main__":
    main()
