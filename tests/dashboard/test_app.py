import json
import shutil
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from saekit.dashboard.server import APP


@pytest.fixture
def browse(monkeypatch: pytest.MonkeyPatch) -> "Browse":
    return Browse(monkeypatch)


class Browse:
    """Opens the feature browser on a run, as the command line does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(self, *arguments: Path | str, latent: str | None = None) -> AppTest:
        self.monkeypatch.setattr("sys.argv", [str(APP), *map(str, arguments)])
        app = AppTest.from_file(APP, default_timeout=60)
        if latent is not None:
            app.query_params["latent"] = latent
        app.run()
        assert not app.exception
        return app


def html_of(app: AppTest) -> str:
    return "\n".join(element.proto.body for element in app.get("html"))


def latents(app: AppTest) -> list[int]:
    (table,) = app.dataframe
    return [int(latent) for latent in table.value["latent"]]


def test_the_overview_shows_the_headline_numbers(any_run: Path, browse: Browse) -> None:
    app = browse(any_run)
    assert "Explained variance" in [metric.label for metric in app.metric]
    assert "mean" in html_of(app)


def test_the_address_opens_a_latent(any_run: Path, browse: Browse) -> None:
    app = browse(any_run, latent="1")
    assert "## Latent 1" in [text.value for text in app.markdown]


@pytest.mark.parametrize("latent", ["3", "-1", "x", "²"])
def test_an_address_beyond_the_sae_is_answered(
    latent: str, hostile_run: Path, browse: Browse
) -> None:
    (warning,) = browse(hostile_run, latent=latent).warning
    assert "this SAE has 0 to 2" in warning.value


def test_latents_are_reached_by_number_and_by_step(hostile_run: Path, browse: Browse) -> None:
    app = browse(hostile_run, latent="1")
    assert latents(app) == [1, 0]
    app.button(key="next").click().run()
    assert app.number_input(key="latent").value == 0
    assert app.query_params["latent"] == "0"
    app.button(key="previous").click().run()
    assert app.number_input(key="latent").value == 1
    app.number_input(key="latent").set_value(2).run()
    assert "is dead" in app.info[0].value
    app.button(key="next").click().run()
    assert app.number_input(key="latent").value == 1, "from outside the table to its first"
    assert not app.exception


def test_search_narrows_the_table_and_opens_its_first(hostile_run: Path, browse: Browse) -> None:
    app = browse(hostile_run, latent="1")
    app.text_input(key="query").set_value("the cat").run()
    assert latents(app) == [0]
    assert app.number_input(key="latent").value == 0
    app.text_input(key="query").set_value("nowhere").run()
    assert "No latent passes" in app.info[0].value
    app.text_input(key="query").set_value("").run()
    app.selectbox(key="show").set_value("all").run()
    assert sorted(latents(app)) == [0, 1, 2]
    assert not app.exception


def test_a_script_as_a_token_is_shown_and_not_run(hostile_run: Path, browse: Browse) -> None:
    html = html_of(browse(hostile_run, latent="0"))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<script" not in html
    assert "<img" not in html


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_a_folder_that_is_no_run_gives_a_message(name: str, tmp_path: Path, browse: Browse) -> None:
    (tmp_path / "empty").mkdir()
    (error,) = browse(tmp_path / name).error
    assert "is no run" in error.value


def test_no_folder_gives_the_command(browse: Browse) -> None:
    (error,) = browse().error
    assert "saekit dashboard RUN" in error.value


def test_a_run_still_training_shows_its_curves_and_reads_new_lines(
    hostile_run: Path, browse: Browse
) -> None:
    shutil.rmtree(hostile_run / "results")
    (hostile_run / "config.json").unlink()
    app = browse(hostile_run)
    assert "saekit eval core" in app.info[0].value
    before = app.get("plotly_chart")[0].proto.spec
    with (hostile_run / "metrics.jsonl").open("a") as log:
        log.write("\n" + json.dumps({"step": 4, "tokens": 40, "loss": 0.5}) + "\n")
    app.run()
    assert app.get("plotly_chart")[0].proto.spec != before
    app.radio(key="screen").set_value("Features").run()
    assert "saekit eval examples" in app.info[0].value
    assert not app.exception
