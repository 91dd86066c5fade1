"""The files of a feature store, a run of latents at a time, from what is known of the latents."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64
from numpy import ndarray

from saekit.evals import _features_latents as found
from saekit.evals._features_latents import Cut, Entries
from saekit.evals._features_near import coactive
from saekit.evals._features_spool import Actives, Spool, Text
from saekit.features import CONTEXTS, KINDS, LATENTS, LISTS, Header, file_name
from saekit.files import new_file, write_atomic

AT_ONCE = 1 << 21
"""Actives that are looked at together, but where one latent has more."""

_COMPRESSION: dict[str, Any] = {"compression": "zstd", "compression_level": 3}


@dataclass(frozen=True, eq=False)
class Files:
    """What the files are made of."""

    folder: Path
    header: Header
    text: Text
    spool: Spool
    known: dict[str, ndarray]
    """Columns of all latents that are there already, by name."""
    peaks: Int64[ndarray, "d_sae peak"]
    """Places where each latent is strongest; -1 for no more."""
    documents: Int64[ndarray, " used"]
    """Numbers in the cache of the documents of the store, in order."""
    n_vocab: int

    @property
    def count(self) -> int:
        return -(-self.header.d_sae // self.header.latents_per_file)

    def bounds(self, number: int) -> tuple[int, int]:
        """The latents of a file."""
        per_file = self.header.latents_per_file
        return number * per_file, min((number + 1) * per_file, self.header.d_sae)

    def there(self, number: int) -> bool:
        """Whether a file's last part was written."""
        return (self.folder / file_name("latents", number)).is_file()

    def write(self, number: int) -> Iterator[int]:
        """Write the three files of a run of latents; gives how many latents each step took."""
        first, last = self.bounds(number)
        tokens = []
        with (
            new_file(self.folder / file_name("latents", number)) as for_latents,
            new_file(self.folder / file_name("tokens", number)) as for_tokens,
            new_file(self.folder / file_name("contexts", number)) as for_contexts,
        ):
            with (
                pq.ParquetWriter(for_latents, LATENTS, **_COMPRESSION) as of_latents,
                pq.ParquetWriter(for_contexts, CONTEXTS, **_COMPRESSION) as of_contexts,
            ):
                for begin in range(first, last, self.header.latents_per_group):
                    end = min(begin + self.header.latents_per_group, last)
                    parts = [self._some(*some) for some in self.spool.chunks(begin, end, AT_ONCE)]
                    rows, contexts = (pa.concat_tables(part[at] for part in parts) for at in (0, 1))
                    of_latents.write_table(rows, row_group_size=max(1, len(rows)))
                    of_contexts.write_table(contexts, row_group_size=max(1, len(contexts)))
                    tokens += [part[2] for part in parts]
                    yield end - begin
            flat = np.concatenate(tokens).ravel()
            pq.write_table(
                pa.table({"token": flat}), for_tokens, use_dictionary=False, compression="none"
            )

    def _some(self, first: int, last: int) -> tuple[Any, Any, ndarray]:
        """Rows of latents first..last, their contexts, and the tokens of the strongest."""
        cfg, n = self.header.config, last - first
        actives = self.spool.actives(first, last)
        near, share = coactive(actives, n, first, self.spool, cfg["near"])
        candidates = np.concatenate(
            [self._peaks_of(self.known["near"][first:last]), self._peaks_of(near)], axis=1
        )
        width = self.header.window
        entries = Entries.joined(
            found.peaks(actives, self.text, cfg["n_contexts"]),
            found.samples(actives, first, cfg["quantiles"], cfg["n_samples"], cfg["seed"]),
            found.silent(actives, candidates, self.text, width, cfg["n_silent"]),
        )
        cut = found.cut(entries, actives, self.text, width)
        lists = {"coactive": _lists(near, near >= 0), "coactive_jaccard": _lists(share, near >= 0)}
        rows = self._rows(first, last, actives, lists)
        return rows, self._contexts(first, entries, cut), self._top_tokens(n, entries, cut)

    def _peaks_of(self, near: ndarray) -> Int64[ndarray, "latent candidate"]:
        """The strongest places of near latents, the nearest latent's strongest first, and then the
        next one's strongest."""
        places = np.where(near[..., None] >= 0, self.peaks[near], -1)
        return places.swapaxes(1, 2).reshape(len(near), -1)

    def _rows(self, first: int, last: int, actives: Actives, lists: dict[str, Any]) -> Any:
        cfg, n = self.header.config, last - first
        tokens = found.input_tokens(actives, self.text, cfg["top"])
        begin = np.searchsorted(tokens.latent, np.arange(n + 1)).astype(np.int32)
        edges = found.edges(actives, n, cfg["quantiles"])
        columns: dict[str, Any] = {
            "latent": np.arange(first, last, dtype=np.int32),
            **found.scalars(actives, n, self.header.n_rows),
            "unexplained": self._unexplained(actives, n),
            "histogram": _lists(found.histogram(actives, n, cfg["bins"])),
            "edges": pa.array([list(some) for some in edges], pa.list_(pa.float32())),
            "input_token": pa.ListArray.from_arrays(begin, tokens.token.astype(np.int32)),
            "input_share": pa.ListArray.from_arrays(begin, tokens.share.astype(np.float32)),
            "input_count": pa.ListArray.from_arrays(begin, tokens.count.astype(np.int64)),
            **lists,
        }
        for name, values in self.known.items():
            columns[name] = _lists(values[first:last]) if name in LISTS else values[first:last]
        arrays = [pa.array(columns[field.name]).cast(field.type) for field in LATENTS]
        return pa.Table.from_arrays(arrays, schema=LATENTS)

    def _unexplained(self, actives: Actives, n: int) -> ndarray:
        error, spread = (
            np.bincount(actives.latent, per_place[actives.place], minlength=n)
            for per_place in (self.spool.error, self.spool.spread)
        )
        return found.divided(error, spread)

    def _contexts(self, first: int, entries: Entries, cut: Cut) -> Any:
        document = self.text.document[self.text.window(entries.place)]
        begin = cut.begin.astype(np.int32)
        columns = {
            "latent": entries.latent + first,
            "kind": np.array(KINDS)[entries.kind],
            "group": entries.group,
            "rank": entries.rank,
            "row": self.text.row(entries.place),
            "at": cut.at,
            "act": cut.act,
            "unexplained": found.divided(
                self.spool.error[entries.place], self.spool.spread[entries.place]
            ),
            "document": np.searchsorted(self.documents, document),
            "tokens": pa.ListArray.from_arrays(begin, cut.tokens.astype(np.int32)),
            "acts": pa.ListArray.from_arrays(begin, cut.acts),
        }
        arrays = [pa.array(columns[field.name]).cast(field.type) for field in CONTEXTS]
        return pa.Table.from_arrays(arrays, schema=CONTEXTS)

    def _top_tokens(self, n: int, entries: Entries, cut: Cut) -> ndarray:
        """The tokens of the strongest contexts, and an empty place behind each."""
        kind = np.uint16 if self.n_vocab < 2**16 else np.uint32
        shape = (n, self.header.n_contexts, self.header.window + 1)
        tokens = np.full(shape, self.n_vocab, dtype=kind)
        length = np.diff(cut.begin)
        entry = np.repeat(np.arange(len(entries)), length)
        within = np.arange(len(entry)) - np.repeat(cut.begin[:-1], length)
        top = entries.kind[entry] == found.TOP
        entry = entry[top]
        tokens[entries.latent[entry], entries.rank[entry], within[top]] = cut.tokens[top]
        return tokens


def write_texts(path: Path, texts: Sequence[str]) -> None:
    # A lone surrogate, which some tokenizers have, is no text to Parquet.
    shown = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
    table = pa.table({"text": pa.array(shown, pa.string())})
    write_atomic(path, lambda temporary: pq.write_table(table, temporary, **_COMPRESSION))


def _lists(values: ndarray, there: ndarray | None = None) -> Any:
    """Rows of a matrix as lists, of those entries that are there."""
    if there is None:
        begin, flat = np.arange(len(values) + 1) * values.shape[1], values.ravel()
    else:
        begin, flat = np.concatenate([[0], np.cumsum(there.sum(1))]), values[there]
    return pa.ListArray.from_arrays(begin.astype(np.int32), flat)
