"""The latents: a table to search, sort and filter, or a map of their directions, and beside it the
chosen one.
"""

import sys

import numpy as np
import streamlit as st
from numpy import ndarray

from saekit import plot
from saekit.dashboard import (
    _building,
    _notes,
    _render,
    features,
    screen_address,
    screen_feature,
    screen_parts,
)
from saekit.dashboard._folder import Folder
from saekit.dashboard._notes import Note
from saekit.dashboard.data import Run, show_token
from saekit.dashboard.features import Query, Show, SortBy, Where
from saekit.dashboard.screen_address import Field, one_of, whole
from saekit.errors import SaekitError
from saekit.features import FeatureStore

WRITE = "--write"
"""Argument of the app: whether the browser may write into the run."""

EXPORTED = 100
"""Latents of a selection that are handed on at once; of all there is the static site."""

ROWS = 500
"""Rows of the table at once: the web browser gets them all."""

SORTS: dict[str, tuple[SortBy, bool]] = {
    "density ↓": ("density", True),
    "density ↑": ("density", False),
    "maximum ↓": ("maximum", True),
    "mean when active ↓": ("mean_active", True),
    "kurtosis ↓": ("kurtosis", True),
    "kurtosis ↑": ("kurtosis", False),
    "logit kurtosis ↓": ("logit_kurtosis", True),
    "nearest cosine ↓": ("nearest_cosine", True),
    "unexplained ↓": ("unexplained", True),
    "number": ("latent", False),
}
PLACES: list[Where] = ["contexts", "fires on", "promotes", "label or note"]
ENDS = ("density_from", "density_to", "kurtosis_from", "kurtosis_to")
"""Powers of 10."""
SHOWN: list[Show] = ["alive", "dense", "dead", "all", "starred"]


FIELDS = (
    *screen_feature.FIELDS,
    Field("query", ""),
    Field("where", PLACES[0], one_of(*PLACES)),
    Field("sort", next(iter(SORTS)), one_of(*SORTS)),
    Field("show", SHOWN[0], one_of(*SHOWN)),
    *(Field(name, None, float, "{:g}".format) for name in ENDS),
    Field("like", None, whole),
    Field("as", "table", one_of("table", "map")),
)


def show(folder: Folder, run: Run) -> None:
    """The list, and beside it the latent chosen."""
    store = store_of(run)
    if store is None:
        return
    left, right = st.columns([1, 1], gap="medium")
    with left:
        notes, texts = _told(run)
        found = _filters(store, notes, texts)
        if not len(found):
            screen_parts.say("No latent passes these filters; widen the search, or show all.")
            return
        latent = chosen(store, found)
        view = st.segmented_control(
            "View",
            ["table", "map"],
            key="as",
            label_visibility="collapsed",
            required=True,
        )
        if view == "map":
            _map(store, found, latent)
        else:
            _table(store, found, latent, notes, texts)
        some = found[:EXPORTED].tolist()
        st.caption(
            f"To hand on: the {'first ' if len(found) > EXPORTED else ''}{len(some):,} listed"
        )
        screen_feature.downloads(run, store, some, "latents")
    with right:
        screen_feature.panel(run, store, latent, found, writable=writable())


def store_of(run: Run) -> FeatureStore | None:
    """The run's store; where it cannot be read or is not there, that and what to do is said."""
    try:
        store = run.features
    except SaekitError as error:
        st.markdown("## Features")
        screen_parts.say(error, "error")
        _offer(run)
        return None
    if store is None:
        st.markdown("## Features")
        screen_parts.say("There is no feature store of this run yet.")
        _offer(run)
    return store


def writable() -> bool:
    return WRITE in sys.argv


def _told(run: Run) -> tuple[dict[int, Note], dict[int, str]]:
    """Notes, and all that is written of latents: explanations and notes."""
    try:
        notes, texts = _notes.read(run.path), _notes.labels(run)
    except SaekitError:
        return {}, {}  # said beside the latent
    for latent, note in notes.items():
        if note.text:
            texts[latent] = f"{texts[latent]}\n{note.text}" if latent in texts else note.text
    return notes, texts


def _offer(run: Run) -> None:
    """How the store is made: by a button, where the browser may write, or by a command."""
    if run.training:
        st.caption("Training has to end first.")
        return
    screen_parts.say(
        "It takes one pass over the activations that the SAE was trained on, and writes to "
        f"{_building.writes(run.path)} alone. Stopped at any moment, it goes on where it was."
    )
    st.button(
        "Make the feature store",
        icon=":material/construction:",
        key="build",
        type="primary",
        on_click=_building.start,
        args=(run.path,),
        disabled=not writable() or _building.running(run.path),
        help=None if writable() else "Start the browser with `saekit dashboard --write` for this",
    )
    st.caption("The same by command:")
    st.code(_building.command(run.path), language="bash", wrap_lines=True)
    if failed := _building.failure(run.path):
        screen_parts.say(failed, "error")
    if _building.running(run.path) or _building.reached(run.path):
        _progress(run)


@st.fragment(run_every=1)
def _progress(run: Run) -> None:
    reached = _building.reached(run.path)
    if reached is None:
        if not _building.running(run.path):
            st.rerun()
        st.caption("Starting …")
        return
    share = min(1.0, reached.done / max(reached.total, 1))
    stopped = "" if _building.running(run.path) else " (not by this browser, or stopped)"
    st.progress(share, f"{reached.phase}: {reached.done:,} of {reached.total:,}{stopped}")


def _filters(store: FeatureStore, notes: dict[int, Note], texts: dict[int, str]) -> ndarray:
    text = st.text_input(
        "Search", key="query", type="search", placeholder="Search for a token or a piece of text"
    )
    where, order, show = st.columns([4, 4, 3])
    place = where.selectbox(
        "in",
        PLACES,
        key="where",
        help=(
            "contexts: anywhere in the strongest contexts, also across tokens. fires on: tokens "
            "with the most of its activation. promotes: output tokens whose logit it raises."
        ),
    )
    sort = order.selectbox("order", list(SORTS), key="sort")
    kind = show.selectbox("show", SHOWN, key="show")
    with st.expander("More filters"):
        density = _powers("density", store.column("density"), share=True)
        kurtosis = _powers("kurtosis", store.column("kurtosis"), share=False)
        like = st.number_input(
            "near to latent",
            0,
            store.d_sae - 1,
            value=None,
            step=1,
            key="like",
            help="Only this one and the nearest to it, by direction or by where they fire",
        )
    sort_by, descending = SORTS[sort]
    query = Query(
        text=text or "",
        where=place,
        show=kind,
        density=density,
        kurtosis=kurtosis,
        like=like,
        sort_by=sort_by,
        descending=descending,
    )
    starred = [latent for latent, note in notes.items() if note.star]
    return features.select(store, query, texts, starred)


def _powers(name: str, values: ndarray, *, share: bool) -> tuple[float, float]:
    """Two sliders over powers of 10, which reach over all values."""
    some = values[np.isfinite(values) & (values > 0)]
    low = int(np.floor(np.log10(some.min()))) if len(some) else -1
    high = 0 if share else max(low + 1, int(np.ceil(np.log10(some.max()))) if len(some) else 1)
    steps = [step / 2 for step in range(2 * low, 2 * high + 1)]
    least = _power(f"{name}_from", f"{name} at least", steps, steps[0], share)
    most = _power(f"{name}_to", f"{name} at most", steps, steps[-1], share)
    return (
        float(10**least) if least > steps[0] else 0.0,
        float(10**most) if most < steps[-1] else float("inf"),
    )


def _power(key: str, label: str, steps: list[float], end: float, share: bool) -> float:
    screen_address.default(key, end)
    # An address may have been made of another run.
    asked = float(st.session_state[key])
    st.session_state[key] = min(steps, key=lambda step: abs(step - asked))
    chosen = st.select_slider(
        label,
        steps,
        format_func=lambda power: _render.percent(10**power) if share else f"{10**power:.3g}",
        key=key,
    )
    return float(chosen)


def chosen(store: FeatureStore, found: ndarray) -> int:
    """The latent to show: of this session, else of the address, else the first of the table.

    One that new filters leave out makes way for the first that they let in.
    """
    state = st.session_state
    asked, before = state["latent"], state.get("listed")
    if asked is not None and asked >= store.d_sae:
        screen_parts.say(
            f"The address asks for latent {asked}; this SAE has 0 to {store.d_sae - 1}. Shown "
            f"instead: {found[0]}.",
            "warning",
        )
        state["latent"] = int(found[0])
    elif before is not None and not np.array_equal(found, before) and asked not in found:
        state["latent"] = int(found[0])
    screen_address.default("latent", int(found[0]))
    state["listed"] = found
    return int(state["latent"])


def _table(
    store: FeatureStore,
    found: ndarray,
    latent: int,
    notes: dict[int, Note],
    texts: dict[int, str],
) -> None:
    at = np.flatnonzero(found == latent)
    page = int(at[0]) // ROWS if len(at) else 0
    shown = found[page * ROWS : (page + 1) * ROWS]
    columns = features.table(store, shown)
    columns["density"] = 100 * columns["density"]
    columns["unexplained"] = 100 * columns["unexplained"]
    some = shown.tolist()
    if notes:
        stars = ["★" if notes.get(one, Note()).star else "" for one in some]
        columns = {"★": np.array(stars, dtype=object), **columns}
    if texts:
        columns["label or note"] = np.array(
            [show_token(texts.get(one, "")) for one in some], dtype=object
        )
    row = np.flatnonzero(shown == latent)[:1].tolist()
    st.session_state["table"] = {"selection": {"rows": row, "columns": [], "cells": []}}
    number = st.column_config.NumberColumn
    st.dataframe(
        columns,
        hide_index=True,
        height=min(620, 35 * (len(shown) + 1) + 3),
        key="table",
        on_select=lambda: _pick(shown),
        selection_mode=["single-row", "single-cell"],
        column_config={
            "latent": number(format="%d", width=60),
            "density": number(format="%.3g%%", width=75),
            "maximum": number("max", format="%.2f", width=60),
            "mean_active": number("mean", help="Mean when active", format="%.2f", width=60),
            "kurtosis": number(format="%.3g", width=75),
            "nearest_cosine": number(
                "nearest", help="Cosine with the nearest decoder row", format="%.2f", width=70
            ),
            "unexplained": number(
                "dark", help="Share of variance left where it fires", format="%.1f%%", width=65
            ),
        },
        column_order=[
            name
            for name in (
                "★",
                "latent",
                "density",
                "fires on",
                "label or note",
                "promotes",
                "maximum",
                "mean_active",
                "kurtosis",
                "nearest_cosine",
                "unexplained",
            )
            if name in columns
        ],
    )
    count = f"{len(found):,} of {store.d_sae:,} latents"
    if len(found) > ROWS:
        count += f"; numbers {page * ROWS + 1:,} to {page * ROWS + len(shown):,} of them shown"
    st.caption(count)


def _pick(shown: ndarray) -> None:
    selection = st.session_state["table"]["selection"]
    # A click on a cell leaves the marked row of the latent shown so far in "rows".
    rows = [row for row, _ in selection["cells"]] or selection["rows"]
    if rows:
        screen_feature.go_to(int(shown[rows[0]]))


def _map(store: FeatureStore, found: ndarray, latent: int) -> None:
    figure = plot.feature_map(features.place_on_map(store), store.column("density"), found, latent)
    st.plotly_chart(
        screen_parts.of_the_page(figure),
        theme=None,
        config=plot.CONFIG | {"scrollZoom": True},
        key="map",
        on_select=_pick_on_map,
        selection_mode="points",
    )
    st.caption(
        "Decoder directions, near ones close to each other; distances say no more. Colour: how "
        "often a latent fires; grey: left out by the filters. Click one to see it."
    )


def _pick_on_map() -> None:
    points = st.session_state["map"]["selection"]["points"]
    if points:
        screen_feature.go_to(int(points[0]["customdata"][0]))
