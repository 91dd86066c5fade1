"""Text that is not ours is shown as text: by every screen, in a real browser, wherever it came
from. `page` sees to it that no dialog opens, which a script that was let in would do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import Page, expect

from saekit.dashboard import _notes, data, export
from saekit.dashboard.data import Run

HOSTILE = (
    "<img src=x onerror=alert(1)><script>alert(2)</script> **b** $x^2$ :smile: "
    "[l](javascript:alert(3)) \u202egnp"
)
"""HTML, a script, Markdown, LaTeX, a name of a picture, a link, and a mark that turns the text."""

NAME = "<b>r **s** $y$ :cat: \u202egnp"
"""The same for the name of a folder, which has no slashes, and shorter."""


@pytest.fixture
def run(hostile_run: Path, tmp_path: Path) -> Path:
    """A run with hostile tokens, name, model, results, notes and explanations, in a folder of its
    own."""
    run = tmp_path / "runs" / NAME
    run.parent.mkdir()
    hostile_run.rename(run)
    config = run / "config.json"
    values = json.loads(config.read_text())
    values["provenance"]["model"] = HOSTILE
    config.write_text(json.dumps(values))
    core = run / "results" / "core.json"
    values = json.loads(core.read_text())
    values["metrics"]["ev"]["definition"] = HOSTILE
    values["config"]["note"] = HOSTILE
    core.write_text(json.dumps(values))
    for kind in (".json", ".safetensors"):
        shutil.copy(core.with_suffix(kind), core.with_name(f"{NAME}{kind}"))
    explained = {"explanations": {"0": HOSTILE}}
    (run / "explanations.json").write_text(json.dumps(explained))
    _notes.keep(run, 0, text=HOSTILE, star=True)
    return run


def shows_text_alone(page: Page) -> None:
    """Nothing of HOSTILE or NAME became an element, and nothing turns or hides what is beside it,
    but in a box that a person writes in."""
    page.locator('[data-testid="stApp"][data-test-script-state="notRunning"]').wait_for()
    page.wait_for_load_state("networkidle")  # Streamlit fetches what draws formulas and emoji late
    expect(page.get_by_test_id("stException")).to_have_count(0)
    assert page.locator('img[src="x"], a[href^="javascript"], .katex').count() == 0
    assert page.get_by_text("b", exact=True).locator("xpath=self::strong").count() == 0
    text = page.evaluate("document.body.innerText")
    assert "\u202e" not in text
    assert "😄" not in text and "🐱" not in text


def test_screens_of_hostile_text(run: Path, serve: Callable[..., str], page: Page) -> None:
    page.goto(f"{serve(run.parent)}/?screen=evals&show=all&latent=0")
    titles = {
        "features": "Features",
        "feature": "Feature",
        "prompt": "Prompt",
        "dark": "Dark matter",
    }
    for screen in ("evals", *titles):
        if screen in titles:  # quicker than by the address
            page.get_by_role("radio", name=titles[screen], exact=True).click()
        page.wait_for_url(f"**screen={screen}**")  # written at the end
        expect(page.get_by_text("\\u202egnp").first).to_be_visible()
        shows_text_alone(page)
    page.get_by_role("radio", name="Runs", exact=True).click()
    page.wait_for_url(lambda url: "screen=" not in url)
    shows_text_alone(page)


def test_a_hostile_address(tiny_run: Path, serve: Callable[..., str], page: Page) -> None:
    address = serve(tiny_run)
    for screen, shown in (("prompt", "nats a token"), ("steer", "steered, seed 0")):
        page.goto(f"{address}/?screen={screen}&text={quote(HOSTILE)}&tokens=2&samples=1")
        page.get_by_text(shown).first.wait_for()
        shows_text_alone(page)
    page.goto(f"{address}/?screen=steer&at={quote(HOSTILE)}&seed={quote(HOSTILE)}")
    page.get_by_text("a value that it cannot have").first.wait_for()
    shows_text_alone(page)


def test_what_is_exported(run: Path, tmp_path: Path, page: Page) -> None:
    opened = Run.open(run)
    store = export.store_of(opened)
    (tmp_path / "page.html").write_text(export.html_page(opened, store, [0, 1]))
    for link in (
        (tmp_path / "page.html").as_uri(),
        export.write_site(opened, tmp_path / "site").as_uri() + "#0",
    ):
        page.goto(link)
        expect(page.get_by_text("alert(2)").first).to_be_visible()
        assert page.locator('img, a[href^="javascript"]').count() == 0
        assert "\u202e" not in page.evaluate("document.body.innerText")


def test_a_command_names_a_hostile_folder_without_showing_it_wrong() -> None:
    assert data.quote("a b") == "'a b'"
    assert data.quote("it's \u202e\\x") == "$'it\\'s \\U0000202e\\\\x'"
