"""Activations of task prompts less a share of one attribute's supervised code, as a cache that SAEs
can be refitted on (arXiv 2405.08366, feature occlusion: do latents tell of the smaller attribute
once the larger one is less in its way?).

One hook for each share: `resid_post.2:without_50_io`. A row is one place of one prompt, a document
one prompt; none is held out, as counts are taken on other prompts. Axes: row (prompts), place, d.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit import checkpoint
from saekit.activations_cache import manifest, shards
from saekit.activations_cache.stats import HookStats
from saekit.activations_cache.storage import storage
from saekit.activations_cache.store import ActivationCache
from saekit.errors import CacheError, ConfigError
from saekit.sae import SAE

_SHARD = 65_536
"""Rows of a shard, about."""


def hook_of(hook: str, alpha: float) -> str:
    """What the activations less `alpha` of their IO code are called."""
    return f"{hook}:without_{round(100 * alpha)}_io"


def refuse(where: Path | str) -> None:
    """Raise what `write` would: before the work, not after."""
    folder = storage(where)
    if folder.exists(manifest.NAME):
        raise CacheError(f"{folder.url} holds a cache already: give another folder as occluded_out")


def write(
    where: Path | str,
    cache: ActivationCache,
    occluded: Mapping[str, Float[Tensor, "row place d"]],
    token: Int[Tensor, "row place"],
) -> ActivationCache:
    """The cache of activations by the names of their hooks, in float32, of the model of `cache`.

    Raises CacheError where there is a cache already.
    """
    refuse(where)
    folder = storage(where)
    n, places = token.shape
    entries = []
    size = max(1, _SHARD // places)
    for number, first in enumerate(range(0, n, size)):
        some = slice(first, first + size)
        row = torch.arange(places * n).view(n, places)[some].flatten()
        columns = {name: x[some].flatten(0, 1).contiguous() for name, x in occluded.items()}
        columns |= {
            "token": token[some].flatten().int(),
            "document": (row // places).int(),
            "position": (row % places).int(),
            "mask": torch.zeros(len(row), dtype=torch.uint8),
        }
        new = [f"prompt {i}" for i in range(n)[some]]
        entries.append(shards.write(folder, f"shard-{number:05d}.safetensors", columns, new))
    of = cache.manifest
    config = {**of.config, "hooks": list(occluded), "dtype": "float32", "holdout": 0.0}
    manifest.Manifest(
        config={**config, "gradients": False},
        model=of.model,
        model_fingerprint=of.model_fingerprint,
        tokenizer_fingerprint=of.tokenizer_fingerprint,
        hooks={name: x.shape[2] for name, x in occluded.items()},
        shards=tuple(entries),
        stats={name: _stats(x.flatten(0, 1).double()) for name, x in occluded.items()},
        complete=True,
    ).save(folder)
    return ActivationCache.open(where)


def _stats(x: Float[Tensor, "row d"]) -> HookStats:
    norm = x.norm(dim=1)
    return HookStats(
        n=len(x),
        sum=tuple(x.sum(0).tolist()),
        sum_norm=float(norm.sum()),
        sum_squares=float(norm.square().sum()),
    )


def refitted(
    paths: Sequence[str], cache: ActivationCache, hook: str, alphas: Sequence[float], device: str
) -> dict[float, SAE]:
    """SAEs that were trained on such a cache, by the share that was taken away.

    Raises ConfigError for an SAE of anything else, CacheError for one of another model.
    """
    known = {hook_of(hook, alpha): alpha for alpha in alphas}
    found: dict[float, SAE] = {}
    for path in paths:
        sae = checkpoint.load(path)
        origin = sae.provenance
        if origin is None or origin.hook not in known:
            what = "an SAE of unknown origin" if origin is None else f"an SAE of '{origin.hook}'"
            raise ConfigError(
                f"refitted: {path} is {what}, and what is counted is of {', '.join(known)}: train "
                "on the cache that occluded_out writes, or name its share in occlude"
            )
        if origin.model_fingerprint != cache.model_fingerprint:
            raise CacheError(
                f"refitted: {path} was trained on model '{origin.model}' (fingerprint "
                f"{origin.model_fingerprint[:12]}), and {cache.url} is of "
                f"{cache.model_fingerprint[:12]}: train it on the cache that occluded_out writes"
            )
        alpha = known[origin.hook]
        if alpha in found:
            raise ConfigError(f"refitted={list(paths)} names two SAEs of '{origin.hook}': give one")
        found[alpha] = replace(sae.to(device, torch.float32), provenance=origin)
    return found
