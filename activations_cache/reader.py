"""Batches of a cache's rows: shuffled, prepared ahead of time, and going on where they stopped.

Axes: row (of the whole cache), batch (rows), d.
"""

import os
import threading
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from saekit.activations_cache.shards import gather
from saekit.activations_cache.store import ActivationCache, Split, in_rising_order
from saekit.config import differences
from saekit.errors import ConfigError

Shuffle = Literal["rows", "blocks", "none"]
Batch = dict[str, Shaped[Tensor, "batch ..."]]

CHUNK = 65_536
"""Rows that stay together, in stored order, where blocks are shuffled."""

_MOST_THREADS = 8
_AHEAD = 512 << 20
"""Bytes of batches that are held ready, where more than two are."""
_TOGETHER, _MOST_TOGETHER = 64 << 20, 16
"""Bytes of batches for a GPU that are gathered as one, and batches at most. Threads take turns at
Python, and each time cost a GPU's short step more than what they copy in between."""


def threads_here() -> int:
    """How many threads gather batches where nothing else is said: half of the cores that this
    process may use, shared with the other processes of torchrun on the machine, and 8 at most."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    near = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_THREADS, cores // near // 2))


class _Span(NamedTuple):
    """A batch: its first row and the row behind its last, by their places in the epoch."""

    epoch: int
    start: int
    stop: int

    @property
    def n_rows(self) -> int:
        return self.stop - self.start


def _n_rows(spans: list[_Span]) -> int:
    return sum(span.n_rows for span in spans)


_Made = tuple[Batch, torch.cuda.Event | None]
"""Batches, and what says that all of them are on the GPU; None where nothing need be waited for."""


class Reader:
    """An iterator over batches of several columns, whose rows belong together.

    Columns are hook points, their gradients (`<hook>.grad`), and what each row is (`token`,
    `document`, `position`, `mask`, of a shuffled cache `source`). Every row of the split comes once
    an epoch, in an order set by (seed, epoch):

    - "rows": any order is as likely as any other. What there is by default, unless the cache was
      shuffled on disk. Each row is sought out alone.
    - "blocks": the rows that are kept, in stored order, are cut into chunks of `CHUNK`, and the
      chunks are shuffled. Files are read in long runs, so this is quick on any disk; it is the
      default for a cache that was shuffled, and no substitute for that.
    - "none": stored order.

    Of n rows, each of several ranks gets n // ranks, no two the same; the few that remain are left
    out (others each epoch, unless the order is "none"). A batch never crosses into the next epoch.
    """

    def __init__(
        self,
        cache: ActivationCache,
        columns: Collection[str],
        batch_size: int,
        *,
        seed: int = 0,
        split: Split = "train",
        exclude: Collection[str] = ("special",),
        shuffle: Shuffle | None = None,
        rank: int = 0,
        ranks: int = 1,
        part: tuple[int, int] = (0, 1),
        epochs: int | None = 1,
        drop_last: bool = False,
        start: int = 0,
        state: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = torch.float32,
        device: str | torch.device = "cpu",
        prefetch: int | None = None,
        threads: int | None = None,
        reuse: bool = False,
    ) -> None:
        """`epochs=None` goes on for ever; `drop_last` leaves out an epoch's last batch where it is
        not full; `part` (which, of how many) gives a part of each batch, and needs `drop_last`;
        `start` is how many batches to pass over, at no cost, and `state` what another
        reader's `state()` gave. `dtype=None` gives activations as they are stored. `prefetch` is
        how many batches are held ready or being made by `threads` threads; at 0 there are none. Not
        given, there are as many threads as `threads_here` says, and work for each but no more than
        512 MiB, 2 batches at least. A thread makes one batch at a time; for a GPU up to 64 MiB of
        them, 16, or half of `prefetch`. What comes, and in which order, hangs on none of it. With
        `reuse`, on a CPU, batches lie in turn in `prefetch` + 2 places, and each holds until 2 more
        were taken: to find new memory for a large batch takes the system longer than to read it.

        Raises CacheError for a column that the cache does not hold, and ConfigError for options
        that cannot work, and where the split holds no row, or with `drop_last` not one full batch.
        """
        low = batch_size < 1 or (prefetch or 0) < 0 or start < 0
        if low or (threads is not None and threads < 1) or not 0 <= rank < ranks:
            raise ConfigError(
                f"batch_size={batch_size} and threads={threads} must be at least 1, "
                f"prefetch={prefetch} and start={start} at least 0, and rank={rank} must lie in "
                f"0..{ranks - 1}"
            )
        _check_part(part, batch_size, drop_last)
        self._part = part
        shuffle = shuffle or ("blocks" if cache.shuffled else "rows")
        kind = _Rows if shuffle == "rows" else _Blocks
        order = kind(cache, split, exclude, None if shuffle == "none" else seed)
        self._rows = order.n // ranks
        if self._rows < (batch_size if drop_last else 1):
            raise ConfigError(
                f"split '{split}' of {cache.url} has {self._rows:,} rows"
                f"{' for each rank' if ranks > 1 else ''}: too few for a batch of "
                f"{batch_size:,}. Harvest more tokens, or lower the batch size"
            )
        self._batch_size, self._epochs, self._drop_last = batch_size, epochs, drop_last
        self._stream = {
            "cache": cache.fingerprint,
            "holdout": cache.manifest.config["holdout"],
            "seed": seed,
            "split": split,
            "exclude": sorted(set(exclude)),
            "shuffle": shuffle,
            "chunk": CHUNK,
            "rank": rank,
            "ranks": ranks,
        }
        self._source = _Source(cache, tuple(columns), order, rank * self._rows, dtype, device)
        self._threads = threads_here() if threads is None else threads
        batch_bytes = self._source.row_bytes * (batch_size // part[1])
        together = 1
        if self._source.on_gpu:
            together = max(1, min(_TOGETHER // batch_bytes, _MOST_TOGETHER))
        if prefetch is None:
            prefetch = max(2, min(together * self._threads, _AHEAD // batch_bytes))
        if reuse:
            self._source.reuse(prefetch + 2, batch_size)
        self._prefetch = prefetch
        self._together = max(1, min(together, prefetch // 2))
        self._pool: ThreadPoolExecutor | None = None
        self._ordering: ThreadPoolExecutor | None = None
        """One thread that says which rows a batch has, in their order, for those that gather."""
        self._ahead: deque[tuple[list[_Span], Future[_Made]]] = deque()
        """Batches to come, those that are gathered together."""
        self._ready: deque[tuple[_Span, Batch]] = deque()
        epoch, number = divmod(start, self._batches_per_epoch)
        self._go_to(epoch, number * batch_size)
        if state is not None:
            self.restore(state)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._prefetch == 0:
            span = next(self._spans)
            ours = self._ours([span])
            space = self._source.space(_n_rows(ours))
            made = self._source.batch(self._source.rows(ours), space)
            ((_, batch),) = self._given([span], made)
            self._at = span.epoch, span.stop
            return batch
        self._fill()
        if not self._ready:
            if not self._ahead:
                raise StopIteration
            # Taken from the queue once it is there: an interrupt while waiting loses nothing.
            spans, future = self._ahead[0]
            made = future.result()
            self._ahead.popleft()
            self._ready.extend(self._given(spans, made))
        span, batch = self._ready.popleft()
        self._at = span.epoch, span.stop
        self._fill()
        return batch

    def state(self) -> dict[str, Any]:
        """Where the reader is, as JSON holds it: behind the last batch that it handed out.

        It is counted in rows, so that a reader of another batch size, or of other columns of the
        same rows, can go on from it.
        """
        epoch, row = self._at
        return {"epoch": epoch, "row": row, **self._stream}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where another reader of this stream was. Raises ConfigError for the state of
        another stream."""
        at = {"epoch": state.get("epoch"), "row": state.get("row")}
        there = {key: value for key, value in state.items() if key not in at}
        epoch, row = at.values()
        if there != self._stream:
            raise ConfigError(
                f"the reader's state is of another stream ({differences(self._stream, there)}): "
                "read the same rows in the same order, or begin anew without it"
            )
        if not (isinstance(epoch, int) and isinstance(row, int) and 0 <= row <= self._rows):
            raise ConfigError(
                f"the reader's state has epoch={epoch!r} and row={row!r}, and an epoch has "
                f"{self._rows:,} rows: it was altered. Begin anew without it"
            )
        self._go_to(epoch, row)

    def close(self) -> None:
        """End the threads and let go of what they prepared. Reading on begins others."""
        self._go_to(*self._at)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _batches_per_epoch(self) -> int:
        rows, size = self._rows, self._batch_size
        return rows // size if self._drop_last else -(-rows // size)

    def _go_to(self, epoch: int, row: int) -> None:
        # Those that gather first: they wait for the other one.
        for pool in (self._pool, self._ordering):
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        self._pool = self._ordering = None
        self._ahead.clear()
        self._ready.clear()
        self._at = epoch, row
        self._spans: Iterator[_Span] = _spans(
            epoch, row, self._rows, self._batch_size, self._epochs, self._drop_last
        )

    def _ours(self, spans: list[_Span]) -> list[_Span]:
        """The parts of batches that are read here."""
        number, of = self._part
        if of == 1:
            return spans
        each = self._batch_size // of
        starts = [(span.epoch, span.start + number * each) for span in spans]
        return [_Span(epoch, start, start + each) for epoch, start in starts]

    def _given(self, spans: list[_Span], made: _Made) -> Iterator[tuple[_Span, Batch]]:
        """The batches that were gathered together, one by one."""
        columns = self._source.given(made)
        first = 0
        for span, ours in zip(spans, self._ours(spans), strict=True):
            rows = slice(first, first := first + ours.n_rows)
            yield span, {name: x[rows] for name, x in columns.items()}

    def _fill(self) -> None:
        held = len(self._ready) + sum(len(spans) for spans, _ in self._ahead)
        while held + self._together <= self._prefetch:
            spans = list(islice(self._spans, self._together))
            if not spans:
                return
            held += len(spans)
            if self._pool is None:
                n = min(self._threads, self._prefetch)
                self._pool = ThreadPoolExecutor(n, thread_name_prefix="saekit-reader")
            if self._ordering is None:
                self._ordering = ThreadPoolExecutor(1, thread_name_prefix="saekit-order")
            # The threads know the source, never the reader: so a reader that is dropped goes, and
            # its threads with it.
            ours = self._ours(spans)
            rows = self._ordering.submit(self._source.rows, ours)
            # Memory from here, not from the threads: what the caller lets go of is used again.
            space = self._source.space(_n_rows(ours))
            self._ahead.append((spans, self._pool.submit(self._source.batch, rows, space)))


def _check_part(part: tuple[int, int], batch_size: int, drop_last: bool) -> None:
    number, of = part
    if not 0 <= number < of or (of > 1 and (batch_size % of or not drop_last)):
        raise ConfigError(
            f"part={part} needs batches whose size ({batch_size:,}) is a multiple of {of}, all of "
            f"them full (drop_last), and a number in 0..{of - 1}"
        )


def _spans(
    epoch: int, row: int, rows: int, size: int, epochs: int | None, drop_last: bool
) -> Iterator[_Span]:
    """The batches from a row on."""
    while epochs is None or epoch < epochs:
        while row < rows and not (drop_last and row + size > rows):
            yield _Span(epoch, row, min(row + size, rows))
            row += size
        epoch, row = epoch + 1, 0


class _Rows:
    """Kept rows in an order in which each permutation is as likely as any other."""

    def __init__(
        self, cache: ActivationCache, split: Split, exclude: Collection[str], seed: int | None
    ) -> None:
        self._seed = seed
        size = np.int32 if cache.n_rows < 2**31 else np.int64
        self._index = cache.indices(split, exclude).numpy().astype(size)
        self.n = len(self._index)
        self._epoch, self._order = -1, self._index

    def rows(self, epoch: int, start: int, stop: int) -> Int[Tensor, " batch"]:
        if epoch != self._epoch:
            # Let go of the last epoch's order before the next is made.
            self._order = self._index
            self._order = np.random.default_rng([self._seed or 0, epoch]).permutation(self._index)
            self._epoch = epoch
        return torch.from_numpy(self._order[start:stop].astype(np.int64))


class _Blocks:
    """Kept rows in chunks, each in stored order; the chunks shuffled, or without a seed not."""

    def __init__(
        self, cache: ActivationCache, split: Split, exclude: Collection[str], seed: int | None
    ) -> None:
        self._cache, self._exclude, self._seed = cache, exclude, seed
        self._split: Split = split
        self.n = 0
        starts: list[int] = []
        for first, stop in cache.shard_bounds:
            kept = cache.kept(first, stop, split, exclude).nonzero().flatten() + first
            # Those of them whose number among all kept rows is a multiple of the chunk.
            starts += kept[-self.n % CHUNK :: CHUNK].tolist()
            self.n += len(kept)
        self._bounds = [*starts, cache.n_rows]
        self._lengths = np.full(len(starts), CHUNK)
        self._lengths[-1:] = self.n - CHUNK * (len(starts) - 1)
        self._chunk: tuple[int, Tensor] = -1, torch.empty(0, dtype=torch.int64)

    def rows(self, epoch: int, start: int, stop: int) -> Int[Tensor, " batch"]:
        order = np.arange(len(self._lengths))
        if self._seed is not None:
            order = np.random.default_rng([self._seed, epoch]).permutation(order)
        ends = self._lengths[order].cumsum()
        parts = []
        while start < stop:
            place = int(np.searchsorted(ends, start, side="right"))
            begin = int(ends[place] - self._lengths[order[place]])
            end = min(stop, int(ends[place]))
            parts.append(self._kept(int(order[place]))[start - begin : end - begin])
            start = end
        return torch.cat(parts)

    def _kept(self, chunk: int) -> Int[Tensor, " row"]:
        """The kept rows of a chunk; the last one is remembered, as several batches come of it."""
        if self._chunk[0] != chunk:
            first, stop = self._bounds[chunk], self._bounds[chunk + 1]
            kept = self._cache.kept(first, stop, self._split, self._exclude)
            self._chunk = chunk, kept.nonzero().flatten() + first
        return self._chunk[1]


class _Source:
    """What a batch is made of; the reader's threads run in it."""

    def __init__(
        self,
        cache: ActivationCache,
        columns: tuple[str, ...],
        order: _Rows | _Blocks,
        offset: int,
        dtype: torch.dtype | None,
        device: str | torch.device,
    ) -> None:
        self._cache, self._columns, self._order, self._offset = cache, columns, order, offset
        self._dtype, self._device = dtype, torch.device(device)
        self._places: deque[Batch] = deque()
        self._own = threading.local()
        """Memory of each thread, for rows in the order in which they are read."""
        for column in columns:
            cache.take(column, torch.empty(0, dtype=torch.int64))
        self._stream = None
        if self._device.type == "cuda":
            if self._device.index is None:
                # The caller's: other threads begin with the first.
                self._device = torch.device("cuda", torch.cuda.current_device())
            # Beside the steps, not between them: a copy takes a good part of a short step's time.
            self._stream = torch.cuda.Stream(self._device)

    @property
    def on_gpu(self) -> bool:
        return self._stream is not None

    @property
    def row_bytes(self) -> int:
        """Of a row of all columns, as stored."""
        return sum(self._cache.space(column, 1, dtype=None).nbytes for column in self._columns)

    def reuse(self, places: int, n: int) -> None:
        """From now on give the same memory in turn. A GPU's pinned memory is used again anyway, as
        soon as what is in it has been copied."""
        if self._stream is None:
            self._places.extend([self.space(n) for _ in range(places)])

    def space(self, n: int) -> Batch:
        """Memory for a batch of n rows. For a GPU pinned, from which the copy needs no CPU, and as
        stored: rows are made wider over there."""
        if self._places:
            self._places.rotate(-1)
            return {column: out[:n] for column, out in self._places[-1].items()}
        pinned = self._stream is not None
        dtype = None if pinned else self._dtype
        return {c: self._cache.space(c, n, dtype=dtype, pinned=pinned) for c in self._columns}

    def rows(self, spans: list[_Span]) -> Int[Tensor, " batch"]:
        """Which rows of the cache batches have. By one thread at a time."""
        at = self._offset
        return torch.cat([self._order.rows(s.epoch, at + s.start, at + s.stop) for s in spans])

    def batch(
        self, rows: Int[Tensor, " batch"] | Future[Int[Tensor, " batch"]], space: Batch
    ) -> _Made:
        """What some rows hold, of all columns. By several threads at once."""
        if isinstance(rows, Future):
            rows = rows.result()
        rising, place = in_rising_order(rows)
        for column, out in space.items():
            if place is None or self._stream is not None:
                # A GPU puts them in their order over there.
                self._cache.take_rising(column, rising, out)
            else:
                risen = self._scratch(column, len(rows))
                self._cache.take_rising(column, rising, risen)
                gather(risen, place, out)
        if self._stream is None:
            return space, None
        with torch.cuda.stream(self._stream):
            there = None if place is None else self._sent(torch.from_numpy(place).pin_memory())
            batch = {column: self._over_there(x, there) for column, x in space.items()}
            event = torch.cuda.Event()
            event.record(self._stream)
        return batch, event

    def given(self, made: _Made) -> Batch:
        """What was gathered, for what the caller does with it next."""
        batch, event = made
        if event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(event)
            for x in batch.values():
                # Its memory was taken for another stream, which must not have it back too early.
                x.record_stream(current)
        return batch

    def _over_there(
        self, x: Shaped[Tensor, "batch ..."], place: Int[Tensor, " batch"] | None
    ) -> Shaped[Tensor, "batch ..."]:
        wider = x.ndim > 1 and self._dtype is not None
        x = self._sent(x)
        if place is not None:
            x = x.index_select(0, place)
        return x.to(self._dtype) if wider else x

    def _sent(self, pinned: Tensor) -> Tensor:
        return pinned.to(self._device, non_blocking=True)

    def _scratch(self, column: str, n: int) -> Shaped[Tensor, "batch ..."]:
        held: Batch = self._own.__dict__
        if column not in held or len(held[column]) < n:
            held[column] = self._cache.space(column, n, dtype=None)
        return held[column][:n]
