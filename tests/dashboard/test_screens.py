"""The screens that run the model or look at results, in every state that a run may be in."""

import json
import re
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from saekit import load, save

Browse = Callable[..., AppTest]
SCREENS = ("runs", "prompt", "steer", "compare", "dark", "evals")
TEXT = "the cat sees <b>a</b> dog $x^2$ :smile: \u202e **no**"


def html_of(app: AppTest) -> str:
    return "\n".join(element.proto.body for element in app.get("html"))


def messages(app: AppTest) -> str:
    found = re.findall(r'<div class="message.*?</div>', html_of(app), re.DOTALL)
    return unescape(re.sub("<.*?>", "", "\n".join(found)))


def texts(app: AppTest) -> str:
    """All that Streamlit would read as Markdown."""
    kinds = ("markdown", "caption", "info", "warning", "error", "success")
    shown = [str(element.value) for kind in kinds for element in getattr(app, kind)]
    return "\n".join([*shown, *(button.label for button in app.button)])


def codes(app: AppTest) -> str:
    return "\n".join(str(code.value) for code in app.code)


@pytest.fixture
def alone(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(tiny_run, tmp_path / "alone"))


@pytest.fixture
def pair(alone: Path, tiny_run: Path) -> Path:
    """A folder of two runs."""
    shutil.copytree(tiny_run, alone.parent / "other & <i>more")
    return alone.parent


@pytest.mark.parametrize("screen", SCREENS)
def test_a_run_in_training_says_what_it_waits_for(screen: str, alone: Path, browse: Browse) -> None:
    shutil.rmtree(alone / "results")
    (alone / "config.json").unlink()
    app = browse(alone, screen=screen, text=TEXT)
    said = messages(app)
    assert "Training has to end first" in said or "one run alone" in said
    assert "saekit train topk" in codes(app)


@pytest.mark.parametrize("screen", SCREENS)
def test_a_run_without_results_says_what_makes_them(
    screen: str, alone: Path, browse: Browse
) -> None:
    shutil.rmtree(alone / "results")
    app = browse(alone, screen=screen, text=TEXT)
    if screen in ("runs", "evals", "dark"):
        assert "saekit eval" in codes(app)
    if screen == "prompt":
        assert "CE with the SAE" in [metric.label for metric in app.metric]


@pytest.mark.parametrize("screen", SCREENS)
def test_a_broken_result_is_named(screen: str, alone: Path, browse: Browse) -> None:
    (alone / "results" / "core.json").write_text("{")
    said = messages(browse(alone, screen=screen))
    assert "core.json" in said and "saekit eval core" in said


@pytest.mark.parametrize("screen", ["prompt", "steer", "compare", "dark"])
def test_broken_weights_are_named(screen: str, pair: Path, browse: Browse) -> None:
    weights = pair / "alone" / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    app = browse(pair, run="alone", screen=screen, text=TEXT)
    assert "sae.safetensors" in messages(app)


@pytest.fixture
def foreign(alone: Path, tmp_path: Path) -> Path:
    """An SAE that does not say where it comes from."""
    sae = load(alone)
    object.__setattr__(sae, "provenance", None)
    save(sae, tmp_path / "foreign")
    return tmp_path / "foreign"


@pytest.mark.parametrize("screen", SCREENS)
def test_an_sae_of_unknown_origin_says_what_to_name(
    screen: str, foreign: Path, browse: Browse
) -> None:
    app = browse(foreign, screen=screen, text=TEXT)
    if screen in ("prompt", "steer"):
        assert "--model MODEL --hook HOOK" in codes(app)
    if screen == "dark":
        assert "does not say which cache" in messages(app)


def test_an_sae_of_unknown_origin_is_run_with_the_model_that_is_named(
    foreign: Path, tiny_lm: Path, browse: Browse
) -> None:
    told = ["--model", str(tiny_lm), "--hook", "resid_post.0"]
    app = browse(*told, foreign, screen="prompt", text=TEXT)
    assert "CE with the SAE" in [metric.label for metric in app.metric]
    app = browse(*told[:3], "attn_z.9", foreign, screen="prompt", text=TEXT)
    assert "attn_z.9" in messages(app)


def test_a_prompt_is_read_and_each_token_can_be_looked_at(tiny_run: Path, browse: Browse) -> None:
    app = browse(tiny_run, screen="prompt", text="the cat sees a dog", at="2")
    (table,) = app.dataframe
    tokens = list(table.value["token"])
    assert "".join(tokens) == "<bos>the cat sees a dog"
    strongest = str(list(table.value["strongest latents"])[2]).split(":")[0]
    assert app.button(key=f"open-{strongest}").label == strongest
    app.button(key="after").click().run()
    assert app.query_params["at"] == "3"
    app.number_input(key="at").set_value(0).run()
    assert "A special token" in messages(app)
    app.number_input(key="at").set_value(2).run()
    app.button(key=f"shade-{strongest}").click().run()
    assert (app.query_params["shade"], app.query_params["of"]) == ("latent", strongest)
    app.button(key=f"open-{strongest}").click().run()
    assert not app.exception
    assert app.query_params["screen"] == "feature"
    assert app.query_params["latent"] == strongest


def test_a_token_beyond_the_text_is_answered(tiny_run: Path, browse: Browse) -> None:
    app = browse(tiny_run, screen="prompt", text="the cat", at="999")
    assert "There is no token 999" in messages(app)


def test_a_latent_of_a_prompt_is_steered_with_one_click(tiny_run: Path, browse: Browse) -> None:
    app = browse(tiny_run, screen="prompt", text="the cat sees", at="2")
    steer = next(each for each in app.button if (each.key or "").startswith("steer-"))
    steer.click().run()
    latent = str(steer.key).removeprefix("steer-")
    assert app.query_params["screen"] == "steer"
    assert app.query_params["changes"].startswith(f"{latent}:set:")
    assert app.query_params["text"] == "the cat sees"
    assert app.number_input(key="latent-0").value == int(latent)
    assert "untouched, seed 0" in texts(app)


def test_changes_are_added_altered_and_taken_away(tiny_run: Path, browse: Browse) -> None:
    app = browse(tiny_run, screen="steer", text="the cat", tokens="3", samples="1")
    assert "Nothing is changed yet" in texts(app)
    app.button(key="add").click().run()
    app.number_input(key="latent-0").set_value(5).run()
    app.number_input(key="amount-0").set_value(-2.5).run()
    assert app.query_params["changes"] == "5:set:-2.5"
    app.selectbox(key="how-0").set_value("ablate").run()
    assert app.query_params["changes"] == "5:ablate"
    app.toggle(key="keep").set_value(False).run()
    assert app.query_params["keep"] == "0"
    app.button(key="away-0").click().run()
    assert "changes" not in app.query_params
    assert not app.exception


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ({"changes": "5:explode:1"}, "`changes` a value"),
        ({"changes": "99999:ablate"}, "left out: [99999]"),
        ({"tokens": "1000000"}, "`tokens` a value"),
        ({"temperature": "nan"}, "`temperature` a value"),
    ],
)
def test_steering_that_cannot_be_is_answered(
    address: dict[str, str], said: str, tiny_run: Path, browse: Browse
) -> None:
    assert said.replace("`", "") in messages(browse(tiny_run, screen="steer", **address))


def test_two_saes_are_compared_pair_by_pair(pair: Path, browse: Browse) -> None:
    app = browse(pair, run="alone", screen="compare")
    metrics = {metric.label: metric.value for metric in app.metric}
    assert metrics["Mean cosine"] == "1.000", "they are copies"
    pairs = next(each for each in app.dataframe if "cosine" in each.value)
    assert list(pairs.value["latent"]) == list(pairs.value["other"])
    chosen = list(pairs.value["latent"])[3]
    again = browse(pair, run="alone", screen="compare", pair=str(chosen))
    assert f"#### Latent {chosen} and latent {chosen}" in texts(again)
    html = html_of(again)
    assert html.count('class="contexts"') == 2
    assert "other &amp; &lt;i&gt;more" in html and "<i>" not in html


@pytest.mark.parametrize("asked", ["../elsewhere", "none"])
def test_the_run_to_compare_with_lies_in_the_folder(asked: str, pair: Path, browse: Browse) -> None:
    app = browse(pair, run="alone", screen="compare", **{"with": asked})
    assert "the link asks for run" in messages(app)
    assert not app.metric


def test_the_error_is_shown_over_text_and_worst_contexts(tiny_run: Path, browse: Browse) -> None:
    app = browse(tiny_run, screen="dark")
    assert "saekit eval dark_matter" in codes(app)
    html = html_of(app)
    assert html.count('class="context"') > 1
    assert "fraction of variance unexplained" in html
    document = app.selectbox(key="document")
    document.set_value(document.options[1]).run()
    assert app.query_params["document"] == document.options[1]


def test_an_error_without_its_cache_says_what_to_do(alone: Path, browse: Browse) -> None:
    config = alone / "config.toml"
    config.write_text(re.sub(r'^cache = ".*"', 'cache = "/gone"', config.read_text(), flags=re.M))
    said = messages(browse(alone, screen="dark"))
    assert "/gone" in said and "saekit harvest" in said


def test_results_are_found_by_name_and_shown_with_definitions(
    tiny_run: Path, browse: Browse
) -> None:
    app = browse(tiny_run, screen="evals", metric="l0_p")
    html = unescape(html_of(app))
    assert "l0_p95" in html and "relative_reconstruction_bias" not in html
    assert "--controls" in codes(app)
    app = browse(tiny_run, screen="evals", eval="<b>")
    assert "There is no result of <b>" in messages(app)


@pytest.mark.parametrize("screen", ["prompt", "steer"])
def test_a_prompt_is_shown_as_text(screen: str, tiny_run: Path, browse: Browse) -> None:
    app = browse(tiny_run, screen=screen, text=TEXT)
    html, markdown = html_of(app), texts(app)
    assert "<b>a</b>" not in html
    for hostile in ("\u202e", ":smile:", "$x^2$", "**no**"):
        assert hostile not in markdown
    assert "\u202e" not in html
    assert app.text_area(key="text").value == TEXT


def test_names_of_files_and_settings_are_shown_as_text(
    hostile_run: Path, tmp_path: Path, browse: Browse
) -> None:
    name = "a <script>alert(1)</script> **b** :smile: \u202e"
    named = hostile_run.rename(tmp_path / name.replace("/", "_"))
    config = named / "config.json"
    values = json.loads(config.read_text())
    values["provenance"]["model"] = "<img src=x onerror=alert(1)>"
    config.write_text(json.dumps(values))
    for screen in SCREENS:
        app = browse(tmp_path, screen=screen, text="x")
        html = html_of(app)
        assert "<script" not in html and "<img" not in html
        assert "\u202e" not in html + texts(app)
        assert ":smile:" not in texts(app)
