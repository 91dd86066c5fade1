"""The shell and the screens of features, as a browser's session sees them."""

import json
import re
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from saekit import explanations
from saekit.explanations import Explanation

Browse = Callable[..., AppTest]
SECRET = "what no link may show"


def html_of(app: AppTest) -> str:
    return "\n".join(element.proto.body for element in app.get("html"))


def messages(app: AppTest) -> str:
    """What the app says, in plain text."""
    found = re.findall(r'<div class="message.*?</div>', html_of(app), re.DOTALL)
    return unescape(re.sub("<.*?>", "", "\n".join(found)))


def latents(app: AppTest) -> list[int]:
    table = app.dataframe[0]
    return [int(latent) for latent in table.value["latent"]]


def test_the_run_is_shown_with_its_headline_numbers(any_run: Path, browse: Browse) -> None:
    app = browse(any_run)
    assert "Explained variance" in [metric.label for metric in app.metric]
    assert "resid_post.0" in html_of(app)


def test_the_address_opens_a_latent(any_run: Path, browse: Browse) -> None:
    app = browse(any_run, latent="1")
    assert "### Latent 1" in [text.value for text in app.markdown]


@pytest.mark.parametrize("latent", ["3", "-1", "x", "²"])
def test_an_address_beyond_the_sae_is_answered(
    latent: str, hostile_run: Path, browse: Browse
) -> None:
    said = messages(browse(hostile_run, latent=latent))
    assert "this SAE has 0 to 2" in said or "a value that it cannot have" in said


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
    assert "No latent passes" in messages(app)
    app.text_input(key="query").set_value("").run()
    app.selectbox(key="show").set_value("all").run()
    assert sorted(latents(app)) == [0, 1, 2]
    assert not app.exception


def test_a_script_as_a_token_is_shown_and_not_run(hostile_run: Path, browse: Browse) -> None:
    html = html_of(browse(hostile_run, latent="0"))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<script" not in html
    assert "<img" not in html


def test_an_explanation_is_shown_with_its_scores_and_searched(
    hostile_run: Path, browse: Browse
) -> None:
    one = Explanation("wolves <b>", by="m", detection=0.75, n=8)
    explanations.keep(hostile_run, {1: one}, "f" * 64)
    app = browse(hostile_run, latent="1")
    assert "wolves &lt;b&gt;" in html_of(app)
    assert "detection 0.75" in html_of(app) and "fuzzing" not in html_of(app)
    assert "cannot be read" not in messages(browse(hostile_run, screen="evals"))
    app = browse(hostile_run, latent="0", query="WOLVES", where="label or note")
    assert latents(app) == [1]
    explanations.keep(hostile_run, {1: one}, "a" * 64)
    assert "explains weights" in messages(browse(hostile_run, latent="1"))


@pytest.mark.parametrize("write", [True, False])
def test_notes_are_kept_where_the_browser_may_write_and_nowhere_else(
    write: bool, hostile_run: Path, browse: Browse
) -> None:
    app = browse(*(["--write"] if write else []), hostile_run, screen="feature", latent="1")
    assert app.text_area(key="note-1").disabled != write
    assert app.button(key="star").disabled != write
    if write:
        app.text_area(key="note-1").set_value("a wolf").run()
        app.button(key="star").click().run()
        again = browse("--write", hostile_run, screen="features", show="starred")
        assert latents(again) == [1]
        assert again.text_area(key="note-1").value == "a wolf"
    assert (hostile_run / "notes.json").exists() == write


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_a_folder_that_holds_no_run_gives_a_message(
    name: str, tmp_path: Path, browse: Browse
) -> None:
    (tmp_path / "empty").mkdir()
    assert "is no run and holds none" in messages(browse(tmp_path / name))


def test_no_folder_gives_the_command(browse: Browse) -> None:
    assert "saekit dashboard PATH" in messages(browse())


def test_a_run_still_training_shows_its_curves_and_reads_new_lines(
    hostile_run: Path, browse: Browse
) -> None:
    shutil.rmtree(hostile_run / "results")
    (hostile_run / "config.json").unlink()
    app = browse(hostile_run)
    assert "Training has to end first" in messages(app)
    before = app.get("plotly_chart")[0].proto.spec
    with (hostile_run / "metrics.jsonl").open("a") as log:
        log.write("\n" + json.dumps({"step": 4, "tokens": 40, "loss": 0.5}) + "\n")
    app.run()
    assert app.get("plotly_chart")[0].proto.spec != before
    app.segmented_control(key="screen").set_value("features").run()
    assert "no feature store" in messages(app)
    assert "Training has to end first." in [caption.value for caption in app.caption]
    assert not app.exception


@pytest.fixture
def folder(tmp_path: Path, hostile_run: Path, tiny_run: Path) -> Path:
    """A finished run, one that trains, one that is broken; outside of it a run, and a link to
    that."""
    root = tmp_path / "runs"
    shutil.copytree(tiny_run, root / "sweep" / "done")
    shutil.copytree(tiny_run, root / "training")
    (root / "training" / "config.json").unlink()
    (root / "training" / "metrics.jsonl").touch()
    shutil.rmtree(root / "training" / "results")
    shutil.copytree(hostile_run, root / "<b>broken</b>")
    (root / "<b>broken</b>" / "config.json").write_text("{")
    outside = tmp_path / "outside"
    shutil.copytree(hostile_run, outside)
    (outside / "config.toml").write_text(f'kind = "{SECRET}"')
    (root / "linked").symlink_to(outside)
    (root / "sweep" / "results").mkdir()
    return root


def test_a_folder_of_runs_lists_those_in_it_with_their_state(folder: Path, browse: Browse) -> None:
    app = browse(folder, run="sweep/done")
    (table,) = (each for each in app.dataframe if "state" in each.value)
    found = dict(zip(table.value["run"], table.value["state"], strict=True))
    assert found == {"<b>broken</b>": "broken", "sweep/done": "finished", "training": "training"}
    assert "<b>broken</b>" in messages(app)
    assert "is not JSON" in messages(app)
    assert "<b>broken" not in html_of(app)
    assert app.selectbox(key="run").value == "sweep/done"


def test_the_broken_run_and_the_training_one_can_be_chosen(folder: Path, browse: Browse) -> None:
    for screen in ("runs", "evals"):
        app = browse(folder, run="<b>broken</b>", screen=screen)
        assert "is not JSON" in messages(app)
        app.selectbox(key="run").set_value("training").run()
        assert not app.exception
        assert "Training has to end first" in messages(app)
        assert app.query_params["run"] == "training"


@pytest.mark.parametrize(
    "asked",
    ["../outside", "linked", "sweep/../../outside", "/etc", "sweep/../linked", "a\0b", "no"],
)
def test_a_link_leads_to_no_path_outside_the_folder(
    asked: str, folder: Path, browse: Browse
) -> None:
    app = browse(folder, run=asked)
    assert "the link asks for run" in messages(app)
    assert "outside" in messages(app) or asked == "no"
    everything = html_of(app) + "".join(each.value.to_csv() for each in app.dataframe)
    assert SECRET not in everything


def test_a_link_cannot_leave_a_single_run(
    hostile_run: Path, tiny_run: Path, browse: Browse
) -> None:
    app = browse(hostile_run, run=str(tiny_run))
    assert "which is one run" in messages(app)
    assert "tiny_lm" not in html_of(app)


def test_the_address_says_what_is_shown_and_leaves_out_defaults(
    folder: Path, browse: Browse
) -> None:
    app = browse(folder)
    assert app.query_params == {}
    app.segmented_control(key="screen").set_value("evals").run()
    assert app.query_params == {"screen": "evals"}
    app.selectbox(key="run").set_value("sweep/done").run()
    app.text_input(key="metric").set_value("l0").run()
    assert app.query_params == {"screen": "evals", "run": "sweep/done", "metric": "l0"}
    again = browse(folder, screen="evals", run="sweep/done", metric="l0")
    assert again.query_params == app.query_params
    assert again.text_input(key="metric").value == "l0"
    assert html_of(again) == html_of(app)


def test_another_address_goes_before_what_the_session_holds(folder: Path, browse: Browse) -> None:
    """As the browser's back button gives one."""
    app = browse(folder, screen="evals", run="sweep/done", metric="l0")
    app.text_input(key="metric").set_value("ev").run()
    app.query_params["metric"] = "l0"
    app.run()
    assert app.text_input(key="metric").value == "l0"
    app.query_params = {}
    app.run()
    assert app.segmented_control(key="screen").value == "runs"
    assert app.query_params == {}


def test_a_choice_made_while_the_address_was_behind_is_kept(folder: Path, browse: Browse) -> None:
    app = browse(folder, screen="evals", run="sweep/done")
    app.text_input(key="metric").set_value("ev").run()
    # The web browser sent the next choice before it had the address of the one before.
    app.query_params = {"screen": "evals", "run": "sweep/done"}
    app.text_input(key="metric").set_value("l0").run()
    assert app.text_input(key="metric").value == "l0"
    assert app.query_params["metric"] == "l0"


@pytest.mark.parametrize("address", [{"screen": "<b>no</b>"}, {"over": "L0"}])
def test_an_address_that_cannot_be_is_answered(
    address: dict[str, str], hostile_run: Path, browse: Browse
) -> None:
    app = browse(hostile_run, **address)
    assert "Its default is shown" in messages(app)
    assert next(iter(address.values())) in messages(app)


OF_FEATURES = pytest.mark.parametrize("screen", ["features", "feature"])


@OF_FEATURES
def test_without_a_store_the_way_to_it_is_said(
    screen: str, hostile_run: Path, browse: Browse
) -> None:
    shutil.rmtree(hostile_run / "results" / "features")
    app = browse(hostile_run, screen=screen)
    assert "no feature store" in messages(app)
    assert app.button(key="build").disabled, "it may not write"
    assert "saekit features build" in "\n".join(code.value for code in app.code)
    assert not browse("--write", hostile_run, screen=screen).button(key="build").disabled


@OF_FEATURES
def test_a_run_in_training_has_no_features_yet(
    screen: str, hostile_run: Path, browse: Browse
) -> None:
    shutil.rmtree(hostile_run / "results")
    (hostile_run / "config.json").unlink()
    app = browse("--write", hostile_run, screen=screen)
    assert "Training has to end first." in [caption.value for caption in app.caption]
    assert not [button for button in app.button if button.key == "build"]


@OF_FEATURES
@pytest.mark.parametrize("file", ["features.json", "contexts-00000.parquet", "vocab.parquet"])
def test_a_broken_store_is_named(file: str, screen: str, hostile_run: Path, browse: Browse) -> None:
    (hostile_run / "results" / "features" / file).write_bytes(b"{")
    app = browse(hostile_run, screen=screen)
    assert file in messages(app) and "cannot be read" in messages(app)
    assert "saekit features build" in "\n".join(code.value for code in app.code)


@OF_FEATURES
def test_a_dead_latent_is_called_dead(screen: str, hostile_run: Path, browse: Browse) -> None:
    app = browse(hostile_run, screen=screen, latent="2", show="all")
    assert "is dead" in app.info[0].value


@OF_FEATURES
def test_features_of_an_sae_of_unknown_origin_are_shown(
    screen: str, hostile_run: Path, browse: Browse
) -> None:
    (hostile_run / "config.toml").unlink()
    config = hostile_run / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"provenance": None}))
    app = browse(hostile_run, screen=screen, latent="1")
    assert "### Latent 1" in [text.value for text in app.markdown]


@pytest.mark.parametrize("file", ["notes.json", "explanations.json"])
def test_broken_notes_are_named_and_the_latent_is_shown(
    file: str, hostile_run: Path, browse: Browse
) -> None:
    (hostile_run / file).write_text("[")
    app = browse(hostile_run, screen="feature", latent="1")
    assert f"{file} cannot be read" in messages(app)
    assert "### Latent 1" in [text.value for text in app.markdown]
