import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from saekit.dashboard import _render, write_report
from saekit.dashboard.data import Context, Run, Span
from saekit.errors import SaekitError


class Page(HTMLParser):
    """The elements, attributes and text that a browser would see; scripts and styles apart."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.style = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["style"]:
            self.style += data
        elif self.tags[-1:] != ["script"]:
            self.text += data


def test_the_page_reaches_for_nothing_outside_itself(any_run: Path, tmp_path: Path) -> None:
    page = Page(write_report(any_run, tmp_path / "report.html"))
    assert "link" not in page.tags
    assert not [value for name, value in page.attributes if name in ("src", "href", "srcset")]
    assert not re.search(r"@import|url\(", page.style)
    (policy,) = [value for name, value in page.attributes if value.startswith("default-src")]
    assert policy.startswith("default-src 'none'")


def test_both_reports_hold_each_metric_with_its_definition(any_run: Path, tmp_path: Path) -> None:
    out = write_report(any_run, tmp_path / "page.html")
    page, markdown = Page(out).text, out.with_suffix(".md").read_text(encoding="utf-8")
    core = Run.open(any_run).core
    assert core is not None
    for name, metric in core.metrics.items():
        assert name in page
        assert metric.definition in page
        assert f"| `{name}` |" in markdown
        assert _render.escape_markdown(metric.definition) in markdown
    assert "resid_post.0" in page
    assert "test split" in page


def test_hostile_tokens_are_shown_and_not_run(hostile_run: Path) -> None:
    out = write_report(hostile_run)
    page = Page(out)
    assert "<script>alert(1)</script>" in page.text
    assert "<img src=x" in page.text
    assert "img" not in page.tags
    assert "<script>alert" not in out.read_text(encoding="utf-8")
    markdown = out.with_suffix(".md").read_text(encoding="utf-8")
    assert "<script" not in markdown
    assert "&lt;script&gt;" in markdown
    assert "\\| a \\| \\*b\\* \\|" in markdown


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (" cat", "a **cat**b"),
        ("(", "a<b>(</b>b"),
        ("  ", "a<b>␣␣</b>b"),
        ("*", "a<b>\\*</b>b"),
    ],
)
def test_the_peak_is_bold_whatever_stands_beside_it(text: str, line: str) -> None:
    """Markdown opens bold only beside letters, so that `a**(**b` would show its asterisks."""
    spans = [Span("a", 0.0, False), Span(text, 1.0, True), Span("b", 0.0, False)]
    assert _render.markdown_context(Context("d", 1.0, spans)) == line


def test_a_name_between_colons_is_no_picture_though_it_is_of_several_tokens() -> None:
    spans = [Span(text, 0.0, False) for text in (":", "smi", "le", ":")]
    assert _render.markdown_context(Context("d", 1.0, spans)) == ":\N{WORD JOINER}smile:"


def test_the_report_says_how_its_latents_were_picked(tiny_run: Path, tmp_path: Path) -> None:
    out = write_report(tiny_run, tmp_path / "report.html", n_latents=3, seed=5)
    text = Page(out).text
    assert re.search(r"3 of the \d+ latents that fire, not picked by hand.*seed 5", text)
    assert len(re.findall(r"Latent \d+", text)) == 3


def test_a_report_without_results_is_refused_with_the_commands(hostile_run: Path) -> None:
    shutil.rmtree(hostile_run / "results")
    with pytest.raises(SaekitError, match=r"(?s)saekit eval core.*saekit eval examples"):
        write_report(hostile_run)
    assert not (hostile_run / "report.html").exists()


def test_a_report_that_is_no_html_is_refused(hostile_run: Path, tmp_path: Path) -> None:
    with pytest.raises(SaekitError, match=r"report\.pdf must end in \.html"):
        write_report(hostile_run, tmp_path / "report.pdf")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5"), (1234567.0, "1,234,567"), (1234.56, "1,234.6"), (2.1e-5, "2.1e-05")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert _render.number(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.0, "0.0%"), (0.123, "12.3%"), (2.1e-4, "0.021%")])
def test_small_shares_keep_their_digits(value: float, text: str) -> None:
    assert _render.percent(value) == text
