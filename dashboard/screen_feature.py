"""One latent: where it fires, how strongly, what it promotes, which others are like it, and what
the user noted of it.

The chosen latent lives in the session under "latent" and in the address as `?latent=`.
"""

import json
from collections.abc import Callable
from typing import Any, Literal

import streamlit as st
from numpy import ndarray

from saekit import plot
from saekit.dashboard import _notes, _render, export, features, screen_parts
from saekit.dashboard._notes import Note
from saekit.dashboard.data import Run
from saekit.dashboard.report import context_note
from saekit.dashboard.screen_address import Field, one_of, whole
from saekit.errors import SaekitError
from saekit.explanations import Explanation
from saekit.features import FeatureStore, Latent

VIEWS = ["strongest", "by quantile", "silent"]

FIELDS = (
    Field("latent", None, whole),
    Field("view", VIEWS[0], one_of(*VIEWS)),
    Field("quantile", None, whole),
)


def panel(run: Run, store: FeatureStore, index: int, found: ndarray, *, writable: bool) -> None:
    """Everything about a latent; the buttons beside its number step through those found."""
    latent = store.latent(index)
    notes, explained = _told(run)
    note = notes.get(index, Note())
    _header(run, store, latent, found, note, writable=writable)
    if index in explained:
        st.html(_render.render("explained.html.j2", one=explained[index]))
    if latent.dead:
        st.info(f"Latent {index} is dead: it fired on none of {store.header.n_rows:,} tokens.")
    else:
        st.caption(_summary(store, latent))
        _contexts(store, latent)
        _tokens_and_histogram(store, latent)
    st.markdown("##### Direct effect on the output")
    _logits(store, latent)
    if not latent.dead:
        _neighbours(store, latent)
        _heads(run, latent)
    _note(run, index, note, writable=writable)
    downloads(run, store, [index], f"latent-{index}")


def _told(run: Run) -> tuple[dict[int, Note], dict[int, Explanation]]:
    try:
        return _notes.read(run.path), _notes.explained(run)
    except SaekitError as error:
        screen_parts.say(error, "warning")
        return {}, {}


def _header(
    run: Run, store: FeatureStore, latent: Latent, found: ndarray, note: Note, *, writable: bool
) -> None:
    row = st.container(
        horizontal=True, vertical_alignment="bottom", gap="xsmall", key="latent-header"
    )
    row.markdown(f"### Latent {latent.index}", width="stretch")
    row.button(
        "",
        icon=":material/star:" if note.star else ":material/star_outline:",
        key="star",
        help="Take the star away" if note.star else "Give it a star" + _only_with_write(writable),
        on_click=_keep,
        args=(run, latent.index),
        kwargs={"star": not note.star},
        disabled=not writable,
    )
    row.button(
        "",
        icon=":material/chevron_left:",
        key="previous",
        help="Previous of those listed (key: ←)",
        on_click=_step,
        args=(found, -1),
        shortcut="Left",
    )
    row.number_input(
        "Latent",
        0,
        store.d_sae - 1,
        step=1,
        key="latent",
        label_visibility="collapsed",
        width=80,
    )
    row.button(
        "",
        icon=":material/chevron_right:",
        key="next",
        help="Next of those listed (key: →)",
        on_click=_step,
        args=(found, 1),
        shortcut="Right",
    )


def _step(found: ndarray, by: int) -> None:
    """Go to the neighbour in the list; from a latent outside it, to its first."""
    at = (found == st.session_state["latent"]).nonzero()[0]
    if len(found):
        st.session_state["latent"] = int(
            found[(int(at[0]) + by) % len(found)] if len(at) else found[0]
        )


def go_to(latent: int) -> None:
    """For a callback: show another latent."""
    st.session_state["latent"] = latent


def _summary(store: FeatureStore, latent: Latent) -> str:
    numbers, density = latent.numbers, store.column("density")
    rank, alive = (density > numbers["density"]).sum() + 1, (density > 0).sum()
    return (
        f"Fires on {_render.percent(numbers['density'])} of tokens (number {rank:,} of {alive:,} "
        f"by density), with {_render.number(numbers['mean_active'])} on the mean and at most "
        f"{_render.number(numbers['maximum'])}. Kurtosis {_render.number(numbers['kurtosis'])}. Of "
        f"what varies on these tokens the SAE leaves {_render.percent(numbers['unexplained'])} in "
        "the dark."
    )


def _contexts(store: FeatureStore, latent: Latent) -> None:
    view = st.segmented_control(
        "Contexts", VIEWS, key="view", label_visibility="collapsed", required=True
    )
    group, note = None, context_note(store)
    kind: Literal["top", "sample", "silent"] = "top"
    if view == "by quantile":
        kind, note = "sample", _SAMPLED
        edges = latent.lists["edges"].tolist()
        last = max(0, len(edges) - 2)
        st.session_state["quantile"] = min(last, st.session_state["quantile"] or last)
        group = st.segmented_control(
            "Quantile",
            list(range(len(edges) - 1))[::-1],
            format_func=lambda at: (
                f"{_render.number(edges[at])} to {_render.number(edges[at + 1])}"
            ),
            key="quantile",
            label_visibility="collapsed",
            required=True,
        )
    elif view == "silent":
        kind, note = "silent", _SILENT
    shown = features.contexts(store, latent, kind, group)
    if not shown:
        st.caption("There are no such contexts.")
        return
    with st.container(border=True, height=430 if len(shown) > 6 else "content"):
        st.html(_render.contexts_html(shown, latent.numbers["maximum"]))
    st.caption(note)


_SAMPLED = (
    "Drawn at random from all activations between these values; each range holds as many of them "
    "as the next. The underlined token is the one that was drawn."
)
_SILENT = (
    "Here the latents nearest to this one fire most, and this one does not: what tells it from "
    "them."
)


def _tokens_and_histogram(store: FeatureStore, latent: Latent) -> None:
    left, right = st.columns(2)
    with left:
        st.markdown("##### Fires on")
        st.html(_render.bars_html(features.input_tokens(store, latent)))
    with right:
        st.markdown("##### How strongly")
        maximum = latent.numbers["maximum"]
        screen_parts.chart(
            plot.activation_histogram(latent.lists["histogram"], maximum), "histogram"
        )


def _logits(store: FeatureStore, latent: Latent) -> None:
    up, down = features.promoted(store, latent), features.suppressed(store, latent)
    screen_parts.chart(plot.token_bars(up, down), "logits")


def _neighbours(store: FeatureStore, latent: Latent) -> None:
    st.markdown("##### Others like it")
    columns = st.columns(2)
    for column, by, what in (
        (columns[0], "near", "cosine"),
        (columns[1], "coactive", "overlap"),
    ):
        near = features.neighbours(store, latent, "near" if by == "near" else "coactive")
        with column:
            st.caption(_LIKE[by])
            st.dataframe(
                {
                    "latent": [other.latent for other in near],
                    what: [other.near for other in near],
                    "density": [100 * other.density for other in near],
                    "fires on": [other.fires_on for other in near],
                },
                hide_index=True,
                key=f"{by}-{latent.index}",
                on_select=_pick,
                selection_mode=["single-row", "single-cell"],
                column_config={
                    "latent": st.column_config.NumberColumn(format="%d", width=50),
                    what: st.column_config.NumberColumn(format="%.2f", width=62),
                    "density": st.column_config.NumberColumn(format="%.2g%%", width=55),
                },
                height=35 * (len(near) + 1) + 3,
            )
            st.session_state[f"_{by}"] = [other.latent for other in near]


_LIKE = {
    "near": "By direction: cosine of decoder rows",
    "coactive": "By where they fire: tokens where both do, over those where either does",
}


def _pick() -> None:
    for by in ("near", "coactive"):
        key = f"{by}-{st.session_state['latent']}"
        selection = st.session_state.get(key, {}).get("selection", {})
        rows = [row for row, _ in selection.get("cells", [])] or selection.get("rows", [])
        if rows:
            go_to(st.session_state[f"_{by}"][rows[0]])
            return


def _heads(run: Run, latent: Latent) -> None:
    """Which heads it reads, for an SAE of attention outputs."""
    heads = features.head_shares(run)
    if heads is not None and latent.index < len(heads):
        st.markdown("##### Heads it reads, by weights")
        screen_parts.chart(plot.head_bars(heads[latent.index]), "heads")


def _note(run: Run, index: int, note: Note, *, writable: bool) -> None:
    key = f"note-{index}"
    st.text_area(
        "Note",
        value=note.text,
        key=key,
        max_chars=_notes.LONGEST,
        disabled=not writable,
        placeholder="What is it?" + _only_with_write(writable),
        on_change=lambda: _keep(run, index, text=st.session_state[key]),
    )


def downloads(run: Run, store: FeatureStore, latents: list[int], name: str) -> None:
    """Buttons that hand some latents on; what they give is made when they are pressed."""
    row = st.container(horizontal=True)
    made: dict[str, tuple[str, Callable[[], str]]] = {
        "HTML": ("html", lambda: export.html_page(run, store, latents)),
        "CSV": ("csv", lambda: export.csv_table(run, store, latents)),
        "Neuronpedia": ("json", lambda: _batch(run, store, latents)),
    }
    for title, (ending, make) in made.items():
        row.download_button(
            title,
            make,
            file_name=f"{name}.{ending}",
            icon=":material/download:",
            key=f"download-{name}-{ending}",
            on_click="ignore",
        )


def _batch(run: Run, store: FeatureStore, latents: list[int]) -> str:
    name = run.path.resolve().name
    return json.dumps(export.neuronpedia(store, latents, name), allow_nan=False)


def _keep(run: Run, index: int, **changes: Any) -> None:
    try:
        _notes.keep(run.path, index, **changes)
    except (SaekitError, OSError) as error:
        st.toast(_render.escape_markdown(error))


def _only_with_write(writable: bool) -> str:
    return "" if writable else " (start with `saekit dashboard --write` to keep it)"
