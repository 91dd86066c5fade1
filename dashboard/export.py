"""Features to hand on: as one HTML page, as CSV, in the layout that Neuronpedia takes, and as a
static site of all of them that opens from the disk.

Nothing written here needs a network or a server, and all text of a corpus is shown as text.
"""

import csv
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from markupsafe import Markup
from numpy import ndarray

from saekit import plot
from saekit.dashboard import _notes, _render, features
from saekit.dashboard.data import Context, Run, quote, show_token
from saekit.errors import SaekitError
from saekit.features import FeatureStore, Latent, Passage
from saekit.files import write_text

BLOCK = 32
"""Latents of a block of the site."""
MARK = ".saekit-site"
"""Names the folders that a site may be written into again."""

_DIGITS = 4


def html_page(run: Run, store: FeatureStore, latents: Sequence[int]) -> str:
    """A page of some latents that stands alone: no script, no network."""
    shown, labels = [], _notes.labels(run)
    for latent in store.scan(latents):
        maximum = latent.numbers["maximum"]
        kinds = [("Strongest", features.contexts(store, latent))]
        for group, (low, high) in reversed(list(enumerate(_ranges(latent)))):
            title = f"Drawn at random from {_render.number(low)} to {_render.number(high)}"
            kinds.append((title, features.contexts(store, latent, "sample", group)))
        kinds.append(
            ("Silent, where near latents fire", features.contexts(store, latent, "silent"))
        )
        shown.append(
            {
                "index": latent.index,
                "label": show_token(labels.get(latent.index, "")),
                "numbers": latent.numbers,
                "contexts": [
                    (title, Markup(_render.contexts_html(some, maximum)))
                    for title, some in kinds
                    if some
                ],
                "fires_on": Markup(_render.bars_html(features.input_tokens(store, latent))),
                "histogram": Markup(plot.histogram_svg(latent.lists["histogram"], maximum)),
                "promoted": features.promoted(store, latent),
                "suppressed": features.suppressed(store, latent),
                "near": features.neighbours(store, latent, "near"),
            }
        )
    return _render.render(
        "features.html.j2",
        run=run.path.resolve().name,
        model=run.model,
        header=store.header,
        latents=shown,
        style=_render.style(),
    )


def csv_table(run: Run, store: FeatureStore, latents: Sequence[int]) -> str:
    """A row for each latent. Text that a spreadsheet would take for a formula gets a ' in front."""
    columns = features.table(store, np.asarray(latents, dtype=np.int64))
    columns["label"] = _labels(run, latents)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*(values.tolist() for values in columns.values()), strict=True):
        writer.writerow([_no_formula(value) if isinstance(value, str) else value for value in row])
    return file.getvalue()


def neuronpedia(store: FeatureStore, latents: Sequence[int], sae_set: str) -> dict[str, Any]:
    """Some latents in the layout of SAEDashboard's `batch-N.json`, which Neuronpedia takes.

    What it calls correlated features and neurons, and a histogram of logits, are not in the store,
    and stay empty.
    """
    of = store.header
    layer = [int(part) for part in of.hook.split(".") if part.isdigit()]
    return {
        "model_id": of.model,
        "layer": layer[0] if layer else 0,
        "sae_set": sae_set,
        "sae_id_suffix": None,
        "features": [_for_neuronpedia(store, latent) for latent in store.scan(latents)],
    }


def write_neuronpedia(
    store: FeatureStore, latents: Sequence[int], out: Path, sae_set: str, per_batch: int = 128
) -> None:
    """Latents in files `batch-0.json` and on, in a folder."""
    for number, at in enumerate(range(0, len(latents), per_batch)):
        batch = neuronpedia(store, latents[at : at + per_batch], sae_set)
        write_text(out / f"batch-{number}.json", json.dumps(batch, allow_nan=False))


def store_of(run: Run) -> FeatureStore:
    """The run's feature store. Raises SaekitError where there is none."""
    if run.features is None:
        raise SaekitError(
            f"{run.path} has no feature store yet; make it first: "
            f"`saekit features build {quote(str(run.path))}`"
        )
    return run.features


def write_site(run: Run, out: Path) -> Path:
    """A static site of all latents; returns its page. It opens from the disk, without a network.

    Raises SaekitError where there is no feature store, and where the folder holds something else.
    """
    store = store_of(run)
    if out.exists() and not (out / MARK).exists() and any(out.iterdir()):
        raise SaekitError(
            f"{out} holds files that are no site of saekit's: give a folder that is empty or new"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / MARK, "")
    (out / "index.html").unlink(missing_ok=True)
    shutil.rmtree(out / "blocks", ignore_errors=True)
    write_text(out / "list.js", f"saekitList({_json(_list(run, store))});\n")
    for number, first in enumerate(range(0, store.d_sae, BLOCK)):
        last = min(first + BLOCK, store.d_sae)
        block = [_for_site(store, latent) for latent in store.scan(range(first, last))]
        write_text(out / "blocks" / f"{number}.js", f"saekitBlock({number}, {_json(block)});\n")
    page = _render.render(
        "site.html.j2",
        run=run.path.resolve().name,
        model=run.model,
        header=store.header,
        block=BLOCK,
        style=_render.style(),
    )
    write_text(out / "index.html", page)
    return out / "index.html"


def _labels(run: Run, latents: Sequence[int]) -> Shaped[ndarray, " latent"]:
    known = _notes.labels(run)
    return np.array([show_token(known.get(index, "")) for index in latents], dtype=object)


def _list(run: Run, store: FeatureStore) -> dict[str, Any]:
    columns = features.table(store, np.arange(store.d_sae))
    columns["label"] = _labels(run, range(store.d_sae))
    return {
        name: values.tolist() if values.dtype == object else _rounded(values)
        for name, values in columns.items()
        if name != "latent"
    }


def _for_site(store: FeatureStore, latent: Latent) -> dict[str, Any]:
    groups = [("Strongest", features.contexts(store, latent))]
    for group, (low, high) in reversed(list(enumerate(_ranges(latent)))):
        title = f"{_render.number(low)} to {_render.number(high)}"
        groups.append((title, features.contexts(store, latent, "sample", group)))
    groups.append(("Silent nearby", features.contexts(store, latent, "silent")))
    return {
        "maximum": _rounded(np.array([latent.numbers["maximum"]]))[0],
        "mean": _rounded(np.array([latent.numbers["mean_active"]]))[0],
        "contexts": [[title, [_short(context) for context in some]] for title, some in groups],
        "histogram": latent.lists["histogram"].tolist(),
        "tokens": [[token.name, token.share] for token in features.input_tokens(store, latent)],
        "up": [[token.name, token.logit] for token in features.promoted(store, latent)],
        "down": [[token.name, token.logit] for token in features.suppressed(store, latent)],
        "near": [[one.latent, one.near] for one in features.neighbours(store, latent, "near")],
        "coactive": [
            [one.latent, one.near] for one in features.neighbours(store, latent, "coactive")
        ],
    }


def _short(context: Context) -> list[Any]:
    """Document, place of the token picked, tokens, and the activations that are not 0."""
    at = next((at for at, span in enumerate(context.spans) if span.is_peak), 0)
    acts = {at: round(span.act, 3) for at, span in enumerate(context.spans) if span.act != 0}
    return [context.document, at, [span.text for span in context.spans], acts]


def _ranges(latent: Latent) -> list[tuple[float, float]]:
    edges = latent.lists["edges"].tolist()
    return list(zip(edges, edges[1:], strict=False))


def _for_neuronpedia(store: FeatureStore, latent: Latent) -> dict[str, Any]:
    of = store.header
    bars = len(latent.lists["histogram"])
    step = latent.numbers["maximum"] / bars if bars else 0.0
    ranges = _ranges(latent)
    activations = [
        _activation(store, passage, -1.0, latent.numbers["maximum"], -1.0)
        for passage in latent.of("top")
    ]
    for group, (low, high) in reversed(list(enumerate(ranges))):
        activations += [
            _activation(store, passage, low, high, 1 / len(ranges))
            for passage in latent.of("sample", group)
        ]
    empty: dict[str, list[Any]] = {name: [] for name in _NOT_THERE}
    return empty | {
        "feature_index": latent.index,
        "neg_str": [store.vocab[token] for token in latent.lists["suppressed"].tolist()],
        "neg_values": _rounded(latent.lists["suppressed_logit"]),
        "pos_str": [store.vocab[token] for token in latent.lists["promoted"].tolist()],
        "pos_values": _rounded(latent.lists["promoted_logit"]),
        "frac_nonzero": latent.numbers["density"],
        "freq_hist_data_bar_values": _rounded(step * (np.arange(bars) + 0.5)),
        "freq_hist_data_bar_heights": latent.lists["histogram"].tolist(),
        "n_prompts_total": of.n_rows // of.window,
        "n_tokens_in_prompt": of.window,
        "dataset": "",
        "activations": activations,
    }


_NOT_THERE = (
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_l1",
    "correlated_neurons_pearson",
    "correlated_features_indices",
    "correlated_features_l1",
    "correlated_features_pearson",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
    "vector",
)


def _activation(
    store: FeatureStore, passage: Passage, low: float, high: float, contains: float
) -> dict[str, Any]:
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": contains,
        "tokens": [store.vocab[token] for token in passage.tokens.tolist()],
        "values": _rounded(passage.acts),
        "qualifying_token_index": passage.at,
    }


def _rounded(values: Float[ndarray, " n"]) -> list[float | None]:
    """To so many digits as are worth their bytes; None for what is no number."""
    exact = np.asarray(values, dtype=np.float64)
    return [float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None for value in exact]


def _json(value: Any) -> str:
    """JSON for the inside of a script, in the narrowest form."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _no_formula(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
