"""The README stays true: every command, kind, evaluation and figure that there is stands in it."""

import importlib.util
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import tyro

from saekit import cli, interop
from saekit.evals import _kinds as eval_kinds
from saekit.trainers import _kinds as sae_kinds
from saekit.trainers._sweep import expand

ROOT = Path(__file__).parent.parent
FOLDERS = ("saekit", "activations_cache", "trainers", "evals", "dashboard")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    path
    for places in ("*.md", "docs/**/*.md", "*/README.md", "saekit/**/README.md")
    for path in sorted(ROOT.glob(places))
]


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
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # As where it is run as a script.
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return _module(ROOT / "benchmarks" / "table.py")


def test_every_format_stands_in_its_table() -> None:
    page = (ROOT / "saekit" / "interop" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\w+)`", page, re.MULTILINE)
    assert sorted(named) == interop.names()


@pytest.mark.parametrize(
    "name",
    [
        "browser.md",
        "peers.md",
        "interop.md",
        "kinds.md",
        "dark_matter.md",
        "../evals/README.md",
        "../saekit/kernels/README.md",
    ],
)
def test_the_tables_of_a_page_are_those_of_the_results(name: str, tables: ModuleType) -> None:
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert tables.with_tables(page, name, tables.load()) == page


def test_of_a_step_the_newest_line_counts_and_failures_are_shown(tables: ModuleType) -> None:
    case = {"hardware": "G", "versions": {"torch": "9"}, "shape": "S", "d_in": 8, "d_sae": 16}
    case |= {"k": 2, "batch": 4, "op": "topk step", "impl": "fused", "variant": "graph"}
    times = {"ms": 1.0, "ms_min": 0.5, "ms_max": 2.0, "tokens_per_s": 4_000, "ratio": 3.0}
    failed = {"impl": "peer", "variant": "1.0", "ms": None, "error": "out of memory"}
    grown = {"op": "grow", "variant": "k", "shape": "", "adam_ms": 0.1, "matmul_ms": 0.2}
    most = {"op": "largest", "ms": None, "peak_gib": 1.5, "stopped_by": "out of memory"}
    checked = case | {"check": {}}
    lines = [checked, case | times | {"ms": 9.0}, case | failed, case | times]
    results = {"step": [*lines, case | times | grown, case | most]}
    table = tables._kernels_page.fused_step(results)
    assert table.startswith("On G, torch 9.\n")
    assert "| topk | fused, graph | 1.00 (0.50 to 2.00) | 4,000 |  | 3.00 |" in table
    assert "9.00" not in table and "| peer, 1.0 | no: out of memory |" in table
    assert "| k | 16 | 2 | 4 | 1.00 | 0.20 | 0.10 |  |" in tables._kernels_page.growth(results)
    assert "| 16 | 1.5 | out of memory |" in tables._kernels_page.most_latents(results)


def test_a_run_is_compared_with_the_eager_one_of_its_seed(tables: ModuleType) -> None:
    case = {"data": "demo", "kind": "topk", "d_in": 8, "d_sae": 16, "k": 2, "batch_size": 4}
    case |= {"steps": 80, "dead": 0.5}
    lines = [
        case | {"variant": variant, "seed": seed, "loss": [9.0] * 6 + [base * (1 + off)] * 2}
        for seed, base in ((0, 1.0), (1, 2.0))
        for variant, off in (("eager, float32", 0), ("fused, bfloat16", 0.01 * (seed + 1)))
    ]
    table = tables._kernels_page.equivalence({"equivalence": lines})
    assert "| 80 | fused, bfloat16 | 2 | +1.500 (+1.000 to +2.000) | 50.00 |" in table
    assert table.count("\n") == 3


def _dark_line(width: int, figures: dict[str, list[float]]) -> dict[str, object]:
    line: dict[str, object] = {
        "op": "sae",
        "hook": "h",
        "width": width,
        "k": 2,
        "seed": 0,
        "figures": figures,
    }
    return line | {"core": {"l0_mean": [2.0], "dead_share": [0.0]}}


def test_a_published_claim_is_called_by_its_intervals(tables: ModuleType) -> None:
    first = {"r2_vec_pooled": [0.5, 0.45, 0.55], "r2_norm_sq": [0.95, 0.92, 0.97]}
    second = {"r2_vec_pooled": [0.2, 0.1, 0.3], "r2_norm_sq": [0.9, 0.85, 0.95]}
    second |= {"length_r2_from_h-64": [0.4, 0.3, 0.45], "length_r2_from_h-128-random": [0.1]}
    lines = [_dark_line(64, {"r2_vec_pooled": [9.0]}), _dark_line(64, first)]
    page = tables._dark_matter_page
    table = page.claims({"dark_matter": [*lines, _dark_line(128, second)]})
    half, norm, tokens = table.splitlines()[2:]
    assert "0.200 [0.100, 0.300] at 128 to 0.500 [0.450, 0.550] at 64" in half
    assert "| confirmed at 64; refuted at 128 |" in half
    assert "| confirmed at 64; undecided at 128 |" in norm
    assert "0.400 [0.300, 0.450] at 128 from 64 | **refuted** |" in tokens


def test_a_chart_is_whole_xml_with_each_value_in_its_place(tables: ModuleType) -> None:
    svg = sys.modules["_svg"]
    series = svg.Series("a < b", [16, 64], [[0.5, 0.25, 0.75], [0.0]], "#123456")
    text = svg.chart([svg.Panel("p", [series])], "width", "share", 1.0)
    root = ElementTree.fromstring(text)
    dots = [e for e in root if e.tag.endswith("circle")]
    assert [float(dot.attrib["cy"]) for dot in dots] == [svg.TOP + svg.HEIGHT / 2, svg.TOP + 250]
    assert float(dots[0].attrib["cx"]) < float(dots[1].attrib["cx"])
    assert any(e.text == "a < b" for e in root)


def test_every_variable_that_is_read_stands_in_the_readme() -> None:
    sources = [path for name in FOLDERS for path in (ROOT / name).rglob("*.py")]
    read = {name for path in sources for name in re.findall(r'"(SAEKIT_\w+)"', path.read_text())}
    assert sorted(re.findall(r"^\| `(SAEKIT_\w+)`", README, re.MULTILINE)) == sorted(read)


def test_every_link_leads_to_a_file() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


class Parsed(BaseException):
    """A command's flags were understood; nothing is to be done."""


def _commands(page: str) -> list[list[str]]:
    """The words of every `saekit ...` in a page's blocks of commands, without `saekit`."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line.partition(" #")[0]) for line in lines]
    return [
        words[at + 1 :]
        for words in found
        for at, word in enumerate(words)
        if word.rpartition("/")[2] == "saekit" and (at == 0 or words[at - 1] == "-m")
    ]


def test_every_command_in_the_pages_can_be_given_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parse = tyro.cli

    def parse_alone(*args: Any, **given: Any) -> None:
        parse(*args, **given)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", parse_alone)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "run.toml").write_text("k = 32\n")  # as a run's own, and no page has it
    n_commands = 0
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        for text, name in re.findall(r"^```toml\n(# (\w+\.toml).*?)^```", page, re.S | re.M):
            (tmp_path / name).write_text(text)
        for words in _commands(page):
            if words == ["--help"] or "..." in words:
                continue
            n_commands += 1
            try:
                code: object = cli.main(words)
            except Parsed:
                continue
            except SystemExit as stopped:
                code = stopped.code
            said = capsys.readouterr().err
            pytest.fail(f"{path.relative_to(ROOT)}: saekit {shlex.join(words)}: {code}, {said}")
    assert n_commands > 50


def test_every_command_has_a_line_of_help() -> None:
    for name, line in cli.commands().items():
        assert line, name


def test_the_recipe_of_a_report_can_be_read_and_is_of_twelve_saes_and_more() -> None:
    sweep = tomllib.loads((ROOT / "docs" / "report_sweep.toml").read_text(encoding="utf-8"))
    runs = expand({key: value for key, value in sweep.items() if key not in ("cache", "out")})
    frozen = {run.name for run in runs if run.config.freeze != "none"}
    learnt = {(run.name.split("-")[0], run.config.d_sae) for run in runs if run.name not in frozen}
    assert len({kind for kind, _ in learnt}) >= 6 and len({size for _, size in learnt}) >= 2
    assert len(learnt) >= 12 and frozen
    measured = tomllib.loads((ROOT / "docs" / "report_evals.toml").read_text(encoding="utf-8"))
    for name, options in measured.items():
        eval_kinds.find(name).Config.from_dict(options)
