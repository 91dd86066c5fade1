"""The feature store of a run: what each latent of an SAE does, latent by latent, as Parquet files.

`saekit features build` writes it into `results/features`; report and dashboard read it. No torch
here. Every latent has one row in `latents-*.parquet` (numbers and short lists), some in
`contexts-*.parquet` (pieces of text), and one in `tokens-*.parquet`, which holds the tokens of its
strongest contexts once more, flat, for search. A file holds `latents_per_file` latents, and in a
file of contexts each row group is of `latents_per_group` of them, so that one latent is read
without its neighbours. `features.json` is the store's header. The store appears whole, by a rename.

Axes: d_sae (latents), bin, token (of a context), top (most promoted tokens and the like, the most
first), vocab.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int, Shaped, UInt
from numpy import ndarray

from saekit.errors import SaekitError, first_line
from saekit.results import RESULTS

NAME = "features"
"""The store's folder, inside a run's results."""
HEADER = "features.json"
FORMAT, VERSION = "saekit-features", 1
BUILDING = ".features.building"
"""The folder beside it in which the next one is being made."""
PROGRESS = "progress.json"

Kind = Literal["top", "sample", "silent"]
KINDS: tuple[Kind, ...] = ("top", "sample", "silent")

CONTEXTS = pa.schema(
    [
        ("latent", pa.int32()),
        ("kind", pa.string()),
        ("group", pa.int8()),
        ("rank", pa.int16()),
        ("row", pa.int64()),
        ("at", pa.int16()),
        ("act", pa.float32()),
        ("unexplained", pa.float32()),
        ("document", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
        ("acts", pa.list_(pa.float32())),
    ]
)
"""A piece of text each. `kind`: "top", the strongest activation of its window of text; "sample", an
activation drawn at random of `group`, the latent's quantile (0: the weakest); "silent", where
latents near to this one are strongest and this one does not fire. `row` of the cache and column
`at` of `tokens` are where, `act` how strong (of a silent one 0), and `unexplained` what the SAE
leaves of that row: |x - x_hat|^2 / |x - mu|^2, mu the mean of the cache."""

SCALARS = {
    "active": "rows on which it fires (is not 0)",
    "density": "share of the rows on which it fires",
    "maximum": "largest activation; 0 where none is above 0",
    "mean": "mean over all rows, those where it is silent too",
    "mean_active": "mean over the rows on which it fires",
    "std": "standard deviation over all rows",
    "skewness": "m3 / m2^(3/2), m the central moments over all rows",
    "kurtosis": "m4 / m2^2, m the central moments over all rows; a normal distribution has 3",
    "unexplained": "sum |x - x_hat|^2 / sum |x - mu|^2 over the rows on which it fires, mu the "
    "mean of the cache: the share of their variance that the SAE leaves in the dark",
    "logit_std": "standard deviation of its direct effect on the logits, over the vocabulary",
    "logit_skewness": "m3 / m2^(3/2) of that effect over the vocabulary",
    "logit_kurtosis": "m4 / m2^2 of that effect over the vocabulary; a normal distribution has 3",
    "nearest_cosine": "cosine of its decoder row with the nearest other one",
    "x": "place on the map of decoder directions",
    "y": "place on the map of decoder directions",
}
"""The numbers of a latent, by column. NaN where one is not defined."""

LISTS = {
    "histogram": pa.int64(),
    "edges": pa.float32(),
    "input_token": pa.int32(),
    "input_share": pa.float32(),
    "input_count": pa.int64(),
    "promoted": pa.int32(),
    "promoted_logit": pa.float32(),
    "suppressed": pa.int32(),
    "suppressed_logit": pa.float32(),
    "near": pa.int32(),
    "near_cosine": pa.float32(),
    "coactive": pa.int32(),
    "coactive_jaccard": pa.float32(),
}
"""Short lists of a latent. `histogram`: counts of values above 0, in equal bins from 0 to the
maximum; `edges`: values between its quantiles, least and largest included; `input_...`: tokens that
it fires on, by their share of the sum of its positive values, with the count of rows; `promoted`,
`suppressed`: output tokens whose logit its decoder row raises or lowers most; `near`: latents by
the cosine of decoder rows; `coactive`: latents by rows where both fire over rows where either
does."""

LATENTS = pa.schema(
    [("latent", pa.int32())]
    + [(name, pa.int64() if name == "active" else pa.float64()) for name in SCALARS]
    + [(name, pa.list_(of)) for name, of in LISTS.items()]
)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the store is of, and how it is laid out."""

    d_sae: int
    hook: str
    model: str
    n_rows: int
    """Rows looked at."""
    split: str
    exclude: tuple[str, ...]
    sae_fingerprint: str | None
    """Of the weights, so that nothing mixes them with another SAE's."""
    cache_fingerprint: str
    config: dict[str, Any]
    """Of the evaluation that wrote it."""
    n_contexts: int
    window: int
    quantiles: int
    latents_per_file: int
    latents_per_group: int
    format: str = FORMAT
    version: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Header":
        """Raises SaekitError for another format or version."""
        found = values.get("format"), values.get("version")
        if found != (FORMAT, VERSION):
            raise SaekitError(
                f"format {found[0]!r}, version {found[1]!r} is not {FORMAT!r}, version {VERSION}"
            )
        known = {f.name for f in fields(cls)}
        return cls(
            **{
                **{k: v for k, v in values.items() if k in known},
                "exclude": tuple(values["exclude"]),
            }
        )


@dataclass(frozen=True, eq=False)
class Passage:
    """A context of a latent: see `CONTEXTS`."""

    kind: Kind
    group: int
    row: int
    at: int
    act: float
    unexplained: float
    document: int
    tokens: Int[ndarray, " token"]
    acts: Float[ndarray, " token"]


@dataclass(frozen=True)
class TokenLogit:
    """An output token and how much a latent's decoder direction raises (or lowers) its logit."""

    name: str
    logit: float


@dataclass(frozen=True, eq=False)
class Latent:
    """All there is to know of one latent."""

    index: int
    numbers: dict[str, float]
    """By the names in `SCALARS`."""
    lists: dict[str, Shaped[ndarray, " top"]]
    """By the names in `LISTS`."""
    passages: list[Passage]

    def of(self, kind: Kind, group: int | None = None) -> list[Passage]:
        """Its contexts of a kind, in their order."""
        return [p for p in self.passages if p.kind == kind and group in (None, p.group)]

    @property
    def dead(self) -> bool:
        """Whether it fired on none of the rows looked at."""
        return self.numbers["active"] == 0


class FeatureStore:
    """A finished store, read piece by piece. Columns once read are kept; contexts are not."""

    def __init__(self, folder: Path, header: Header) -> None:
        self.folder = folder
        self.header = header
        self._columns: dict[str, ndarray] = {}
        self._lists: dict[str, tuple[ndarray, ndarray]] = {}
        self._reading = Lock()  # who asks for the same meanwhile waits for it

    @classmethod
    def open(cls, results: Path) -> "FeatureStore":
        """The store of a folder of results. Raises SaekitError where there is none, and where its
        header or a file of it is damaged or missing."""
        folder = results / NAME
        path = folder / HEADER
        try:
            header = Header.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise SaekitError(
                f"{folder} holds no feature store: {path.name} is not there"
            ) from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError, SaekitError) as error:
            raise SaekitError(f"{path} cannot be read ({error})") from error
        store = cls(folder, header)
        store._check()
        return store

    @staticmethod
    def exists(results: Path) -> bool:
        return (results / NAME / HEADER).is_file()

    @property
    def d_sae(self) -> int:
        return self.header.d_sae

    @cached_property
    def vocab(self) -> list[str]:
        """Every token as text, by id."""
        return self._texts("vocab.parquet")

    @cached_property
    def documents(self) -> list[str]:
        """Names of the documents that contexts are of."""
        return self._texts("documents.parquet")

    def column(self, name: str) -> Shaped[ndarray, " d_sae"]:
        """One number of every latent: see `SCALARS`. Shared: nothing may change it."""
        self.load([name])
        return self._columns[name]

    def load(self, names: Iterable[str]) -> None:
        """Read several numbers of every latent in one pass, for `column` to give."""
        with self._reading:
            missing = [name for name in names if name not in self._columns]
            if missing:
                table = self._read(missing)
                self._columns |= {name: table[name].to_numpy() for name in missing}

    def lists(self, name: str) -> tuple[Int[ndarray, " bounds"], Shaped[ndarray, " entries"]]:
        """One list of every latent: where each begins (and the last ends), and all of them, end to
        end."""
        with self._reading:
            if name not in self._lists:
                whole = self._read([name])[name].combine_chunks()
                begin = whole.offsets.to_numpy()
                self._lists[name] = begin - begin[0], whole.flatten().to_numpy()
        return self._lists[name]

    @cached_property
    def top_tokens(self) -> UInt[ndarray, "d_sae place"]:
        """The tokens of each latent's strongest contexts, each context in `window` places and an
        empty one behind, which hold `len(vocab)` where there is no token. For search."""
        per_file, files = self.header.latents_per_file, self._files("tokens")
        tokens = np.zeros((0, 0))
        for number, path in enumerate(files):
            first, last = number * per_file, min(self.d_sae, (number + 1) * per_file)
            part = self._table(path, ["token"])["token"].to_numpy().reshape(last - first, -1)
            if not number:  # one copy of what is large
                tokens = np.empty((self.d_sae, part.shape[1]), part.dtype)
            tokens[first:last] = part
        return tokens

    def latent(self, index: int) -> Latent:
        """Read one latent. Raises SaekitError where the SAE has none of that number."""
        return next(self.scan([index]))

    def scan(self, latents: Iterable[int]) -> Iterator[Latent]:
        """Read latents one by one, in the order given; those that follow their neighbours cost
        little. Raises SaekitError at the first number that the SAE does not have."""
        group, rows = None, {}
        for index in latents:
            if not 0 <= index < self.d_sae:
                raise SaekitError(f"there is no latent {index}: this SAE has 0 to {self.d_sae - 1}")
            number, within = divmod(index, self.header.latents_per_file)
            wanted = number, within // self.header.latents_per_group
            if wanted != group:
                group = wanted
                rows = {part: self._group(part, *wanted) for part in ("latents", "contexts")}
            yield _as_latent(index, *(_rows_of(table, index) for table in rows.values()))

    def _group(self, part: str, number: int, group: int) -> Any:
        """A row group of a part of the store, as an Arrow table."""
        path = self._file(part, number)
        with self._open(path) as file, _in_words(path):
            return file.read_row_group(group, use_threads=False)

    def _read(self, names: list[str]) -> Any:
        return pa.concat_tables([self._table(path, names) for path in self._files("latents")])

    def _texts(self, name: str) -> list[str]:
        texts: list[str] = self._table(self.folder / name, ["text"])["text"].to_pylist()
        return texts

    def _table(self, path: Path, columns: list[str]) -> Any:
        with self._open(path) as file, _in_words(path):
            return file.read(columns)

    def _open(self, path: Path) -> Any:
        with _in_words(path):
            return pq.ParquetFile(path, memory_map=True)

    def _file(self, part: str, number: int) -> Path:
        return self.folder / file_name(part, number)

    def _files(self, part: str) -> list[Path]:
        count = -(-self.d_sae // self.header.latents_per_file)
        return [self._file(part, number) for number in range(count)]

    def _check(self) -> None:
        """That every file is there, opens, and holds as many rows as it should."""
        per_file = self.header.latents_per_file
        for part in ("latents", "contexts", "tokens"):
            for number, path in enumerate(self._files(part)):
                with self._open(path) as file:
                    found, groups = file.metadata.num_rows, file.num_row_groups
                latents = min(per_file, self.d_sae - number * per_file)
                whole = {
                    "latents": found == latents,
                    "contexts": groups == -(-latents // self.header.latents_per_group),
                    "tokens": found % latents == 0,
                }
                if not whole[part]:
                    raise SaekitError(f"{path} holds {found} rows, not those of {latents} latents")
        for name in ("vocab.parquet", "documents.parquet"):
            self._open(self.folder / name).close()


def _rows_of(table: Any, index: int) -> list[dict[str, Any]]:
    first, last = np.searchsorted(table["latent"].to_numpy(), [index, index + 1])
    rows: list[dict[str, Any]] = table.slice(int(first), int(last - first)).to_pylist()
    return rows


def _as_latent(index: int, row: list[dict[str, Any]], contexts: list[dict[str, Any]]) -> Latent:
    numbers = {name: float(row[0][name]) for name in SCALARS}
    lists = {name: np.array(row[0][name], dtype=of.to_pandas_dtype()) for name, of in LISTS.items()}
    passages = [
        Passage(
            kind=p["kind"],
            group=p["group"],
            row=p["row"],
            at=p["at"],
            act=p["act"],
            unexplained=p["unexplained"],
            document=p["document"],
            tokens=np.array(p["tokens"], dtype=np.int32),
            acts=np.array(p["acts"], dtype=np.float32),
        )
        for p in contexts
    ]
    return Latent(index, numbers, lists, passages)


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise SaekitError(f"{path} cannot be read ({first_line(error)})") from error


def file_name(part: str, number: int) -> str:
    """A file of a part of the store: "latents", "contexts" or "tokens"."""
    return f"{part}-{number:05d}.parquet"


@dataclass(frozen=True)
class Progress:
    """How far the making of a store is."""

    phase: str
    done: int
    total: int


def progress(results: Path) -> Progress | None:
    """Of the store that is being made, or was when its maker stopped; None where none is."""
    try:
        text = (results / BUILDING / PROGRESS).read_text(encoding="utf-8")
    except OSError:
        return None
    return Progress(**json.loads(text))


def results_of(run: Path) -> Path:
    """The folder of a run's results."""
    return run / RESULTS
