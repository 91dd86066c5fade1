"""What an SAE does to a text, on disk and in two orders: by place, and by latent.

The first pass over a cache writes it in pieces, each of which appears whole, so that a pass that
was stopped goes on with the places that no piece has; several processes take a part of these each.
A piece costs some 12 bytes for each active latent.

Axes: place (tokens of all windows, laid end to end), window, active (a latent at a place where it
fires), latent (d_sae).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Int64
from numpy import ndarray
from safetensors.numpy import load_file, save_file

from saekit.activations_cache.store import ActivationCache
from saekit.errors import CacheError, SaekitError
from saekit.evals._base import EvalConfig
from saekit.files import write_atomic

PLACES, ACTIVE = 1 << 17, 1 << 22
"""A piece ends at the window that exceeds one of these counts. Only memory depends on them."""


@dataclass(frozen=True, eq=False)
class Text:
    """Whole windows, laid end to end."""

    token: Int32[ndarray, " place"]
    keep: Bool[ndarray, " place"]
    """False for tokens of the kinds left out."""
    start: Int64[ndarray, " windows_1"]
    """Place of each window's first token; at the end, the number of places."""
    first_row: Int64[ndarray, " windows"]
    """Row of the cache that this token lies in."""
    document: Int64[ndarray, " windows"]

    FILE = "text.safetensors"

    @classmethod
    def of(cls, cache: ActivationCache, cfg: EvalConfig) -> "Text":
        """The first windows that together hold at most `max_rows` kept rows.

        Raises CacheError where there is none.
        """
        windows, rows = [], 0
        for window in cache.windows(cfg.split, cfg.exclude):
            rows += int(window.keep.sum())
            if rows > cfg.max_rows:
                break
            # Out of the shard's memory, and narrow.
            windows.append(
                (
                    window.tokens.numpy().astype(np.int32),
                    window.keep.numpy().copy(),
                    window.start,
                    window.document,
                )
            )
        if not windows:
            raise CacheError(
                f"split '{cfg.split}' of {cache.url} has no window of at most "
                f"max_rows={cfg.max_rows} rows; choose another split, or raise max_rows"
            )
        token, keep, start, document = zip(*windows, strict=True)
        return cls(
            token=np.concatenate(token),
            keep=np.concatenate(keep),
            start=np.cumsum([0, *map(len, token)]),
            first_row=np.array(start, dtype=np.int64),
            document=np.array(document, dtype=np.int64),
        )

    @classmethod
    def kept_in(cls, folder: Path, make: Callable[[], "Text"] | None = None) -> "Text":
        """That of the folder; where it has none, a new one, which is put there."""
        path = folder / cls.FILE
        if make is not None and not path.exists():
            made = make()
            arrays = {name: getattr(made, name) for name in cls.__dataclass_fields__}
            write_atomic(path, lambda temporary: save_file(arrays, temporary))
        return cls(**load_file(path))

    @property
    def n_places(self) -> int:
        return len(self.token)

    @cached_property
    def n_rows(self) -> int:
        """Rows that are looked at."""
        return int(self.keep.sum())

    def window(self, place: Int[ndarray, "*shape"]) -> Int64[ndarray, "*shape"]:
        return np.searchsorted(self.start, place, side="right") - 1

    def row(self, place: Int[ndarray, "*shape"]) -> Int64[ndarray, "*shape"]:
        """Row of the cache."""
        window = self.window(place)
        row: ndarray = self.first_row[window] + place - self.start[window]
        return row

    def runs(self, there: Sequence[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
        """Bounds of runs of whole windows outside of those that are there, which rise; of at most
        `size` places where a window is not longer.

        They hang on no more than what is there, whoever asks; and where that was made of such runs,
        they are those of a pass that was not stopped.
        """
        gaps = zip(
            [0, *(last for _, last in there)],
            [*(first for first, _ in there), self.n_places],
            strict=True,
        )
        for first, last in gaps:
            at, end = (int(np.searchsorted(self.start, place)) for place in (first, last))
            while at < end:
                reach = int(np.searchsorted(self.start, self.start[at] + size, side="right")) - 1
                after = min(max(at + 1, reach), end)
                yield int(self.start[at]), int(self.start[after])
                at = after


@dataclass(frozen=True, eq=False)
class Actives:
    """Active latents of some latents, by latent and then by place."""

    latent: Int64[ndarray, " active"]
    place: Int64[ndarray, " active"]
    value: Float32[ndarray, " active"]

    def __getitem__(self, index: Any) -> "Actives":
        return Actives(self.latent[index], self.place[index], self.value[index])

    def __len__(self) -> int:
        return len(self.latent)


@dataclass(frozen=True, eq=False)
class Coded:
    """What an SAE makes of some rows: its active latents by place, and what it leaves of each."""

    place: Int64[ndarray, " active"]
    latent: Int64[ndarray, " active"]
    value: Float32[ndarray, " active"]
    of: Int64[ndarray, " row"]
    """Place of each row."""
    error: Float32[ndarray, " row"]
    """|x - x_hat|^2."""
    spread: Float32[ndarray, " row"]
    """|x - mu|^2."""


class Writer:
    """Collects the code of places in their order, and writes it in pieces."""

    def __init__(self, folder: Path, d_sae: int) -> None:
        self.folder, self.d_sae = folder, d_sae
        self._codes: list[Coded] = []
        self._first = self._next = 0

    def add(self, begin: int, end: int, coded: Coded) -> bool:
        """The rows of places begin..end; says whether all that it was given is on disk."""
        if begin != self._next:
            self.flush()
            self._first = begin
        self._codes.append(coded)
        self._next = end
        actives = sum(len(code.place) for code in self._codes)
        if end - self._first >= PLACES or actives >= ACTIVE:
            self.flush()
        return not self._codes

    def flush(self) -> None:
        if not self._codes:
            return
        place, latent, value, of, error, spread = (
            np.concatenate([getattr(code, name) for code in self._codes])
            for name in Coded.__dataclass_fields__
        )
        n_places = self._next - self._first
        order = np.argsort(latent, kind="stable")
        left = np.zeros((2, n_places), dtype=np.float32)
        left[:, of - self._first] = error, spread
        arrays = {
            "place": place[order].astype(np.int32),
            "value": value[order],
            "offset": _offsets(np.bincount(latent, minlength=self.d_sae)),
            "latent": latent.astype(np.int32),
            "first": _offsets(np.bincount(place - self._first, minlength=n_places)),
            "left": left,
        }
        path = self.folder / f"piece-{self._first:012d}-{self._next:012d}.safetensors"
        write_atomic(path, lambda temporary: save_file(arrays, temporary))
        self._first = self._next
        self._codes = []


class Spool:
    """The pieces, read by latent."""

    def __init__(self, folder: Path, n_places: int) -> None:
        """Raises SaekitError where the pieces do not have each place once."""
        self.bounds = self.there(folder)
        ends = [0, *(last for _, last in self.bounds)]
        begins = [*(first for first, _ in self.bounds), n_places]
        if ends != begins:
            at = next(end for end, begin in zip(ends, begins, strict=True) if end != begin)
            raise SaekitError(
                f"the pieces in {folder} do not have each place of the text once (see place {at}): "
                "several starts wrote there at once, or a process does not see the files of "
                "another. Delete the folder, and give the same command again"
            )
        self._pieces = [_mapped(path) for path in self.files(folder)]
        self.count = np.sum([np.diff(piece["offset"]) for piece in self._pieces], axis=0)
        """Actives of each latent."""
        self.error, self.spread = np.concatenate([piece["left"] for piece in self._pieces], axis=1)
        """|x - x_hat|^2 and |x - mu|^2 at each place, 0 where it is left out."""

    @staticmethod
    def files(folder: Path) -> list[Path]:
        return sorted(folder.glob("piece-*.safetensors"))

    @classmethod
    def there(cls, folder: Path) -> list[tuple[int, int]]:
        """Bounds of the pieces that are on disk, in order."""
        return [_bounds(path) for path in cls.files(folder)]

    def chunks(self, first: int, last: int, at_once: int) -> Iterator[tuple[int, int]]:
        """Bounds of runs of latents that have at most `at_once` actives, or are one latent."""
        total = np.concatenate([[0], np.cumsum(self.count[first:last])])
        at = 0
        while at < last - first:
            reach = int(np.searchsorted(total, total[at] + at_once, side="right")) - 1
            end = max(at + 1, reach)
            yield first + at, first + end
            at = end

    def actives(self, first: int, last: int) -> Actives:
        """Those of latents first..last, whose numbers then begin at 0."""
        parts = []
        for piece in self._pieces:
            offset = piece["offset"][first : last + 1]
            begin, end = int(offset[0]), int(offset[-1])
            latent = np.repeat(np.arange(last - first), np.diff(offset))
            place = piece["place"][begin:end].astype(np.int64)
            parts.append((latent, place, piece["value"][begin:end]))
        latent, place, value = (np.concatenate(part) for part in zip(*parts, strict=True))
        order = np.argsort(latent, kind="stable")
        return Actives(latent[order], place[order], value[order])

    def beside(
        self, actives: Actives
    ) -> Iterator[tuple[Int64[ndarray, " pair"], Int64[ndarray, " pair"]]]:
        """For each piece: pairs of an active's latent and a latent that fires at its place too."""
        for (begin, end), piece in zip(self.bounds, self._pieces, strict=True):
            here = (actives.place >= begin) & (actives.place < end)
            first = piece["first"]
            place = actives.place[here] - begin
            count = first[place + 1] - first[place]
            within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            at = np.repeat(first[place], count) + within
            yield np.repeat(actives.latent[here], count), piece["latent"][at]


def _mapped(path: Path) -> dict[str, ndarray]:
    """The arrays of a safetensors file, left on disk until they are looked into."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        described = json.loads(file.read(size))
    kinds = {"I32": np.int32, "I64": np.int64, "F32": np.float32}
    return {
        name: np.memmap(
            path, kinds[of["dtype"]], "r", 8 + size + of["data_offsets"][0], of["shape"]
        )
        if np.prod(of["shape"])
        else np.zeros(of["shape"], kinds[of["dtype"]])
        for name, of in described.items()
    }


def _offsets(count: Int[ndarray, " n"]) -> Int64[ndarray, " n_1"]:
    return np.concatenate([[0], np.cumsum(count)]).astype(np.int64)


def _bounds(path: Path) -> tuple[int, int]:
    """First place of a piece, and that behind its last."""
    _, first, last = path.stem.split("-")
    return int(first), int(last)
