"""The pages of the documentation that are made and not written; `make docs` builds them."""

import importlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import saekit
from saekit import cli, interop
from saekit.evals import _kinds as evaluations
from saekit.trainers import _kinds as kinds

ROOT = Path(__file__).parent.parent
PARTS = ("_api", "_commands", "_links", "_metrics", "_notebooks")


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules of docs/site by name."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")
    yield {name: importlib.import_module(name) for name in PARTS}
    for name in PARTS:
        del sys.modules[name]


def test_help_is_asked_for_of_every_command_kind_and_evaluation(
    site: dict[str, ModuleType],
) -> None:
    asked = site["_commands"].uses()
    assert list(asked) == list(cli.commands())
    assert [words[1:] for words in asked["train"]] == [[], *([name] for name in kinds.names())]
    named = [*evaluations.names(), "all"]
    assert [words[1:] for words in asked["eval"]] == [[], *([name] for name in named)]


def test_help_is_what_the_command_says_without_colours(site: dict[str, ModuleType]) -> None:
    said = site["_commands"].help_of(["push"])
    assert "saekit push" in said and "--dry-run" in said and "\x1b" not in said
    with pytest.raises(RuntimeError, match="saekit train nothing --help ends with 2"):
        site["_commands"].help_of(["train", "nothing"])


@pytest.mark.parametrize("package", ["interop", "trainers", "evals", "kernels"])
def test_everything_public_of_a_package_is_in_the_reference(
    package: str, site: dict[str, ModuleType]
) -> None:
    """By what Python finds in it; the reference goes by its text."""
    pages, expected = site["_api"].pages(ROOT), site["_api"].expected(ROOT)
    there = importlib.import_module(f"saekit.{package}")
    text = "".join(pages.values())
    modules = [f"saekit.{package}.{m.name}" for m in pkgutil.iter_modules(there.__path__)]
    for name in modules:
        assert (f"::: {name}\n" in text) == (not name.rpartition(".")[2].startswith("_")), name
    for name in there.__all__:
        found = getattr(there, name)
        if inspect.isfunction(found) or inspect.isclass(found):
            assert f"{found.__module__}.{found.__name__}" in expected


def test_what_saekit_has_by_name_is_in_the_reference(site: dict[str, ModuleType]) -> None:
    expected = site["_api"].expected(ROOT)
    page = site["_api"].pages(ROOT)["api/saekit.md"]
    for name in saekit.__all__:
        found = getattr(saekit, name)
        assert f"{found.__module__}.{found.__name__}" in expected
        assert f"[`saekit.{name}`]" in page
    assert f"{interop.load.__module__}.load" in expected


def test_links_lead_to_pages_and_what_has_none_is_text(site: dict[str, ModuleType]) -> None:
    text = (
        "[a](../saekit/interop/README.md#adding-a-format) [b](../saekit/sae.py) [c](adr) "
        "[d](../saekit/commands/push.py) [e](../Makefile) [f](https://example.org/x) [g](#here) "
        "![h](report.png)\n```\n[i](../Makefile)\n```\n"
    )
    made = site["_links"].rewritten(text, "docs/kinds.md", ROOT)
    assert made == (
        "[a](formats.md#adding-a-format) [b](api/saekit.sae.md) [c](adr/index.md) "
        "[d](cli/push.md) e [f](https://example.org/x) [g](#here) "
        "![h](report.png)\n```\n[i](../Makefile)\n```\n"
    )
    deep = site["_links"].rewritten("[a](../kinds.md)", "docs/how_to/train.md", ROOT)
    assert deep == "[a](../kinds.md)"
    moved = site["_links"].rewritten("[a](../docs/kinds.md)", "evals/README.md", ROOT)
    assert moved == "[a](../kinds.md)"


def test_each_evaluation_has_its_equations(site: dict[str, ModuleType]) -> None:
    page = site["_metrics"].page(ROOT)
    for name in evaluations.names():
        assert f"\n## {name}\n" in page
    assert "| `ev` | Explained variance about the mean, 1 - fvu. |" in page


def test_a_notebook_is_shown_with_its_outputs(site: dict[str, ModuleType], tmp_path: Path) -> None:
    def output(**data: object) -> dict[str, object]:
        return {"output_type": "display_data", "data": data}

    figure = {"data": [{"name": "</script>"}], "layout": {}}
    outputs = [
        {"output_type": "stream", "text": ["1\n", "2\n"]},
        output(**{"application/vnd.plotly.v1+json": figure, "text/plain": "no"}),
        output(**{"image/png": "AAAA\n"}),
        output(**{"text/plain": ["x"]}),
        output(**{"text/html": ["<b>in\n", "line</b>"], "text/plain": "no"}),
        output(**{"text/html": "<pre>no\n</pre>", "text/plain": "\x1b[1mplain\x1b[0m"}),
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "words"]},
        {"cell_type": "code", "source": "print(1)", "outputs": outputs},
    ]
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "one.ipynb").write_text(json.dumps({"cells": cells}))
    made = site["_notebooks"].pages(tmp_path)
    page = made["notebooks/one.md"]
    assert page.startswith("# Title\nwords\n")
    assert "````python\nprint(1)\n````" in page and "````text\n1\n2\n````" in page
    assert page.count("</script>") == 2 and '"<\\/script>"' in page and "no" not in page
    assert "data:image/png;base64,AAAA)" in page
    assert "<div><b>inline</b></div>" in page and "````text\nplain\n````" in page
    assert site["_notebooks"].has_figures(made)
    assert site["_notebooks"].pages(tmp_path / "nowhere") == {}
