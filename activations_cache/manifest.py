"""The manifest of a cache: what is in it, where it comes from, and what of it is complete.

`manifest.json` is replaced in one step after each shard, so a shard is in it only once it is whole
on disk.
"""

import dataclasses
import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from saekit.errors import CacheError
from saekit.files import write_json

NAME = "manifest.json"
FORMAT = "saekit-activations"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of rows."""

    file: str
    rows: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a cache but its rows."""

    config: dict[str, Any]
    """The harvest's config."""
    model: str
    model_fingerprint: str
    hooks: dict[str, int]
    """Width of each hook point."""
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    @property
    def n_rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """What the rows are: equal for equal rows of an equal model, wherever the cache lies."""
        parts = [self.model_fingerprint, *self.hooks, *(shard.sha256 for shard in self.shards)]
        return sha256("\n".join(parts).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        write_json(
            folder / NAME, {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        )

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Raises CacheError where the folder has no manifest that this release can read."""
        path = folder / NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CacheError(
                f"{folder} is no activation cache: it has no {NAME}. `saekit harvest --out "
                f"{folder}` makes one"
            ) from error
        except ValueError as error:
            raise CacheError(f"{path} is not valid JSON ({error}): the file was altered") from error
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise CacheError(f"{path} is not a saekit manifest: its 'format' is not '{FORMAT}'")
        version = values.pop("version")
        if version > VERSION:
            raise CacheError(
                f"{path} is of format version {version}, this saekit reads up to {VERSION}: "
                "upgrade saekit"
            )
        shards = tuple(Shard(**shard) for shard in values.pop("shards"))
        return cls(**values, shards=shards)
