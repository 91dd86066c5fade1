from typing import Any

import numpy as np
import pytest

from saekit import plot
from saekit.features import TokenLogit
from saekit.plot.run import INK, MUTED, WARM
from saekit.results import Metric


def traces(figure: Any) -> Any:
    """What a figure draws; plotly ships no types."""
    return figure.data


def notes(figure: Any) -> list[str]:
    return [note.text for note in figure.layout.annotations]


def metric(value: float) -> Metric:
    return Metric(value=value, definition="", n=1)


def test_figures_of_nothing_say_so() -> None:
    nothing = np.zeros(0)
    for figure in (
        plot.training_curves({}),
        plot.density_histogram(nothing),
        plot.activation_histogram(np.zeros(4, int), 0.0),
        plot.token_bars([], []),
        plot.ce_ladder({}),
    ):
        assert not traces(figure)
        assert notes(figure) != []
    assert "<rect" not in plot.histogram_svg(np.zeros(4, int), 0.0)


@pytest.mark.parametrize("density", [[0.0, 0.0], [1.0], [1e-7, 0.5, 0.0]])
def test_each_latent_is_in_one_bar_of_the_density_histogram(density: list[float]) -> None:
    alive, dead = traces(plot.density_histogram(np.array(density)))
    assert sum(alive.y) + sum(dead.y) == len(density)
    assert sum(dead.y) == density.count(0.0)


def test_the_density_of_one_latent_is_marked() -> None:
    for mark in (0.0, 0.01):
        figure = plot.density_histogram(np.array([0.0, 0.01]), mark=mark)
        assert "this latent" in notes(figure)


def test_training_curves_draw_what_was_logged() -> None:
    curves = {"step": np.array([1.0]), "ev": np.array([-3.0]), "unknown": np.array([1.0])}
    (trace,) = traces(plot.training_curves(curves))
    assert list(trace.y) == [-3.0]
    assert trace.mode == "markers", "a line through one point cannot be seen"


def test_tokens_are_escaped_in_labels_and_tooltips() -> None:
    figure: Any = plot.token_bars([TokenLogit("<b>x</b>", 1.0)], [])
    assert figure.data[0].customdata[0] == "&lt;b&gt;x&lt;/b&gt;"
    assert figure.layout.yaxis.ticktext[0] == "&lt;b&gt;x&lt;/b&gt;"


def test_a_token_that_closes_the_script_does_not_end_the_figure() -> None:
    html = plot.to_html(plot.token_bars([TokenLogit("</script>", 1.0)], []), "x")
    assert html.count("</script>") == html.count("<script")


def test_the_ladder_gives_the_distance_from_the_clean_model() -> None:
    values = {"ce_clean": 3.0, "ce_sae": 3.25, "ce_zero": 9.0}
    (bars,) = traces(plot.ce_ladder({name: metric(value) for name, value in values.items()}))
    assert list(bars.y) == ["Model as it is", "With the SAE", "Zero-ablated"]
    assert "+0.250" in bars.text[1]


def test_shades_run_from_nothing_to_orange() -> None:
    assert plot.shade(0.0, 2.0) == plot.shade(1.0, 0.0) == "rgb(247 146 62 / 0)"
    assert plot.shade(2.0, 2.0) == plot.shade(9.0, 2.0) == "rgb(247 146 62 / 1)"


def test_in_the_dark_ink_is_light_and_text_of_a_corpus_stays_as_it_is() -> None:
    bars = plot.token_bars([TokenLogit(INK, 1.0)], [TokenLogit("b", -1.0)])
    dark: Any = plot.in_dark(bars)
    assert dark.layout.font.color not in (MUTED, INK)
    assert traces(dark)[0].customdata[0] == INK
    assert traces(dark)[0].marker.color == WARM
    ladder = plot.in_dark(plot.ce_ladder({"ce_clean": metric(1.0), "ce_sae": metric(2.0)}))
    assert MUTED not in str(ladder.to_json())
