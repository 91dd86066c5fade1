"""Shuffle a cache on disk: the same rows in an order in which any is as likely as any other.

Two passes, each sequential, in bounded memory (Rao 1961, Sandelius 1962): every row is dealt onto a
pile drawn at random, and every pile is shuffled in memory and becomes a shard. Both draws are
functions of the seed and of a row's number alone, so that any shard can be made again, and checked,
without the others. Axes: row, d.
"""

import dataclasses
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8, UInt16
from rich.filesize import decimal
from torch import Tensor

from saekit.activations_cache import manifest, shards
from saekit.activations_cache.manifest import Manifest, Shard, Shuffle
from saekit.activations_cache.shards import SOURCE
from saekit.activations_cache.storage import LocalStorage, Storage, storage
from saekit.activations_cache.store import ActivationCache
from saekit.config import differences
from saekit.errors import ConfigError, SaekitError
from saekit.files import full_disk_in_words, write_json
from saekit.progress import Bar, bar

log = logging.getLogger(__name__)

MAX_PILES = 4096
"""More would be written to in pieces too small for a disk."""
_DRAW = 65_536
"""Rows whose piles are drawn together."""
_PILES = ".piles"
_MIB = 1 << 20


def shuffle(
    source: ActivationCache,
    out: Path | str,
    *,
    seed: int = 0,
    shard_mib: float = 128.0,
    memory_mib: float = 1024.0,
    progress: bool = False,
) -> ActivationCache:
    """Write the rows of `source` in random order into `out`, or finish what was begun there.

    A pile and its shuffled copy take at most `memory_mib`: with rows of b bytes, N of them on P
    piles, that is (N/P + 6 sqrt(N/P)) * (2b + 16) bytes, six standard deviations of a pile's size
    allowed for. P, the number of shards, is the least that keeps to it and to shards of about
    `shard_mib`, but at most `MAX_PILES`. The names of the documents come on top.

    Temporary files as large as the source lie in a hidden folder of `out`, or where `out` is remote
    in the local temporary folder. A killed call goes on when it is given again, and ends in the
    very same files.

    Raises ConfigError where `out` holds something else, or an option cannot work, CacheError where
    another process writes there, and SaekitError where the disk is too small.
    """
    folder = storage(out)
    layout = _Layout.of(source)
    n_piles = _n_piles(source.n_rows, layout.row_bytes, shard_mib, memory_mib)
    record = Shuffle(
        source=source.location, source_fingerprint=source.fingerprint, seed=seed, n_piles=n_piles
    )
    _check_place(source, folder)
    _begun(source, folder, record)  # A folder of something else is left alone: no lock there.
    with folder.lock(), _scratch(folder) as where:
        current = _begun(source, folder, record)
        if not current.complete:
            current.save(folder)
            piles = _Piles(where, record, layout, current)
            rows = max(1, int(memory_mib * _MIB) // (2 * layout.row_bytes + 32))
            done, total = current.n_rows, 2 * source.n_rows
            with bar("shuffle", total, done=done, shown=progress) as shown:
                piles.deal(source, rows, folder, shown)
                _write(source, folder, current, piles, shown)
        # Not sooner, as what was dealt shall outlive an error.
        shutil.rmtree(where, ignore_errors=True)
    return ActivationCache.open(out)


def piles_of(seed: int, n_piles: int, start: int, stop: int) -> UInt16[np.ndarray, " row"]:
    """The pile of each of the source's rows start..stop."""
    first = start // _DRAW
    draws = [
        np.random.default_rng([seed, 0, block]).integers(n_piles, size=_DRAW, dtype=np.uint16)
        for block in range(first, -(-stop // _DRAW))
    ]
    return np.concatenate([*draws, np.empty(0, np.uint16)])[start - first * _DRAW :][: stop - start]


def arrangement(
    record: Shuffle, pile: int, for_training: Bool[np.ndarray, " row"]
) -> Int[np.ndarray, " row"]:
    """The order of a pile's rows in its shard, as places among them in the order of the source.

    Any order is as likely as any other, but that rows for training come first: training then
    reads one run of each shard.
    """
    draw = np.random.default_rng([record.seed, 1, record.n_piles, pile])
    order = draw.permutation(len(for_training))
    return order[(~for_training[order]).argsort(kind="stable")]


def remake(source: ActivationCache, folder: Storage, held: Manifest, number: int) -> None:
    """Write one shard of a shuffled cache again, from its source.

    Raises CacheError, and leaves what is there, where it comes out as another.
    """
    record, expected = held.shuffle, held.shards[number].checksum
    assert record is not None
    layout = _Layout.of(source)
    packed = []
    for reader, (first, stop) in enumerate(source.shard_bounds):
        here = piles_of(record.seed, record.n_piles, first, stop) == number
        packed.append(layout.pack(layout.read(source, reader, torch.from_numpy(here.nonzero()[0]))))
    rows = np.concatenate(packed)
    _write_shard(source, folder, record, number, layout, rows, expected)


@dataclass(frozen=True)
class _Layout:
    """How the columns of a row lie side by side, in bytes."""

    columns: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    """Type, and shape of one row's part."""

    @classmethod
    def of(cls, source: ActivationCache) -> "_Layout":
        names = [name for name in source.columns if name != SOURCE]
        stored = {name: source.readers[0].column(name) for name in names}
        types = {name: (x.dtype, tuple(x.shape[1:])) for name, x in stored.items()}
        return cls({**types, SOURCE: (torch.int64, ())})

    @property
    def row_bytes(self) -> int:
        return sum(map(self._width, self.columns))

    def _width(self, name: str) -> int:
        dtype, tail = self.columns[name]
        return dtype.itemsize * math.prod(tail)

    def read(
        self, source: ActivationCache, number: int, rows: slice | Int[Tensor, " row"]
    ) -> dict[str, Tensor]:
        """Some rows of a shard of the source, as stored, with their numbers."""
        reader, first = source.readers[number], source.shard_bounds[number][0]
        columns = {}
        for name, (dtype, _) in self.columns.items():
            if name == SOURCE:
                columns[name] = torch.arange(first, first + reader.shard.rows)[rows]
            elif isinstance(rows, slice) and dtype != torch.int8:
                columns[name] = reader.read(name, rows.start, rows.stop)
            else:  # `read` would scale int8.
                columns[name] = reader.column(name)[rows]
        columns["document"] += reader.shard.document_offset
        return columns

    def pack(self, columns: Mapping[str, Tensor]) -> UInt8[np.ndarray, "row byte"]:
        rows = np.empty((len(columns[SOURCE]), self.row_bytes), np.uint8)
        at = 0
        for name in self.columns:
            width = self._width(name)
            x = columns[name].reshape(len(rows), width // columns[name].itemsize)
            rows[:, at : at + width] = x.contiguous().view(torch.uint8).numpy()
            at += width
        return rows

    def unpack(
        self, packed: UInt8[np.ndarray, "row byte"], order: Int[np.ndarray, " row"]
    ) -> dict[str, Tensor]:
        return {name: self.column(name, packed, order) for name in self.columns}

    def column(
        self,
        name: str,
        packed: UInt8[np.ndarray, "row byte"],
        order: Int[np.ndarray, " row"] | slice,
    ) -> Tensor:
        at = sum(self._width(other) for other in takewhile(name.__ne__, self.columns))
        part = np.ascontiguousarray(packed[order, at : at + self._width(name)])
        dtype, tail = self.columns[name]
        return torch.from_numpy(part).view(dtype).reshape(len(part), *tail)


class _Piles:
    """Rows dealt onto piles, each a file of packed rows in the order of the source."""

    def __init__(self, folder: Path, record: Shuffle, layout: _Layout, current: Manifest) -> None:
        self._folder, self._record, self.layout = folder, record, layout
        self._done = len(current.shards)
        """Piles that are shards already."""

    def path(self, pile: int) -> Path:
        return self._folder / f"{pile:05d}"

    def read(self, pile: int) -> UInt8[np.ndarray, "row byte"]:
        path = self.path(pile)
        packed = np.fromfile(path, np.uint8) if path.exists() else np.empty(0, np.uint8)
        return packed.reshape(-1, self.layout.row_bytes)

    def deal(self, source: ActivationCache, rows_at_once: int, out: Storage, shown: Bar) -> None:
        """Deal the shards of the source that are not dealt yet."""
        dealt, sizes = self._progress()
        self._check_space(source, out, sum(sizes))
        for number, (first, stop) in enumerate(source.shard_bounds):
            if number >= dealt and self._done < self._record.n_piles:
                for start in range(first, stop, rows_at_once):
                    end = min(start + rows_at_once, stop)
                    rows = slice(start - first, end - first)
                    packed = self.layout.pack(self.layout.read(source, number, rows))
                    piles = piles_of(self._record.seed, self._record.n_piles, start, end)
                    self._append(packed, piles, sizes)
                self._save(number + 1, sizes)
            shown.advance(stop - first)

    def _append(
        self,
        packed: UInt8[np.ndarray, "row byte"],
        piles: UInt16[np.ndarray, " row"],
        sizes: list[int],
    ) -> None:
        order = piles.argsort(kind="stable")
        ends = np.bincount(piles, minlength=self._record.n_piles).cumsum().tolist()
        for pile, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
            if start < stop and pile >= self._done:
                path = self.path(pile)
                with full_disk_in_words(path), path.open("ab") as file:
                    file.write(packed[order[start:stop]].data)
                sizes[pile] += (stop - start) * self.layout.row_bytes

    def _save(self, dealt: int, sizes: list[int]) -> None:
        """Record that so many shards are dealt, once that is true of the disk too."""
        for pile, size in enumerate(sizes):
            if size:
                with self.path(pile).open("rb") as file:
                    os.fsync(file.fileno())
        write_json(self._folder / "progress.json", {**self._of(), "dealt": dealt, "sizes": sizes})

    def _of(self) -> dict[str, Any]:
        return {"seed": self._record.seed, "source": self._record.source_fingerprint}

    def _progress(self) -> tuple[int, list[int]]:
        """Shards dealt by an earlier call, and the bytes of each pile, which are cut to that."""
        try:
            progress = json.loads((self._folder / "progress.json").read_text(encoding="utf-8"))
            dealt, sizes = int(progress["dealt"]), list(progress["sizes"])
            if {**progress, **self._of()} == progress and len(sizes) == self._record.n_piles:
                sizes[: self._done] = [0] * self._done
                for pile, size in enumerate(sizes):
                    if not size:
                        self.path(pile).unlink(missing_ok=True)
                    elif self.path(pile).stat().st_size < size:
                        raise ValueError("a pile is cut short")
                    else:
                        os.truncate(self.path(pile), size)
                return dealt, sizes
        except (FileNotFoundError, ValueError):
            pass
        # None, or of no use: all piles anew.
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        return 0, [0] * self._record.n_piles

    def _check_space(self, source: ActivationCache, out: Storage, there: int) -> None:
        width = self.layout.row_bytes
        left = source.n_rows * (self._record.n_piles - self._done) // self._record.n_piles
        need = max(0, left * width - there)
        # A pile makes room for the next shard once it is one.
        largest = _largest(source.n_rows, self._record.n_piles) * width
        free = shutil.disk_usage(self._folder).free
        if need + largest > free:
            raise SaekitError(
                f"shuffling {source.url} into {out.url} needs {decimal(need + largest)} more in "
                f"{self._folder.parent}, and {decimal(free)} are free there: make room, or give "
                "another --out"
            )


def _write(
    source: ActivationCache, folder: Storage, current: Manifest, piles: _Piles, shown: Bar
) -> None:
    record = current.shuffle
    assert record is not None
    for pile in range(len(current.shards), record.n_piles):
        shard = _write_shard(source, folder, record, pile, piles.layout, piles.read(pile))
        current = replace(current, shards=(*current.shards, shard))
        current.save(folder)
        piles.path(pile).unlink(missing_ok=True)
        shown.advance(shard.rows)
    replace(current, complete=True).save(folder)


def _write_shard(
    source: ActivationCache,
    folder: Storage,
    record: Shuffle,
    pile: int,
    layout: _Layout,
    packed: UInt8[np.ndarray, "row byte"],
    expected: str | None = None,
) -> Shard:
    name = f"shard-{pile:05d}.safetensors"
    # Rows of any document may lie in any shard: the first has all names.
    names = source.documents if pile == 0 else []
    mask, document = (layout.column(name, packed, slice(None)) for name in ("mask", "document"))
    order = arrangement(record, pile, source.for_training(mask, document).numpy())
    columns = layout.unpack(packed, order)
    return shards.write(folder, name, columns, names, expected=expected)


def _n_piles(n_rows: int, row_bytes: int, shard_mib: float, memory_mib: float) -> int:
    """Piles that a shuffle needs. Raises ConfigError where they would be too many."""
    if shard_mib <= 0:
        raise ConfigError(f"shard_mib={shard_mib:g} must be positive: it is the size of a shard")
    per_row = 2 * row_bytes + 16
    room = int(memory_mib * _MIB) // per_row
    most = _largest(n_rows, MAX_PILES)
    if most > room:
        raise ConfigError(
            f"memory_mib={memory_mib:g} is too little for {n_rows:,} rows of {row_bytes:,} bytes: "
            f"with {MAX_PILES:,} piles, the most there may be, one and its copy take "
            f"memory_mib={math.ceil(10 * most * per_row / _MIB) / 10:g}"
        )
    n_piles = min(MAX_PILES, max(1, math.ceil(n_rows * row_bytes / (shard_mib * _MIB))))
    if _largest(n_rows, n_piles) > room:
        # N/P + 6 sqrt(N/P) is the room where sqrt(N/P) is sqrt(room + 9) - 3.
        n_piles = max(n_piles, math.floor(n_rows / (math.sqrt(room + 9) - 3) ** 2))
    while _largest(n_rows, n_piles) > room:
        n_piles += 1
    return n_piles


def _largest(n_rows: int, n_piles: int) -> int:
    """Rows of the largest pile: its mean, and six standard deviations."""
    mean = n_rows / n_piles
    return n_rows if n_piles == 1 else math.ceil(mean + 6 * math.sqrt(mean))


def _begun(source: ActivationCache, folder: Storage, record: Shuffle) -> Manifest:
    """What an earlier call of the same command left behind, or a beginning."""
    begun = replace(source.manifest, shards=(), ranks=1, shuffle=record, complete=False)
    if not folder.exists(manifest.NAME):
        if folder.names():
            raise ConfigError(f"{folder.url} exists and is no activation cache: give another --out")
        return begun
    there = Manifest.load(folder)
    ours, theirs = _identity(begun), _identity(there)
    if ours != theirs:
        raise ConfigError(
            f"{folder.url} holds another cache ({differences(ours, theirs)}): give another --out, "
            "or the options that it was begun with"
        )
    if there.complete:
        log.info("%s is complete: %d rows", folder.url, there.n_rows)
        return there
    whole = 0
    while whole < len(there.shards) and folder.exists(there.shards[whole].file):
        whole += 1
    return replace(begun, shards=there.shards[:whole])


def _identity(of: Manifest) -> dict[str, Any]:
    """What makes two shuffles the same; the source may have been moved since."""
    values = dataclasses.asdict(of.shuffle) if of.shuffle else {}
    values.pop("source", None)
    return {"shuffled": of.shuffle is not None, **values, **of.config}


def _check_place(source: ActivationCache, folder: Storage) -> None:
    if ActivationCache(folder, source.manifest).location == source.location:
        raise ConfigError(f"{folder.url} is the cache to be shuffled: give another --out")
    if isinstance(folder, LocalStorage) and folder.path.is_file():
        raise ConfigError(f"{folder.url} exists and is no activation cache: give another --out")


@contextmanager
def _scratch(folder: Storage) -> Iterator[Path]:
    """Where the piles lie: beside the shards where they are on a local disk."""
    if isinstance(folder, LocalStorage):
        yield folder.path / _PILES
        return
    with tempfile.TemporaryDirectory(prefix="saekit-shuffle-") as name:
        yield Path(name) / _PILES
