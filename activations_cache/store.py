"""A finished cache, and how it is read: rows in shuffled batches, or windows in the order of the
text.

Axes: row (of the whole cache, shard after shard), batch (rows), pos (tokens of a window), d.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.activations_cache import masks, shards
from saekit.activations_cache.manifest import Manifest
from saekit.activations_cache.shards import ShardReader
from saekit.documents import held_out
from saekit.errors import CacheError, ConfigError
from saekit.progress import bar

Split = Literal["train", "test", "all"]


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
    """A complete activation cache on disk. Each shard's checksum is compared when it is first
    read."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._shards = [ShardReader(path, shard) for shard in manifest.shards]
        self._starts = np.cumsum([0, *(shard.rows for shard in manifest.shards)])

    @classmethod
    def open(cls, path: Path | str) -> "ActivationCache":
        """Raises CacheError where there is no cache, or its harvest was not finished."""
        manifest = Manifest.load(Path(path))
        if not manifest.complete:
            raise CacheError(
                f"{path} is not complete ({manifest.n_rows:,} rows so far): give the same `saekit "
                "harvest` command again to finish it"
            )
        return cls(Path(path), manifest)

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

    @cached_property
    def documents(self) -> list[str]:
        """Names of the documents, by number."""
        return [name for shard in self._shards for name in shard.new_documents]

    @property
    def has_gradients(self) -> bool:
        return bool(self.manifest.config["gradients"])

    def width(self, hook: str) -> int:
        """Width of a hook point, or of its gradient (`<hook>.grad`).

        Raises CacheError for one that was not harvested.
        """
        hook, of_gradient, _ = hook.partition(shards.GRADIENT)
        if of_gradient and not self.has_gradients:
            raise CacheError(
                f"{self.path} holds no gradients: harvest again with --gradients, into another "
                "--out"
            )
        if hook not in self.hooks:
            raise CacheError(
                f"{self.path} has no activations at '{hook}'; it holds {', '.join(self.hooks)}. "
                f"Harvest it with `saekit harvest --hooks {hook} ...`"
            )
        return self.hooks[hook]

    def indices(
        self, split: Split = "all", exclude: Collection[str] = ("special",)
    ) -> Int[Tensor, " row"]:
        """Rows of a split, in stored order, without tokens of the kinds in `exclude`."""
        return self._kept(split, exclude).nonzero().flatten()

    def rows(self, hook: str, index: Int[Tensor, " batch"]) -> Float[Tensor, "batch d"]:
        """Activations of the given rows, in that order, in float32."""
        x = torch.empty(len(index), self.width(hook))
        shard_of = np.searchsorted(self._starts, index.numpy(), side="right") - 1
        for number in np.unique(shard_of):
            here = torch.from_numpy(shard_of == number)
            local = index[here] - int(self._starts[number])
            x[here] = self._shards[number].column(hook)[local].float()
        return x

    def row_slice(self, hook: str, start: int, stop: int) -> Float[Tensor, "batch d"]:
        """Activations of rows start..stop in float32."""
        return self.rows(hook, torch.arange(start, min(stop, self.n_rows)))

    def batches(
        self,
        hook: str,
        batch_size: int,
        *,
        seed: int = 0,
        split: Split = "train",
        exclude: Collection[str] = ("special",),
        epochs: int | None = 1,
        drop_last: bool = False,
        start: int = 0,
    ) -> Iterator[Float[Tensor, "batch d"]]:
        """Shuffled batches of one hook point; see `aligned`."""
        aligned = self.aligned(
            (hook,),
            batch_size,
            seed=seed,
            split=split,
            exclude=exclude,
            epochs=epochs,
            drop_last=drop_last,
            start=start,
        )
        return (batch[hook] for batch in aligned)

    def aligned(
        self,
        columns: Collection[str],
        batch_size: int,
        *,
        seed: int = 0,
        split: Split = "train",
        exclude: Collection[str] = ("special",),
        epochs: int | None = 1,
        drop_last: bool = False,
        start: int = 0,
    ) -> Iterator[dict[str, Float[Tensor, "batch _"]]]:
        """Shuffled batches of several columns, whose rows belong together: hook points, and their
        gradients as `<hook>.grad`.

        Every row of the split comes once an epoch, in an order set by (seed, epoch).

        `epochs=None` goes on for ever; `drop_last` leaves out an epoch's last batch where it is
        not full; `start` is how many batches to pass over, at no cost: a stopped reader goes on
        where it was. Raises ConfigError where the split holds no row, or with `drop_last` not one
        full batch.
        """
        index = self.indices(split, exclude)
        per_epoch = len(index) // batch_size if drop_last else -(-len(index) // batch_size)
        if per_epoch == 0:
            raise ConfigError(
                f"split '{split}' of {self.path} has {len(index):,} rows: too few for a batch of "
                f"{batch_size:,}. Harvest more tokens, or lower the batch size"
            )
        epoch, first = divmod(start, per_epoch)
        while epochs is None or epoch < epochs:
            order = index[
                torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(index)))
            ]
            for number in range(first, per_epoch):
                rows = order[number * batch_size : (number + 1) * batch_size]
                yield {column: self.rows(column, rows) for column in columns}
            epoch, first = epoch + 1, 0

    def windows(
        self, split: Split = "test", exclude: Collection[str] = ("special",)
    ) -> Iterator[Window]:
        """The windows of a split, in stored order."""
        kept = self._kept("all", exclude)
        in_split = self._in_split(split)
        starts = (self._column("position") == 0).nonzero().flatten().tolist()
        tokens, document = self._column("token").long(), self._column("document")
        for start, stop in zip(starts, [*starts[1:], self.n_rows], strict=True):
            if in_split[start]:
                yield Window(tokens[start:stop], int(document[start]), start, kept[start:stop])

    def verify(self, *, progress: bool = False) -> None:
        """Read every shard and compare its checksum.

        Raises CacheError naming the first that fails.
        """
        with bar("verify", self.n_rows, shown=progress) as shown:
            for shard, entry in zip(self._shards, self.manifest.shards, strict=True):
                shard.check()
                shown.advance(entry.rows)

    def _kept(self, split: Split, exclude: Collection[str]) -> Bool[Tensor, " row"]:
        return self._in_split(split) & (self._column("mask") & masks.bits(exclude) == 0)

    def _in_split(self, split: Split) -> Bool[Tensor, " row"]:
        if split == "all":
            return torch.ones(self.n_rows, dtype=torch.bool)
        fraction = self.manifest.config["holdout"]
        test = torch.tensor([held_out(name, fraction) for name in self.documents])
        in_test = test[self._column("document").long()]
        return in_test if split == "test" else ~in_test

    def _column(self, name: str) -> Tensor:
        return torch.cat([shard.column(name) for shard in self._shards])
