"""The latents, one by one: a table to search and sort, and beside it what the chosen one fires on.

The chosen latent lives in the session under "latent" and in the address as `?latent=`.
"""

from typing import Any

import numpy as np
import streamlit as st
from numpy import ndarray

from saekit.dashboard import _render, data, figures
from saekit.dashboard.data import Run, Show, SortBy, Where, eval_command
from saekit.dashboard.report import context_note
from saekit.results import LatentExamples

SORTS: dict[str, tuple[SortBy, bool]] = {
    "density ↓": ("density", True),
    "density ↑": ("density", False),
    "maximum ↓": ("maximum", True),
    "number": ("latent", False),
}


def show(run: Run) -> None:
    if run.examples is None:
        st.markdown("## Features")
        st.info(
            f"No examples yet: `{eval_command('examples', run.path)}` collects them"
            + (", once training has ended." if run.training else ".")
        )
        return
    examples = run.examples
    left, right = st.columns([4, 6], gap="medium")
    with left:
        found = _filters(examples)
        if len(found):
            latent = _chosen(examples, found)
            _table(run, found, latent)
            with right:
                _latent(examples, found, latent)
        else:
            st.info("No latent passes these filters; widen the search, or show all.")


def _filters(examples: LatentExamples) -> ndarray:
    query = st.text_input(
        "Search", key="query", type="search", placeholder="Search for a token or a piece of text"
    )
    where, order, show = st.columns([4, 4, 3])
    places: list[Where] = ["contexts", "fires on", "promotes"]
    place = where.selectbox(
        "in",
        places,
        key="where",
        help=(
            "contexts: anywhere in the examples, also across tokens. fires on: the token under the "
            "strongest activation. promotes: output tokens whose logit it raises."
        ),
    )
    sort = order.selectbox("order", list(SORTS), key="sort")
    kinds: list[Show] = ["alive", "dead", "all"]
    kind = show.selectbox("show", kinds, key="show")
    alive = examples.density[examples.density > 0]
    low = int(np.floor(np.log10(alive.min()))) if len(alive) else -1
    bounds = st.select_slider(
        "fires on this share of tokens",
        [step / 2 for step in range(2 * low, 1)],
        (float(low), 0.0),
        format_func=lambda power: _render.percent(10**power),
        key="bounds",
    )
    sort_by, descending = SORTS[sort]
    return data.select(
        examples,
        show=kind,
        query=query or "",
        where=place,
        density=(10 ** bounds[0], 10 ** bounds[1]),
        sort_by=sort_by,
        descending=descending,
    )


def _chosen(examples: LatentExamples, found: ndarray) -> int:
    """The latent to show: of this session, else of the address, else the first of the table.

    One that new filters leave out makes way for the first that they let in.
    """
    state = st.session_state
    if "latent" not in state:
        asked = st.query_params.get("latent")
        state["latent"] = int(found[0])
        if asked is not None:
            if asked.isascii() and asked.isdigit() and int(asked) < len(examples.density):
                state["latent"] = int(asked)
            else:
                st.warning(
                    f"The address asks for latent {_render.escape_markdown(asked)}; this SAE has "
                    f"0 to {len(examples.density) - 1}. Shown instead: {state['latent']}."
                )
    elif not np.array_equal(found, state["listed"]) and state["latent"] not in found:
        state["latent"] = int(found[0])
    state["listed"] = found
    st.query_params["latent"] = str(state["latent"])
    return int(state["latent"])


def _table(run: Run, found: ndarray, latent: int) -> None:
    columns = {name: values[found] for name, values in run.table.items()}
    columns["density"] = 100 * columns["density"]
    row = np.flatnonzero(found == latent)[:1].tolist()
    st.session_state["table"] = {"selection": {"rows": row, "columns": [], "cells": []}}
    config = st.column_config
    st.dataframe(
        columns,
        hide_index=True,
        height=min(620, 35 * (len(found) + 1) + 2),
        key="table",
        on_select=lambda: _pick(found),
        selection_mode=["single-row", "single-cell"],
        column_config={
            "latent": config.NumberColumn(format="%d", width=60),
            "density": config.NumberColumn(format="%.3g%%", width=75),
            "maximum": config.NumberColumn("max", format="%.2f", width=60),
        },
    )
    st.caption(f"{len(found):,} of {run.d_sae:,} latents")


def _pick(found: ndarray) -> None:
    selection = st.session_state["table"]["selection"]
    # A click on a cell leaves the marked row of the latent shown so far in "rows".
    rows = [row for row, _ in selection["cells"]] or selection["rows"]
    if rows:
        st.session_state["latent"] = int(found[rows[0]])


def _latent(examples: LatentExamples, found: ndarray, latent: int) -> None:
    title, back, number, on = st.columns([6, 1, 2, 1], vertical_alignment="bottom")
    title.markdown(f"## Latent {latent}")
    back.button(
        "",
        icon=":material/chevron_left:",
        key="previous",
        help="Previous in the table",
        on_click=_step,
        args=(found, -1),
        width="stretch",
    )
    number.number_input(
        "Latent", 0, len(examples.density) - 1, step=1, key="latent", label_visibility="collapsed"
    )
    on.button(
        "",
        icon=":material/chevron_right:",
        key="next",
        help="Next in the table",
        on_click=_step,
        args=(found, 1),
        width="stretch",
    )
    density, maximum = float(examples.density[latent]), float(examples.maximum[latent])
    if density <= 0:
        st.info(f"Latent {latent} is dead: it fired on none of {examples.n_rows:,} tokens.")
    else:
        rank, alive = (examples.density > density).sum() + 1, (examples.density > 0).sum()
        st.caption(
            f"Fires on {_render.percent(density)} of tokens (number {rank:,} of {alive:,} by "
            f"density), with at most {_render.number(maximum)}."
        )
        shown = data.contexts(examples, latent)
        with st.container(border=True, height=430 if len(shown) > 6 else "content"):
            st.html(_render.contexts_html(shown, maximum))
        st.caption(context_note(examples))
    bars = figures.token_bars(data.promoted(examples, latent), data.suppressed(examples, latent))
    _chart(bars, "logits")
    left, right = st.columns(2)
    with left:
        _chart(figures.activation_histogram(examples.histogram[latent], maximum), "histogram")
    with right:
        _chart(figures.density_histogram(examples.density, mark=density), "density")


def _step(found: ndarray, by: int) -> None:
    """Go to the neighbour in the table; from a latent outside it, to its first."""
    at = np.flatnonzero(found == st.session_state["latent"])
    st.session_state["latent"] = int(found[(int(at[0]) + by) % len(found)] if len(at) else found[0])


def _chart(figure: Any, key: str) -> None:
    st.plotly_chart(figure, theme=None, config=figures.CONFIG, key=key)
