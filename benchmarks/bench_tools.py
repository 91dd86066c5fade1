"""What other tools' SAEs reach beside ours, of the same rows in the same order.

    python benchmarks/bench_tools.py --pythons sae/bin/python dl/bin/python
    python benchmarks/bench_tools.py --pythons sae/bin/python --data zipf --kinds topk

Each tool trains the kinds that it has at the same rates (warm-up and decay too), and is measured
as `bench_kinds.py` measures ours; its driver stands in peers/. Every rate is tried with one seed,
and more seeds follow with the best: the one that explains most of those at about the L0 that was
asked for, where there is one. One line for each run, in the file of `bench_kinds.py`; a run
whose line is there already is not made again, where it is ours only under the same config.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from _kinds_data import (
    CACHES,
    NAME,
    SEEDS,
    TRUE_L0,
    Data,
    Experiment,
    Line,
    config_of,
    figures_of,
    of_today,
    open_data,
    trained_line,
    trained_lines,
)
from _record import FOLDER, RESULTS, append
from bench_harvest import peer_of
from safetensors.torch import load_file, save_file

from saekit import SAE, JumpReLU, TopK, train
from saekit.activations_cache.reader import Reader
from saekit.config import TrainConfig
from saekit.trainers._base import fold_input_scale, input_scale

RATES = (1e-3, 4e-3, 6e-3, 1e-2)
"""Learning rates that each tool is tried with; more seeds follow with the best."""
NEAR = 1.25
"""Times the L0 asked for that still counts as about it, on held-out rows."""
SHARED = ("topk", "batch_topk", "jumprelu")
"""Kinds that other tools have, too."""
L0 = {"zipf": TRUE_L0, "demo": 32}
"""Data that they are trained on, and latents that shall fire a token of it."""


def against(
    tools: dict[str, str | None],
    data: Data,
    kinds: Iterable[str],
    seeds: int,
    device: str,
    results: Path,
) -> None:
    """Each tool's SAEs of the same rows. `tools` are the Pythons that have them; None is ours."""
    done = trained_lines(results)
    with tempfile.TemporaryDirectory() as folder:
        rows = _rows(data, Path(folder))
        for name in kinds:
            for tool, python in tools.items():
                best: dict[float, tuple[bool, float]] = {}
                for seed in range(seeds):
                    for lr in RATES if seed == 0 else (max(best, key=lambda lr: best[lr]),):
                        options = {"l0": L0[data.name], "lr": lr}
                        experiment = Experiment("tools", data.name, name, options)
                        config = _config(experiment, seed)
                        line = done.get((tool, experiment.key, seed))
                        # Other tools' lines hold no config.
                        if line is None or (python is None and not of_today(line, config)):
                            line = _run(tool, python, experiment, config, data, rows, device)
                            append(NAME, line, results)
                        near = line["l0"] <= NEAR * options["l0"]
                        best.setdefault(lr, (near, line["ev"] if near else -line["l0"]))


def _config(experiment: Experiment, seed: int) -> TrainConfig:
    """What we train with, and what others are told."""
    l0, lr = experiment.options["l0"], experiment.options["lr"]
    given = {"target_l0": l0} if experiment.kind == "jumprelu" else {"k": l0}
    config: TrainConfig = config_of(replace(experiment, options={**given, "lr": lr}), seed)
    return config


def _run(
    tool: str,
    python: str | None,
    experiment: Experiment,
    config: TrainConfig,
    data: Data,
    rows: tuple[Path, float],
    device: str,
) -> Line:
    versions: dict[str, str] = {}
    ours: Line = {}
    if python is None:
        sae = train(config, data.cache, device=device)
        ours = {"config": config.to_dict()}
    else:
        sae, versions = _other(
            tool, python, experiment.kind, experiment.options["l0"], config, *rows, device
        )
    return {
        **trained_line(tool, experiment, config, device, sae),
        **ours,
        "peer_versions": versions,
        **figures_of(sae, data),
    }


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
    tool: str,
    python: str,
    name: str,
    l0: int,
    config: TrainConfig,
    rows: Path,
    scale: float,
    device: str,
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
        "device": device,
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
    sae = _as_ours(load_file(out), l0)
    return fold_input_scale(sae, scale), told["versions"]


def _as_ours(weights: dict[str, torch.Tensor], l0: int) -> SAE:
    """What a driver wrote, as an SAE of the rows that it read."""
    threshold = weights.pop("threshold", None)
    norm = weights["W_dec"].norm(dim=1).clamp_min(1e-12)
    if threshold is None:
        assert torch.allclose(norm, torch.ones_like(norm), atol=1e-3), "rows of W_dec of norm 1"
        activation: TopK | JumpReLU = TopK(l0)
    else:
        activation = JumpReLU(threshold * norm)
    # A latent in units of what it adds to x_hat, as ours are; what it adds stays.
    return SAE(
        W_enc=weights["W_enc"] * norm,
        b_enc=weights["b_enc"] * norm,
        W_dec=weights["W_dec"] / norm[:, None],
        b_dec=weights["b_dec"],
        activation=activation,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pythons", nargs="+", required=True, help="pythons that have another tool installed"
    )
    parser.add_argument("--data", nargs="+", choices=L0, default=list(L0), help="by name")
    parser.add_argument("--kinds", nargs="+", choices=SHARED, default=SHARED, help="by name")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=CACHES, help="for the caches")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    tools = {"saekit": None, **{peer_of(python): python for python in args.pythons}}
    for name in args.data:
        against(tools, open_data(name, args.out), args.kinds, args.seeds, args.device, args.results)


if __name__ == "__main__":
    main()
