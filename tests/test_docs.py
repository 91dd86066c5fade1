"""The README stays true: every command, kind, evaluation and figure that there is stands in it."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from saekit import cli
from saekit.evals import _kinds as eval_kinds
from saekit.trainers import _kinds as sae_kinds

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def figures() -> ModuleType:
    return _module(ROOT / "docs" / "figures.py")


@pytest.mark.parametrize(
    ("pattern", "there"),
    [
        (r"^\| `saekit (\w+)", list(cli.commands())),
        (r"^\| kinds of SAE.*?\n\n", sae_kinds.names()),
        (r"^\| evaluations.*?\n\n", eval_kinds.names()),
    ],
    ids=["commands", "kinds", "evaluations"],
)
def test_the_tables_name_all_there_is_and_nothing_else(pattern: str, there: list[str]) -> None:
    if "saekit" in pattern:
        named = re.findall(pattern, README, re.MULTILINE)
    else:
        block = re.search(pattern, README, re.MULTILINE | re.DOTALL)
        assert block is not None
        named = re.findall(r"^\| `(\w+)`", block[0], re.MULTILINE)
    assert sorted(named) == sorted(there)


def test_the_figures_are_those_of_the_result_beside_them(figures: ModuleType) -> None:
    result = json.loads((ROOT / "docs" / "demo_core.json").read_text(encoding="utf-8"))
    assert figures.with_figures(README, result) == README


@pytest.fixture
def tables() -> ModuleType:
    return _module(ROOT / "benchmarks" / "table.py")


@pytest.mark.parametrize("name", ["peers.md", "kinds.md"])
def test_the_tables_of_a_page_are_those_of_the_results(name: str, tables: ModuleType) -> None:
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert tables.with_tables(page, name, tables.load()) == page


def test_every_link_leads_to_a_file() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_command_has_a_line_of_help() -> None:
    for name, line in cli.commands().items():
        assert line, name
