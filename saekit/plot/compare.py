"""Charts of several SAEs at once: each SAE has one colour and one number throughout, so that the
page needs one legend for all of them.

Text from folders and configs is escaped, since plotly reads labels as markup.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from numpy import ndarray

from saekit.plot.run import INK, MUTED, PALE, SLATE, WARM, _empty, _finish, _head, _range
from saekit.results import Metric

COLOURS = (
    "#d9601a",
    "#2f6690",
    "#4d8b31",
    "#8e4585",
    "#b8860b",
    "#17877d",
    "#c2395b",
    "#5b5fc7",
    "#7a5c3e",
    "#3d9bd1",
    "#8a9a1d",
    "#4a4a4a",
)
"""Of SAE 1, 2, ...; further ones begin again, and are told apart by number."""

_POINTS = 400
"""Of a curve, at most: more cannot be seen, and make the page long."""

_SYMBOLS = {
    "random": "x-thin",
    "random_pursuit": "y-up",
    "pca": "cross-thin",
    "neuron": "asterisk",
}


def colour(number: int) -> str:
    """Of the SAE with that number, from 1."""
    return COLOURS[(number - 1) % len(COLOURS)]


@dataclass(frozen=True)
class Point:
    """An SAE, or a control of it, in a plot of one number over another."""

    number: int
    name: str
    x: float
    y: Metric
    control: str | None = None


def scatter(points: Sequence[Point], title: str, y_title: str) -> go.Figure:
    """A number over L0, on a log axis, with intervals; controls are small crosses in grey.

    Controls so far from the SAEs that these could not be told apart are left out of view: the axis
    then covers the SAEs with room to either side, and the title says so.
    """
    if not any(point.control is None for point in points):
        return _empty(f"{y_title} was not measured")
    figure = go.Figure()
    for control in sorted({point.control for point in points if point.control is not None}):
        of = [point for point in points if point.control == control]
        symbol = _SYMBOLS.get(control, "circle-open")
        line = {"width": 1.6, "color": MUTED}
        _add_points(figure, of, {"symbol": symbol, "size": 9, "color": MUTED, "line": line})
    for point in points:
        if point.control is None:
            marker = {"size": 16, "color": colour(point.number), "line_width": 0, "opacity": 0.88}
            _add_points(figure, [point], marker, text=str(point.number))
    figure.update_xaxes(title_text="L0, active latents a token (log)", type="log", **_ticks(points))
    shown, cut = _window(points)
    figure.update_yaxes(title_text=y_title, range=shown)
    aside = f"{cut} control{' is' if cut == 1 else 's are'} out of view" if cut else ""
    _head(figure, title, aside)
    return _finish(figure, height=320, top=36)


def _add_points(
    figure: go.Figure, points: Sequence[Point], marker: Mapping[str, object], text: str = ""
) -> None:
    lower, upper = (
        [abs(p.y.interval[side] - p.y.value) if p.y.interval else 0.0 for p in points]
        for side in (0, 1)
    )
    names = [
        f"{p.number} · {escape(p.name)}" + (f", {escape(p.control)} control" if p.control else "")
        for p in points
    ]
    ends = [
        f"<br>95 %: {p.y.interval[0]:.4g} to {p.y.interval[1]:.4g}" if p.y.interval else ""
        for p in points
    ]
    figure.add_scatter(
        x=[p.x for p in points],
        y=[p.y.value for p in points],
        mode="markers+text" if text else "markers",
        text=text,
        textfont={"color": "white", "size": 10},
        marker=marker,
        error_y={
            "array": upper,
            "arrayminus": lower,
            "symmetric": False,
            "thickness": 1.2,
            "width": 3,
            "color": marker["color"],
        },
        customdata=list(zip(names, ends, strict=True)),
        hovertemplate="%{customdata[0]}<br>L0 %{x:.4g}<br>%{y:.4g}%{customdata[1]}<extra></extra>",
    )


def _window(points: Sequence[Point]) -> tuple[list[float] | None, int]:
    """The range of the y axis where controls would crush it, and how many are outside."""
    own = [end for p in points if p.control is None for end in (*(p.y.interval or ()), p.y.value)]
    low, high = min(own), max(own)
    spread = max(high - low, 0.02 * max(abs(low), abs(high)), 1e-6)
    everything = [p.y.value for p in points]
    if max(everything) - min(everything) <= 8 * spread:
        return None, 0
    shown = [low - 2.5 * spread, high + 2.5 * spread]
    return shown, sum(not shown[0] <= y <= shown[1] for y in everything)


def _ticks(points: Sequence[Point]) -> dict[str, Any]:
    """A few round numbers as far as the points go: of itself a log axis has few below a decade."""
    xs = [point.x for point in points if point.x > 0]
    if not xs:
        return {}
    low, high = min(xs) / 1.25, max(xs) * 1.25
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks: list[float] = []
    for factors in (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 5, 7),
        np.arange(2, 20) / 2,
        np.arange(5, 50) / 5,
        np.arange(10, 100) / 10,
    ):
        steps = [float(f"{factor * 10.0**power:.3g}") for power in powers for factor in factors]
        ticks = [step for step in steps if low <= step <= high]
        if len(ticks) > 2:
            break
    return {
        "range": [np.log10(low), np.log10(high)],
        "tickvals": ticks,
        "ticktext": [f"{tick:g}" for tick in ticks],
    }


def densities(
    densities: Sequence[tuple[int, str, Float[ndarray, " d_sae"]]], bins_a_decade: int = 4
) -> go.Figure:
    """How often latents fire, in each SAE: the share of its latents in bins of equal width on a log
    axis, and far left those that never did."""
    alive = [density[density > 0] for _, _, density in densities]
    if not any(map(len, alive)):
        return _empty("Densities were not measured")
    low = float(np.floor(np.log10(min(each.min() for each in alive if len(each)))))
    low = min(low, -1.0)
    edges = np.linspace(low, 0.0, round(-low * bins_a_decade) + 1)
    figure = go.Figure()
    zero_at = low - 0.6
    for (number, name, density), fires in zip(densities, alive, strict=True):
        counts, _ = np.histogram(np.log10(fires), edges)
        who = f"{number} · {escape(name)}"
        figure.add_scatter(
            x=(edges[:-1] + edges[1:]) / 2,
            y=counts / len(density),
            mode="lines",
            line={"color": colour(number), "width": 2, "shape": "hvh"},
            customdata=np.stack([10 ** edges[:-1], 10 ** edges[1:]], axis=1),
            hovertemplate=f"{who}<br>%{{y:.1%}} of its latents fire on a share of "
            "%{customdata[0]:.2~g} to %{customdata[1]:.2~g} of tokens<extra></extra>",
        )
        figure.add_scatter(
            x=[zero_at],
            y=[(density <= 0).mean()],
            mode="markers",
            marker={"color": colour(number), "size": 9, "symbol": "diamond"},
            hovertemplate=f"{who}<br>%{{y:.2%}} of its latents never fired<extra></extra>",
        )
    ticks = list(range(int(low), 1))
    figure.update_xaxes(
        title_text="share of tokens it fires on (log)",
        tickvals=[zero_at, *ticks],
        ticktext=["never", *(f"10<sup>{tick}</sup>" if tick else "1" for tick in ticks)],
        tickangle=0,
        range=[zero_at - 0.25, 0.05],
    )
    figure.update_yaxes(title_text="share of latents", tickformat=".0%", rangemode="tozero")
    return _finish(figure, height=320)


_PANELS = {
    "ev": ("Explained variance", "in training", "%{y:.4f}"),
    "l0": ("L0", "in training", "%{y:.1f}"),
    "dead": ("Dead latents", "by training's own rule", "%{y:.2%}"),
    "fired": ("Latents that fired", "in each window of training", "%{y:.2%}"),
}
Curves = Mapping[str, tuple[Float[ndarray, " step"], Float[ndarray, " step"]]]
"""By panel, tokens trained on and values."""


def lives(curves: Sequence[tuple[int, str, Curves]]) -> dict[str, go.Figure]:
    """How training went in each SAE: a figure for each number that any of them has."""
    panels = {}
    for name, (title, detail, form) in _PANELS.items():
        figure, shown = go.Figure(), []
        for number, who, each in curves:
            if name not in each:
                continue
            x, y = _thinned(*each[name])
            shown.append(y)
            figure.add_scatter(
                x=x,
                y=y,
                mode="lines" if len(x) > 1 else "markers",
                line={"color": colour(number), "width": 1.6},
                hovertemplate=f"{number} · {escape(who)}<br>{form}<br>after %{{x:.4s}} tokens"
                "<extra></extra>",
            )
        if not shown or not max(map(len, shown)):
            continue
        figure.update_xaxes(title_text="tokens trained on")
        figure.update_yaxes(_range(name, np.concatenate(shown)))
        if name == "fired":
            figure.update_yaxes(tickformat=".0%", range=[0, 1.05])
        _head(figure, title, detail)
        panels[name] = _finish(figure, height=270, top=36)
    return panels


def _thinned(
    x: Float[ndarray, " step"], y: Float[ndarray, " step"]
) -> tuple[Float[ndarray, " kept"], Float[ndarray, " kept"]]:
    """At most `_POINTS` of those where there is a value, evenly spread, the last among them."""
    there = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if len(there) > _POINTS:
        there = there[np.linspace(0, len(there) - 1, _POINTS).round().astype(int)]
    return x[there], y[there]


@dataclass(frozen=True)
class Parts:
    """The two parts of an SAE's error."""

    name: str
    linear: Metric
    nonlinear: Metric
    faint: bool = False
    """Drawn paler: a control."""


def dark_matter(bars: Sequence[Parts]) -> go.Figure:
    """The error of each SAE as a share of the activations' variance: the part that is linear in the
    activations, and the part that is not. The two add up to FVU."""
    if not bars:
        return _empty("`dark_matter` was not measured")
    figure = go.Figure()
    names = [escape(bar.name, quote=False) for bar in bars]
    for what, hue in (("nonlinear", WARM), ("linear", SLATE)):
        metrics = [bar.nonlinear if what == "nonlinear" else bar.linear for bar in bars]
        figure.add_bar(
            name=what,
            x=[metric.value for metric in metrics],
            y=list(range(len(bars))),
            orientation="h",
            width=0.7,
            marker={"color": hue, "opacity": [0.45 if bar.faint else 1.0 for bar in bars]},
            customdata=names,
            hovertemplate=f"%{{customdata}}<br>{what}: %{{x:.4f}} of the variance<extra></extra>",
        )
    for at, bar in enumerate(bars):
        total = bar.linear.value + bar.nonlinear.value
        share = bar.nonlinear.value / total if total > 0 else 0.0
        figure.add_annotation(
            x=max(total, 0.0),
            y=at,
            text=f"{total:.3f} <span style='color:{MUTED}'>{share:.0%}</span>",
            showarrow=False,
            xanchor="left",
            xshift=5,
            font={"size": 11, "color": INK},
        )
    top = max(bar.linear.value + bar.nonlinear.value for bar in bars)
    figure.update_xaxes(title_text="share of the variance of x", range=[0, 1.4 * top], nticks=6)
    figure.update_yaxes(
        tickvals=list(range(len(bars))), ticktext=names, autorange="reversed", showgrid=False
    )
    _finish(figure, height=84 + 27 * len(bars), top=34)
    figure.update_layout(
        barmode="stack",
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "normal"},
        # Room for what stands at a bar's end where the window is narrow.
        margin_r=48,
    )
    return figure.update_xaxes(linecolor=PALE)
