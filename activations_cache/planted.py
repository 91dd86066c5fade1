"""Caches of activations that no model made, for tests and benchmarks whose right answer is known.

Axes: row, d, n_features.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.activations_cache import shards
from saekit.activations_cache.manifest import Manifest, Shard
from saekit.activations_cache.stats import HookStats
from saekit.activations_cache.storage import storage
from saekit.activations_cache.store import ActivationCache
from saekit.synthetic import BLOCK, Synthetic

HOOK = "resid_post.0"
"""The hook point that the rows are said to come from."""
CONTEXT = 128
"""Rows of a document, which is one window."""

Gradient = Callable[[Float[Tensor, "row d"], Float[Tensor, "row n_features"]], Tensor]
"""The gradient `[row, d]` with respect to rows, from them and from their codes."""


def planted_cache(
    where: Path | str,
    synthetic: Synthetic,
    n_rows: int,
    *,
    gradient: Gradient | None = None,
    holdout: float = 0.0,
    shard_rows: int = 65_536,
) -> ActivationCache:
    """A cache of the first rows of a synthetic dictionary, made block by block."""

    def part(start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        xs, grads = [], []
        for first, last in pairwise([*range(start, stop, BLOCK), stop]):
            x, codes = synthetic.rows(first, last)
            xs.append(x)
            if gradient is not None:
                grads.append(gradient(x, codes))
        return torch.cat(xs), torch.cat(grads) if grads else None

    bounds = pairwise([*range(0, n_rows, shard_rows), n_rows])
    return cache_of((part(start, stop) for start, stop in bounds), where, holdout=holdout)


def cache_of(
    parts: Iterable[tuple[Float[Tensor, "_ d"], Float[Tensor, "_ d"] | None]],
    where: Path | str,
    *,
    holdout: float = 0.0,
) -> ActivationCache:
    """A cache with a shard for each part: rows and, in all of them or none, their gradients."""
    folder = storage(where)
    entries: list[Shard] = []
    stats = HookStats()
    n_documents, d, gradients = 0, 0, False
    for number, (x, grad) in enumerate(parts):
        row = torch.arange(len(x), dtype=torch.int32)
        new = [f"planted {n_documents + i}" for i in range(-(-len(x) // CONTEXT))]
        columns = {
            HOOK: x.contiguous(),
            "token": torch.zeros_like(row),
            "document": row // CONTEXT + n_documents,
            "position": row % CONTEXT,
            "mask": torch.zeros(len(x), dtype=torch.uint8),
        }
        if grad is not None:
            columns[HOOK + shards.GRADIENT] = grad.contiguous()
        entries.append(shards.write(folder, f"shard-{number:05d}.safetensors", columns, new))
        n_documents, d, gradients = n_documents + len(new), x.shape[1], grad is not None
        norm = x.double().norm(dim=1)
        stats = stats.plus(
            HookStats(
                n=len(x),
                sum=tuple(x.double().sum(0).tolist()),
                sum_norm=float(norm.sum()),
                sum_squares=float(norm.square().sum()),
            )
        )
    Manifest(
        config={"holdout": holdout, "dtype": "float32", "gradients": gradients},
        model="planted",
        model_fingerprint="planted",
        tokenizer_fingerprint=None,
        hooks={HOOK: d},
        shards=tuple(entries),
        stats={HOOK: stats},
        complete=True,
    ).save(folder)
    return ActivationCache.open(where)
