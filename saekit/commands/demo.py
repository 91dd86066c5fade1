"""Run the whole path on the embedded model: activations, SAE, metrics, report."""

from dataclasses import dataclass
from pathlib import Path

from saekit.commands._shared import Args, parse, print_metrics


@dataclass(frozen=True, kw_only=True)
class DemoArgs(Args):
    """Harvest, train, evaluate and report on the embedded model: the whole path, offline."""

    out: Path = Path("demo_run")
    """Folder for everything that the demo makes."""

    harvest_tokens: int = 1_500_000
    """Tokens of the standard library to harvest."""

    train_tokens: int = 4_000_000
    """Activations to train on; they are read more than once."""


def run(argv: list[str]) -> None:
    args = parse(DemoArgs, argv, "demo")
    from saekit.activations_cache.config import HarvestConfig
    from saekit.activations_cache.harvest import harvest
    from saekit.checkpoint import fingerprint
    from saekit.dashboard.report import write_report
    from saekit.evals._base import evaluate
    from saekit.results import RESULTS, EvalResult
    from saekit.trainers._loop import train
    from saekit.trainers.topk import TopKConfig

    folder = args.out / "run"
    what = HarvestConfig(hooks=("resid_post.1",), n_tokens=args.harvest_tokens)
    how = TopKConfig(d_sae=4096, k=32, n_tokens=args.train_tokens, lr=2e-3, dead_after=200_000)
    print("1/4  harvest: the embedded language model reads this Python's standard library")
    cache = harvest(what, args.out / "cache", progress=True)
    print(f"     {cache.n_rows:,} activations of {len(cache.documents):,} documents")
    print(f"2/4  train: a TopK SAE of {how.d_sae:,} latents, {how.k} of them active a token")
    sae = train(how, cache, out=folder, progress=True)
    print("3/4  evaluate: on documents that training never saw")
    for name in ("core", "examples"):
        if not (folder / RESULTS / f"{name}.json").exists() or (
            EvalResult.load(folder / RESULTS, name).sae_fingerprint != fingerprint(sae)
        ):
            evaluate(name, sae, cache, out=folder / RESULTS, progress=True)
    print_metrics(EvalResult.load(folder / RESULTS, "core"))
    print("4/4  report")
    print(f"     {write_report(folder)}\n\nBrowse the features: saekit dashboard {folder}")
