"""A finished cache, and how it is looked into: rows by number, or windows in the order of the text.

Axes: row (of the whole cache, shard after shard), batch (rows), pos (tokens of a window), d.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor

from saekit.activations_cache import masks, shards
from saekit.activations_cache.manifest import Manifest
from saekit.activations_cache.shards import ShardReader
from saekit.activations_cache.stats import HookStats
from saekit.activations_cache.storage import LocalStorage, Storage, storage
from saekit.documents import held_out
from saekit.errors import CacheError

Split = Literal["train", "test", "all"]

_PIECE = 2 << 20
"""Bytes."""
_NEAR = 4
"""Rows that lie so near to each other are read in one go, with what lies between them."""


def in_rising_order(
    index: Int[Tensor, " batch"],
) -> tuple[Int[np.ndarray, " batch"], Int[np.ndarray, " batch"] | None]:
    """Numbers of rows as they rise, and at which place among them each of `index` is: None where
    they rise already."""
    rows = index.numpy()
    if (rows[1:] >= rows[:-1]).all():
        return rows, None
    order = np.argsort(rows)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return rows[order], place


@dataclass(frozen=True)
class Window:
    """What the model saw at once: tokens of one document, the beginning-of-sequence token first."""

    tokens: Int[Tensor, " pos"]
    document: int
    start: int
    """Row of the first token."""
    keep: Bool[Tensor, " pos"]
    """False for tokens of the kinds left out."""


class ActivationCache:
    """A complete activation cache. Each shard's checksum is compared when it is first read.

    Rows that hold a value that is not finite are never given out as part of a split, whatever is
    excluded: see `indices`.
    """

    def __init__(self, where: Storage | Path | str, manifest: Manifest) -> None:
        self.folder = where if isinstance(where, Storage) else storage(where)
        self.manifest = manifest
        self.readers = [ShardReader(self.folder, shard) for shard in manifest.shards]
        """One for each shard, in order."""
        self._starts = np.cumsum([0, *(shard.rows for shard in manifest.shards)])

    @classmethod
    def open(cls, where: Path | str) -> "ActivationCache":
        """A cache in a folder or behind a URL.

        Raises CacheError where there is none, or it was not finished.
        """
        folder = storage(where)
        manifest = Manifest.load(folder)
        if not manifest.complete:
            command = "shuffle" if manifest.shuffle else "harvest"
            raise CacheError(
                f"{folder.url} is not complete ({manifest.n_rows:,} rows so far): give the same "
                f"`saekit {command}` command again to finish it"
            )
        return cls(folder, manifest)

    @property
    def url(self) -> str:
        """Where it lies, as it was opened: for messages."""
        return self.folder.url

    @property
    def location(self) -> str:
        """Its URL, or its path from the root: where to open it from any folder."""
        return str(self.path.absolute()) if isinstance(self.folder, LocalStorage) else self.url

    @property
    def path(self) -> Path:
        """Its folder. Raises CacheError where it does not lie on a local disk."""
        if not isinstance(self.folder, LocalStorage):
            raise CacheError(f"{self.url} is not on a local disk: copy it to one first")
        return self.folder.path

    @property
    def hooks(self) -> dict[str, int]:
        """Width of each hook point."""
        return self.manifest.hooks

    @property
    def n_rows(self) -> int:
        return self.manifest.n_rows

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def model(self) -> str:
        return self.manifest.model

    @property
    def model_fingerprint(self) -> str:
        return self.manifest.model_fingerprint

    @property
    def dtype(self) -> str:
        """Precision of the activations on disk, as the harvest's config names it."""
        return str(self.manifest.config["dtype"])

    @property
    def has_gradients(self) -> bool:
        return bool(self.manifest.config["gradients"])

    @property
    def shuffled(self) -> bool:
        """Whether the rows lie in random order; else they lie in the order of the text."""
        return self.manifest.shuffle is not None

    @property
    def columns(self) -> list[str]:
        """All columns of a shard."""
        endings = ["", shards.SCALE] if self.dtype == "int8" else [""]
        endings += [shards.GRADIENT] if self.has_gradients else []
        own = [*shards.COLUMNS, *([shards.SOURCE] if self.shuffled else [])]
        return [hook + ending for hook in self.hooks for ending in endings] + own

    @property
    def shard_bounds(self) -> list[tuple[int, int]]:
        """First row of each shard, and the row behind its last."""
        starts: list[int] = self._starts.tolist()
        return list(zip(starts, starts[1:], strict=False))

    @cached_property
    def documents(self) -> list[str]:
        """Names of the documents, by number."""
        return [name for shard in self.readers for name in shard.new_documents]

    def width(self, hook: str) -> int:
        """Width of a hook point, or of its gradient (`<hook>.grad`).

        Raises CacheError for one that was not harvested.
        """
        hook, of_gradient, _ = hook.partition(shards.GRADIENT)
        if of_gradient and not self.has_gradients:
            raise CacheError(
                f"{self.url} holds no gradients: harvest again with --gradients, into another --out"
            )
        if hook not in self.hooks:
            raise CacheError(
                f"{self.url} has no activations at '{hook}'; it holds {', '.join(self.hooks)}. "
                f"Harvest it with `saekit harvest --hooks {hook} ...`"
            )
        return self.hooks[hook]

    def stats(self, hook: str) -> HookStats:
        """Statistics of a hook point over all rows but special tokens. Raises CacheError for one
        that was not harvested."""
        self.width(hook)
        if hook not in self.manifest.stats:
            raise CacheError(f"{self.url} holds no statistics of '{hook}': harvest it again")
        return self.manifest.stats[hook]

    def indices(
        self, split: Split = "all", exclude: Collection[str] = ("special",)
    ) -> Int[Tensor, " row"]:
        """Rows of a split, in stored order, without tokens of the kinds in `exclude`.

        Rows of the kind "nonfinite" are left out always: no mean survives one of them.
        """
        kept = [
            self.kept(start, stop, split, exclude).nonzero().flatten() + start
            for start, stop in self.shard_bounds
        ]
        return torch.cat(kept)

    def kept(
        self, start: int, stop: int, split: Split = "all", exclude: Collection[str] = ("special",)
    ) -> Bool[Tensor, " batch"]:
        """Which of the rows start..stop `indices` gives."""
        left_out = masks.bits(exclude) | masks.KINDS["nonfinite"]
        kept = self._slice("mask", start, stop) & left_out == 0
        if split == "all":
            return kept
        in_test = self._held_out[self._slice("document", start, stop).long()]
        return kept & (in_test if split == "test" else ~in_test)

    def for_training(
        self, mask: UInt8[Tensor, " row"], document: Int[Tensor, " row"]
    ) -> Bool[Tensor, " row"]:
        """Which rows with such a mask and document `indices("train")` gives."""
        left_out = masks.KINDS["special"] | masks.KINDS["nonfinite"]
        return (mask & left_out == 0) & ~self._held_out[document.long()]

    def rows(self, hook: str, index: Int[Tensor, " batch"]) -> Float[Tensor, "batch d"]:
        """Activations of the given rows, in that order, in float32."""
        return self.take(hook, index)

    def row_slice(self, hook: str, start: int, stop: int) -> Float[Tensor, "batch d"]:
        """Activations of rows start..stop in float32."""
        return self.take(hook, torch.arange(start, min(stop, self.n_rows)))

    def take(
        self,
        column: str,
        index: Int[Tensor, " batch"],
        *,
        dtype: torch.dtype | None = torch.float32,
    ) -> Shaped[Tensor, "batch ..."]:
        """The given rows of any column, in that order.

        Activations and gradients `[batch, d]` come in `dtype`, or as stored where it is None (int8
        always as float32: scaled); `token`, `document`, `position`, `mask` and `source` `[batch]`
        in their own types. Raises IndexError for a row that is not there.
        """
        out = self.space(column, len(index), dtype=dtype)
        rising, place = in_rising_order(index)
        if place is None:
            self.take_rising(column, rising, out)
        else:
            risen = self.space(column, len(index), dtype=None)
            self.take_rising(column, rising, risen)
            shards.gather(risen, place, out)
        return out

    def take_rising(
        self,
        column: str,
        rows: Int[np.ndarray, " batch"],
        out: Shaped[Tensor, "batch ..."],
    ) -> None:
        """The given rows of any column, whose numbers rise, into memory of `space`. Raises
        IndexError for a row that is not there."""
        if not len(rows):
            return
        if rows[0] < 0 or rows[-1] >= self.n_rows:
            raise IndexError(f"rows {rows[0]} to {rows[-1]} of {self.url}: it has {self.n_rows:,}")
        ends = np.searchsorted(rows, self._starts)
        # For all shards at once: a batch may have a few rows of each of very many, and threads that
        # read at once take turns at Python after each step.
        local = rows - np.repeat(self._starts[:-1], np.diff(ends))
        run = np.cumsum(np.diff(rows, prepend=rows[0]) > _NEAR)
        straight = out.dtype == self.readers[0].dtype(column)
        places = shards.as_bytes(out) if straight else None
        for number, (first, last) in enumerate(pairwise(ends.tolist())):
            if first == last:
                continue
            shard, part = self.readers[number], slice(first, last)
            if last - first >= _NEAR * (run[last - 1] - run[first] + 1):
                _runs(shard, column, local[part], run[part], out[part])
            elif places is not None:
                shard.bytes_into(column, local[part], places[part])
            else:
                shard.rows_into(column, local[part], out[part])
            if column == "document":
                out[part] += shard.shard.document_offset

    def space(
        self,
        column: str,
        n: int,
        *,
        dtype: torch.dtype | None = torch.float32,
        pinned: bool = False,
    ) -> Shaped[Tensor, "batch ..."]:
        """Memory for `n` rows of a column; `pinned`: such as a GPU copies from on its own."""
        narrow = column in shards.COLUMNS or (column == shards.SOURCE and self.shuffled)
        tail = () if narrow else (self.width(column),)
        kind = self._dtype_of(column) if dtype is None or narrow else dtype
        return torch.empty((n, *tail), dtype=kind, pin_memory=pinned)

    def _dtype_of(self, column: str) -> torch.dtype:
        """The type that rows of a column come in where no other is asked for."""
        if not self.readers:
            return torch.float32
        stored = self.readers[0].dtype(column)
        return torch.float32 if stored == torch.int8 else stored

    def batches(
        self,
        hook: str,
        batch_size: int,
        *,
        seed: int = 0,
        split: Split = "train",
        exclude: Collection[str] = ("special",),
    ) -> Iterator[Float[Tensor, "batch d"]]:
        """One epoch of shuffled batches of one hook point, in float32; `reader.Reader` does more.

        Raises what the reader raises.
        """
        # The reader's module imports this one.
        from saekit.activations_cache.reader import Reader

        cache: Any = self  # Pyright knows this module by two names, and takes them for two classes.
        reader = Reader(cache, (hook,), batch_size, seed=seed, split=split, exclude=exclude)
        return (batch[hook] for batch in reader)

    def windows(
        self, split: Split = "test", exclude: Collection[str] = ("special",)
    ) -> Iterator[Window]:
        """The windows of a split, in stored order.

        Raises CacheError for a shuffled cache: its rows no longer stand beside their neighbours.
        """
        if self.manifest.shuffle is not None:
            raise CacheError(
                f"{self.url} is shuffled: its rows do not lie in windows any more. Give the cache "
                f"that it was made from, {self.manifest.shuffle.source}"
            )
        return self._windows(split, exclude)

    def _windows(self, split: Split, exclude: Collection[str]) -> Iterator[Window]:
        for first, end in self.shard_bounds:  # A window lies in one shard.
            kept = self.kept(first, end, "all", exclude)
            starts = (self._slice("position", first, end) == 0).nonzero().flatten().tolist()
            tokens = self._slice("token", first, end).long()
            document = self._slice("document", first, end)
            for start, stop in zip(starts, [*starts[1:], end - first], strict=True):
                of = int(document[start])
                if split == "all" or bool(self._held_out[of]) == (split == "test"):
                    yield Window(tokens[start:stop], of, first + start, kept[start:stop])

    @cached_property
    def _held_out(self) -> Bool[Tensor, " document"]:
        fraction = self.manifest.config["holdout"]
        return torch.tensor([held_out(name, fraction) for name in self.documents], dtype=torch.bool)

    def _slice(self, column: str, start: int, stop: int) -> Shaped[Tensor, " batch"]:
        """Rows start..stop of a narrow column, read as they lie."""
        out = self.space(column, max(0, stop - start))
        for (first, end), shard in zip(self.shard_bounds, self.readers, strict=True):
            a, b = max(start, first), min(stop, end)
            if a < b:
                shard.read_into(column, a - first, out[a - start : b - start])
                if column == "document":
                    out[a - start : b - start] += shard.shard.document_offset
        return out


def _runs(
    shard: ShardReader,
    column: str,
    local: Int[np.ndarray, " batch"],
    run: Int[np.ndarray, " batch"],
    out: Shaped[Tensor, "batch ..."],
) -> None:
    """Rows of a shard, given in rising order, into `out`. `run` numbers the runs of rows that lie
    near to each other."""
    ends = (np.flatnonzero(np.diff(run)) + 1).tolist()
    for first, last in pairwise([0, *ends, len(local)]):
        _run(shard, column, local[first:last], out[first:last])


def _run(
    shard: ShardReader,
    column: str,
    local: Int[np.ndarray, " batch"],
    out: Shaped[Tensor, "batch ..."],
) -> None:
    """Rows that lie near to each other, given in rising order, into `out`."""
    every = bool((np.diff(local) == 1).all())
    if every and out.dtype == shard.dtype(column):
        shard.read_into(column, int(local[0]), out)
        return
    # In pieces that stay in a CPU's cache until they are where they belong.
    step = max(1, _PIECE * len(out) // max(out.nbytes, 1))
    for at in range(0, len(local), step):
        rows, place = local[at : at + step], out[at : at + step]
        first = int(rows[0])
        read = shard.read(column, first, int(rows[-1]) + 1)
        place.copy_(read if every else read[torch.from_numpy(rows - first)])
