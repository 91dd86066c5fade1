"""Charts of latents: where they lie on the map, which heads they read."""

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int
from numpy import ndarray

from saekit.plot.run import INK, PALE, WARM, _finish

MOST = 40_000
"""Points of the map at once: the web browser gets them all."""


def feature_map(
    place: Float[ndarray, "d_sae 2"],
    density: Float[ndarray, " d_sae"],
    found: Int[ndarray, " found"],
    chosen: int,
) -> go.Figure:
    """Every latent at its place on the map; those found coloured by how often they fire, the others
    grey, the chosen one ringed. Of more than `MOST` of a kind, that many are drawn, spread evenly
    over them."""
    others = np.setdiff1d(np.arange(len(place)), found)
    figure = go.Figure()
    for latents, colour in ((_some(others), None), (_some(np.sort(found)), density)):
        marker: dict[str, object] = {"size": 5, "color": PALE, "opacity": 0.5}
        if colour is not None:
            fires = np.log10(np.maximum(colour[latents], 1e-9))
            low, high = np.quantile(fires, [0.05, 0.95]) if len(fires) else (-1, 0)
            scale = [[0, "#9fb3c8"], [1, WARM]]
            marker = {"size": 6, "color": fires, "colorscale": scale, "cmin": low, "cmax": high}
        figure.add_trace(
            go.Scattergl(
                x=place[latents, 0].astype(np.float32),
                y=place[latents, 1].astype(np.float32),
                mode="markers",
                marker=marker,
                customdata=np.stack([latents, 100 * density[latents]], axis=1),
                hovertemplate="latent %{customdata[0]}<br>fires on %{customdata[1]:.3~g}% of tokens"
                "<extra></extra>",
            )
        )
    x, y = (float(value) for value in place[chosen])
    ring = {"size": 17, "color": "rgba(0,0,0,0)", "line": {"color": INK, "width": 3}}
    figure.add_scatter(x=[x], y=[y], mode="markers", marker=ring, hoverinfo="skip")
    _finish(figure, height=560)
    figure.update_xaxes(visible=False, fixedrange=False)
    figure.update_yaxes(visible=False, fixedrange=False, scaleanchor="x")
    return figure.update_layout(dragmode="pan", margin={"l": 4, "r": 4, "t": 4, "b": 4})


def head_bars(shares: Float[ndarray, " head"]) -> go.Figure:
    """Share of each head in a latent's decoder row."""
    figure = go.Figure(
        go.Bar(
            x=[str(head) for head in range(len(shares))],
            y=shares,
            marker_color=WARM,
            hovertemplate="head %{x}: %{y:.1%}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="head", type="category")
    figure.update_yaxes(title_text="share of |W_dec|", tickformat=".0%", rangemode="tozero")
    return _finish(figure, height=240)


def _some(latents: Int[ndarray, " n"]) -> Int[ndarray, " most"]:
    if len(latents) <= MOST:
        return latents
    return latents[np.linspace(0, len(latents) - 1, MOST).astype(np.int64)]
