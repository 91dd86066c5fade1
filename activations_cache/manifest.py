"""The manifest of a cache: what is in it, where it comes from, and what of it is complete.

`manifest.json` is replaced in one step after each shard, so a shard is in it only once it is whole
on disk.
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any

import xxhash

from saekit.activations_cache.stats import HookStats
from saekit.activations_cache.storage import Storage
from saekit.activations_cache.tokens import Cursor
from saekit.errors import CacheError

NAME = "manifest.json"
FORMAT = "saekit-activations"
VERSION = 1

_SEAL = re.compile(r',\n "checksum": "[0-9a-f]{32}"\n\}\n\Z')
_REMEDY = "Harvest again, into another --out, or put the manifest back from a copy"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of rows."""

    file: str
    """Its name in the cache's folder, or in a folder therein where ranks harvested side by side."""
    rows: int
    checksum: str
    """xxh3_128 of the file, in hex."""
    index_checksum: str
    """That of its header and of the columns that say what a row is, in the order of the file."""
    n_documents: int
    """Documents that first appear in it."""
    document_offset: int = 0
    """What to add to its `document` column to get the cache's numbers."""
    rank: int = 0
    """Which of the manifest's `ranks` made it."""
    start: Cursor = field(default_factory=Cursor)
    """Where in the corpus its first row stands: what is needed to make it again."""


@dataclass(frozen=True, kw_only=True)
class Shuffle:
    """How a shuffled cache was made from another: enough to make any of its shards again."""

    source: str
    """Where the cache lay that it was made from."""
    source_fingerprint: str
    seed: int
    n_piles: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a cache but its rows."""

    config: dict[str, Any]
    """The harvest's config."""
    model: str
    model_fingerprint: str
    tokenizer_fingerprint: str | None
    """None where the model has no tokenizer."""
    hooks: dict[str, int]
    """Width of each hook point."""
    shards: tuple[Shard, ...] = ()
    end: Cursor = field(default_factory=Cursor)
    """Where in the corpus the harvest goes on after the last shard."""
    stats: dict[str, HookStats] = field(default_factory=dict)
    """By hook point, over the rows that are neither special nor nonfinite."""
    marked: dict[str, int] = field(default_factory=dict)
    """Rows of each kind of token (`masks.KINDS`)."""
    n_padding: int = 0
    """Positions that went through the model as padding and were dropped."""
    ranks: int = 1
    """Processes that harvested it side by side."""
    shuffle: Shuffle | None = None
    """None for a cache whose rows lie in the order of the text."""
    complete: bool = False

    @property
    def n_rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """What the rows are: equal for equal rows of an equal model, wherever the cache lies."""
        parts = [self.model_fingerprint, *self.hooks, *(shard.checksum for shard in self.shards)]
        return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())

    def save(self, folder: Storage) -> None:
        content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        folder.write_text(NAME, _sealed(json.dumps(content, indent=1, allow_nan=False)))

    @classmethod
    def load(cls, folder: Storage) -> "Manifest":
        """Raises CacheError where the folder has no manifest that this release can read."""
        where = f"{folder.url}/{NAME}"
        try:
            text = folder.read_text(NAME)
            values = json.loads(text)
        except FileNotFoundError as error:
            raise CacheError(
                f"{folder.url} is no activation cache: it has no {NAME}. `saekit harvest --out "
                f"{folder.url}` makes one"
            ) from error
        except ValueError as error:
            raise CacheError(
                f"{where} is not valid JSON ({error}): the file was altered. {_REMEDY}"
            ) from error
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise CacheError(f"{where} is not a saekit manifest: its 'format' is not '{FORMAT}'")
        version = values.pop("version", 0)
        if version > VERSION:
            raise CacheError(
                f"{where} is of format version {version}, this saekit reads up to {VERSION}: "
                "upgrade saekit"
            )
        if text != _sealed(_SEAL.sub("\n}", text)):
            raise CacheError(f"{where} does not match its own checksum: it was altered. {_REMEDY}")
        del values["checksum"]
        return cls(
            **{
                **values,
                "shards": tuple(
                    Shard(**{**shard, "start": Cursor(**shard["start"])})
                    for shard in values["shards"]
                ),
                "end": Cursor(**values["end"]),
                "stats": {
                    hook: HookStats(**{**held, "sum": tuple(held["sum"])})
                    for hook, held in values["stats"].items()
                },
                "shuffle": Shuffle(**values["shuffle"]) if values["shuffle"] else None,
            }
        )


def _sealed(text: str) -> str:
    """JSON text with its own checksum as the last field, so that no byte of it can be another."""
    return f'{text[:-2]},\n "checksum": "{xxhash.xxh3_128_hexdigest(text.encode())}"\n}}\n'


def added(a: dict[str, HookStats], b: dict[str, HookStats]) -> dict[str, HookStats]:
    """Both together, by hook point; either may know none yet."""
    return {hook: a.get(hook, HookStats()).plus(b.get(hook, HookStats())) for hook in {**a, **b}}


def counted(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    """Both together, by kind of token; either may know none yet."""
    return {kind: a.get(kind, 0) + b.get(kind, 0) for kind in {**a, **b}}
