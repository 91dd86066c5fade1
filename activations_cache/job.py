"""A harvest at work: the model's batches into shards, from where an earlier call was stopped.

A shard holds the rows of a fixed number of forward batches, and says where in the corpus it begins.
That makes a harvest resumable to the byte, and any shard of it by itself: what is made again is
computed in the very batches of an uninterrupted run.
"""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, cast

import torch
from rich.filesize import decimal

from saekit.activations_cache import corpus, images, manifest, ranks, shards, tokens
from saekit.activations_cache.config import DTYPES, HarvestConfig
from saekit.activations_cache.manifest import Manifest, Shard, added, counted
from saekit.activations_cache.model import LanguageModel, Model, load
from saekit.activations_cache.model_vision import VisionModel
from saekit.activations_cache.storage import Storage
from saekit.activations_cache.tokens import Cursor, TokenBatch
from saekit.activations_cache.writer import Rows, Schema, Sealed, ShardWriter
from saekit.config import differences
from saekit.errors import CacheError, ConfigError, CorpusError, SaekitError
from saekit.progress import bar

log = logging.getLogger(__name__)

DEFAULT_CONTEXT = 256
_MIB = 1 << 20
_MOST_BUFFERS = 8

Data = Callable[[Cursor], Iterator[TokenBatch]]
"""What goes through the model, from any place in the corpus on."""


def load_model(cfg: HarvestConfig) -> Model:
    """The model that the config names, where and in the precision it shall run.

    Raises ConfigError for a context longer than the model's.
    """
    device = resolve_device(cfg.device)
    model = load(cfg.model, backend=cfg.backend, device=device, dtype=DTYPES[cfg.model_dtype])
    if isinstance(model, LanguageModel) and cfg.context and cfg.context > model.context:
        raise ConfigError(
            f"context={cfg.context} exceeds what '{cfg.model}' can look at ({model.context} tokens)"
        )
    return model


def resolve_device(device: str) -> str:
    """The device that a config names; "auto" is the first GPU where there is one."""
    if device != "auto":
        return device
    # torchrun tells each process on a machine its number.
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


class Job:
    """A harvest's config, its model, and what both give: the columns, the batches, the sizes."""

    def __init__(
        self,
        cfg: HarvestConfig,
        model: Model,
        data: Data | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.cfg, self.model, self.rank, self.ranks = cfg, model, rank, ranks
        self._data = data
        self.schema = Schema(model.widths(cfg.hooks), DTYPES[cfg.dtype], cfg.gradients)
        n_shards = int(cfg.memory_mib * _MIB) // self.shard_bytes
        if n_shards < 2:
            raise ConfigError(
                f"memory_mib={cfg.memory_mib:g} is too little: a batch of {self._batch_rows:,} "
                f"tokens takes {decimal(self.shard_bytes)}, and there must be room for two. Lower "
                "--batch-size or --context, or raise it"
            )
        self.n_buffers = min(n_shards, _MOST_BUFFERS)
        """Shards that may be in memory at once."""

    @property
    def positions(self) -> int:
        """Positions of a row of a pass, at most."""
        if isinstance(self.model, VisionModel):
            return self.model.n_positions
        if isinstance(self.model, LanguageModel):
            return self.cfg.context or min(DEFAULT_CONTEXT, self.model.context)
        return self.cfg.context or 1

    @property
    def batches_per_shard(self) -> int:
        return max(1, int(self.cfg.shard_mib * _MIB) // (self._batch_rows * self._row_bytes))

    @property
    def shard_rows(self) -> int:
        """Rows of a shard, at most."""
        return self.batches_per_shard * self._batch_rows

    @property
    def shard_bytes(self) -> int:
        return self.shard_rows * self._row_bytes

    @property
    def _batch_rows(self) -> int:
        return self.cfg.batch_size * self.positions

    @property
    def _row_bytes(self) -> int:
        return sum(self.schema.row_bytes().values())

    def batches(self, start: Cursor) -> Iterator[TokenBatch]:
        """The corpus as it goes through the model, from `start` on."""
        cfg = self.cfg
        # Pyright takes a cached_property for another type than the protocols' properties.
        model, text, vision = self.model, cast(Any, self.model), cast(Any, self.model)
        if self._data is not None:
            return self._data(start)
        source: dict[str, Any] = {"config": cfg.dataset_config, "split": cfg.dataset_split}
        shared: dict[str, Any] = {
            "n_tokens": cfg.n_tokens,
            "start": start,
            "rank": self.rank,
            "ranks": self.ranks,
        }
        if isinstance(model, VisionModel):
            pictures = images.images(
                cfg.dataset, image_field=cfg.image_field, skip=start.document, **source
            )
            return images.image_batches(pictures, vision, cfg.batch_size, **shared)
        if not isinstance(model, LanguageModel):
            raise ConfigError(f"'{model.name}' is neither of text nor of images: give `data`")
        texts = corpus.documents(
            cfg.dataset,
            text_field=cfg.text_field,
            messages_field=cfg.messages_field,
            skip=start.document,
            **source,
        )
        windows = tokens.windows(
            texts,
            text,
            context=self.positions,
            layout=cfg.layout,
            first_k=cfg.first_k,
            **shared,
        )
        return tokens.batches(
            windows, text, cfg.batch_size, context=self.positions, layout=cfg.layout
        )

    def buffer(self) -> Rows:
        """Memory for one shard."""
        return Rows(self.schema, self.shard_rows, self.model.device, self.cfg.sink_factor)

    def run(self, folder: Storage, progress: bool) -> None:
        """Harvest into the folder, from where an earlier call was stopped."""
        current = self._begun(folder)
        gone = missing(folder, current)
        if current.complete and not gone:
            return
        self._check_space(current, folder)
        stream = self.batches(current.end)
        first = None if current.complete else next(stream, None)
        if first is None and current.n_rows == 0 and self.ranks == 1:
            raise CorpusError(
                f"dataset '{self.cfg.dataset}' gave no token: it is empty, or holds only empty "
                "documents"
            )
        with folder.lock():
            if self._begun(folder) != current:
                raise CacheError(f"{folder.url} was written by another harvest just now: try again")
            for number in gone:
                self.remake(folder, current, number)
            if not current.complete:
                if not folder.exists(manifest.NAME):
                    # A shard without it would look like somebody else's file.
                    current.save(folder)
                # The rest of the corpus, with the batch that showed that there is one.
                rest = chain([] if first is None else [first], stream)
                replace(self._fill(folder, current, rest, progress), complete=True).save(folder)

    def remake(self, folder: Storage, held: Manifest, number: int) -> None:
        """Make a shard of a cache again; its writer's lock must be held.

        Raises CacheError, and leaves what is there, where it comes out as another: the model, the
        text or the versions have changed.
        """
        entry = held.shards[number]
        before = [shard for shard in held.shards[:number] if shard.rank == entry.rank]
        job = Job(self.cfg, self.model, self._data, entry.rank, held.ranks)
        rows = job._buffer(entry.start, sum(shard.n_documents for shard in before))
        for batch in islice(job.batches(entry.start), self.batches_per_shard):
            rows.add(self.model, batch)
        sealed = rows.seal()
        shards.write(
            folder, entry.file, sealed.columns, sealed.new_documents, expected=entry.checksum
        )

    def _begun(self, folder: Storage) -> Manifest:
        held, model = begun(self.cfg, folder), self.model
        if held is None:
            return Manifest(
                config=self.cfg.to_dict(),
                model=self.cfg.model,
                model_fingerprint=model.fingerprint,
                tokenizer_fingerprint=model.tokenizer_fingerprint,
                hooks=self.schema.hooks,
            )
        for what, there, here in (
            ("weights", held.model_fingerprint, model.fingerprint),
            ("tokenizer", held.tokenizer_fingerprint, model.tokenizer_fingerprint),
        ):
            if there != here:
                raise CacheError(
                    f"{folder.url} was begun with other {what} of '{self.cfg.model}' (fingerprint "
                    f"{str(there)[:12]}, now {str(here)[:12]}): give another --out"
                )
        return held

    def _check_space(self, current: Manifest, folder: Storage) -> None:
        need = (self.cfg.n_tokens // self.ranks - current.n_rows) * self._row_bytes
        free = folder.free_bytes()
        if free is not None and need > free:
            raise SaekitError(
                f"{self.cfg.n_tokens:,} tokens need up to {decimal(need)} more in {folder.url}, "
                f"and {decimal(free)} are free there: lower --n-tokens, name fewer --hooks, or "
                "give another --out"
            )

    def _buffer(self, start: Cursor, n_documents: int) -> Rows:
        rows = self.buffer()
        rows.clear(start, n_documents)
        return rows

    def _fill(
        self, folder: Storage, current: Manifest, stream: Iterator[TokenBatch], progress: bool
    ) -> Manifest:
        """Write shard after shard; returns what the manifest says in the end."""
        state = current

        def write(number: int, rows: Rows) -> "_Written":
            sealed = rows.seal()
            name = f"shard-{number:05d}.safetensors"
            shard = shards.write(folder, name, sealed.columns, sealed.new_documents)
            return _Written(replace(shard, rank=self.rank, start=rows.start), rows.end, sealed)

        def commit(written: _Written) -> None:
            nonlocal state
            state = _with(state, written)
            self._check_finite(state, written.sealed, folder)
            state.save(folder)

        def discard(written: _Written) -> None:
            folder.remove(written.shard.file)

        total = self.cfg.n_tokens // self.ranks
        with (
            bar("harvest", total, done=current.n_rows, shown=progress) as shown,
            ShardWriter(
                self.buffer, self.n_buffers, write, commit, discard, len(current.shards)
            ) as writer,
        ):
            at, n_documents = current.end, sum(shard.n_documents for shard in current.shards)
            while some := list(islice(stream, 1)):
                rows = writer.empty()
                rows.clear(at, n_documents)
                for batch in chain(some, islice(stream, self.batches_per_shard - 1)):
                    rows.add(self.model, batch)
                    shown.advance(batch.n_rows)
                at, n_documents = rows.end, rows.n_documents
                writer.submit(rows)
        return state

    def _check_finite(self, state: Manifest, sealed: Sealed, folder: Storage) -> None:
        if sealed.nonfinite is None:
            return
        n = state.marked["nonfinite"]
        found = f"{n:,} rows so far are not finite as {self.cfg.dtype}, here {sealed.nonfinite}"
        if n > self.cfg.max_nonfinite:
            folder.remove(state.shards[-1].file)
            raise CacheError(
                f"{found}; max_nonfinite={self.cfg.max_nonfinite} allows no more. Use --dtype "
                "bfloat16 or float32 or another --model-dtype, or raise --max-nonfinite: such rows "
                "are marked and never read"
            )
        log.warning("%s", found)


@dataclass(frozen=True)
class _Written:
    """A shard that is on disk."""

    shard: Shard
    end: Cursor
    sealed: Sealed


def _with(held: Manifest, written: _Written) -> Manifest:
    sealed = written.sealed
    return replace(
        held,
        shards=(*held.shards, written.shard),
        end=written.end,
        stats=added(held.stats, sealed.stats),
        marked=counted(held.marked, sealed.marked),
        n_padding=held.n_padding + sealed.n_padding,
    )


def begun(cfg: HarvestConfig, folder: Storage) -> Manifest | None:
    """What an earlier call of the same command left behind."""
    if not folder.exists(manifest.NAME):
        names = folder.names()
        if any(not name.startswith(ranks.PREFIX) for name in names):
            raise ConfigError(f"{folder.url} exists and is no activation cache: give another --out")
        return None
    held = Manifest.load(folder)
    if held.shuffle is not None:
        raise ConfigError(f"{folder.url} is a shuffled cache: give another --out")
    if held.config != cfg.to_dict():
        raise ConfigError(
            f"{folder.url} holds a cache of another config "
            f"({differences(cfg.to_dict(), held.config)}): give another --out, or the config that "
            "it was begun with"
        )
    return held


def missing(folder: Storage, held: Manifest) -> list[int]:
    """Numbers of the shards whose file is gone."""
    there = set(folder.names())
    return [n for n, shard in enumerate(held.shards) if shard.file not in there]
