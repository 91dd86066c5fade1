"""Caches of activations that no model made, for tests and benchmarks whose right answer is known.

A planted cache keeps its dictionary beside its rows (`planted.safetensors`), so that the answer can
be asked for on any machine; the dictionary's checksum stands where that of a model would, so that
no SAE is evaluated against another dictionary. Axes: row, d, n_features.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import xxhash
from jaxtyping import Float
from torch import Tensor

from saekit.activations_cache import shards
from saekit.activations_cache.manifest import Manifest, Shard
from saekit.activations_cache.stats import HookStats
from saekit.activations_cache.storage import storage
from saekit.activations_cache.store import ActivationCache
from saekit.errors import CacheError
from saekit.progress import bar
from saekit.synthetic import BLOCK, Synthetic, SyntheticConfig

HOOK = "resid_post.0"
"""The hook point that the rows are said to come from."""
CONTEXT = 128
"""Rows of a document, which is one window."""
DICTIONARY = "planted.safetensors"
"""The file that holds what the rows were made from."""

Gradient = Callable[[Float[Tensor, "row d"], Float[Tensor, "row n_features"]], Tensor]
"""The gradient `[row, d]` with respect to rows, from them and from their codes."""


def planted_cache(
    where: Path | str,
    synthetic: Synthetic | SyntheticConfig,
    n_rows: int,
    *,
    gradient: Gradient | None = None,
    holdout: float = 0.0,
    shard_rows: int = 65_536,
    progress: bool = False,
) -> ActivationCache:
    """A cache of the first rows of a synthetic dictionary, made block by block, and the dictionary
    itself, which `synthetic_of` reads. The manifest keeps a config that is given."""
    about: dict[str, Any] = {}
    if isinstance(synthetic, SyntheticConfig):
        about = {"synthetic": synthetic.to_dict()}
        synthetic = Synthetic.from_config(synthetic)
    made: Synthetic = synthetic

    def part(start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        xs, grads = [], []
        for first, last in pairwise([*range(start, stop, BLOCK), stop]):
            x, codes = made.rows(first, last)
            xs.append(x)
            if gradient is not None:
                grads.append(gradient(x, codes))
            shown.advance(last - first)
        return torch.cat(xs), torch.cat(grads) if grads else None

    content = _content(made)
    with storage(where).new_file(DICTIONARY) as path:
        path.write_bytes(content)
    bounds = pairwise([*range(0, n_rows, shard_rows), n_rows])
    with bar("plant", n_rows, shown=progress) as shown:
        return cache_of(
            (part(start, stop) for start, stop in bounds),
            where,
            holdout=holdout,
            fingerprint=fingerprint_of(made),
            about=about,
        )


def fingerprint_of(synthetic: Synthetic) -> str:
    """What a cache of its rows has as its model's fingerprint."""
    return xxhash.xxh3_128_hexdigest(_content(synthetic))


def synthetic_of(cache: ActivationCache) -> Synthetic:
    """The dictionary that a cache's rows were made from, in their order.

    Raises CacheError where no dictionary was planted in it, where it was before dictionaries were
    kept, where the file is gone or altered, and for a shuffled cache, whose rows lie in another
    order.
    """
    remedy = "plant one with `saekit plant --out CACHE`, and train on that"
    if cache.model != "planted":
        raise CacheError(
            f"{cache.url} holds activations of '{cache.model}', and nobody knows the true features "
            f"of a model: the cache must be of a planted dictionary; {remedy}"
        )
    if cache.shuffled:
        raise CacheError(
            f"{cache.url} is shuffled: its rows lie in another order than their dictionary makes "
            "them. Give the cache that it was made from"
        )
    if cache.model_fingerprint == "planted":
        raise CacheError(
            f"{cache.url} keeps no dictionary: its rows were made elsewhere, or by a saekit that "
            f"kept none; {remedy}"
        )
    try:
        content = cache.folder.local(DICTIONARY, cache.model_fingerprint).read_bytes()
    except FileNotFoundError as error:
        raise CacheError(
            f"{cache.url} has no {DICTIONARY}, which holds what its rows were made from: copy the "
            "whole folder again, or plant again"
        ) from error
    found = xxhash.xxh3_128_hexdigest(content)
    if found != cache.model_fingerprint:
        raise CacheError(
            f"{cache.url}/{DICTIONARY} has fingerprint {found[:12]}, and the rows were made from "
            f"{cache.model_fingerprint[:12]}: it was altered. Put it back from a copy, or plant "
            "again"
        )
    held = safetensors.torch.load(content)
    magnitude, magnitude_sd = held.pop("magnitude").tolist()
    seed = int(held.pop("seed"))
    return Synthetic(**held, magnitude=magnitude, magnitude_sd=magnitude_sd, seed=seed)


def _content(synthetic: Synthetic) -> bytes:
    """A dictionary as its file holds it."""
    names = ("directions", "p", "bias", "parent", "group", "factor")
    held = {name: getattr(synthetic, name) for name in names}
    tensors = {name: tensor.contiguous() for name, tensor in held.items() if tensor is not None}
    sizes = (synthetic.magnitude, synthetic.magnitude_sd)
    tensors["magnitude"] = torch.tensor(sizes, dtype=torch.float64)
    tensors["seed"] = torch.tensor(synthetic.seed)
    return safetensors.torch.save(tensors)


def cache_of(
    parts: Iterable[tuple[Float[Tensor, "_ d"], Float[Tensor, "_ d"] | None]],
    where: Path | str,
    *,
    holdout: float = 0.0,
    fingerprint: str = "planted",
    about: Mapping[str, Any] | None = None,
) -> ActivationCache:
    """A cache with a shard for each part: rows and, in all of them or none, their gradients.

    `fingerprint` says what the rows were made from, where that is known; `about` is for the
    manifest.
    """
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
        config={
            "holdout": holdout,
            "dtype": "float32",
            "gradients": gradients,
            **(about or {}),
        },
        model="planted",
        model_fingerprint=fingerprint,
        tokenizer_fingerprint=None,
        hooks={HOOK: d},
        shards=tuple(entries),
        stats={HOOK: stats},
        complete=True,
    ).save(folder)
    return ActivationCache.open(where)
