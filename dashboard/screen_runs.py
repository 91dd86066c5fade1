"""All runs of the folder side by side, and the one that is chosen: curves, headline numbers,
densities. Runs that train are shown as they go on."""

from collections.abc import Sequence

import streamlit as st

from saekit import plot
from saekit.dashboard import _latents, _render, _runs
from saekit.dashboard._folder import Folder
from saekit.dashboard._runs import Brief
from saekit.dashboard.data import Run, eval_command
from saekit.dashboard.report import measured_on, tiles
from saekit.dashboard.screen_address import Field, one_of
from saekit.dashboard.screen_parts import chart, lacking, say

FIELDS = (Field("over", "ev", one_of(*_runs.Y)),)

_REFRESH = 5
"""Seconds between two looks at runs that train."""


def show(folder: Folder, run: Run) -> None:
    if not folder.single:
        table(folder)
    _one(run)


def table(folder: Folder) -> None:
    """Every run, broken ones among them."""
    briefs = _runs.briefs(folder)
    st.markdown("## Runs")
    _choose(briefs)
    for each in briefs:
        if each.run is None:
            say(f"{each.shown}: {each.problem}", "error")
    left, right = st.columns([5, 7], gap="large")
    with left:
        _pareto(briefs)
    with right:
        _differences(briefs)
    st.markdown("#### Training, side by side")
    if any(each.state == "training" for each in briefs):
        st.fragment(_live, run_every=_REFRESH)(folder)
    else:
        _curves(briefs)


def _choose(briefs: Sequence[Brief]) -> None:
    columns = _runs.table(briefs)
    names = [each.name for each in briefs]
    current = st.session_state["run"]
    rows = [names.index(current)] if current in names else []
    st.session_state["runs"] = {"selection": {"rows": rows, "columns": [], "cells": []}}
    number = st.column_config.NumberColumn
    st.dataframe(
        columns,
        hide_index=True,
        height=min(420, 35 * (len(briefs) + 1) + 2),
        key="runs",
        on_select=lambda: _pick(names),
        selection_mode=["single-row", "single-cell"],
        column_config={
            "tokens": number(format="compact"),
            **{label: number(format="%.4f") for label in list(_runs.NUMBERS.values())[1:]},
            "L0": number(format="%.1f"),
            "dead": number(format="percent"),
        },
    )
    st.caption("A click on a row chooses the run that every screen shows.")


def _pick(names: list[str]) -> None:
    selection = st.session_state["runs"]["selection"]
    # A click on a cell leaves the row marked so far in "rows".
    rows = [row for row, _ in selection["cells"]] or selection["rows"]
    if rows:
        st.session_state["run"] = names[rows[0]]


def _pareto(briefs: Sequence[Brief]) -> None:
    st.markdown("#### Sparsity against what is kept")
    key = st.radio(
        "Over L0",
        list(_runs.Y),
        key="over",
        format_func=lambda name: _runs.Y[name][0],
        horizontal=True,
        label_visibility="collapsed",
    )
    points = _runs.points(briefs, key)
    chart(plot.scatter(points, *_runs.Y[key]), "pareto")
    st.html(_render.legend_html([(each.number, each.shown) for each in briefs if each.metrics]))
    if reason := _runs.incomparable(briefs):
        say(reason, "warning")


def _differences(briefs: Sequence[Brief]) -> None:
    st.markdown("#### What they were made with, where they differ")
    found = _runs.differences(briefs)
    if found[""]:
        st.dataframe(found, hide_index=True, height=380, key="differences")
    else:
        st.caption("They do not differ in anything that is known of them.")


def _live(folder: Folder) -> None:
    _curves(_runs.briefs(folder))


def _curves(briefs: Sequence[Brief]) -> None:
    panels = plot.lives(_runs.curves(briefs))
    if not panels:
        st.caption("No run has a training log.")
    names = list(panels)
    for column, name in zip(st.columns(3, gap="medium"), names, strict=False):
        with column:
            chart(panels[name], f"life-{name}")


def _one(run: Run) -> None:
    st.markdown("## The run")
    if run.core is None:
        command = [eval_command("core", run.path)]
        lacking("It has not been measured.", command, training=run.training)
    else:
        for column, tile in zip(st.columns(5), tiles(run.core), strict=False):
            column.metric(
                tile.label, tile.value, help=_render.escape_markdown(tile.definition), border=True
            )
            column.caption(tile.aside)
        st.html(_render.plain_html(measured_on(run.core)))
    st.markdown("#### Training")
    panels = list(plot.training_panels(run.curves).items())
    for at in range(0, len(panels), 3):
        # Beside each other where there is room: drawn as one they would overlap on a phone.
        for column, (name, panel) in zip(st.columns(3), panels[at : at + 3], strict=False):
            with column:
                chart(panel, f"training-{name}")
    left, right = st.columns(2, gap="large")
    density = _latents.density(run)
    if run.core is not None:
        with left:
            st.markdown("#### What the reconstruction costs the model")
            chart(plot.ce_ladder(run.core.metrics), "ladder")
    if density is not None:
        with right:
            st.markdown("#### How often latents fire")
            chart(plot.density_histogram(density), "density")
