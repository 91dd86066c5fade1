"""Several runs as one document: an HTML file that needs no network, Markdown, and JSON for
programs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from markupsafe import Markup

from saekit import plot
from saekit.dashboard import _render, data
from saekit.dashboard._comparison import (
    COLUMNS,
    NONLINEAR_SHARE,
    Column,
    Comparison,
    Subject,
    derived,
    measured_with,
    number,
)
from saekit.dashboard.data import quote
from saekit.errors import SaekitError
from saekit.files import write_json, write_text
from saekit.plot import Curves, Parts, Point
from saekit.results import EvalResult, Metric

FORMAT, VERSION = "saekit-comparison", 1

UNTRAINED_CONTROL = "untrained model"
"""What an SAE of an untrained model is called in plots, beside SAEs of a trained one."""

SPARSITY = ("k", "target_l0", "budget", "steps", "l1_coef", "l0_coef", "kl_coef")
"""Keys of training configs that set how many latents fire, the first that is there."""

PARETO = (
    ("core", "ce_recovered_zero", "Cross-entropy recovered", "share, zero-ablated is 0"),
    ("core", "ev", "Explained variance", "share"),
    ("dark_matter", NONLINEAR_SHARE, "Dark matter", "nonlinear share of the error"),
)

READING = (
    "Under a number stands its 95 % interval, of resampled documents. ↑: higher is better, ↓: "
    "lower is. In bold colour, and only there, is the best of a column: its interval overlaps "
    "with none of the other SAEs'. Where no number is marked, these data do not tell which is "
    "best. ° marks a number that is not clearly better than a control of the same SAE, which "
    "learnt no features: the intervals overlap, or the control's is the better one."
)


@dataclass(frozen=True)
class Line:
    """A number in every SAE."""

    key: str
    definitions: Sequence[tuple[str, str]]
    """Each definition that there is, and the numbers of the SAEs whose it is (none: all)."""
    metrics: Sequence[Metric | None]


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Write what tells runs apart into `out`, an HTML file, and return its path.

    Markdown and JSON go beside it under the same name. Raises SaekitError where a run is not
    finished, not measured by `core`, or given twice.
    """
    out = Path(out)
    if out.suffix not in (".html", ".htm"):
        raise SaekitError(
            f"{out} must end in .html: that is what is written, with Markdown (.md) and JSON "
            "(.json) beside it"
        )
    comparison = Comparison.open(runs)
    values = {
        "comparison": comparison,
        "heading": heading(comparison),
        "reading": READING,
        "definitions": definitions(comparison),
        "facts": [_facts(subject) for subject in comparison.subjects],
        "sections": [
            (name, lines(comparison, name)) for name in comparison.evals if name != "examples"
        ],
        "differences": comparison.differences(),
        "eval_differences": comparison.eval_differences(),
        "commands": commands(comparison, out),
        "evals_toml": evals_toml(comparison),
    }
    charts = {name: Markup(plot.to_html(f, name)) for name, f in charts_of(comparison).items()}
    page = _render.render(
        "compare.html.j2",
        **values,
        figures=charts,
        plotly=Markup(plot.plotly_script()),
        style=_render.style(),
        colour=plot.colour,
    )
    write_json(out.with_suffix(".json"), as_json(comparison, commands(comparison, out)))
    write_text(out.with_suffix(".md"), _render.render("compare.md.j2", **values))
    write_text(out, page)
    return out


def heading(comparison: Comparison) -> str:
    """What all of them are SAEs of."""
    runs = [subject.run for subject in comparison.subjects]
    hooks = sorted({f"{run.hook} of {run.model}" for run in runs})
    return f"{len(runs)} SAEs of {', '.join(hooks)}"


def definitions(comparison: Comparison) -> list[tuple[Column, str]]:
    """Of the table's columns."""
    return [
        (
            column,
            next(m.definition for s in comparison.subjects if (m := number(s.results, column))),
        )
        for column in comparison.columns
    ]


def _facts(subject: Subject) -> dict[str, Any]:
    run = subject.run
    made = run.provenance
    of = next((key for key in SPARSITY if run.config.get(key) is not None), None)
    return {
        "subject": subject,
        "sparsity": f"{of} = {run.config[of]}" if of else "–",
        "rows_seen": f"{made.rows_seen:,}" if made else "–",
        "trained_on": made.cache_fingerprint[:12] if made else "–",
        "evaluated_on": subject.results["core"].cache_fingerprint[:12],
        "fingerprint": (run.fingerprint or "–")[:12],
    }


def lines(comparison: Comparison, name: str) -> list[Line]:
    """Every number of an evaluation, and what follows from them, SAE by SAE."""
    found = []
    for subject in comparison.subjects:
        result = subject.results.get(name)
        found.append({**result.metrics, **derived(result)} if result else {})
    lines = []
    for key in dict.fromkeys(key for metrics in found for key in metrics):
        metrics = [each.get(key) for each in found]
        lines.append(Line(key, _definitions(metrics), metrics))
    return lines


def _definitions(metrics: Sequence[Metric | None]) -> list[tuple[str, str]]:
    whose: dict[str, list[str]] = {}
    for at, metric in enumerate(metrics, 1):
        if metric is not None:
            whose.setdefault(metric.definition, []).append(str(at))
    if len(whose) == 1:
        return [("", definition) for definition in whose]
    return [(", ".join(of), definition) for definition, of in whose.items()]


def charts_of(comparison: Comparison) -> dict[str, Any]:
    """The figures of the page, by name."""
    subjects = comparison.subjects
    charts = {
        f"pareto-{key}": plot.scatter(_points(comparison, name, key), title, y_title)
        for name, key, title, y_title in PARETO
        if any(name in subject.results for subject in subjects)
    }
    charts["density"] = plot.densities(
        [(s.number, s.name, d) for s in subjects if (d := _density(s)) is not None]
    )
    lives = plot.lives([(s.number, s.name, _curves(s)) for s in subjects])
    charts |= {f"life-{name}": figure for name, figure in lives.items()}
    if bars := parts(subjects):
        charts["dark_matter"] = plot.dark_matter(bars)
    return charts


def _points(comparison: Comparison, name: str, key: str) -> list[Point]:
    l0, column = COLUMNS[0], next(c for c in COLUMNS if (c.eval, c.key) == (name, key))
    points = []
    for subject in comparison.subjects:
        # Far from all others where little is lost by any ablation, it may not set the scale.
        own = UNTRAINED_CONTROL if comparison.aside(subject) else None
        for control, results in ((own, subject.results), *subject.controls.items()):
            x, y = number(results, l0), number(results, column)
            if x and y and x.value > 0:
                points.append(Point(subject.number, subject.name, x.value, y, control))
    return points


def _density(subject: Subject) -> np.ndarray | None:
    """Of the rows that `core` looked at, which are the same in every SAE."""
    return subject.results["core"].arrays.get("density")


def _curves(subject: Subject) -> Curves:
    curves = subject.run.curves
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    if "tokens" in curves:
        logged = ("ev", "l0", "dead")
        found = {name: (curves["tokens"], curves[name]) for name in logged if name in curves}
    life = subject.results["firing"].arrays if "firing" in subject.results else {}
    if "life_rows" in life:
        found["fired"] = (np.cumsum(life["life_rows"]).astype(float), life["life_fired_share"])
    return found


def parts(subjects: Sequence[Subject]) -> list[Parts]:
    """The error of each SAE and of its controls, in its linear and its nonlinear part."""
    bars = []
    for subject in subjects:
        of = f"{subject.number} · {subject.name}" if len(subjects) > 1 else subject.name
        for control, results in ((None, subject.results), *subject.controls.items()):
            metrics = results["dark_matter"].metrics if "dark_matter" in results else {}
            if "fvu_linear" in metrics and "fvu_nonlinear" in metrics:
                name = of if control is None else f"{control} control"
                errors = metrics["fvu_linear"], metrics["fvu_nonlinear"]
                bars.append(Parts(name, *errors, faint=control is not None))
    return bars


def commands(comparison: Comparison, out: Path) -> list[str]:
    """What makes the runs again, measures them alike, and writes this document."""
    found, again = [], []
    for subject in comparison.subjects:
        path, run = subject.run.path, subject.run
        if (path / data.CONFIG).is_file():
            again.append(f"{path}-again")
            config, folder = quote(str(path / data.CONFIG)), quote(again[-1])
            found.append(f"saekit train {run.kind} {config} --out {folder}")
        else:
            again.append(str(path))
    folders = " ".join(map(quote, again))
    controls = " --controls" if any(subject.controls for subject in comparison.subjects) else ""
    only = " ".join(map(quote, comparison.evals))
    found.append(f"saekit eval all evals.toml --sae {folders} --only {only}{controls}")
    found.append(f"saekit report {folders} --out {quote(out.name)}")
    return found


def evals_toml(comparison: Comparison) -> str:
    """What `saekit eval all` takes to measure as was measured here."""
    tables = {}
    for name in comparison.evals:
        if name not in comparison.incomparable:
            first = next(s.results[name] for s in comparison.subjects if name in s.results)
            tables[name] = measured_with(first)
    return tomli_w.dumps(tables)


def as_json(comparison: Comparison, commands: Sequence[str]) -> dict[str, Any]:
    """The whole of it for programs: see the keys."""
    saes = []
    for subject, row in zip(
        comparison.subjects, (r for r in comparison.rows if r.control is None), strict=True
    ):
        run = subject.run
        saes.append(
            {
                "number": subject.number,
                "name": subject.name,
                "path": str(run.path),
                "kind": run.kind,
                "hook": run.hook,
                "model": run.model,
                "d_sae": run.d_sae,
                "fingerprint": run.fingerprint,
                "config": run.config,
                "provenance": run.provenance.to_dict() if run.provenance else None,
                "results": {name: _result(result) for name, result in subject.results.items()},
                "controls": {
                    control: {name: _result(result) for name, result in results.items()}
                    for control, results in subject.controls.items()
                },
                "best": [key for key, cell in row.cells.items() if cell.best],
                "not_clear_of_a_control": [k for k, cell in row.cells.items() if cell.doubtful],
            }
        )
    return {
        "format": FORMAT,
        "version": VERSION,
        "columns": [asdict(column) for column in comparison.columns],
        "saes": saes,
        "differences": dict(comparison.differences()),
        "evaluation_differences": dict(comparison.eval_differences()),
        "incomparable": comparison.incomparable,
        "notes": comparison.notes,
        "commands": list(commands),
        "evals.toml": evals_toml(comparison),
    }


def _result(result: EvalResult) -> dict[str, Any]:
    return {
        "hook": result.hook,
        "split": result.split,
        "exclude": list(result.exclude),
        "cache_fingerprint": result.cache_fingerprint,
        "sae_fingerprint": result.sae_fingerprint,
        "config": result.config,
        "versions": result.versions,
        "metrics": {key: asdict(m) for key, m in {**result.metrics, **derived(result)}.items()},
    }
