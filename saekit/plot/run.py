"""Charts of one SAE: how training went, how often and how strongly its latents fire, what it costs
the model; and the look of all charts.
"""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from jaxtyping import Float, Int
from numpy import ndarray
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from saekit.features import TokenLogit
from saekit.results import Metric

INK, MUTED, GRID = "#1f2933", "#66727f", "#e8ebee"
WARM, SLATE, PALE = "#d9601a", "#4a6580", "#c3ccd5"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
CONFIG = {"displaylogo": False, "displayModeBar": False, "responsive": True}
"""How plotly shows a figure on a page of ours."""

_DARK = {
    INK: "#e3e7eb",
    MUTED: "#9aa5b1",
    GRID: "#2c343c",
    PALE: "#515c67",
    SLATE: "#7f9db9",
    "white": "#20262c",
}
_STYLED = re.compile(f"<span style='color:({INK}|{MUTED})")

_PANELS = {
    "ev": ("Explained variance", "in training, from 0 up", "%{y:.4f}"),
    "loss": ("Loss", "as minimised", "%{y:.4g}"),
    "l0": ("L0", "active latents a token", "%{y:.1f}"),
    "dead": ("Dead latents", "share, not fired lately", "%{y:.2%}"),
    "lr": ("Learning rate", "", "%{y:.3g}"),
    "tokens_per_s": ("Throughput", "tokens a second", "%{y:,.0f} tokens/s"),
}

_LADDER = {
    "ce_clean": "Model as it is",
    "ce_sae": "With the SAE",
    "ce_mean": "Mean-ablated",
    "ce_zero": "Zero-ablated",
}


def shade(act: float, maximum: float) -> str:
    """The background of a token: none where the latent is silent, warm orange at its maximum."""
    share = min(max(act / maximum, 0.0), 1.0) if maximum > 0 else 0.0
    return f"rgb(247 146 62 / {share:.3g})"


def training_curves(curves: Mapping[str, Float[ndarray, " step"]], columns: int = 3) -> go.Figure:
    """Small panels of the training log over the tokens seen, one for each column that is in it."""
    panels = [name for name in _PANELS if name in curves]
    if not panels:
        return _empty("No training log: metrics.jsonl has no lines yet")
    columns = min(columns, len(panels))
    unit = "tokens" if "tokens" in curves else "steps"
    x = curves.get("tokens", curves.get("step", np.arange(len(curves[panels[0]]))))
    rows = -(-len(panels) // columns)
    figure = make_subplots(rows, columns, vertical_spacing=0.36 / rows)
    for at, name in enumerate(panels):
        row, column, y = at // columns + 1, at % columns + 1, curves[name]
        line = {"color": WARM if name in ("ev", "loss") else SLATE, "width": 1.8}
        hover = f"{_PANELS[name][2]}<br>after %{{x:.4s}} {unit}<extra></extra>"
        trace = go.Scatter(x=x, y=y, mode="lines", line=line, hovertemplate=hover)
        if np.isfinite(y).sum() == 1:
            trace.update(mode="markers", marker={"color": line["color"], "size": 7})
        figure.add_trace(trace, row, column)
        figure.update_yaxes(_range(name, y), row=row, col=column)
        _head(figure, *_PANELS[name][:2], row=row, col=column)
        if at + columns >= len(panels):
            figure.update_xaxes(title_text=f"{unit} trained on", row=row, col=column)
    return _finish(figure, height=250 * rows + 10, top=34)


def training_panels(curves: Mapping[str, Float[ndarray, " step"]]) -> dict[str, go.Figure]:
    """The panels of `training_curves` one by one, for pages too narrow for them side by side; at
    least one, which says that there is nothing."""
    axes = {name: curves[name] for name in ("tokens", "step") if name in curves}
    there = [name for name in _PANELS if name in curves]
    return {name: training_curves({**axes, name: curves[name]}) for name in there} or {
        "none": training_curves({})
    }


def density_histogram(density: Float[ndarray, " d_sae"], mark: float | None = None) -> go.Figure:
    """How often latents fire, on a log axis; those that never did have a bar of their own.

    `mark` draws a line at one latent's density.
    """
    if not len(density):
        return _empty("No latents")
    alive = np.log10(density[density > 0])
    dead = int((density <= 0).sum())
    low = float(np.floor(alive.min())) if len(alive) else -4.0
    edges = np.linspace(low, 0.0, round(-low * 8) + 1) if low < 0 else np.linspace(-1.0, 0.0, 9)
    counts, _ = np.histogram(alive, edges)
    width, zero_at = edges[1] - edges[0], edges[0] * 1.12 - 0.1
    share = 100 / len(density)
    figure = go.Figure(
        go.Bar(
            x=(edges[:-1] + edges[1:]) / 2,
            y=counts,
            width=width * 0.92,
            marker_color=SLATE,
            customdata=np.stack([10 ** edges[:-1], 10 ** edges[1:], counts * share], axis=1),
            hovertemplate="%{y:,} latents (%{customdata[2]:.1f}%)<br>fire on a share of "
            "%{customdata[0]:.2~g} to %{customdata[1]:.2~g} of tokens<extra></extra>",
        )
    )
    figure.add_bar(
        x=[zero_at],
        y=[dead],
        width=[-edges[0] * 0.05],
        marker_color=PALE,
        hovertemplate=f"%{{y:,}} latents ({dead * share:.1f}%)<br>never fired<extra></extra>",
    )
    ticks = list(range(int(np.ceil(edges[0])), 1))
    figure.update_xaxes(
        title_text="share of tokens it fires on (log)",
        tickvals=[zero_at, *ticks],
        ticktext=["0", *(f"10<sup>{tick}</sup>" if tick else "1" for tick in ticks)],
        tickangle=0,
        range=[zero_at - 0.3, 0.08],
    )
    figure.update_yaxes(title_text="latents", dtick=_whole_ticks(max(dead, *counts)))
    if mark is not None:
        at = np.log10(mark) if mark > 0 else zero_at
        figure.add_vline(x=at, line_color=WARM, line_width=2)
        figure.add_annotation(
            x=at,
            y=1,
            yref="paper",
            yanchor="bottom",
            text="this latent",
            font_color=WARM,
            showarrow=False,
        )
    return _finish(figure, height=300, top=30 if mark is not None else 12)


def activation_histogram(counts: Int[ndarray, " bin"], maximum: float) -> go.Figure:
    """How strongly one latent fires when it does. Counts that differ a lot get a log axis."""
    if not counts.sum():
        return _empty("It never fired")
    edges = np.linspace(0, maximum, len(counts) + 1)
    figure = go.Figure(
        go.Bar(
            x=(edges[:-1] + edges[1:]) / 2,
            y=np.where(counts > 0, counts, np.nan),
            width=np.diff(edges) * 0.92,
            marker_color=WARM,
            customdata=np.stack([edges[:-1], edges[1:]], axis=1),
            hovertemplate="%{y:,} tokens<br>activation %{customdata[0]:.3g} to %{customdata[1]:.3g}"
            "<extra></extra>",
        )
    )
    spread = counts.max() > 50 * counts[counts > 0].min()
    figure.update_xaxes(title_text="activation, where active", range=[0, maximum])
    title = "tokens (log)" if spread else "tokens"
    figure.update_yaxes(title_text=title, dtick=_whole_ticks(counts.max()))
    if spread:
        top = np.log10(counts.max()) + 0.15
        figure.update_yaxes(type="log", dtick=1, range=[np.log10(0.6), top])
    return _finish(figure, height=300)


def token_bars(promoted: Sequence[TokenLogit], suppressed: Sequence[TokenLogit]) -> go.Figure:
    """Output tokens that a latent's decoder direction raises (left) and lowers (right) most."""
    if not promoted and not suppressed:
        return _empty("This hook does not write to the residual stream: no output tokens to show")
    titles = ["Raises the logit of", "Lowers the logit of"]
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.2)
    for column, (tokens, colour) in enumerate(((promoted, WARM), (suppressed, SLATE)), start=1):
        names = [escape(token.name, quote=False) for token in tokens]
        short = [escape(_clip(token.name), quote=False) for token in tokens]
        figure.add_bar(
            x=[token.logit for token in tokens],
            y=list(range(len(tokens))),
            orientation="h",
            width=0.76,
            marker_color=colour,
            customdata=names,
            hovertemplate="%{customdata}<br>logit %{x:+.3f} a unit of activation<extra></extra>",
            row=1,
            col=column,
        )
        figure.update_xaxes(title_text="logit, a unit of activation", row=1, col=column)
        figure.update_yaxes(
            tickvals=list(range(len(tokens))),
            ticktext=short,
            autorange="reversed",
            showgrid=False,
            row=1,
            col=column,
        )
    figure.update_annotations(font_size=13)
    rows = max(len(promoted), len(suppressed))
    return _finish(figure, height=110 + 22 * rows, top=36)


def ce_ladder(metrics: Mapping[str, Metric]) -> go.Figure:
    """The model's next-token loss: as it is, with the SAE in place, and with the hook ablated."""
    steps = [name for name in _LADDER if name in metrics]
    if not steps:
        return _empty("Cross-entropy was not measured")
    values = [metrics[name].value for name in steps]
    clean = metrics["ce_clean"].value if "ce_clean" in metrics else float("nan")
    above = [
        f"{value:.3f}  <span style='color:{MUTED}'>{value - clean:+.3f}</span>" for value in values
    ]
    labels = [
        above[at] if name != "ce_clean" else f"{values[at]:.3f}" for at, name in enumerate(steps)
    ]
    figure = go.Figure(
        go.Bar(
            x=values,
            y=[_LADDER[name] for name in steps],
            orientation="h",
            marker_color=[WARM if name == "ce_sae" else SLATE for name in steps],
            width=0.62,
            text=labels,
            textposition="outside",
            cliponaxis=False,
            customdata=np.exp(values),
            hovertemplate="%{y}: %{x:.4f} nats a token<br>perplexity %{customdata:,.1f}"
            "<extra></extra>",
        )
    )
    figure.update_xaxes(
        title_text="cross-entropy, nats a token",
        range=[0, max(values) * 1.4],
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, tickfont={"size": 13, "color": INK})
    return _finish(figure, height=70 + 46 * len(steps))


def histogram_svg(
    counts: Int[ndarray, " bin"], maximum: float, width: int = 168, height: int = 36
) -> str:
    """A word-sized activation histogram for the report, heights logarithmic."""
    heights = np.log1p(counts) / max(float(np.log1p(counts).max(initial=0)), 1e-9)
    step, unit = width / max(len(counts), 1), maximum / max(len(counts), 1)
    bars = [
        f'<rect x="{at * step:.1f}" y="{height * (1 - h):.1f}" width="{step * 0.88:.1f}" '
        f'height="{height * h:.1f}"><title>{count:,} tokens between {at * unit:.3g} and '
        f"{(at + 1) * unit:.3g}</title></rect>"
        for at, (h, count) in enumerate(zip(heights, counts, strict=True))
        if count
    ]
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="activation histogram" fill="{WARM}">{"".join(bars)}</svg>'
    )


def in_dark(figure: go.Figure) -> go.Figure:
    """The same figure for a dark page: ink and grid light, the colours of data as they are."""
    return go.Figure(_darker(figure.to_dict()))


def _darker(value: Any, key: str = "") -> Any:
    """Only colours are exchanged, and those in our own markup: other text is the corpus's."""
    if isinstance(value, dict):
        return {name: _darker(inner, name) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_darker(inner, key) for inner in value]
    if isinstance(value, str) and "color" in key:
        return _DARK.get(value, value)
    if isinstance(value, str) and key == "text":
        return _STYLED.sub(lambda found: f"<span style='color:{_DARK[found[1]]}", value)
    return value


def to_html(figure: go.Figure, name: str) -> str:
    """The figure as an element of a page that has `plotly_script` in its head."""
    return str(
        pio.to_html(
            figure, CONFIG, include_plotlyjs=False, full_html=False, div_id=f"figure-{name}"
        )
    )


def plotly_script() -> str:
    """The source of plotly.js, for a page that must work without a network."""
    return str(get_plotlyjs())


def _finish(figure: go.Figure, height: int, top: int = 12) -> go.Figure:
    figure.update_layout(
        template="none",
        height=height,
        showlegend=False,
        bargap=0.05,
        margin={"l": 44, "r": 16, "t": top, "b": 48},
        font={"family": FONT, "size": 12, "color": MUTED},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"bgcolor": "white", "bordercolor": PALE, "font": {"color": INK, "size": 12}},
    )
    figure.update_xaxes(
        showgrid=False,
        zeroline=False,
        linecolor=PALE,
        automargin=True,
        title_standoff=8,
        fixedrange=True,
    )
    figure.update_yaxes(
        gridcolor=GRID,
        zeroline=False,
        automargin=True,
        title_standoff=8,
        fixedrange=True,
        # Unseen ticks hold the names off the axis.
        ticks="outside",
        ticklen=5,
        tickcolor="rgba(0,0,0,0)",
    )
    return figure


def _empty(why: str) -> go.Figure:
    figure = go.Figure()
    figure.add_annotation(
        text=why, showarrow=False, font_size=13, x=0.5, y=0.5, xref="paper", yref="paper"
    )
    _finish(figure, height=140)
    return figure.update_xaxes(visible=False).update_yaxes(visible=False)


def _head(figure: go.Figure, name: str, detail: str, **panel: int) -> None:
    """A title above a chart, or above the panel at `row` and `col`; the detail small behind it."""
    aside = f" <span style='color:{MUTED};font-size:11px'>{detail}</span>" if detail else ""
    figure.add_annotation(
        text=f"<span style='color:{INK}'><b>{name}</b></span>{aside}",
        showarrow=False,
        font_size=13,
        x=0,
        y=1,
        xref="x domain",
        yref="y domain",
        xanchor="left",
        yanchor="bottom",
        yshift=6,
        **panel,
    )


def _range(name: str, y: Float[ndarray, " step"]) -> dict[str, object]:
    """Axis settings of a training panel: losses that fall far get a log axis, EV shows 0 to 1."""
    finite = y[np.isfinite(y)]
    if name == "ev":
        return {"range": [-0.02, 1.02]}
    if name == "loss" and finite.min() > 0 and finite.max() > 20 * finite.min():
        return {"type": "log", "dtick": 1 if finite.max() > 100 * finite.min() else "D2"}
    if name in ("l0", "dead", "lr", "tokens_per_s"):
        top = float(finite.max()) * 1.08
        tick = {"tickformat": ".0%" if top > 0.05 else ".2~%"} if name == "dead" else {}
        return {"range": [0, top if top > 0 else 1], **tick}
    return {}


def _whole_ticks(highest: int | np.integer) -> int | None:
    """The distance of ticks on an axis of counts: left to plotly, but never below 1."""
    return 1 if highest <= 5 else None


def _clip(name: str, length: int = 22) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
