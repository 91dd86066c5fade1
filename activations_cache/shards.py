"""One shard: a safetensors file of rows, a column for each hook point and for what a row is.

Columns, all of the same number of rows: one `[row, d]` a hook point under its name; `<name>.scale`
float32 `[row]` where the cache is int8 (value = int8 * scale); `<name>.grad` `[row, d]` where
gradients were harvested; `token`, `document`, `position` int32 and `mask` uint8 `[row]`; in a
shuffled cache `source` int64 `[row]`, the row's number in the cache it was made from. `document`
counts documents in order of appearance; the names of those that first appear in this shard stand in
the file's metadata. Axes: row, d.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from jaxtyping import Int
from numpy import ndarray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saekit.activations_cache.direct import DirectWriter
from saekit.activations_cache.manifest import Shard
from saekit.activations_cache.storage import Storage
from saekit.errors import CacheError
from saekit.files import file_checksum

GRADIENT = ".grad"
"""Ends the name of the column that holds the gradients with respect to a hook point."""
SCALE = ".scale"
"""Ends the name of the column that holds the scales of an int8 column."""

COLUMNS: dict[str, torch.dtype] = {
    "token": torch.int32,
    "document": torch.int32,
    "position": torch.int32,
    "mask": torch.uint8,
}
"""The columns of every shard beside its hook points, each `[row]`."""
SOURCE = "source"
"""One more of a shuffled cache, int64: the row's number in the cache it was made from."""
INDEX = (*COLUMNS, SOURCE)
"""The columns that say what a row is."""

_PIECE = 1 << 20
"""Bytes that are hashed and staged at once."""

_SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_TYPES = {name: dtype for dtype, name in _SAFETENSORS_NAMES.items()}


def write(
    folder: Storage,
    name: str,
    columns: Mapping[str, Tensor],
    new_documents: list[str],
    *,
    expected: str | None = None,
) -> Shard:
    """Write a shard, whole or not at all; returns what the manifest is to say of it.

    Raises CacheError, and leaves what is there, where the checksum is not the expected one.

    The columns are written from where they lie, and hashed on the way: safetensors' own writer
    would copy all of them first, and the file would have to be read again.
    """
    # Widest type first: every column then lies at a multiple of its element's size.
    order = sorted(columns, key=lambda column: (-columns[column].element_size(), column))
    header: dict[str, Any] = {"__metadata__": {"documents": json.dumps(new_documents)}}
    at = 0
    for column in order:
        tensor = columns[column]
        header[column] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, index_digest = xxhash.xxh3_128(), xxhash.xxh3_128()
    with folder.new_file(name) as path, DirectWriter(path) as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            index_digest.update(part)
            file.write(memoryview(part))
        for column in order:
            content = _bytes(columns[column])
            # In pieces that stay in a core's cache from the one to the other.
            for piece in (content[at : at + _PIECE] for at in range(0, len(content), _PIECE)):
                digest.update(piece)
                if column in INDEX:
                    index_digest.update(piece)
                file.write(piece)
        if expected not in (None, digest.hexdigest()):
            raise CacheError(
                f"{folder.url}/{name}, made again, is not what it was: the text, the machine or "
                "the versions of its libraries have changed. Harvest into another --out"
            )
    return Shard(
        file=name,
        rows=len(columns["token"]),
        checksum=digest.hexdigest(),
        index_checksum=index_digest.hexdigest(),
        n_documents=len(new_documents),
    )


def gather(source: Tensor, index: Int[ndarray, " batch"], out: Tensor) -> None:
    """Rows of `source` into `out`, `[batch, ...]`, made to its type. `index` lies in range.

    By one thread that lets others run: numpy copies row by row, where torch's index goes element by
    element, and in threads of its own.
    """
    rows = as_bytes(source)
    if out.dtype == source.dtype:
        np.take(rows, index, axis=0, out=as_bytes(out), mode="clip")
        return
    # In pieces that stay in a CPU's cache until they are where they belong.
    step = max(1, _PIECE * len(out) // max(out.nbytes, 1))
    for at in range(0, len(index), step):
        some = torch.from_numpy(np.take(rows, index[at : at + step], axis=0, mode="clip"))
        place = out[at : at + step]
        place.copy_(some.view(source.dtype).view(place.shape))


def as_bytes(tensor: Tensor) -> Any:
    """An array `[row, byte]` of numpy, which has no bfloat16; the same memory."""
    assert tensor.is_contiguous()
    return tensor.view(len(tensor), -1).view(torch.uint8).numpy()


def _bytes(tensor: Tensor) -> memoryview:
    assert tensor.is_contiguous()
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


class ShardReader:
    """A shard on disk, memory-mapped.

    Its checksum is compared once, before any activation is read from it; for what a row is, that of
    those columns alone, so that choosing rows does not read the whole cache.
    """

    def __init__(self, folder: Storage, shard: Shard) -> None:
        self._folder = folder
        self.shard = shard
        self._compared: set[str] = set()
        self._columns: dict[str, Tensor] = {}
        self._bytes: dict[str, ndarray] = {}
        # A reader's threads come here at once: only one of them is to fetch, open and compare.
        self._lock = RLock()

    @property
    def name(self) -> str:
        return f"{self._folder.url}/{self.shard.file}"

    def column(self, name: str) -> Tensor:
        """A whole column, not copied: rows are read from disk when they are used."""
        part: Literal["index", "all"] = "index" if name in INDEX else "all"
        if part not in self._compared or name not in self._columns:
            with self._lock:
                self._compare_once(part)
                self._columns[name] = self._file.get_tensor(name)
        return self._columns[name]

    def rows_into(self, name: str, index: Int[ndarray, " batch"], out: Tensor) -> None:
        """The given rows of a column into `out`, `[batch, ...]`, scaled where it is int8."""
        column = self.column(name)
        if column.dtype == torch.int8:
            of = torch.from_numpy(index)
            out.copy_(self._scaled(name, column[of], of))
        else:
            gather(column, index, out)

    def bytes_into(self, name: str, index: Int[ndarray, " batch"], out: ndarray) -> None:
        """The same as stored, into `[batch, byte]`."""
        if name not in self._bytes:
            self._bytes[name] = as_bytes(self.column(name))
        np.take(self._bytes[name], index, axis=0, out=out, mode="clip")

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of a column, `[stop - start, ...]`: float32 of an int8 column, else as
        stored.

        A plain read into new memory: for long runs of rows that is several times as fast as the
        page faults of a memory map.
        """
        column = self.column(name)
        out = torch.empty((stop - start, *column.shape[1:]), dtype=column.dtype)
        self.read_into(name, start, out)
        return self._scaled(name, out, slice(start, stop))

    def dtype(self, name: str) -> torch.dtype:
        """The type that a column is stored in."""
        with self._lock:
            return _TYPES[self._header[1][name]["dtype"]]

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Rows from `start` on of a column, as stored, into `out` of its type, till it is full."""
        column = self.column(name)
        row_bytes = column.nbytes // max(len(column), 1)
        view = _bytes(out)
        # Opened anew each time: a cache may have more shards than a process may have open files.
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._offset(name) + start * row_bytes)
            while view:
                count = file.readinto(view)
                if not count:
                    raise CacheError(f"{self.name} ends early: it was cut short while it was read")
                view = view[count:]

    def _scaled(self, name: str, values: Tensor, rows: Any) -> Tensor:
        if values.dtype != torch.int8:
            return values
        return values.float() * self.column(name + SCALE)[rows][:, None]

    @cached_property
    def new_documents(self) -> list[str]:
        """Names of the documents that first appear in it."""
        self._compare_once("index")
        names: list[str] = json.loads(self._file.metadata()["documents"])
        return names

    @cached_property
    def _path(self) -> Path:
        with self._refusing():
            return self._folder.local(self.shard.file, self.shard.checksum)

    @cached_property
    def _file(self) -> Any:
        with self._refusing():
            return safe_open(self._path, framework="pt")

    def _compare_once(self, part: Literal["index", "all"]) -> None:
        if part not in self._compared:
            if part == "index":
                self._check_index()
            else:
                self.check()
            self._compared.add(part)

    def _check_index(self) -> None:
        file = self._file  # Opening it checks that the header can be read at all.
        begin, columns = self._header
        digest = xxhash.xxh3_128()
        with self._path.open("rb") as start:
            digest.update(start.read(begin))
        for name in sorted(columns, key=lambda name: columns[name]["data_offsets"]):
            if name in INDEX:
                digest.update(_bytes(file.get_tensor(name)))
        if digest.hexdigest() != self.shard.index_checksum:
            raise self._altered()

    @cached_property
    def _header(self) -> tuple[int, dict[str, Any]]:
        """Its length, and what it says of each column."""
        with self._path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            columns = json.loads(file.read(size))
        columns.pop("__metadata__", None)
        return 8 + size, columns

    def _offset(self, name: str) -> int:
        begin, columns = self._header
        return begin + int(columns[name]["data_offsets"][0])

    def check(self) -> None:
        """Raises CacheError where the file is missing or is not what was written."""
        with self._refusing():
            if file_checksum(self._path) != self.shard.checksum:
                raise self._altered()

    def _altered(self) -> CacheError:
        return CacheError(
            f"{self.name} does not match its checksum in the manifest: the shard was cut short or "
            f"altered. `saekit verify {self._folder.url} --repair` makes it again"
        )

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise CacheError(
                f"{self.name} cannot be read ({error}). `saekit verify {self._folder.url} "
                "--repair` makes it again"
            ) from error
