"""A run with a feature store of any number of latents, drawn at random: of the shape that `saekit
features build` writes, without the SAE that it would be of.

Axes: latent (those of a row group), context, pos.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray

from saekit.features import CONTEXTS, LATENTS, LISTS, NAME, SCALARS, Header, file_name, results_of
from saekit.files import write_json

TOP, SAMPLES, SILENT, WINDOW, QUANTILES, BINS, LISTED = 12, 4, 6, 24, 5, 24, 10
PER_FILE, PER_GROUP = 4096, 128
N_ROWS = 10_000_000
N_CONTEXTS = TOP + QUANTILES * SAMPLES + SILENT


def write_run(run: Path, d_sae: int, vocab: list[str], seed: int = 0) -> None:
    """One latent in a hundred is dead."""
    folder = results_of(run) / NAME
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    options: dict[str, Any] = {"compression": "zstd", "compression_level": 3}
    for number, first in enumerate(range(0, d_sae, PER_FILE)):
        last = min(first + PER_FILE, d_sae)
        flat = []
        with (
            pq.ParquetWriter(folder / file_name("latents", number), LATENTS, **options) as latents,
            pq.ParquetWriter(folder / file_name("contexts", number), CONTEXTS, **options) as texts,
        ):
            for begin in range(first, last, PER_GROUP):
                some = np.arange(begin, min(begin + PER_GROUP, last))
                latents.write_table(_latents(some, d_sae, len(vocab), rng))
                table, tokens = _contexts(some, len(vocab), rng)
                texts.write_table(table)
                flat.append(tokens)
        top = np.full((last - first, TOP, WINDOW + 1), len(vocab), dtype=np.uint16)
        top[..., :WINDOW] = np.concatenate(flat)
        pq.write_table(
            pa.table({"token": top.ravel()}),
            folder / file_name("tokens", number),
            use_dictionary=False,
            compression="none",
        )
    documents = [f"document/{at}" for at in range(1000)]
    for name, texts_ in {"vocab": vocab, "documents": documents}.items():
        pq.write_table(pa.table({"text": texts_}), folder / f"{name}.parquet")
    header = Header(
        d_sae=d_sae,
        hook="resid_post.1",
        model="demo",
        n_rows=N_ROWS,
        split="all",
        exclude=("special",),
        sae_fingerprint="f" * 64,
        cache_fingerprint="c" * 64,
        config={},
        n_contexts=TOP,
        window=WINDOW,
        quantiles=QUANTILES,
        latents_per_file=PER_FILE,
        latents_per_group=PER_GROUP,
    )
    write_json(folder / "features.json", header.to_dict())
    config = {"kind": "topk", "cache": "none", "hook": "resid_post.1", "d_sae": d_sae, "k": 64}
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items())
    (run / "config.toml").write_text(lines, encoding="utf-8")
    write_json(run / "config.json", {"d_sae": d_sae, "fingerprint": "f" * 64})


def _latents(some: ndarray, d_sae: int, n_vocab: int, rng: np.random.Generator) -> Any:
    n = len(some)
    dead = some % 100 == 99
    columns: dict[str, ndarray] = {name: rng.normal(size=n) for name in SCALARS}
    density = np.where(dead, 0.0, 10 ** rng.uniform(-5, -1, n))
    columns |= {
        "active": (density * N_ROWS).astype(np.int64),
        "density": density,
        "maximum": np.where(dead, 0.0, rng.lognormal(1, 0.5, n)),
        "kurtosis": 1 / np.maximum(density, 1e-6),
        "unexplained": rng.uniform(0, 1, n),
        "nearest_cosine": rng.uniform(0, 1, n),
    }
    arrays = [pa.array(some.astype(np.int32))]
    arrays += [pa.array(columns[name]) for name in SCALARS]
    for name, kind in LISTS.items():
        length = {"histogram": BINS, "edges": QUANTILES + 1}.get(name, LISTED)
        high = {"near": d_sae, "coactive": d_sae}.get(name, n_vocab)
        whole = pa.types.is_integer(kind)
        shape = (n, length)
        values = (
            rng.integers(0, high, shape) if whole else np.sort(rng.uniform(0, 1, shape))[:, ::-1]
        )
        if name == "edges":
            values = values[:, ::-1]
        arrays.append(_lists(values, kind))
    return pa.Table.from_arrays(
        [array.cast(field.type) for array, field in zip(arrays, LATENTS, strict=True)],
        schema=LATENTS,
    )


def _contexts(some: ndarray, n_vocab: int, rng: np.random.Generator) -> tuple[Any, ndarray]:
    n = len(some)
    shape = (n, N_CONTEXTS, WINDOW)
    tokens = rng.integers(0, n_vocab, shape)
    acts = np.where(rng.uniform(size=shape) < 0.1, rng.lognormal(0, 0.5, shape), 0)
    acts[:, :, WINDOW // 2] = np.sort(rng.lognormal(1, 0.5, shape[:2]))[:, ::-1]
    acts[:, -SILENT:] = 0
    kinds = ["top"] * TOP + ["sample"] * (QUANTILES * SAMPLES) + ["silent"] * SILENT
    groups = [0] * TOP + [at // SAMPLES for at in range(QUANTILES * SAMPLES)] + [0] * SILENT
    ranks = [*range(TOP), *(at % SAMPLES for at in range(QUANTILES * SAMPLES)), *range(SILENT)]
    columns = [
        np.repeat(some, N_CONTEXTS),
        np.tile(kinds, n),
        np.tile(groups, n),
        np.tile(ranks, n),
        rng.integers(0, N_ROWS, n * N_CONTEXTS),
        np.full(n * N_CONTEXTS, WINDOW // 2),
        acts[:, :, WINDOW // 2].ravel(),
        rng.uniform(0, 1, n * N_CONTEXTS),
        rng.integers(0, 1000, n * N_CONTEXTS),
    ]
    arrays = [pa.array(column) for column in columns]
    arrays += [_lists(tokens.reshape(-1, WINDOW), pa.int32())]
    arrays += [_lists(acts.reshape(-1, WINDOW), pa.float32())]
    table = pa.Table.from_arrays(
        [array.cast(field.type) for array, field in zip(arrays, CONTEXTS, strict=True)],
        schema=CONTEXTS,
    )
    return table, tokens[:, :TOP]


def _lists(values: ndarray, kind: Any) -> Any:
    begin = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(begin, pa.array(values.ravel()).cast(kind))
