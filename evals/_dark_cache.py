"""An SAE's error and its two parts as activations of a cache of their own, for SAEs to be trained
on (arXiv 2410.14670, sec. 5: do features remain in what is not linear?).

Rows, tokens, documents and their split are those of the cache that the SAE reads. Axes: row, d.
"""

from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.activations_cache import manifest, masks, shards
from saekit.activations_cache.config import DTYPES
from saekit.activations_cache.stats import HookStats
from saekit.activations_cache.storage import storage
from saekit.activations_cache.store import ActivationCache
from saekit.errors import CacheError
from saekit.evals._dark_parts import Seen, Split, Subject
from saekit.progress import bar

PARTS = ("error", "linear_error", "nonlinear_error")
"""What stands behind the hook's name: `resid_post.1:linear_error`."""


def write_parts(
    where: Path | str,
    cache: ActivationCache,
    subject: Subject,
    split: Split,
    batch_size: int,
    *,
    progress: bool = False,
) -> ActivationCache:
    """The cache of e = x - x_hat, LinErr and NonlinErr at every row of `cache`, in its dtype
    (bfloat16 for int8).

    Raises CacheError where there is a cache already, and for a shuffled one.
    """
    refuse(where, cache)
    folder = storage(where)
    stored = DTYPES[cache.dtype] if DTYPES[cache.dtype].is_floating_point else torch.bfloat16
    names = [f"{subject.hook}:{part}" for part in PARTS]
    entries, stats = [], dict.fromkeys(names, HookStats())
    with bar("error parts", cache.n_rows, shown=progress) as shown:
        for number, (start, stop) in enumerate(cache.shard_bounds):
            rows = torch.arange(start, stop)
            columns = {name: cache.take(name, rows) for name in shards.COLUMNS}
            columns |= {
                name: torch.empty(len(rows), cache.width(subject.hook), dtype=stored)
                for name in names
            }
            left_out = masks.bits(("special", "nonfinite"))
            for some in torch.split(torch.arange(len(rows)), batch_size):
                parts = _parts(cache, subject, split, rows[some])
                kept = columns["mask"][some] & left_out == 0
                for name, values in zip(names, parts, strict=True):
                    columns[name][some] = values.to(stored).cpu()
                    stats[name] = stats[name].plus(_stats(values.cpu()[kept]))
                shown.advance(len(some))
            new = cache.readers[number].new_documents
            entries.append(shards.write(folder, f"shard-{number:05d}.safetensors", columns, new))
    config = {
        **cache.manifest.config,
        "hooks": names,
        "dtype": str(stored).removeprefix("torch."),
        "gradients": False,
    }
    replace(
        cache.manifest,
        config=config,
        hooks=dict.fromkeys(names, cache.width(subject.hook)),
        shards=tuple(
            replace(entry, start=old.start)
            for entry, old in zip(entries, cache.manifest.shards, strict=True)
        ),
        stats=stats,
        ranks=1,
    ).save(folder)
    return ActivationCache.open(where)


def refuse(where: Path | str, cache: ActivationCache) -> None:
    """Raise what `write_parts` would: before hours of work, not after."""
    folder = storage(where)
    if folder.exists(manifest.NAME):
        raise CacheError(f"{folder.url} holds a cache already: give another folder as parts_out")
    if cache.shuffled:
        raise CacheError(f"{cache.url} is shuffled: give the cache that it was made from")


def _parts(
    cache: ActivationCache, subject: Subject, split: Split, index: Tensor
) -> tuple[Float[Tensor, "row d"], ...]:
    """Of any rows: those that are not finite stay so."""
    x = cache.rows(subject.hook, index).to(subject.sae.device)
    seen = Seen(x.double(), subject.sae(x).double(), x.new_zeros(len(x)).double())
    part = split.parts(seen)
    return seen.error, part.linear, part.nonlinear


def _stats(x: Float[Tensor, "row d"]) -> HookStats:
    norm = x.norm(dim=1)
    return HookStats(
        n=len(x),
        sum=tuple(x.sum(0).tolist()),
        sum_norm=float(norm.sum()),
        sum_squares=float(norm.square().sum()),
    )
