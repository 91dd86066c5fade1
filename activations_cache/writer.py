"""Activations to shards on disk, beside the model that makes the next ones.

Rows are gathered in buffers that are allocated once: a hook's activation is copied into its place
as soon as the model has computed it (on a GPU by a stream of its own, into pinned memory), and a
full buffer is marked, hashed and written by a thread. Nothing grows with the length of the corpus.

Axes: batch (rows of a pass), pos, row (kept positions), d.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int32
from torch import Tensor

from saekit.activations_cache import shards
from saekit.activations_cache.masks import KINDS
from saekit.activations_cache.model import Model
from saekit.activations_cache.shards import GRADIENT, SCALE
from saekit.activations_cache.stats import HookStats
from saekit.activations_cache.tokens import Cursor, TokenBatch
from saekit.errors import ConfigError

_LARGEST_INT8 = 127
_LEAVE_OUT_OF_STATS = KINDS["special"]


@dataclass(frozen=True)
class Schema:
    """The columns of a cache, by name: type and width, None for a column `[row]`."""

    hooks: dict[str, int]
    dtype: torch.dtype
    gradients: bool

    @property
    def columns(self) -> dict[str, tuple[torch.dtype, int | None]]:
        columns: dict[str, tuple[torch.dtype, int | None]] = {}
        for hook, width in self.hooks.items():
            columns[hook] = self.dtype, width
            if self.dtype == torch.int8:
                columns[hook + SCALE] = torch.float32, None
            if self.gradients:
                columns[hook + GRADIENT] = self.gradient_dtype, width
        return columns | {name: (dtype, None) for name, dtype in shards.COLUMNS.items()}

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Gradients span many powers of two: those of a float16 or int8 cache are bfloat16."""
        small = self.dtype in (torch.float16, torch.int8)
        return torch.bfloat16 if small else self.dtype

    def row_bytes(self) -> dict[str, int]:
        """Bytes of a row on disk by column; those of the token itself together, as "token"."""
        sizes = {
            name: dtype.itemsize * (1 if width is None else width)
            for name, (dtype, width) in self.columns.items()
        }
        own = sum(sizes.pop(name) for name in shards.COLUMNS)
        return sizes | {"token": own}


@dataclass(frozen=True)
class Sealed:
    """The finished rows of a shard."""

    columns: dict[str, Tensor]
    new_documents: list[str]
    stats: dict[str, HookStats]
    nonfinite: str | None
    """The first value that is not finite, in words."""
    marked: dict[str, int]
    n_padding: int


class Rows:
    """Memory for the rows of one shard."""

    def __init__(
        self, schema: Schema, capacity: int, device: torch.device, sink_factor: float
    ) -> None:
        self.schema = schema
        self._sink_factor = sink_factor
        on_gpu = device.type == "cuda"
        self._columns = {
            name: torch.empty(
                (capacity,) if width is None else (capacity, width), dtype=dtype, pin_memory=on_gpu
            )
            for name, (dtype, width) in schema.columns.items()
        }
        # Kept until the shard is sealed, for the marks of sinks and of values that are not finite.
        self._norms = {
            hook: torch.empty(capacity, dtype=torch.float32, pin_memory=on_gpu)
            for hook in schema.hooks
        }
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._device = device
        self.clear(Cursor(), 0)

    def clear(self, start: Cursor, n_documents: int) -> None:
        """Begin a shard at `start`, after `n_documents` documents."""
        self.n = 0
        self.start = self.end = start
        self.n_documents = n_documents
        """Documents up to and with the last row."""
        self._last: str | None = None
        # The last document before goes on here if some of it is used up and some is not.
        self._continues = start.token > 0
        self._new_documents: list[str] = []
        self._n_padding = 0
        self._sums = {hook: _Sums(width, self._device) for hook, width in self.schema.hooks.items()}

    def add(self, model: Model, batch: TokenBatch) -> None:
        """Run the model over a batch and keep its rows."""
        n = batch.n_rows
        if self.n + n > len(self._columns["mask"]):
            raise ConfigError(
                f"a batch of {n:,} rows is more than batch_size and context promise: give the "
                "config those of the data"
            )
        here = slice(self.n, self.n + n)
        index = None if n == batch.kept.numel() else batch.kept.flatten().nonzero().flatten()
        mask = batch.mask[batch.kept]
        counted = (mask & _LEAVE_OUT_OF_STATS == 0).float()
        if self._stream is not None:
            index = index if index is None else index.to(self._device, non_blocking=True)
            counted = counted.to(self._device, non_blocking=True)

        def rows_of(x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "row d"]:
            rows = x.flatten(0, 1)
            return rows if index is None else rows.index_select(0, index)

        def see(hook: str, x: Float[Tensor, "batch pos d"]) -> None:
            rows = kept = rows_of(x)
            norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
            error = None
            if self.schema.dtype == torch.int8:
                kept, scale, error = _to_int8(rows)
                self._keep(hook + SCALE, here, scale)
            elif self.schema.dtype == torch.float16:
                # Beyond 65,504 there is nothing but infinity.
                norms = norms.where(rows.to(torch.float16).isfinite().all(1), torch.inf)
            self._keep(hook, here, kept)
            self._copy(self._norms[hook][here], norms)
            self._sums[hook].add(rows, norms, counted, error)

        if self.schema.gradients:
            acts, grads = model.capture_with_gradients(
                batch.inputs, batch.scored, list(self.schema.hooks)
            )
            for hook, x in acts.items():
                see(hook, x)
                self._keep(hook + GRADIENT, here, rows_of(grads[hook]))
        else:
            model.visit(batch.inputs, list(self.schema.hooks), see)
        self._columns["token"][here] = batch.token[batch.kept].int()
        self._columns["document"][here] = self._number(batch).int()
        self._columns["position"][here] = batch.position[batch.kept].int()
        self._columns["mask"][here] = mask.to(torch.uint8)
        self.n += n
        self.end = batch.end
        self._n_padding += batch.n_padding

    def seal(self) -> Sealed:
        """What the shard holds, once all of it has arrived from the device.

        Runs in a writer's thread, and so does without torch's operators: each would raise a team of
        OpenMP threads there, and more teams than cores slow the model's down for good.
        """
        if self._stream is not None:
            self._stream.synchronize()
        columns = {name: column[: self.n] for name, column in self._columns.items()}
        token, document, position, mask = (columns[name].numpy() for name in shards.COLUMNS)
        norms = {hook: norm[: self.n].numpy() for hook, norm in self._norms.items()}
        bad = {hook: ~np.isfinite(norm) for hook, norm in norms.items()}
        bad_row = np.logical_or.reduce(list(bad.values()))
        mask |= bad_row.astype(np.uint8) * np.uint8(KINDS["nonfinite"])
        sinks = _sinks(norms, position, self._sink_factor)
        mask |= sinks.astype(np.uint8) * np.uint8(KINDS["sink"])
        return Sealed(
            columns=columns,
            new_documents=self._new_documents,
            stats={hook: sums.stats() for hook, sums in self._sums.items()},
            nonfinite=next(
                (
                    f"'{hook}' at token {token[row]} (position {position[row]} of a window of "
                    f"document number {document[row]})"
                    for row in np.flatnonzero(bad_row)
                    for hook in bad
                    if bad[hook][row]
                ),
                None,
            ),
            marked={kind: int((mask & bit != 0).sum()) for kind, bit in KINDS.items()},
            n_padding=self._n_padding,
        )

    def _keep(self, column: str, here: slice, values: Tensor) -> None:
        self._copy(self._columns[column][here], values)

    def _copy(self, place: Tensor, values: Tensor) -> None:
        if self._stream is None:
            place.copy_(values)
            return
        values = values.to(place.dtype)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            place.copy_(values, non_blocking=True)
        # Its memory must not be given to others before the copy is done.
        values.record_stream(self._stream)

    def _number(self, batch: TokenBatch) -> Int[Tensor, " row"]:
        """The cache's numbers of the documents of a batch's rows."""
        numbers = []
        for name in batch.names:
            if self._continues or name == self._last:
                self._continues = False
            else:
                self._new_documents.append(name)
                self.n_documents += 1
            self._last = name
            numbers.append(self.n_documents - 1)
        return torch.tensor(numbers)[batch.document[batch.kept]]


class _Sums:
    """Running sums at one hook point, where the model runs."""

    def __init__(self, width: int, device: torch.device) -> None:
        wide = torch.float64
        self._x = torch.zeros(width, dtype=wide, device=device)
        # n, |x|, |x|^2, squared error
        self._scalars = torch.zeros(4, dtype=wide, device=device)
        self._has_error = False

    def add(
        self,
        x: Float[Tensor, "row d"],
        norms: Float[Tensor, " row"],
        counted: Float[Tensor, " row"],
        error: Float[Tensor, " row"] | None,
    ) -> None:
        """Add the rows that `counted` marks with 1, as far as they are finite."""
        finite = norms.isfinite()
        x = x.float()
        # On a GPU, asking whether any row is not finite would cost a wait in every batch.
        if x.device.type != "cpu" or not finite.all():
            x = torch.where(finite[:, None], x, 0)
            norms = torch.where(finite, norms, 0)
            counted = counted * finite
        self._x += counted @ x
        lengths = norms.double()
        parts = [counted.double().sum(), counted @ norms, (counted * lengths.square()).sum()]
        if error is not None:
            self._has_error = True
            parts.append((counted * torch.where(finite, error, 0)).sum())
        self._scalars[: len(parts)] += torch.stack([part.double() for part in parts])

    def stats(self) -> HookStats:
        n, norm, squares, error = self._scalars.tolist()
        return HookStats(
            n=int(n),
            sum=tuple(self._x.tolist()),
            sum_norm=norm,
            sum_squares=squares,
            sum_squared_error=error if self._has_error else None,
        )


def _to_int8(
    x: Float[Tensor, "row d"],
) -> tuple[Tensor, Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Values in -127..127, the scale of each row (its largest magnitude / 127), and the squared
    error of each row."""
    x = x.float()
    scale = x.abs().amax(1) / _LARGEST_INT8
    steps = torch.where(scale > 0, scale, 1)[:, None]
    values = (x / steps).round().nan_to_num(0).clamp(-_LARGEST_INT8, _LARGEST_INT8)
    return values.to(torch.int8), scale, (values * steps - x).square().sum(1)


def _sinks(
    norms: dict[str, Float32[np.ndarray, " row"]],
    position: Int32[np.ndarray, " row"],
    factor: float,
) -> Bool[np.ndarray, " row"]:
    """Rows whose norm at any hook point is above `factor` times the median of its window."""
    starts = np.flatnonzero(position == 0)
    lengths = np.diff(np.append(starts, len(position)))
    found = np.zeros(len(position), dtype=bool)
    # Windows of one length at a time, and most are as long as the context: a loop over windows
    # would hold up the model.
    for length in np.unique(lengths):
        rows = starts[lengths == length, None] + np.arange(length)
        for norm in norms.values():
            values = norm[rows]
            with np.errstate(invalid="ignore"):  # Rows that are not finite are marked as that.
                found[rows] |= values > factor * np.median(values, axis=1, keepdims=True)
    return found


@dataclass
class ShardWriter:
    """Threads that write full buffers, and the one place where a shard is committed: in order.

    `write` makes a file of a full buffer and returns what `commit` is to be told; `commit` is
    called for one shard after the other, by any thread. What was written after a shard that could
    not be is handed to `discard`.
    """

    make: Callable[[], Rows]
    """Makes one more buffer: done only when all there are hold rows on their way to the disk."""
    most: int
    """Buffers at once; at least two."""
    write: Callable[[int, Rows], Any]
    commit: Callable[[Any], None]
    discard: Callable[[Any], None]
    first: int
    """Number of the first shard."""
    _free: "SimpleQueue[Rows]" = field(default_factory=SimpleQueue, init=False)
    _pending: "deque[Future[None]]" = field(default_factory=deque, init=False)
    _done: dict[int, Any] = field(default_factory=dict, init=False)
    _lock: Any = field(default_factory=Lock, init=False)

    def __post_init__(self) -> None:
        self._next = self._to_commit = self.first
        self._failed = False
        self._made = 0
        self._pool = ThreadPoolExecutor(max(1, self.most - 1), "saekit-writer")

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # What is being written ends whole; what waits is made again by the next call.
        self._pool.shutdown(wait=True, cancel_futures=error is not None)
        for made in self._done.values():
            self.discard(made)
        if error is None:
            self._raise_failed(wait=True)

    def empty(self) -> Rows:
        """A buffer to fill; waits until there is one. Raises what a thread ran into."""
        self._raise_failed()
        try:
            rows = self._free.get(block=self._made == self.most)
        except Empty:
            self._made += 1
            return self.make()
        self._raise_failed()
        return rows

    def submit(self, rows: Rows) -> None:
        """Have a full buffer written as the next shard."""
        self._pending.append(self._pool.submit(self._write, self._next, rows))
        self._next += 1

    def _write(self, number: int, rows: Rows) -> None:
        try:
            if self._failed:
                return
            made = self.write(number, rows)
            with self._lock:
                self._done[number] = made
                while self._to_commit in self._done:
                    self.commit(self._done.pop(self._to_commit))
                    self._to_commit += 1
        except BaseException:
            self._failed = True
            raise
        finally:
            self._free.put(rows)

    def _raise_failed(self, wait: bool = False) -> None:
        while self._pending and (wait or self._pending[0].done()):
            self._pending.popleft().result()
