"""One shard: a safetensors file of rows, a column each for token, document, position and mask.

Tensors: one `[row, d]` a hook point under its name, and one under `<name>.grad` where the harvest
kept gradients; `token`, `document`, `position` int32 and
`mask` uint8 `[row]`. `document` counts the cache's documents in order of appearance; the names of
those that first appear in this shard stand in the file's metadata. Axes: row, d.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from saekit.activations_cache.manifest import Shard
from saekit.errors import CacheError
from saekit.files import file_sha256, write_atomic

GRADIENT = ".grad"
"""Ends the name of the column that holds the gradients with respect to a hook point."""


COLUMNS = ("token", "document", "position", "mask")


@dataclass(frozen=True)
class ActivationBatch:
    """Rows of activations, and which token each belongs to."""

    acts: dict[str, Float[Tensor, "row _"]]
    token: Int[Tensor, " row"]
    document: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    mask: UInt8[Tensor, " row"]


def write(folder: Path, number: int, batch: ActivationBatch, new_documents: list[str]) -> Shard:
    """Write a shard, whole or not at all."""
    name = f"shard-{number:05d}.safetensors"
    tensors = {**batch.acts, **{column: getattr(batch, column) for column in COLUMNS}}
    metadata = {"documents": json.dumps(new_documents)}
    write_atomic(folder / name, lambda path: save_file(tensors, path, metadata))
    return Shard(file=name, rows=len(batch.token), sha256=file_sha256(folder / name))


class ShardReader:
    """A shard on disk, memory-mapped. Its checksum is compared once, before anything is read from
    it."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        self._path = folder / shard.file
        self._shard = shard

    def column(self, name: str) -> Tensor:
        """A whole tensor of the file, not copied: rows are read from disk when they are used."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    @cached_property
    def new_documents(self) -> list[str]:
        names: list[str] = json.loads(self._file.metadata()["documents"])
        return names

    @cached_property
    def _file(self) -> Any:
        self.check()
        with self._refusing():
            return safe_open(self._path, framework="pt")

    def check(self) -> None:
        """Raises CacheError where the file is missing or is not what was written."""
        with self._refusing():
            if file_sha256(self._path) != self._shard.sha256:
                raise CacheError(
                    f"{self._path} does not match its checksum in the manifest: the shard was cut "
                    "short or altered. Delete it and give the harvest's command again: it makes "
                    "what is missing"
                )

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise CacheError(
                f"{self._path} cannot be read ({error}). Give the harvest's command again: it "
                "makes "
                "what is missing"
            ) from error
