"""The feature browser as a person uses it: in Chromium, by clicks and keys.

`page` sees to it that no error is in the console, that no dialog opens and nothing is fetched from
elsewhere.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from saekit.dashboard import export, write_report
from saekit.dashboard.compare import write_comparison
from saekit.dashboard.data import Run

SHOWS = {
    "runs": "Training, side by side",
    "features": "of 64 latents",
    "feature": "Direct effect on the output",
    "prompt": "CE with the SAE",
    "steer": "How it goes on",
    "compare": "Matched latents",
    "dark": "Worst contexts",
    "evals": "explained variance about the mean",
}
"""What each screen shows of a finished run, by its name in the address."""

TEXT = "the cat sees a dog"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    """A folder of two finished runs."""
    root = tmp_path_factory.mktemp("browsed")
    for name in ("first", "second"):
        shutil.copytree(tiny_run, root / name)
    return root


@pytest.fixture(scope="module")
def address(runs: Path, serve: Callable[..., str]) -> str:
    """Of a browser that may write."""
    return serve(runs, write=True)


def settled(page: Page) -> None:
    """Once the app has run to its end. After a click or a key, wait first for what it changes: the
    app may not have begun to run."""
    page.locator('[data-testid="stApp"][data-test-script-state="notRunning"]').wait_for()
    expect(page.get_by_test_id("stException")).to_have_count(0)


@pytest.mark.parametrize("name", SHOWS)
def test_a_screen_opens_by_its_address_and_survives_reload_and_back(
    name: str, address: str, page: Page
) -> None:
    link = f"{address}/?screen={name}&text={TEXT.replace(' ', '+')}"
    page.goto(link)
    expect(page.get_by_text(SHOWS[name]).first).to_be_visible()
    settled(page)
    here = page.url
    page.reload()
    expect(page.get_by_text(SHOWS[name]).first).to_be_visible()
    settled(page)
    assert page.url == here
    other = "evals" if name != "evals" else "runs"
    page.get_by_role("radio", name={"evals": "Evals", "runs": "Runs"}[other], exact=True).click()
    expect(page.get_by_text(SHOWS[other]).first).to_be_visible()
    settled(page)
    page.go_back()
    expect(page.get_by_text(SHOWS[name]).first).to_be_visible()
    settled(page)
    assert page.url == here


def test_a_latent_is_searched_for_stepped_through_and_kept(
    address: str, runs: Path, page: Page
) -> None:
    page.goto(f"{address}/?screen=features&run=second")
    page.get_by_text("of 64 latents").wait_for()
    settled(page)
    page.get_by_role("searchbox").or_(page.get_by_label("Search")).first.fill("cat")
    page.keyboard.press("Enter")
    page.wait_for_url("**query=cat**")
    settled(page)
    number = page.get_by_role("spinbutton", name="Latent", exact=True)
    first = number.input_value()
    page.get_by_role("heading", name=f"Latent {first}", exact=True).click()
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**latent=**")
    expect(number).not_to_have_value(first)
    settled(page)
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("heading", name=f"Latent {first}", exact=True)).to_be_visible()
    expect(number).to_have_value(first)
    settled(page)
    page.get_by_role("textbox", name="Note").fill("cats, I *think*")
    page.keyboard.press("Control+Enter")
    # What is sent later arrives later: with the star, the note is there, too.
    page.locator(".st-key-star button").first.click()
    page.locator(".st-key-star").get_by_text("star", exact=True).first.wait_for()
    settled(page)
    page.reload()
    expect(page.get_by_role("textbox", name="Note")).to_have_value("cats, I *think*")
    settled(page)
    assert f'"{first}"' in (runs / "second" / "notes.json").read_text()
    page.goto(f"{address}/?screen=features&run=second&show=starred")
    expect(page.get_by_text("1 of 64 latents")).to_be_visible()


def test_a_row_of_the_table_opens_its_latent(address: str, page: Page) -> None:
    page.goto(f"{address}/?screen=features&sort=number&run=first")
    page.get_by_text("of 64 latents").wait_for()
    settled(page)
    table = page.get_by_test_id("stDataFrame").first
    # Drawn: the rows, which stand in the picture once more for screen readers.
    expect(table.locator("canvas tr").first).to_be_attached()
    table.click(position={"x": 140, "y": 35 * 3 + 17})
    page.wait_for_url("**latent=**")
    latent = re.search(r"latent=(\d+)", page.url)
    assert latent is not None
    expect(page.get_by_role("heading", name=f"Latent {latent[1]}")).to_be_visible()


def test_from_a_prompt_to_a_latent_to_steering(address: str, page: Page) -> None:
    page.goto(f"{address}/?screen=prompt&run=first")
    settled(page)
    page.get_by_label("Text", exact=True).fill(TEXT)
    page.keyboard.press("Control+Enter")
    page.get_by_text("CE with the SAE").first.wait_for()
    settled(page)
    page.get_by_role("option", name="cat").click()
    page.wait_for_url("**at=**")
    settled(page)
    page.locator('[class*="st-key-steer-"] button').first.click()
    page.wait_for_url("**screen=steer**")
    page.get_by_text("steered, seed 0").wait_for()
    settled(page)
    assert "changes=" in page.url
    page.go_back()
    page.get_by_text("CE with the SAE").first.wait_for()
    settled(page)
    page.locator('[class*="st-key-open-"] button').first.click()
    page.wait_for_url("**screen=feature**")
    expect(page.get_by_text("Direct effect on the output")).to_be_visible()


@pytest.mark.parametrize(("title", "holds"), [("HTML", "<h3>Latent 3"), ("CSV", "latent,density")])
def test_a_latent_is_downloaded(title: str, holds: str, address: str, page: Page) -> None:
    page.goto(f"{address}/?screen=feature&latent=3&run=first")
    settled(page)
    with page.expect_download() as download:
        page.locator(f".st-key-download-latent-3-{title.lower()} button").click()
    assert holds in Path(download.value.path()).read_text()


def test_without_write_nothing_can_be_kept(
    runs: Path, serve: Callable[..., str], page: Page
) -> None:
    page.goto(f"{serve(runs / 'first')}/?screen=feature&latent=3")
    expect(page.get_by_role("textbox", name="Note")).to_be_disabled()
    expect(page.locator(".st-key-star button").first).to_be_disabled()
    assert not (runs / "first" / "notes.json").exists()


def test_the_static_site_is_looked_around_in_from_the_disk(
    runs: Path, tmp_path: Path, page: Page
) -> None:
    page.goto(export.write_site(Run.open(runs / "first"), tmp_path / "site").as_uri())
    rows = page.locator("#rows tr")
    expect(rows.nth(1)).to_be_visible()
    n_alive = rows.count()
    rows.nth(1).click()
    expect(page.locator("#latent h2")).to_have_text(re.compile(r"Latent \d+"))
    assert page.locator("#latent .context").count() > 1
    there = page.url
    page.keyboard.press("ArrowRight")
    expect(page).not_to_have_url(there)
    page.go_back()
    expect(page).to_have_url(there)
    page.reload()
    expect(page.locator("#latent .context").first).to_be_visible()
    page.get_by_label("Search").fill("cat")
    assert 0 < rows.count() < n_alive
    page.get_by_label("Search").fill("nothing has this")
    expect(rows).to_have_count(0)


def test_tables_of_reports_have_no_empty_bands_on_a_phone(
    runs: Path, tmp_path: Path, page: Page
) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(write_comparison([runs / "first", runs / "second"], tmp_path / "both.html").as_uri())
    headings = page.locator(".compared thead tr")
    heights = headings.evaluate_all("rows => rows.map((row) => row.offsetHeight)")
    assert len(heights) >= 2 and max(heights) < 45  # one line: columns that follow are out of sight
    page.goto(write_report(runs / "first", tmp_path / "one.html").as_uri())
    rows = page.locator(".metrics tbody tr")
    expect(rows.first).to_contain_text("explained variance about the mean")
    ends = rows.evaluate_all("rows => rows.map((row) => row.getBoundingClientRect().right)")
    assert len(ends) > 5 and max(ends) <= 390
