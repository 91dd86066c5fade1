"""What the comparisons of trained SAEs share: activations to train on, the figures of an SAE of
them, and the lines of results/kinds.jsonl, written and found again."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from saekit import SAE, ActivationCache, HarvestConfig, evaluate, harvest
from saekit.activations_cache.planted import HOOK, planted_cache
from saekit.config import TrainConfig
from saekit.evals.core import CoreConfig
from saekit.synthetic import Detection, Synthetic, SyntheticConfig, hierarchical_tree, recovery
from saekit.trainers import kind

NAME = "kinds"
"""Of the file of results."""
SEEDS = 3
FOUND = 0.9
"""Cosine above which a feature counts as found."""
CACHES = Path("bench-kinds")
"""Where caches are kept between benchmarks."""

Line = dict[str, Any]


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


@functools.cache
def open_data(name: str, folder: Path) -> Data:
    """Activations by name; they are made where the folder does not hold them yet."""
    return demo(folder) if name == "demo" else planted(name, folder)


def trained_line(
    tool: str, experiment: Experiment, config: TrainConfig, device: str, sae: SAE
) -> Line:
    """What the line of any trained SAE begins with; its figures come last."""
    return {
        "op": "train",
        "impl": tool,
        "experiment": experiment.name,
        "data": experiment.data,
        "kind": experiment.kind,
        "options": experiment.options,
        "key": experiment.key,
        "seed": config.seed,
        "device": device,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "n_tokens": config.n_tokens,
    }


def figures_of(sae: SAE, data: Data) -> dict[str, float]:
    return {name: round(value, 6) for name, value in data.figures(sae).items()}


def trained_lines(results: Path) -> dict[tuple[str, str, int], Line]:
    """The lines that are there, by tool, experiment and seed."""
    path = results / f"{NAME}.jsonl"
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {(x["impl"], x["key"], x["seed"]): x for x in lines if x["op"] == "train"}


def of_today(line: Line | None, config: TrainConfig) -> bool:
    """Whether there is a line, and of the config that its run would have now: where a default has
    changed since, the run is made again. An option that is newer than the line, and left at what it
    is by default, does what was done then."""
    if line is None or "config" not in line:
        return False
    now = json.loads(json.dumps(config.to_dict()))
    usual = json.loads(json.dumps(type(config)().to_dict()))
    newer = {key: usual[key] for key in now if key not in line["config"] and key in usual}
    return bool({**newer, **line["config"]} == now)
