"""Whether a cache is what its harvest or shuffle wrote, and making the shards again that are not.

Axes: row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt16
from safetensors import safe_open

from saekit.activations_cache import manifest, masks, shards, shuffle
from saekit.activations_cache.shards import SOURCE, ShardReader
from saekit.activations_cache.store import ActivationCache
from saekit.errors import CacheError
from saekit.progress import bar


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a cache."""

    file: str
    """The shard, or the manifest."""
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}"


def verify(cache: ActivationCache | Path | str, *, progress: bool = False) -> list[Fault]:
    """Read a whole cache, and list everything that is wrong with it.

    Each shard is compared with its checksum, then its columns with what the manifest says of them,
    and for a shuffled cache its rows with those that the recorded seed puts there. Last the counts
    of the manifest are compared with the rows. Raises CacheError where there is no cache, it is not
    complete, or its manifest was altered.
    """
    cache = cache if isinstance(cache, ActivationCache) else ActivationCache.open(cache)
    faults: list[Fault] = []
    counts = np.zeros(256, np.int64)
    record = cache.manifest.shuffle
    piles = None
    if record is not None and _names_can_be_read(cache):
        piles = shuffle.piles_of(record.seed, record.n_piles, 0, cache.n_rows)
    with bar("verify", cache.n_rows, shown=progress) as shown:
        for number, reader in enumerate(cache.readers):
            problems = list(_problems(cache, number, piles))
            faults += [Fault(reader.shard.file, problem) for problem in problems]
            if not problems:
                counts += np.bincount(reader.column("mask").numpy(), minlength=256)
            shown.advance(reader.shard.rows)
    if not faults:
        faults = [Fault(manifest.NAME, problem) for problem in _miscounts(cache, counts)]
    return faults


def repair(where: Path | str, *, progress: bool = False) -> list[Fault]:
    """Make the faulty shards of a cache again; gives the faults that were there.

    A shard of a shuffled cache is made from the cache that was shuffled, any other from the corpus
    and the model. Raises CacheError where the manifest is at fault, where the source is not there
    any more, and where a shard made again is not what it was.
    """
    cache = ActivationCache.open(where)
    with cache.folder.lock():
        faults = verify(cache, progress=progress)
        files = {fault.file for fault in faults}
        if manifest.NAME in files:
            raise CacheError(
                f"{cache.url} holds other rows than {manifest.NAME} says ({faults[0].problem}): no "
                "shard is at fault. Harvest again, into another --out"
            )
        held = cache.manifest.shards
        numbers = [number for number, shard in enumerate(held) if shard.file in files]
        if numbers:
            _make_again(cache, numbers)
    return faults


def _names_can_be_read(cache: ActivationCache) -> bool:
    """Where they cannot, their shard is at fault, and which rows are for training is not known."""
    try:
        return bool(cache.documents)
    except CacheError:
        return False


def _problems(
    cache: ActivationCache, number: int, piles: UInt16[np.ndarray, " row"] | None
) -> Iterator[str]:
    """What is wrong with a shard. Nothing is read of one whose checksum is another."""
    reader, shard = cache.readers[number], cache.manifest.shards[number]
    try:
        # Again, even where this process has read it before.
        ShardReader(cache.folder, shard).check()
    except CacheError as error:
        yield str(error)
        return
    found = list(_wrong_columns(cache, number))
    yield from found
    if len(reader.new_documents) != shard.n_documents:
        yield (
            f"names {len(reader.new_documents):,} documents, the manifest says "
            f"{shard.n_documents:,}"
        )
    if piles is not None and not found:
        yield from _misplaced(cache, number, piles)


def _wrong_columns(cache: ActivationCache, number: int) -> Iterator[str]:
    reader, shard = cache.readers[number], cache.manifest.shards[number]
    path = cache.folder.local(shard.file, shard.checksum)
    with safe_open(path, framework="pt") as file:
        there = set(file.keys())
    if there != set(cache.columns):
        missing, more = set(cache.columns) - there, there - set(cache.columns)
        yield f"lacks the columns {sorted(missing)} and has {sorted(more)} beyond the manifest's"
    for name in sorted(there & set(cache.columns)):
        column = reader.column(name)
        dtype = {**shards.COLUMNS, SOURCE: torch.int64}.get(name)
        tail: tuple[int, ...] = ()
        if name in cache.hooks:
            dtype, tail = getattr(torch, cache.dtype), (cache.hooks[name],)
        elif name.endswith(shards.GRADIENT):
            tail = (cache.width(name),)
        elif name.endswith(shards.SCALE):
            dtype = torch.float32
        if tuple(column.shape) != (shard.rows, *tail):
            yield (
                f"column '{name}' has shape {list(column.shape)}, the manifest says "
                f"{[shard.rows, *tail]}"
            )
        if column.dtype != dtype and not (dtype is None and column.is_floating_point()):
            yield f"column '{name}' is of {column.dtype}, the manifest says {dtype or 'floats'}"


def _misplaced(
    cache: ActivationCache, pile: int, piles: UInt16[np.ndarray, " row"]
) -> Iterator[str]:
    """Rows that the shuffle's seed does not put there, in that order.

    Where no shard has any, all together hold each row of the source once: a row lies on one pile
    alone, and each shard is compared with all rows of its pile.
    """
    record = cache.manifest.shuffle
    assert record is not None
    source = cache.readers[pile].column(SOURCE).numpy()
    n = int((piles == pile).sum())
    if len(source) != n:
        yield f"has {len(source):,} rows, and {n:,} belong there by the shuffle's seed"
        return
    # In the order of the source, as they were dealt.
    there = source.argsort(kind="stable")
    dealt = source[there]
    reader = cache.readers[pile]
    for_training = cache.for_training(reader.column("mask"), reader.column("document")).numpy()
    order = shuffle.arrangement(record, pile, for_training[there])
    known = (dealt >= 0) & (dealt < len(piles))
    wrong = ~known
    wrong[known] = piles[dealt[known]] != pile
    wrong[1:] |= np.diff(dealt) <= 0
    wrong |= dealt[order] != source
    if wrong.any():
        yield f"{int(wrong.sum()):,} rows are not where the shuffle's seed puts them"


def _miscounts(cache: ActivationCache, counts: np.ndarray) -> Iterator[str]:
    """What the manifest counts otherwise than the rows do; `counts` is by value of the mask."""
    kinds, values = masks.KINDS, np.arange(256)
    for kind, n in cache.manifest.marked.items():
        there = int(counts[values & kinds[kind] != 0].sum())
        if there != n:
            yield f"counts {n:,} rows of kind '{kind}', and there are {there:,}"
    most = int(counts[values & kinds["special"] == 0].sum())
    # A row is nonfinite where it is so at any hook point, and counts at the others.
    least = int(counts[values & (kinds["special"] | kinds["nonfinite"]) == 0].sum())
    for hook, stats in cache.manifest.stats.items():
        if not least <= stats.n <= most:
            yield (
                f"has statistics of '{hook}' over {stats.n:,} rows, and {least:,} are neither "
                "special nor nonfinite"
            )


def _make_again(cache: ActivationCache, numbers: list[int]) -> None:
    record = cache.manifest.shuffle
    if record is not None:
        source = ActivationCache.open(record.source)
        if source.fingerprint != record.source_fingerprint:
            raise CacheError(
                f"{record.source} is not the cache that {cache.url} was shuffled from any more "
                f"(fingerprint {source.fingerprint[:12]}, was {record.source_fingerprint[:12]}): "
                "shuffle again, into another --out"
            )
        for number in numbers:
            shuffle.remake(source, cache.folder, cache.manifest, number)
        return
    # Models are slow to import, and only this needs them.
    from saekit.activations_cache.harvest import remake

    remake(cache.folder, cache.manifest, numbers)
