"""The run's numbers: headline metrics, training curves, densities, and every definition."""

import streamlit as st

from saekit.dashboard import _render, figures
from saekit.dashboard.data import Run, eval_command
from saekit.dashboard.report import measured_on, tiles


def show(run: Run) -> None:
    st.markdown("## Overview")
    if run.core is None:
        st.info(
            f"No metrics yet: `{eval_command('core', run.path)}` measures them"
            + (", once training has ended." if run.training else ".")
        )
    else:
        headline = tiles(run.core)
        for column, tile in zip(st.columns(max(1, len(headline))), headline, strict=False):
            column.metric(
                tile.label, tile.value, help=_render.escape_markdown(tile.definition), border=True
            )
            column.caption(tile.aside)
        st.caption(measured_on(run.core))
    st.markdown("#### Training")
    _chart(figures.training_curves(run.curves), "training")
    left, right = st.columns(2, gap="large")
    if run.core is not None:
        left.markdown("#### What the reconstruction costs the model")
        with left:
            _chart(figures.ce_ladder(run.core.metrics), "ladder")
    density = (
        run.examples.density
        if run.examples
        else run.core.arrays.get("density")
        if run.core
        else None
    )
    if density is not None:
        right.markdown("#### How often latents fire")
        with right:
            _chart(figures.density_histogram(density), "density")
    if run.core is not None:
        st.markdown("#### All metrics")
        st.html(_render.metrics_html(run.core.metrics))


def _chart(figure: object, key: str) -> None:
    st.plotly_chart(figure, theme=None, config=figures.CONFIG, key=key)
