"""Every chart of report, feature browser and notebooks: plotly figures from plain numbers, which
know of no file and no page.

Restrained on purpose: one warm colour for what is looked at, one slate for the rest, no legend
where a title will do. Text that came from a corpus is escaped, since plotly reads labels as markup.
"""

from saekit.plot.compare import (
    Curves,
    Parts,
    Point,
    colour,
    dark_matter,
    densities,
    lives,
    scatter,
)
from saekit.plot.latents import feature_map, head_bars
from saekit.plot.live import Next, cosines, next_tokens, shares
from saekit.plot.run import (
    CONFIG,
    activation_histogram,
    ce_ladder,
    density_histogram,
    histogram_svg,
    in_dark,
    plotly_script,
    shade,
    to_html,
    token_bars,
    training_curves,
    training_panels,
)

__all__ = [
    "CONFIG",
    "Curves",
    "Next",
    "Parts",
    "Point",
    "activation_histogram",
    "ce_ladder",
    "colour",
    "cosines",
    "dark_matter",
    "densities",
    "density_histogram",
    "feature_map",
    "head_bars",
    "histogram_svg",
    "in_dark",
    "lives",
    "next_tokens",
    "plotly_script",
    "scatter",
    "shade",
    "shares",
    "to_html",
    "token_bars",
    "training_curves",
    "training_panels",
]
