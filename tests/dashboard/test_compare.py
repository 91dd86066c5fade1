"""Reports on many runs. The runs are hand-made, so that what is best, and what is not, is known."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from saekit.dashboard import _comparison, compare
from saekit.dashboard._comparison import Comparison
from saekit.dashboard.compare import write_comparison
from saekit.dashboard.report import write_report
from saekit.errors import SaekitError
from saekit.plot import Point
from saekit.plot.compare import _thinned, _ticks, _window
from saekit.results import Control, EvalResult, Metric, Provenance

Interval = tuple[float, float] | None
MakeRun = Callable[..., Path]


def metric(value: float, interval: Interval = None, definition: str = "so defined") -> Metric:
    return Metric(value=value, definition=definition, n=100, interval=interval)


@pytest.fixture
def make_run(hostile_run: Path, tmp_path: Path) -> MakeRun:
    """A copy of the hostile run under another name, with these numbers."""

    def make(
        name: str, evals: str = "core", config: dict[str, int] | None = None, **m: Metric
    ) -> Path:
        run = tmp_path / name
        if not run.exists():
            shutil.copytree(hostile_run, run)
        core = EvalResult.load(run / "results", "core")
        kept = core.metrics if evals == "core" else {}
        changed = replace(core, eval=evals, metrics={**kept, **m}, config=config or core.config)
        changed.save(run / "results")
        return run

    return make


def add_control(run: Path, name: str = "random", of: str | None = None, **m: Metric) -> Path:
    core = EvalResult.load(run / "results", "core")
    folder = run / "results" / "controls" / name
    made = json.loads((run / "config.json").read_text())["provenance"]
    assert core.sae_fingerprint is not None
    Control(
        name=name,
        of=of or core.sae_fingerprint,
        sae_fingerprint="e" * 64,
        d_sae=3,
        provenance=Provenance.from_dict(made),
    ).save(folder)
    replace(core, sae_fingerprint="e" * 64, metrics=m).save(folder)
    return folder


def best(runs: list[Path], key: str = "core.ev") -> list[bool]:
    rows = [row for row in Comparison.open(runs).rows if row.control is None]
    return [row.cells[key].best for row in rows]


@pytest.mark.parametrize(
    ("intervals", "marked"),
    [
        ([(0.5, 0.6), (0.7, 0.8)], [False, True]),
        ([(0.5, 0.6), (0.55, 0.8)], [False, False]),
        ([(0.5, 0.6), (0.6, 0.8)], [False, False]),
        ([(0.5, 0.6), None], [False, False]),
        # The one that comes second is apart, but a third, of a wide interval, is not.
        ([(0.5, 0.6), (0.1, 0.75), (0.7, 0.8)], [False, False, False]),
        ([(0.1, 0.2), (0.5, 0.6), (0.7, 0.8)], [False, False, True]),
    ],
)
def test_best_is_whose_interval_overlaps_with_no_other(
    intervals: list[Interval], marked: list[bool], make_run: MakeRun
) -> None:
    runs = [
        make_run(f"r{i}", ev=metric(sum(ends) / 2 if ends else 0.9, ends))
        for i, ends in enumerate(intervals)
    ]
    assert best(runs) == marked


def test_the_lowest_is_best_where_lower_is_better(make_run: MakeRun) -> None:
    runs = [
        make_run("a", ce_delta=metric(1.0, (0.9, 1.1))),
        make_run("b", ce_delta=metric(2.0, (1.9, 2.1))),
    ]
    assert best(runs, "core.ce_delta") == [True, False]


def test_nothing_is_best_where_neither_high_nor_low_is(make_run: MakeRun) -> None:
    runs = [
        make_run("a", l0_mean=metric(8.0, (7.9, 8.1))),
        make_run("b", l0_mean=metric(2.0, (1.9, 2.1))),
    ]
    assert best(runs, "core.l0_mean") == [False, False]
    assert "L0 goes from 2 to 8" in " ".join(Comparison.open(runs).notes)


@pytest.mark.parametrize("change", ["config", "cache", "hook"])
def test_numbers_that_were_measured_differently_have_no_best(
    change: str, make_run: MakeRun
) -> None:
    runs = [
        make_run("a", ev=metric(0.9, (0.89, 0.91))),
        make_run("b", ev=metric(0.1, (0.09, 0.11))),
    ]
    assert best(runs) == [True, False]
    core = EvalResult.load(runs[1] / "results", "core")
    other = {
        "config": replace(core, config={"n_rows": 50}),
        "cache": replace(core, cache_fingerprint="d" * 64),
        "hook": replace(core, hook="resid_post.1"),
    }[change]
    other.save(runs[1] / "results")
    found = Comparison.open(runs)
    assert best(runs) == [False, False]
    (note,) = [note for note in found.notes if "do not compare" in note]
    assert change in note
    assert "core" not in compare.evals_toml(found)


def test_an_sae_of_an_untrained_model_stands_beside_and_is_never_best(make_run: MakeRun) -> None:
    runs = [
        make_run("a", ev=metric(0.5, (0.49, 0.51))),
        make_run("b", ev=metric(0.3, (0.29, 0.31))),
        make_run("untrained", ev=metric(0.9, (0.89, 0.91))),
    ]
    path = runs[2] / "config.json"
    config = json.loads(path.read_text())
    config["provenance"]["model"] += "#random=0"
    path.write_text(json.dumps(config))
    core = EvalResult.load(runs[2] / "results", "core")
    replace(core, cache_fingerprint="d" * 64).save(runs[2] / "results")
    found = Comparison.open(runs)
    assert best(runs) == [True, False, False] and not found.incomparable
    (note,) = [note for note in found.notes if "untrained model" in note]
    assert note.startswith("Of an untrained model, as a control: untrained.")
    points = compare._points(found, "core", "ev")
    assert [point.control for point in points] == [None, None, "untrained model"]
    alone = [runs[2], make_run("c", ev=metric(0.8, (0.79, 0.81)))]
    assert best(alone) == [False, False]


def test_what_does_not_change_a_number_does_not_forbid_comparing(make_run: MakeRun) -> None:
    runs = [
        make_run(name, ev=metric(v, (v, v)), config={"n_rows": 100, "batch_size": size})
        for name, v, size in (("a", 0.9, 64), ("b", 0.8, 128))
    ]
    assert best(runs) == [True, False]


def test_a_number_that_is_not_clear_of_a_control_is_marked(make_run: MakeRun) -> None:
    run, other = (
        make_run("a", ev=metric(0.9, (0.8, 1.0))),
        make_run("b", ev=metric(0.9, (0.8, 1.0))),
    )
    add_control(run, "random", ev=metric(0.7, (0.6, 0.79)))
    add_control(run, "pca", ev=metric(0.75, (0.7, 0.81)))
    add_control(other, "random", ev=metric(0.7, (0.6, 0.79)))
    rows = Comparison.open([run, other]).rows
    assert [(row.subject.name, row.control) for row in rows] == [
        ("a", None),
        ("a", "pca"),
        ("a", "random"),
        ("b", None),
        ("b", "random"),
    ]
    assert [row.cells["core.ev"].doubtful for row in rows] == [True, False, False, False, False]


def test_a_control_of_other_weights_is_refused(make_run: MakeRun) -> None:
    run = make_run("a")
    add_control(run, of="0" * 64, ev=metric(0.1))
    for write in (lambda: Comparison.open([run]), lambda: write_report(run)):
        with pytest.raises(SaekitError, match=r"trained again since.*eval all --sae .* --controls"):
            write()


def test_results_that_an_older_control_left_are_passed_over(make_run: MakeRun) -> None:
    run = make_run("a")
    folder = add_control(run, ev=metric(0.1))
    core = EvalResult.load(folder, "core")
    replace(core, eval="geometry", sae_fingerprint="0" * 64).save(folder)
    (subject,) = Comparison.open([run]).subjects
    assert list(subject.controls["random"]) == ["core"]


def test_the_nonlinear_share_is_that_of_the_error(make_run: MakeRun) -> None:
    dark = {"fvu_total": metric(0.4), "fvu_nonlinear": metric(0.1), "fvu_linear": metric(0.3)}
    run = make_run("a", evals="dark_matter", **dark)
    row = Comparison.open([run]).rows[0]
    assert row.cells["dark_matter.nonlinear_share"].metric.value == pytest.approx(0.25)
    nothing = EvalResult.load(run / "results", "dark_matter")
    assert not _comparison.derived(replace(nothing, metrics={**dark, "fvu_total": metric(0.0)}))


def test_differences_of_configs_are_found_and_nothing_else(make_run: MakeRun) -> None:
    a, b = make_run("a"), make_run("b")
    text = (b / "config.toml").read_text().replace("k = 2", "k = 1\nlr = 0.5")
    (b / "config.toml").write_text(text)
    assert Comparison.open([a, b]).differences() == [("k", ["2", "1"]), ("lr", ["–", "0.5"])]
    assert Comparison.open([a, a.parent / "a run"]).differences() == []


def test_names_are_as_long_as_tells_them_apart(tmp_path: Path) -> None:
    short = _comparison.short_names
    assert short([tmp_path / "x" / "a", tmp_path / "x" / "b"]) == ["a", "b"]
    assert short([tmp_path / "x" / "a", tmp_path / "y" / "a"]) == ["x/a", "y/a"]


def test_a_run_given_twice_is_refused(make_run: MakeRun) -> None:
    run = make_run("a")
    with pytest.raises(SaekitError, match="is given twice"):
        Comparison.open([run, run.parent / "a run" / ".." / "a"])


def test_runs_that_are_not_measured_are_refused_with_the_commands(
    make_run: MakeRun, tmp_path: Path
) -> None:
    runs = [make_run("a"), make_run("b"), make_run("c")]
    for run in runs[1:]:
        shutil.rmtree(run / "results")
    with pytest.raises(SaekitError, match=r"(?s)eval core --sae \S*b\n.*eval core --sae \S*c"):
        write_comparison(runs, tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_a_comparison_that_is_no_html_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(SaekitError, match=r"x\.pdf must end in \.html"):
        write_comparison([make_run("a"), make_run("b")], tmp_path / "x.pdf")


@pytest.fixture
def written(make_run: MakeRun, tmp_path: Path) -> tuple[Path, list[Path]]:
    """A page of two runs, of names that are not to be trusted, with controls and dark matter."""
    names = ("<script>alert(2)<", "b | *c*")
    runs = []
    for i, name in enumerate(names):
        run = make_run(name, ev=metric(0.8 - i / 2, (0.75 - i / 2, 0.85 - i / 2), "of <i>x</i>"))
        dark = {"fvu_total": 0.4, "fvu_nonlinear": 0.1, "fvu_linear": 0.3}
        make_run(name, evals="dark_matter", **{key: metric(v) for key, v in dark.items()})
        add_control(run, ev=metric(0.2, (0.1, 0.3)), l0_mean=metric(2.0))
        runs.append(run)
    return write_comparison(runs, tmp_path / "out" / "page.html"), runs


def test_the_page_stands_alone_and_runs_no_text(written: tuple[Path, list[Path]]) -> None:
    page = written[0].read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(2)&lt;" in page
    assert "of &lt;i&gt;x&lt;/i&gt;" in page
    assert "default-src 'none'" in page
    elements = re.sub(r"<(script|style)>.*?</\1>", "", page, flags=re.DOTALL)
    assert len(elements) < len(page) / 2, "scripts were not taken out"
    assert not re.search(r"\s(src|href)=|@import|url\(", elements)
    assert page.count("</script>") == page.count("<script")
    markdown = written[0].with_suffix(".md").read_text(encoding="utf-8")
    # Lines set in are code, shown as they are.
    text = [line for line in markdown.splitlines() if not line.startswith("    ")]
    assert "<script" not in "\n".join(text)
    assert "b \\| \\*c\\*" in markdown


def test_the_page_holds_numbers_intervals_definitions_and_commands(
    written: tuple[Path, list[Path]],
) -> None:
    page = written[0].read_text(encoding="utf-8")
    markdown = written[0].with_suffix(".md").read_text(encoding="utf-8")
    assert "0.75 to 0.85" in page and "**0.8** (0.75 to 0.85)" in markdown
    assert "with x_hat for x, nats" in page and "with x\\_hat for x, nats" in markdown
    for text in (page, markdown):
        assert "random control" in text
        assert "saekit train topk" in text and "saekit eval all evals.toml --sae" in text
    for figure in ("pareto-ev", "pareto-nonlinear_share", "density", "dark_matter", "life-ev"):
        assert f'id="figure-{figure}"' in page


def test_the_json_holds_what_was_measured(written: tuple[Path, list[Path]]) -> None:
    out, runs = written
    values = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert values["format"] == "saekit-comparison"
    for sae, run in zip(values["saes"], runs, strict=True):
        found = EvalResult.load(run / "results", "core")
        assert sae["results"]["core"]["metrics"].keys() == found.metrics.keys()
        for key, one in found.metrics.items():
            assert Metric.from_dict(sae["results"]["core"]["metrics"][key]) == one
        assert sae["controls"]["random"]["core"]["metrics"]["ev"]["value"] == 0.2
    assert [sae["best"] for sae in values["saes"]] == [["core.ev"], []]


def test_twelve_runs_fit_into_ten_megabytes(make_run: MakeRun, tmp_path: Path) -> None:
    lines = [
        {"step": i, "tokens": 10 * i, "ev": 0.5, "l0": 3.14159, "dead": 0.1} for i in range(3000)
    ]
    many = {f"metric_{i}": metric(i / 7, (i / 8, i / 6), "word " * 40) for i in range(300)}
    runs = [make_run(f"r{i}", **many) for i in range(12)]
    for run in runs:
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = write_comparison(runs, tmp_path / "page.html")
    assert page.stat().st_size < 10e6
    assert page.read_text(encoding="utf-8").count("plotly.js v") == 1


def test_a_curve_is_thinned_to_values_that_are_there_and_keeps_its_end() -> None:
    x, y = np.arange(5000.0), np.arange(5000.0)
    y[::2] = np.nan
    xs, ys = _thinned(x, y)
    assert len(xs) == 400 and xs[-1] == 4999 and np.isfinite(ys).all()
    np.testing.assert_array_equal(xs, ys)


def test_controls_far_off_do_not_crush_the_plot_and_are_counted() -> None:
    saes = [Point(i, "s", 8.0, metric(0.8 + i / 100)) for i in (1, 2)]
    near, far = (Point(1, "s", 8.0, metric(v), "pca") for v in (0.78, -5.0))
    assert _window([*saes, near]) == (None, 0)
    shown, cut = _window([*saes, near, far])
    assert cut == 1 and shown is not None
    assert shown[0] < 0.78 < 0.82 < shown[1]


def test_ticks_lie_among_the_points() -> None:
    for xs in ([13.0, 16.0], [4.0, 32.0], [1.0, 1000.0], [5.0]):
        ticks = _ticks([Point(1, "s", x, metric(0.0)) for x in xs])
        assert 3 <= len(ticks["tickvals"]) <= 12, xs
        assert min(xs) / 1.3 < ticks["tickvals"][0] and ticks["tickvals"][-1] < max(xs) * 1.3


def test_the_report_of_one_run_has_a_section_for_each_evaluation(make_run: MakeRun) -> None:
    run = make_run("a", evals="geometry", near=metric(0.3, (0.2, 0.4), "nearest, as defined"))
    add_control(run, ev=metric(0.2, (0.1, 0.3)))
    page = write_report(run).read_text(encoding="utf-8")
    markdown = (run / "report.md").read_text(encoding="utf-8")
    for text in (page, markdown):
        assert "Geometry" in text and "nearest, as defined" in text and "0.2 to 0.4" in text
        assert "random control" in text
        assert f"saekit eval geometry --sae {run}-again" in text


def test_the_report_refuses_an_evaluation_of_other_weights(make_run: MakeRun) -> None:
    run = make_run("a", evals="geometry", near=metric(0.3))
    found = EvalResult.load(run / "results", "geometry")
    replace(found, sae_fingerprint="0" * 64).save(run / "results")
    with pytest.raises(SaekitError, match=r"trained again since.*saekit eval geometry --sae"):
        write_report(run)
