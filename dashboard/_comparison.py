"""Several SAEs side by side, as plain data: which numbers, which of them are best, what differs.

A number is called best only where the measurements compare (one hook, one cache, one config) and
its 95 % interval overlaps with none of the others'. The resamples of documents are the same for all
SAEs, so intervals that are apart are more than enough for a difference, and those that overlap may
still hide one. Without intervals nothing is called best.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from saekit.dashboard import _findings
from saekit.dashboard.data import Run
from saekit.errors import SaekitError
from saekit.results import EvalResult, Metric

Better = Literal["high", "low", None]

_FREE = ("device", "batch_size", "run_folder", "against")
"""Keys of an evaluation's config that do not change what it measures, or change with the SAE."""

UNTRAINED = "#random="
"""In the name of a model that is as it was before any training."""

NONLINEAR_SHARE = "nonlinear_share"
"""Reckoned here, of `dark_matter`: see `derived`."""


@dataclass(frozen=True)
class Column:
    """A number of the table."""

    eval: str
    key: str
    label: str
    better: Better = None

    @property
    def id(self) -> str:
        return f"{self.eval}.{self.key}"


COLUMNS = (
    Column("core", "l0_mean", "L0"),
    Column("core", "ev", "EV", "high"),
    Column("core", "ce_recovered_zero", "CE recovered (zero)", "high"),
    Column("core", "ce_recovered_mean", "CE recovered (mean)", "high"),
    Column("core", "ce_delta", "CE added", "low"),
    Column("core", "kl_sae", "KL", "low"),
    Column("core", "dead_share", "Dead"),
    Column("core", "dense_share", "Dense"),
    Column("dark_matter", "fvu_nonlinear", "FVU, nonlinear"),
    Column("dark_matter", NONLINEAR_SHARE, "Nonlinear share"),
    Column("geometry", "max_cos_dec_abs_mean", "Nearest decoder row"),
    Column("ground_truth", "mcc_abs", "MCC", "high"),
)
"""What the table shows, of what was measured. Where neither high nor low is better by itself, no
number is called best."""


@dataclass(frozen=True, eq=False)
class Subject:
    """One SAE of the comparison."""

    number: int
    """From 1; it stands for the SAE in plots."""
    name: str
    run: Run
    results: Mapping[str, EvalResult]
    controls: Mapping[str, Mapping[str, EvalResult]]

    @classmethod
    def of(cls, run: Run, number: int = 1, name: str | None = None) -> "Subject":
        return cls(
            number, name or run.path.name, run, _findings.results(run), _findings.controls(run)
        )

    @property
    def untrained(self) -> bool:
        """Whether it is a control of another kind: an SAE of a model before any training."""
        return UNTRAINED in self.run.model


@dataclass(frozen=True)
class Cell:
    """A number in the table."""

    metric: Metric
    best: bool = False
    doubtful: bool = False
    """Whether a control of the same SAE is not clearly worse."""


@dataclass(frozen=True)
class Row:
    """An SAE, or a control of it."""

    subject: Subject
    control: str | None
    cells: Mapping[str, Cell]
    """By the column's `id`."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What there is to say of several SAEs, or of one beside its controls."""

    subjects: Sequence[Subject]

    @classmethod
    def open(cls, paths: Sequence[Path]) -> "Comparison":
        """Read the runs. Raises SaekitError for one that is not finished or not measured, and for
        one that is given twice."""
        runs = [Run.open(path) for path in paths]
        seen: dict[Path, Path] = {}
        for run in runs:
            if (first := seen.setdefault(run.path.resolve(), run.path)) is not run.path:
                raise SaekitError(f"{first} is given twice, as {run.path} too: name each run once")
        absent = [command for run in runs if not run.core for command in run.missing()[:1]]
        if absent:
            commands = "\n".join(f"    {command}" for command in absent)
            raise SaekitError(
                f"a comparison needs results that are not there yet; give first:\n{commands}"
            )
        names = short_names([run.path for run in runs])
        return cls([Subject.of(run, i + 1, names[i]) for i, run in enumerate(runs)])

    @cached_property
    def evals(self) -> list[str]:
        """The evaluations that at least one SAE has been put to, `core` first."""
        names = {name for subject in self.subjects for name in subject.results}
        return sorted(names, key=lambda name: (name != "core", name))

    @cached_property
    def columns(self) -> list[Column]:
        """Those that at least one SAE has a number for."""
        return [
            column
            for column in COLUMNS
            if any(number(subject.results, column) for subject in self.subjects)
        ]

    @cached_property
    def rows(self) -> list[Row]:
        """Every SAE, each with its controls below it."""
        rows = []
        for subject in self.subjects:
            cells = {}
            for column in self.columns:
                if metric := number(subject.results, column):
                    best = self._is_best(subject, column)
                    cells[column.id] = Cell(metric, best, _doubtful(subject, column))
            rows.append(Row(subject, None, cells))
            for control, results in subject.controls.items():
                found = {column.id: number(results, column) for column in self.columns}
                kept = {name: Cell(metric) for name, metric in found.items() if metric}
                rows.append(Row(subject, control, kept))
        return rows

    @cached_property
    def incomparable(self) -> dict[str, str]:
        """Evaluations whose numbers do not compare, and why."""
        found = {}
        for name in self.evals:
            results = [one.results[name] for one in self._compared if name in one.results]
            reasons = [mismatch(a, b) for a, b in combinations(results, 2)]
            if reason := next(filter(None, reasons), None):
                found[name] = reason
        return found

    @cached_property
    def _compared(self) -> Sequence[Subject]:
        """Those of trained models, where there are any: activations of an untrained one differ by
        design, and its numbers stand beside the others to be read, not to be ranked."""
        return [one for one in self.subjects if not one.untrained] or self.subjects

    def aside(self, subject: Subject) -> bool:
        """Whether it is there to be read beside the others, not to be ranked among them."""
        return subject not in self._compared

    def _is_best(self, subject: Subject, column: Column) -> bool:
        if column.eval in self.incomparable or self.aside(subject):
            return False
        others = [one for one in self._compared if one is not subject]
        metrics = [m for one in others if (m := number(one.results, column))]
        own = number(subject.results, column)
        if own is None or not metrics:
            return False
        return all(clearly_better(own, metric, column.better) for metric in metrics)

    @cached_property
    def notes(self) -> list[str]:
        """What a reader must know before comparing."""
        notes = [
            f"Numbers of `{name}` do not compare, and none is marked best: {reason}."
            for name, reason in self.incomparable.items()
        ]
        if aside := [one.name for one in self.subjects if self.aside(one)]:
            notes.append(
                f"Of an untrained model, as a control: {', '.join(aside)}. Its activations are "
                "others, so that its numbers are never marked; what it scores is there without "
                "anything that the model learnt."
            )
        l0 = [m.value for one in self._compared if (m := number(one.results, COLUMNS[0]))]
        if len(l0) > 1 and max(l0) > 1.1 * min(l0):
            notes.append(
                f"L0 goes from {min(l0):.4g} to {max(l0):.4g}, and more active latents reconstruct "
                "better: the best of a column is no ranking of methods. Read the plots over L0."
            )
        for name in self.evals:
            lacking = [one.name for one in self.subjects if name not in one.results]
            if lacking:
                notes.append(f"Not there: `{name}` of {', '.join(lacking)}.")
        return notes

    def differences(self) -> list[tuple[str, list[str]]]:
        """What the SAEs were made with, where they differ: the key, and each one's value."""
        return differing([made_with(subject.run) for subject in self.subjects])

    def eval_differences(self) -> list[tuple[str, list[str]]]:
        """What they were measured with, where that differs."""
        used: list[dict[str, Any]] = [{} for _ in self.subjects]
        for known, subject in zip(used, self.subjects, strict=True):
            for name, result in subject.results.items():
                versions = {f"version of {of}": version for of, version in result.versions.items()}
                cache = {"cache_fingerprint": result.cache_fingerprint[:12]}
                for key, value in {**measured_with(result), **cache, **versions}.items():
                    known[f"{name}: {key}"] = value
        return differing(used, absent_too=False)


def number(results: Mapping[str, EvalResult], column: Column) -> Metric | None:
    result = results.get(column.eval)
    if result is None:
        return None
    return derived(result).get(column.key) or result.metrics.get(column.key)


def derived(result: EvalResult) -> dict[str, Metric]:
    """Numbers that follow from those of an evaluation, and are read beside them."""
    total, nonlinear = (result.metrics.get(key) for key in ("fvu_total", "fvu_nonlinear"))
    if result.eval != "dark_matter" or not total or not nonlinear or total.value <= 0:
        return {}
    share = Metric(
        value=nonlinear.value / total.value,
        definition="fvu_nonlinear / fvu_total: the share of the SAE's squared error that no linear "
        "map of x predicts; no interval is reckoned for it",
        n=nonlinear.n,
    )
    return {NONLINEAR_SHARE: share}


def clearly_better(a: Metric, b: Metric, better: Better) -> bool:
    """Whether the intervals do not overlap, and that of `a` is on the better side."""
    if better is None or a.interval is None or b.interval is None:
        return False
    if better == "low":
        return a.interval[1] < b.interval[0]
    return a.interval[0] > b.interval[1]


def _doubtful(subject: Subject, column: Column) -> bool:
    own = number(subject.results, column)
    if own is None or own.interval is None or column.better is None:
        return False
    result = subject.results[column.eval]
    return any(
        metric.interval is not None and not clearly_better(own, metric, column.better)
        for results in subject.controls.values()
        if (metric := number(results, column)) and mismatch(result, results[column.eval]) is None
    )


def mismatch(a: EvalResult, b: EvalResult) -> str | None:
    """Why the numbers of two SAEs by the same evaluation do not compare; None where they do."""
    if a.hook != b.hook:
        return f"they are of different hooks, {a.hook} and {b.hook}"
    if a.cache_fingerprint != b.cache_fingerprint:
        return (
            f"they were taken on different caches, {a.cache_fingerprint[:12]} and "
            f"{b.cache_fingerprint[:12]}"
        )
    ours, theirs = measured_with(a), measured_with(b)
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if keys:
        listed = ", ".join(f"{key} = {ours.get(key)} and {theirs.get(key)}" for key in keys)
        return f"they were taken with different configs, {listed}"
    return None


def measured_with(result: EvalResult) -> dict[str, Any]:
    """The config of an evaluation as far as it says what was measured."""
    return {key: value for key, value in result.config.items() if key not in _FREE}


def made_with(run: Run) -> dict[str, Any]:
    """All that is known of how an SAE came about, by name."""
    made = run.provenance
    known = {"kind": run.kind, "hook": run.hook, "d_sae": run.d_sae, **run.config}
    if made is None:
        return known
    known |= {
        "model": made.model,
        "model_fingerprint": made.model_fingerprint[:12],
        "cache_fingerprint": made.cache_fingerprint[:12],
        "rows_seen": made.rows_seen,
        "commit": made.commit and made.commit[:12],
    }
    return known | {f"version of {name}": version for name, version in made.versions.items()}


def short_names(paths: Sequence[Path]) -> list[str]:
    """Of each path its last part, or as many of its last parts as tell it from the others."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def differing(
    values: Sequence[Mapping[str, Any]], *, absent_too: bool = True
) -> list[tuple[str, list[str]]]:
    """The keys whose values are not all the same; "–" stands where one has no such key."""
    found = []
    for key in dict.fromkeys(key for each in values for key in each):
        shown = ["–" if each.get(key) is None else _plain(each[key]) for each in values]
        if len({text for text in shown if absent_too or text != "–"}) > 1:
            found.append((key, shown))
    return found


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
