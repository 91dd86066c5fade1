"""Processes that harvest side by side: a folder each, and one manifest over all of them."""

from dataclasses import replace

from saekit.activations_cache import manifest
from saekit.activations_cache.manifest import Manifest, added, counted
from saekit.activations_cache.storage import Storage
from saekit.errors import ConfigError, CorpusError

PREFIX = "rank-"
"""Begins the name of a rank's folder."""


def folder_name(rank: int, ranks: int) -> str:
    """The folder of a rank inside the cache's."""
    return f"{PREFIX}{rank}-of-{ranks}"


def shares_of(whole: Storage) -> int | None:
    """Among how many ranks a harvest was shared out that was begun there; None where none was.

    Raises ConfigError where it was begun anew by another number.
    """
    found = {
        int(number)
        for name in whole.names()
        if name.startswith(PREFIX)
        and (number := name.partition("/")[0].rpartition("-of-")[2]).isdecimal()
    }
    if len(found) > 1:
        numbers = ", ".join(map(str, sorted(found)))
        raise ConfigError(
            f"{whole.url} was begun by several numbers of processes ({numbers}): delete the "
            f"folders {PREFIX}*-of-N of all but one N"
        )
    return found.pop() if found else None


def join(whole: Storage, ranks: int) -> bool:
    """Make one cache of what the ranks have harvested, if all have; says whether it did.

    Two that come at once write the same manifest.
    """
    parts = []
    for rank in range(ranks):
        folder = whole.sub(folder_name(rank, ranks))
        if not folder.exists(manifest.NAME):
            return False
        parts.append(Manifest.load(folder))
        if not parts[-1].complete:
            return False
    joined = replace(parts[0], shards=(), stats={}, marked={}, n_padding=0, ranks=ranks)
    n_documents = 0
    for rank, part in enumerate(parts):
        here = tuple(
            replace(
                shard,
                file=f"{folder_name(rank, ranks)}/{shard.file}",
                document_offset=n_documents,
            )
            for shard in part.shards
        )
        n_documents += sum(shard.n_documents for shard in part.shards)
        joined = replace(
            joined,
            shards=joined.shards + here,
            end=part.end,
            stats=added(joined.stats, part.stats),
            marked=counted(joined.marked, part.marked),
            n_padding=joined.n_padding + part.n_padding,
        )
    if joined.n_rows == 0:
        raise CorpusError(
            f"dataset '{joined.config['dataset']}' gave no token: it is empty, or holds only empty "
            "documents"
        )
    joined.save(whole)
    return True
