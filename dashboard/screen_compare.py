"""Two SAEs: their numbers, which latent of one is which of the other, and what a pair fires on."""

from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from saekit import plot
from saekit.dashboard import _latents, _matched, _render, screen_live
from saekit.dashboard._comparison import Comparison, Subject
from saekit.dashboard._folder import Folder
from saekit.dashboard._matched import Matches
from saekit.dashboard._opened import opened
from saekit.dashboard.data import Run, show_token
from saekit.dashboard.screen_address import Field, default, whole
from saekit.dashboard.screen_parts import chart, go_to, lacking, say
from saekit.errors import SaekitError

FIELDS = (Field("with", None), Field("pair", None, whole))
N_CONTEXTS = 6


def show(folder: Folder, run: Run) -> None:
    st.markdown("## Compare")
    other = _other(folder, run)
    if other is None:
        return
    _numbers(run, other)
    if run.training or other.training:
        unfinished = run if run.training else other
        lacking("Latents can be matched once both are finished.", unfinished.missing(),
                training=True)  # fmt: skip
        return
    matches = _match(run.path, run.fingerprint, other.path, other.fingerprint, (run, other))
    _found(matches)
    left, right = st.columns([4, 7], gap="large")
    with left:
        latent = _pairs(run, matches)
    with right:
        _pair(run, other, latent, matches)


def _other(folder: Folder, run: Run) -> Run | None:
    """The run to compare with, which must be of the folder."""
    names = [name for name in folder.names if folder.path / name != run.path]
    if not names:
        say(
            "There is one run alone. Open a folder that holds several, to compare two of them: "
            "`saekit dashboard FOLDER`"
        )
        return None
    default("with", names[0])
    if (asked := st.session_state["with"]) not in names:
        same = asked in folder.names
        say("This is the run itself: choose another." if same else folder.refusal(asked), "error")
        st.session_state["with"] = names[0]
        if not same:
            return None
    name = st.selectbox("Compare with", names, key="with", format_func=show_token)
    try:
        return opened(folder.run(str(name)))
    except SaekitError as error:
        say(error, "error")
        return None


def _numbers(run: Run, other: Run) -> None:
    names = [show_token(each.path.resolve().name) for each in (run, other)]
    subjects = [Subject.of(each, at, names[at - 1]) for at, each in enumerate((run, other), 1)]
    comparison = Comparison(subjects)
    if not comparison.columns:
        say("Neither has been measured.")
    else:
        st.html(_render.compared_html(comparison))
        if comparison.notes:
            say("\n".join(comparison.notes), "warning")
    differing = comparison.differences()
    with st.expander(f"{len(differing)} settings differ"):
        columns = {"": [show_token(key) for key, _ in differing]}
        for at, name in enumerate(names):
            columns[f"{at + 1} · {name}"] = [show_token(values[at]) for _, values in differing]
        st.dataframe(columns, hide_index=True, key="settings")


@st.cache_data(max_entries=4, show_spinner="Matching latents …")
def _match(
    path: Path, fingerprint: str | None, other: Path, other_fingerprint: str | None, _runs: Any
) -> Matches:
    a, b = (screen_live.saes(run.path, run.fingerprint) for run in _runs)
    return _matched.match(a, b, (_latents.density(_runs[0]), _latents.density(_runs[1])))


def _found(matches: Matches) -> None:
    st.markdown("#### Matched latents")
    first, second, third, fourth = st.columns(4)
    first.metric("Pairs", f"{len(matches.latent):,}", border=True)
    second.metric("Mean cosine", f"{matches.mean:.3f}", border=True)
    third.metric("Above 0.7", f"{matches.share(0.7):.1%}", border=True)
    fourth.metric("Above 0.9", f"{matches.share(0.9):.1%}", border=True)
    how = (
        "One to one, the matching whose cosines add up to most (Hungarian method)"
        if matches.one_to_one
        else f"Each latent of the first with its nearest of the second, for there are more than "
        f"{_matched.MAX_MATCHING:,}: several may share one"
    )
    said = (
        f"{how}; by the signed cosine of decoder rows, of {matches.n[0]:,} and {matches.n[1]:,} "
        "latents that fire. Random directions would be matched, too: `saekit eval stability "
        "--against` puts these numbers beside theirs."
    )
    st.html(_render.plain_html(said))
    chart(plot.cosines(matches.cosine), "cosines")


def _pairs(run: Run, matches: Matches) -> int:
    default("pair", int(matches.latent[0]))
    latent = int(st.session_state["pair"])
    shown = np.arange(len(matches.latent))[:2000]
    at = np.flatnonzero(matches.latent[shown] == latent)[:1].tolist()
    st.session_state["pairs"] = {"selection": {"rows": at, "columns": [], "cells": []}}
    st.dataframe(
        {
            "latent": matches.latent[shown],
            "other": matches.other[shown],
            "cosine": matches.cosine[shown],
            "fires on": _latents.fires_on(run, matches.latent[shown].tolist()),
        },
        hide_index=True,
        height=560,
        key="pairs",
        on_select=lambda: _pick(matches),
        selection_mode=["single-row", "single-cell"],
        column_config={
            "latent": st.column_config.NumberColumn(format="%d", width=60),
            "other": st.column_config.NumberColumn(format="%d", width=60),
            "cosine": st.column_config.NumberColumn(format="%.3f", width=65),
        },
    )
    return latent


def _pick(matches: Matches) -> None:
    selection = st.session_state["pairs"]["selection"]
    # A click on a cell leaves the row marked so far in "rows".
    rows = [row for row, _ in selection["cells"]] or selection["rows"]
    if rows:
        st.session_state["pair"] = int(matches.latent[rows[0]])


def _pair(run: Run, other: Run, latent: int, matches: Matches) -> None:
    counterpart = matches.of(latent)
    if counterpart is None:
        say(f"Latent {latent} has no counterpart: it is dead, left over, or not there.")
        return
    st.markdown(f"#### Latent {latent} and latent {counterpart[0]}, cosine {counterpart[1]:.3f}")
    for at, (each, number) in enumerate(((run, latent), (other, counterpart[0])), 1):
        st.html(_render.legend_html([(at, show_token(each.path.resolve().name))]))
        contexts, maximum = _latents.contexts(each, number, N_CONTEXTS)
        if not contexts:
            say(f"No contexts of latent {number} were collected.")
            continue
        with st.container(border=True):
            st.html(_render.contexts_html(contexts, maximum))
    st.button("Open the first", key="open-pair", on_click=go_to, args=("feature",),
              kwargs={"latent": latent})  # fmt: skip
