"""How alike the ITDA dictionaries of two models' layers are, gathered from the same text.

    python benchmarks/bench_layers.py

One line for each amount of noise on the second model's weights, in the file of `bench_kinds.py`.
"""

import argparse
from pathlib import Path

import torch
from _kinds_data import CACHES, NAME
from _record import RESULTS, append
from safetensors.torch import load_file

from saekit import HarvestConfig, harvest, train
from saekit.activations_cache.model import LanguageModel, wrap
from saekit.seeds import stream
from saekit.trainers._run import EXTRAS
from saekit.trainers.itda import ITDAConfig, jaccard

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
    parser.add_argument("--out", type=Path, default=CACHES, help="for the caches and runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    for jitter in JITTERS:
        layers(jitter, args.out, args.results)


if __name__ == "__main__":
    main()
