"""What each kind of SAE reaches on the same activations: the evidence behind docs/kinds.md.

    python benchmarks/bench_kinds.py                     # everything; hours on two cores
    python benchmarks/bench_kinds.py --only tree         # experiments by name; --data: by data
    python benchmarks/bench_kinds.py --workers 8         # as many runs at a time, of a core each
    python benchmarks/bench_kinds.py --tools sae/bin/python dl/bin/python
    python benchmarks/bench_kinds.py --layers            # ITDA dictionaries, layer against layer
    python benchmarks/table.py                           # the page from what was written

Planted data (`saekit.synthetic`) has a known dictionary: beside explained variance it says how many
features were found (one-to-one matching) and how well latents tell when theirs is there (F1). The
embedded model's residual stream has a loss: it says how much of it the SAE keeps. Every figure is
of the SAE as exported, on held-out rows. With `--tools`, other tools train the kinds that they have
on the same rows in the same order, at the same rates (warm-up and decay too), and are measured as
we are. One line for each run; a run whose line is there already, under the same config, is not made
again, so a stopped benchmark goes on. Runs beside others (`workers` above 1) say nothing of speed.
"""

import argparse
import functools
import json
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _record import FOLDER, RESULTS, append
from bench_harvest import peer_of
from rich.progress import track
from safetensors.torch import load_file, save_file

from saekit import SAE, ActivationCache, HarvestConfig, JumpReLU, TopK, evaluate, harvest, train
from saekit.activations_cache.model import LanguageModel, wrap
from saekit.activations_cache.planted import HOOK, planted_cache
from saekit.activations_cache.reader import Reader
from saekit.config import TrainConfig
from saekit.evals.core import CoreConfig
from saekit.seeds import stream
from saekit.synthetic import Detection, Synthetic, SyntheticConfig, hierarchical_tree, recovery
from saekit.trainers import kind
from saekit.trainers._base import fold_input_scale, input_scale
from saekit.trainers._run import EXTRAS
from saekit.trainers.itda import ITDAConfig, jaccard

NAME = "kinds"
SEEDS = 3
FOUND = 0.9
"""Cosine above which a feature counts as found."""


@dataclass(frozen=True)
class Data:
    """Activations to train on, and what can be said of an SAE of them."""

    name: str
    cache: ActivationCache
    defaults: dict[str, Any]
    """Of every run on it."""
    figures: Callable[[SAE], dict[str, float]]


@dataclass(frozen=True)
class Experiment:
    """One row of a table: a kind with its options, on some data."""

    name: str
    data: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return json.dumps([self.name, self.data, self.kind, self.options], sort_keys=True)


_FEATURES: dict[str, Any] = {
    "n_features": 256,
    "d_in": 64,
    "p_max": 0.3,
    "p_min": 0.01,
    "zipf_exponent": 0.5,
    "magnitude_sd": 0.25,
}
PLANTED = {
    "zipf": SyntheticConfig(**_FEATURES),
    "correlated": SyntheticConfig(**_FEATURES, correlation=0.5, correlation_rank=8),
    "hierarchy": SyntheticConfig(**_FEATURES, n_trees=32, branching=(4,)),
    # As many dimensions as features, all as rare: what proofs of recovery assume.
    "apart": SyntheticConfig(
        n_features=128, d_in=128, firing="constant", p_max=0.03, p_min=0.03, magnitude_sd=0.25
    ),
}
TRUE_L0 = 7
"""Features of a row of each of them, on the mean, about."""


def defaults_of(data: str) -> dict[str, Any]:
    """What every run on these data is trained with, but for its own options."""
    common: dict[str, Any] = {
        "n_tokens": 1_000_000,
        "precision": "float32",
        "checkpoint_every": 100_000,
        "life_windows": 0,
    }
    if data == "demo":
        sizes = {"d_sae": 2048, "batch_size": 1024, "lr": 4e-3, "dead_after": 100_000}
    elif data.startswith("tree"):
        # Sizes of the paper's own code, which takes 15,000 steps at 3e-2.
        sizes = {"d_sae": 20, "batch_size": 200, "dead_after": 50_000}
    else:
        sizes = {"d_sae": 256, "batch_size": 512, "lr": 4e-3, "dead_after": 50_000}
    return {**common, **sizes}


def config_of(experiment: Experiment, seed: int) -> TrainConfig:
    options = {**defaults_of(experiment.data), "seed": seed, **experiment.options}
    return kind(experiment.kind).Config.from_dict(options)


def planted(name: str, folder: Path) -> Data:
    if name.startswith("tree"):
        synthetic = hierarchical_tree(int(name.removeprefix("tree")))
    else:
        synthetic = Synthetic.from_config(PLANTED[name])
    gradient = _gradient(synthetic)
    path = folder / name
    cache = (
        ActivationCache.open(path)
        if (path / "manifest.json").exists()
        else planted_cache(path, synthetic, 300_000, gradient=gradient, holdout=0.1)
    )

    def figures(sae: SAE) -> dict[str, float]:
        core = evaluate("core", sae, cache, hook=HOOK, config=CoreConfig(ce_tokens=0)).metrics
        found = recovery(sae.W_dec, synthetic.directions)
        x, codes = synthetic.rows(400_000, 420_480)
        told = sum(
            (
                Detection.of(sae.encode(some), there, found.feature)
                for some, there in zip(x.split(4096), codes.split(4096), strict=True)
            ),
            start=Detection(*(torch.zeros(sae.d_sae, dtype=torch.int64) for _ in range(3))),
        )
        return {
            **_core(core),
            "mcc": found.mcc,
            "found": found.share(FOUND),
            "f1": float(told.f1.mean()),
            "true_l0": float((codes > 0).sum(1).float().mean()),
        }

    return Data(name, cache, defaults_of(name), figures)


def _gradient(synthetic: Synthetic) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Of a loss that only the rarer half of the features have to do with."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(synthetic.n_features, generator=generator)
    weights[synthetic.rate > synthetic.rate.median()] = 0
    direction = weights @ synthetic.directions

    def gradient(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return (codes @ weights)[:, None] * direction

    return gradient


def demo(folder: Path) -> Data:
    config = HarvestConfig(hooks=("resid_post.2",), n_tokens=600_000, gradients=True)
    cache = harvest(config, folder / "demo", progress=True)
    core = CoreConfig(max_rows=50_000, ce_tokens=15_000)
    return Data(
        "demo",
        cache,
        defaults_of("demo"),
        lambda sae: _core(evaluate("core", sae, cache, hook="resid_post.2", config=core).metrics),
    )


def _core(metrics: dict[str, Any]) -> dict[str, float]:
    names = {"l0": "l0_mean", "dead": "dead_share"}
    shown = ("ev", "l0", "dead", "ce_recovered_zero", "ce_recovered_mean", "ce_clean", "ce_sae")
    named = {name: names.get(name, name) for name in shown}
    return {name: metrics[key].value for name, key in named.items() if key in metrics}


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


RATES = (1e-3, 4e-3, 1e-2)
"""Learning rates that each tool is tried with; more seeds follow with the best."""
SHARED = ("topk", "batch_topk", "jumprelu")
"""Kinds that other tools have, too."""


def against(
    tools: dict[str, str | None],
    data: Data,
    l0: int,
    kinds: Iterable[str],
    seeds: int,
    results: Path,
) -> None:
    """Each tool's SAEs of the same rows. `tools` are the Pythons that have them; None is ours."""
    done = _done(results)
    with tempfile.TemporaryDirectory() as folder:
        rows, scale = _rows(data, Path(folder))
        for name in kinds:
            for tool, python in tools.items():
                best: dict[float, float] = {}
                for seed in range(seeds):
                    for lr in RATES if seed == 0 else (max(best, key=lambda lr: best[lr]),):
                        options = {"l0": l0, "lr": lr}
                        key = Experiment("tools", data.name, name, options).key
                        if (tool, key, seed) in done:
                            best.setdefault(lr, done[tool, key, seed]["ev"])
                            continue
                        given = {"target_l0": l0} if name == "jumprelu" else {"k": l0}
                        config = kind(name).Config.from_dict(
                            {**data.defaults, **given, "lr": lr, "seed": seed}
                        )
                        versions: dict[str, str] = {}
                        if python is None:
                            sae = train(config, data.cache)
                        else:
                            sae, versions = _other(tool, python, name, l0, config, rows, scale)
                        line: dict[str, Any] = {
                            "op": "train",
                            "impl": tool,
                            "experiment": "tools",
                            "data": data.name,
                            "kind": name,
                            "options": options,
                            "key": key,
                            "seed": seed,
                            "device": "cpu",
                            "d_in": sae.d_in,
                            "d_sae": sae.d_sae,
                            "n_tokens": config.n_tokens,
                            "peer_versions": versions,
                            **{n: round(value, 6) for n, value in data.figures(sae).items()},
                        }
                        append(NAME, line, results)
                        best.setdefault(lr, line["ev"])


def _rows(data: Data, folder: Path) -> tuple[Path, float]:
    """The rows in the order in which our own loop reads them, scaled as it scales them."""
    config = TrainConfig(**data.defaults)
    hook = next(iter(data.cache.hooks))
    reader = Reader(
        data.cache, (hook,), config.batch_size, seed=0, epochs=None, drop_last=True, prefetch=0
    )
    x = torch.cat([next(reader)[hook] for _ in range(config.n_steps)])
    scale = input_scale(config, float(x[:32_768].norm(dim=1).mean()), x.shape[1])
    path = folder / "rows.safetensors"
    save_file({"x": x * scale}, path)
    return path, scale


def _other(
    tool: str, python: str, name: str, l0: int, config: TrainConfig, rows: Path, scale: float
) -> tuple[SAE, dict[str, str]]:
    """What another tool makes of the rows, and which versions of what did."""
    job = {
        "kind": name,
        "l0": l0,
        "d_sae": config.d_sae,
        "lr": config.lr,
        "n_steps": config.n_steps,
        "batch_size": config.batch_size,
        "warmup": round(config.lr_warmup * config.n_steps),
        "decay": round(config.lr_decay * config.n_steps),
        "dead_after": config.dead_after,
        "seed": config.seed,
    }
    out = rows.with_name("out.safetensors")
    driver = FOLDER / "peers" / f"{tool}_train.py"
    command = [
        python,
        str(driver),
        "--rows",
        str(rows),
        "--job",
        json.dumps(job),
        "--out",
        str(out),
    ]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    told = json.loads(said.splitlines()[-1])
    weights = load_file(out)
    threshold = weights.pop("threshold", None)
    norm = weights["W_dec"].norm(dim=1).clamp_min(1e-12)
    if threshold is None:
        assert torch.allclose(norm, torch.ones_like(norm), atol=1e-3), "rows of W_dec of norm 1"
        activation: TopK | JumpReLU = TopK(l0)
    else:
        activation = JumpReLU(threshold * norm)
    # A latent in units of what it adds to x_hat, as ours are; what it adds stays.
    sae = SAE(
        W_enc=weights["W_enc"] * norm,
        b_enc=weights["b_enc"] * norm,
        W_dec=weights["W_dec"] / norm[:, None],
        b_dec=weights["b_dec"],
        activation=activation,
    )
    return fold_input_scale(sae, scale), told["versions"]


JITTERS = (0.0, 0.05, 0.2)
"""Noise on the weights of the second model, as a share of each tensor's standard deviation."""


def layers(jitter: float, folder: Path, results: Path) -> None:
    """ITDA dictionaries of each layer of the embedded model and of the same with noise on its
    weights, from the same text in the same order: how alike they are, layer by layer."""
    hooks = tuple(f"resid_post.{i}" for i in range(4))
    dictionaries: list[list[torch.Tensor]] = []
    for share in (0.0, jitter):
        model = LanguageModel.load("demo")
        generator = stream("jitter")
        for weight in model.model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.data += share * weight.std() * noise
        # Other weights have another fingerprint, so other caches.
        wrapped = wrap(model.model, model.tokenizer, f"demo, jitter {share:g}")
        config = HarvestConfig(model=wrapped.name, hooks=hooks, n_tokens=120_000)
        cache = harvest(config, folder / f"layers {share:g}", model=wrapped, progress=True)
        found = []
        for hook in hooks:
            out = folder / f"itda {share:g} {hook}"
            cfg = ITDAConfig(d_sae=2048, steps=16, n_tokens=100_000, batch_size=1024)
            train(cfg, cache, hook=hook, out=out)
            found.append(load_file(out / EXTRAS)["labels"])
        dictionaries.append(found)
    matrix = [[round(jaccard(a, b), 5) for b in dictionaries[1]] for a in dictionaries[0]]
    line = {"op": "jaccard", "kind": "itda", "jitter": jitter, "hooks": hooks, "jaccard": matrix}
    append(NAME, line, results)


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
    parser.add_argument("--out", type=Path, default=Path("bench-kinds"), help="for the caches")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tools", nargs="+", help="pythons that have another tool installed")
    parser.add_argument("--layers", action="store_true", help="ITDA, layer against layer")
    args = parser.parse_args()
    if args.layers:
        for jitter in JITTERS:
            layers(jitter, args.out, args.results)
        return
    if args.tools:
        tools = {"saekit": None, **{peer_of(python): python for python in args.tools}}
        for name, l0 in (("zipf", TRUE_L0), ("demo", 32)):
            if not args.data or name in args.data:
                against(
                    tools, _open(name, args.out), l0, args.kinds or SHARED, args.seeds, args.results
                )
        return
    wanted = [
        (experiment, seed)
        for seed in range(args.seeds)
        for experiment in experiments()
        if (not args.only or experiment.name in args.only)
        and (not args.data or experiment.data in args.data)
        and (not args.kinds or experiment.kind in args.kinds)
    ]
    done = _done(args.results)
    wanted = [(e, seed) for e, seed in wanted if not _is_done(done, e, seed)]
    # Made here, so that no two workers make one.
    for name in sorted({experiment.data for experiment, _ in wanted}):
        _open(name, args.out)
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


@functools.cache
def _open(name: str, folder: Path) -> Data:
    return demo(folder) if name == "demo" else planted(name, folder)


def _done(results: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The lines that are there, by tool, experiment and seed."""
    path = results / f"{NAME}.jsonl"
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {(x["impl"], x["key"], x["seed"]): x for x in lines if x["op"] == "train"}


def _is_done(
    done: dict[tuple[str, str, int], dict[str, Any]], experiment: Experiment, seed: int
) -> bool:
    """Whether there is a line of this run under the config that it would have now: where a default
    has changed since, it is made again."""
    line = done.get(("saekit", experiment.key, seed))
    now = json.loads(json.dumps(config_of(experiment, seed).to_dict()))
    return line is not None and line["config"] == now


def _run(experiment: Experiment, seed: int, folder: Path, device: str) -> dict[str, Any]:
    data = _open(experiment.data, folder)
    config = config_of(experiment, seed)
    begun = time.perf_counter()
    sae = train(config, data.cache, device=device)
    seconds = time.perf_counter() - begun
    return {
        "op": "train",
        "impl": "saekit",
        "experiment": experiment.name,
        "data": data.name,
        "kind": experiment.kind,
        "options": experiment.options,
        "key": experiment.key,
        "seed": seed,
        "device": device,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "n_tokens": config.n_tokens,
        "config": config.to_dict(),
        "seconds": round(seconds, 2),
        "tokens_per_s": round(config.n_tokens / seconds),
        **{name: round(value, 6) for name, value in data.figures(sae).items()},
    }


if __name__ == "__main__":
    main()
