"""How much of an SAE's error is linear, how it falls as dictionaries grow, and whether larger ones
fail on the same tokens: the claims of Engels et al. 2024 (arXiv 2410.14670) on the embedded model.

    python benchmarks/bench_dark_matter.py --device cuda     # some minutes on an H200
    python benchmarks/bench_dark_matter.py --small           # a try-out, minutes on two cores
    python benchmarks/table.py                               # docs/dark_matter.md, figures and all

SAEs of several widths are trained on two layers, and `saekit eval dark_matter` is put to each,
beside the smaller ones of its layer, the one of its width of the layer before, and a dictionary of
random directions. For one width a layer, SAEs are trained on the error and on its two parts, too.
One line for each SAE, and for each layer one of the power laws over widths. What is made already,
SAEs and results, is kept in `--out`, so a stopped study goes on with the same command.
"""

import argparse
import json
import logging
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _record import RESULTS, append, clear
from rich.progress import track

from saekit import SAE, ActivationCache, HarvestConfig, evaluate, harvest, load, save, train
from saekit.checkpoint import fingerprint
from saekit.commands._eval_all import is_there
from saekit.evals._controls import random_sae
from saekit.evals._dark_cache import PARTS
from saekit.evals._resample import Estimate
from saekit.evals._scaling import EXPONENTS, PowerLaw, power_law
from saekit.evals.core import CoreConfig
from saekit.evals.dark_matter import DarkMatterConfig
from saekit.results import EvalResult, Metric
from saekit.trainers.topk import TopKConfig

NAME = "dark_matter"
LR_WIDTH = 4096
"""The width that `--lr` is meant for; others take it times sqrt(LR_WIDTH / width)."""
SMALL = {
    "n_tokens": 60_000,
    "widths": [64, 128, 256, 512],
    "train_tokens": 100_000,
    "batch_size": 1024,
    "parts_of": 256,
    "pursuit_rows": 2_000,
    "ce_tokens": 2_000,
    "fit_rows": 50_000,
    "n_bootstrap": 200,
}
"""What `--small` puts in the place of defaults."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """Where everything is, and what is asked for."""

    args: argparse.Namespace
    cache: ActivationCache

    def folder(self, hook: str, width: int, what: str = "") -> Path:
        """Of an SAE. Its name alone tells it from any other, as results name others by it."""
        name = f"{hook}-{width}" + (f"-{what}" if what else "")
        return Path(self.args.out) / name

    def config(self, width: int) -> TopKConfig:
        args = self.args
        return TopKConfig(
            d_sae=width,
            k=args.k,
            n_tokens=args.train_tokens,
            batch_size=args.batch_size,
            lr=args.lr * math.sqrt(LR_WIDTH / width),
            dead_after=min(200_000, args.train_tokens // 4),
            seed=args.seed,
            life_windows=0,
            checkpoint_every=10_000,
        )

    def evals(self, others: tuple[str, ...], parts_out: str | None) -> DarkMatterConfig:
        args = self.args
        return DarkMatterConfig(
            fit_rows=args.fit_rows,
            ce_tokens=args.ce_tokens,
            n_bootstrap=args.n_bootstrap,
            others=others,
            parts_out=parts_out,
            pursuit=args.pursuit_rows > 0,
            pursuit_rows=max(1, args.pursuit_rows),
            batch_size=args.eval_batch,
            device=args.device,
        )


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = arguments()
    config = HarvestConfig(hooks=tuple(args.hooks), n_tokens=args.n_tokens, device=args.device)
    cache = harvest(config, args.out / "cache", progress=True)
    study = Study(args, cache)
    seen = done(args.results)
    for hook in args.hooks:
        for width in track(sorted(args.widths), f"{hook}, widths"):
            line = measured(study, hook, width)
            keep(line, seen, args.results)
            if width == args.parts_of:
                for part in PARTS:
                    keep(of_part(study, hook, width, part), seen, args.results)
        if len(args.widths) > 3:
            keep(scaling(study, hook), seen, args.results)


def measured(study: Study, hook: str, width: int) -> Line:
    """An SAE of this width, trained and measured."""
    folder = study.folder(hook, width)
    sae, seconds = trained(study, study.config(width), study.cache, hook, folder)
    parts_out = str(folder / "parts") if width == study.args.parts_of else None
    others = tuple(str(path) for path in beside(study, hook, width, sae))
    config = study.evals(others, parts_out)
    begun = time.perf_counter()
    found = evaluated(NAME, study, sae, hook, folder, config)
    taken = time.perf_counter() - begun
    core = evaluated("core", study, sae, hook, folder, study_core(study))
    return {
        "op": "sae",
        "hook": hook,
        "width": width,
        "kind": "topk",
        "k": study.args.k,
        "seed": study.args.seed,
        "device": study.args.device,
        "d_in": sae.d_in,
        "cache_rows": study.cache.n_rows,
        "sae": fingerprint(sae),
        "config": study.config(width).to_dict(),
        "eval": {k: v for k, v in config.to_dict().items() if k not in ("others", "parts_out")},
        "train_seconds": round(seconds, 2),
        "eval_seconds": round(taken, 2),
        "core": figures(core, "ev", "l0_mean", "dead_share"),
        "figures": figures(found),
        "rows": {"fit": int(found.metrics["fit_rows"].value), "held_out": rows_of(found)},
    }


def beside(study: Study, hook: str, width: int, sae: SAE) -> list[Path]:
    """Other SAEs that its error is predicted from, all of them made before."""
    smaller = [study.folder(hook, other) for other in sorted(study.args.widths) if other < width]
    hooks = study.args.hooks
    before = hooks[: hooks.index(hook)]
    random = study.folder(hook, width, "random")
    if not (random / "config.json").exists():
        save(random_sae(sae, study.cache, hook), random)
    return [*smaller, *(study.folder(other, width) for other in before), random]


def of_part(study: Study, hook: str, width: int, part: str) -> Line:
    """An SAE of the same kind, trained on a part of another's error: what features are left?"""
    folder = study.folder(hook, width, part)
    cache = ActivationCache.open(study.folder(hook, width) / "parts")
    name = f"{hook}:{part}"
    sae, seconds = trained(study, study.config(width), cache, name, folder)
    core = evaluated("core", replace(study, cache=cache), sae, name, folder, study_core(study))
    return {
        "op": "part",
        "hook": hook,
        "width": width,
        "part": part,
        "k": study.args.k,
        "seed": study.args.seed,
        "device": study.args.device,
        "sae": fingerprint(sae),
        "config": study.config(width).to_dict(),
        "train_seconds": round(seconds, 2),
        "core": figures(core, "ev", "l0_mean", "dead_share"),
    }


def scaling(study: Study, hook: str) -> Line:
    """The power law over widths, of the whole error and of its nonlinear part."""
    widths = sorted(study.args.widths)
    results = [EvalResult.load(study.folder(hook, width) / "results", NAME) for width in widths]

    def samples(name: str) -> torch.Tensor:
        arrays = [torch.from_numpy(result.arrays[f"{name}_samples"]) for result in results]
        return torch.stack(arrays, 1)

    total, nonlinear = samples("fvu_total"), samples("fvu_nonlinear")
    law = power_law(widths, total)
    return {
        "op": "scaling",
        "hook": hook,
        "widths": widths,
        "k": study.args.k,
        "seed": study.args.seed,
        "device": study.args.device,
        "saes": [result.sae_fingerprint for result in results],
        "reference": law.reference,
        "total": of_law(law, widths, total),
        "nonlinear": of_law(power_law(widths, nonlinear), widths, nonlinear),
        "nonlinear_mean": estimate(nonlinear.mean(1)),
        "nonlinear_ratio": estimate(nonlinear[:, -1] / nonlinear[:, 0]),
        "total_ratio": estimate(total[:, -1] / total[:, 0]),
        "exponents": EXPONENTS,
    }


def of_law(law: PowerLaw, widths: list[int], y: torch.Tensor) -> Line:
    fitted = torch.stack([law(float(width)) for width in widths], 1)
    return {
        "floor": estimate(law.floor),
        "scale": estimate(law.scale),
        "exponent": estimate(law.exponent),
        "at_edge": law.at_edge,
        "largest_miss": round(float((fitted - y)[0].abs().max()), 6),
    }


def trained(
    study: Study, config: TopKConfig, cache: ActivationCache, hook: str, folder: Path
) -> tuple[SAE, float]:
    begun = time.perf_counter()
    train(config, cache, hook=hook, out=folder, device=study.args.device)
    return load(folder), time.perf_counter() - begun


def study_core(study: Study) -> CoreConfig:
    return CoreConfig(
        ce_tokens=0,
        device=study.args.device,
        batch_size=study.args.eval_batch,
        n_bootstrap=study.args.n_bootstrap,
    )


def evaluated(
    name: str,
    study: Study,
    sae: SAE,
    hook: str,
    folder: Path,
    config: DarkMatterConfig | CoreConfig,
) -> EvalResult:
    """What is there already is not measured again."""
    out = folder / "results"
    if is_there(out, name, fingerprint(sae), study.cache.fingerprint, config.to_dict()):
        return EvalResult.load(out, name)
    if isinstance(config, DarkMatterConfig) and config.parts_out:
        # Of a study that was stopped before the result was written.
        clear(Path(config.parts_out))
    return evaluate(name, sae, study.cache, hook=hook, config=config, out=out)


def figures(result: EvalResult, *names: str) -> dict[str, list[float]]:
    """Values, each with the ends of its interval where it has one."""
    return {name: _numbers(result.metrics[name]) for name in names or sorted(result.metrics)}


def _numbers(metric: Metric) -> list[float]:
    return [round(value, 6) for value in (metric.value, *(metric.interval or ()))]


def estimate(samples: torch.Tensor) -> list[float]:
    found = Estimate.of(samples)
    assert found is not None, "fvu is defined wherever activations vary"
    return [round(value, 6) for value in (found.value, *(found.interval or ()))]


def rows_of(result: EvalResult) -> int:
    return result.metrics["fvu_total"].n


def done(results: Path) -> set[str]:
    """What the lines that are there are of."""
    path = results / f"{NAME}.jsonl"
    if not path.exists():
        return set()
    return {of(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()}


def of(line: Line) -> str:
    """What a line is of: SAEs and how they were measured."""
    what = {name: line.get(name) for name in ("op", "hook", "width", "sae", "saes", "eval")}
    return json.dumps(what, sort_keys=True)


def keep(line: Line, seen: set[str], results: Path) -> None:
    if of(line) not in seen:
        append(NAME, line, results)
        seen.add(of(line))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hooks", nargs="+", default=["resid_post.1", "resid_post.2"])
    widths = [1024, 2048, 4096, 8192, 16384]
    parser.add_argument("--widths", type=int, nargs="+", default=widths)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--n-tokens", type=int, default=2_000_000, help="of the cache")
    parser.add_argument("--train-tokens", type=int, default=8_000_000, help="of each SAE")
    parser.add_argument("--batch-size", type=int, default=4096, help="of a training step")
    parser.add_argument("--lr", type=float, default=2e-3, help=f"at {LR_WIDTH} latents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--parts-of", type=int, default=4096, help="width whose error SAEs are trained on; 0: none"
    )
    parser.add_argument("--fit-rows", type=int, default=200_000)
    parser.add_argument("--ce-tokens", type=int, default=50_000)
    parser.add_argument("--pursuit-rows", type=int, default=20_000, help="0: none")
    parser.add_argument("--n-bootstrap", type=int, default=1000)
    parser.add_argument("--eval-batch", type=int, default=8192, help="rows at once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="other defaults, for a try-out")
    parser.add_argument("--out", type=Path, default=Path("bench-dark-matter"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    if parser.parse_known_args()[0].small:
        parser.set_defaults(**SMALL)
    return parser.parse_args()


if __name__ == "__main__":
    main()
