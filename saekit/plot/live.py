"""Charts of what is reckoned while somebody looks: steering, errors of one text, matches."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from numpy import ndarray

from saekit.plot.run import SLATE, WARM, _clip, _empty, _finish


@dataclass(frozen=True)
class Next:
    """A next token, and how likely it is untouched and steered."""

    token: str
    clean: float
    steered: float


def next_tokens(found: Sequence[Next]) -> go.Figure:
    """How likely the next tokens are, untouched and steered."""
    names = [escape(_clip(each.token), quote=False) for each in found]
    figure = go.Figure()
    for name, colour, values in (
        ("untouched", SLATE, [each.clean for each in found]),
        ("steered", WARM, [each.steered for each in found]),
    ):
        figure.add_bar(
            name=name,
            x=values,
            y=list(range(len(found))),
            orientation="h",
            marker_color=colour,
            customdata=names,
            hovertemplate=f"%{{customdata}}<br>{name}: %{{x:.2%}}<extra></extra>",
        )
    figure.update_xaxes(title_text="probability", tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(
        tickvals=list(range(len(found))), ticktext=names, autorange="reversed", showgrid=False
    )
    _finish(figure, height=100 + 30 * len(found), top=34)
    return figure.update_layout(
        bargap=0.25,
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
    )


def shares(values: Float[ndarray, " row"]) -> go.Figure:
    """How much of the error each hundredth of the tokens holds: the worst first, added up."""
    if not len(values) or values.sum() <= 0:
        return _empty("There is no error")
    ordered = np.sort(values)[::-1].cumsum() / values.sum()
    at = np.unique(np.linspace(0, len(ordered) - 1, 200).round().astype(int))
    figure = go.Figure(
        go.Scatter(
            x=(at + 1) / len(ordered),
            y=ordered[at],
            mode="lines",
            line={"color": WARM, "width": 2},
            hovertemplate="the worst %{x:.1%} of the tokens<br>hold %{y:.1%} of the error"
            "<extra></extra>",
        )
    )
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": SLATE, "dash": "dot", "width": 1},
        hoverinfo="skip",
    )  # fmt: skip
    figure.update_xaxes(title_text="tokens, the worst first", tickformat=".0%", range=[0, 1])
    figure.update_yaxes(title_text="of the error", tickformat=".0%", range=[0, 1.02])
    return _finish(figure, height=280)


def cosines(values: Float[ndarray, " pair"]) -> go.Figure:
    """How alike the pairs are."""
    edges = np.linspace(-1.0, 1.0, 41)
    counts, _ = np.histogram(values, edges)
    low = edges[np.flatnonzero(counts)[0]] if counts.any() else 0.0
    figure = go.Figure(
        go.Bar(
            x=(edges[:-1] + edges[1:]) / 2,
            y=counts,
            marker_color=SLATE,
            customdata=np.stack([edges[:-1], edges[1:]], axis=1),
            hovertemplate="%{y:,} pairs<br>cosine %{customdata[0]:.2f} to %{customdata[1]:.2f}"
            "<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="cosine of the decoder rows", range=[min(low, 0) - 0.02, 1.02])
    figure.update_yaxes(title_text="pairs")
    return _finish(figure, height=260)
