"""What each evaluation costs: tokens a second and peak memory, at several counts of tokens.

    python benchmarks/bench_evals.py                   # half an hour on two cores
    python benchmarks/bench_evals.py --evals core --counts 1_000_000
    python benchmarks/table.py                         # the table of evals/README.md

Every case runs in a process of its own, so that its memory is its own, on the same SAE of the
embedded model, whose quality does not matter. Time is that of `evaluate`, opening the cache and
importing left out. A case at twice the tokens should take twice the time: the last column of the
table says how the time grew. One line for each case.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _record import RESULTS, append
from peers._driver import measured
from rich.progress import track

from saekit import SAE, ActivationCache, HarvestConfig, TopK, evaluate, harvest, load, save
from saekit.activations_cache.planted import HOOK as PLANTED_HOOK
from saekit.activations_cache.planted import planted_cache
from saekit.evals import _kinds
from saekit.results import Provenance, versions
from saekit.synthetic import SyntheticConfig

NAME = "evals"
HOOK, HEADS = "resid_post.2", "attn_z.1"
COUNTS = (100_000, 200_000, 400_000)
CE_TOKENS = 50_000
"""What `core` and `dark_matter` measure losses on by default."""


@dataclass(frozen=True)
class Case:
    """How an evaluation is asked for a count of tokens."""

    eval: str
    config: Callable[[int], dict[str, Any]]
    unit: str = "tokens"
    share: float = 1.0
    """Of the counts asked for: for what takes long."""


def _rows(n: int) -> dict[str, Any]:
    return {"max_rows": n}


CASES: dict[str, Case] = {
    "core": Case("core", lambda n: {"max_rows": n, "ce_tokens": CE_TOKENS}),
    "core, rows alone": Case("core", lambda n: {"max_rows": n, "ce_tokens": 0}),
    "core, losses alone": Case("core", lambda n: {"max_rows": 4096, "ce_tokens": n}, share=0.1),
    "examples": Case("examples", _rows),
    "firing": Case("firing", _rows),
    "geometry": Case("geometry", _rows),
    "stability": Case("stability", _rows),
    "dark_matter": Case(
        "dark_matter", lambda n: {"max_rows": n, "fit_rows": n, "ce_tokens": CE_TOKENS}
    ),
    "indirect_object": Case(
        "indirect_object",
        lambda n: {"n_fit": n, "n_test": n // 2, "n_patch": n // 10},
        unit="prompts",
        share=0.01,
    ),
    "attention": Case("attention", _rows, share=0.1),
    "ground_truth": Case("ground_truth", _rows),
}


def made(folder: Path, name: str, d_in: int, d_sae: int, cache: ActivationCache, hook: str) -> Path:
    """A TopK SAE of random directions of that cache and hook."""
    path = folder / name
    if not (path / "config.json").exists():
        generator = torch.Generator().manual_seed(len(name))
        rows = torch.randn(d_sae, d_in, generator=generator)
        W_dec = rows / rows.norm(dim=1, keepdim=True)
        origin = Provenance(
            kind="topk",
            hook=hook,
            model=cache.model,
            model_fingerprint=cache.model_fingerprint,
            cache_fingerprint=cache.fingerprint,
            config={},
            rows_seen=0,
            versions=versions(),
        )
        biases = torch.zeros(d_sae), torch.zeros(d_in)
        sae = SAE(W_dec.T.contiguous(), biases[0], W_dec, biases[1], TopK(32), provenance=origin)
        save(sae, path)
    return path


def prepared(folder: Path, most: int, d_sae: int) -> None:
    """The caches and SAEs, those that are not there yet."""
    manifest, n = folder / "cache" / "manifest.json", round(1.5 * most)
    if manifest.exists():  # One that was made for more is as good.
        n = max(n, json.loads(manifest.read_text(encoding="utf-8"))["config"]["n_tokens"])
    # Most documents are held out: they are what is looked at.
    config = HarvestConfig(hooks=(HOOK, HEADS), n_tokens=n, holdout=0.75)
    cache = harvest(config, folder / "cache", progress=True)
    for name, hook in (("sae", HOOK), ("other", HOOK), ("heads", HEADS)):
        made(folder, name, cache.width(hook), d_sae, cache, hook)
    path = folder / "planted"
    if not (path / "manifest.json").exists():
        synthetic = SyntheticConfig(n_features=d_sae // 2, d_in=256)
        planted_cache(path, synthetic, round(1.5 * most), holdout=0.75)
    planted = ActivationCache.open(path)
    made(folder, "of-planted", planted.width(PLANTED_HOOK), d_sae, planted, PLANTED_HOOK)


def one(case: Case, n: int, folder: Path, device: str) -> dict[str, Any]:
    """Run here, and say what it took."""
    sae = {"attention": "heads", "ground_truth": "of-planted"}.get(case.eval, "sae")
    cache = ActivationCache.open(folder / ("planted" if sae == "of-planted" else "cache"))
    values = {"device": device, **case.config(n)}
    if case.eval == "stability":
        values["against"] = [str(folder / "other")]
    config = _kinds.find(case.eval).Config.from_dict(values)
    found = load(folder / sae)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    begun = time.process_time()
    with measured() as run:
        result = evaluate(case.eval, found, cache, config=config)
    gpu = torch.cuda.max_memory_allocated() / 2**20 if device != "cpu" else None
    return {
        "seconds": round(run.seconds, 3),
        "cpu_seconds": round(time.process_time() - begun, 3),
        "growth_mib": run.growth_mib,
        "gpu_mib": gpu and round(gpu, 1),
        "rows": max(metric.n for metric in result.metrics.values()),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--evals", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument(
        "--core", type=int, default=1_000_000, help="tokens of one more core; 0: no"
    )
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("bench-evals"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=2, metavar=("CASE", "COUNT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, n = args.one
        print(json.dumps(one(CASES[name], int(n), args.out, args.device)))
        return
    prepared(args.out, max(*args.counts, args.core), args.d_sae)
    asked = [(name, round(n * CASES[name].share)) for name in args.evals for n in args.counts]
    if "core" in args.evals and args.core:
        asked.append(("core", args.core))
    for name, n in track(asked, "evaluations"):
        command = [sys.executable, __file__, "--one", name, str(n), "--out", str(args.out)]
        command += ["--device", args.device]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        line = {
            "op": "eval",
            "impl": "saekit",
            "case": name,
            "unit": CASES[name].unit,
            "count": n,
            "device": args.device,
            "d_in": 256,
            "d_sae": args.d_sae,
            "l0": 32,
            **json.loads(said.splitlines()[-1]),
        }
        append(NAME, line, args.results)


if __name__ == "__main__":
    main()
