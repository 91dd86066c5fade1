"""Every run of a folder in brief: what it is, how far it is, and its headline numbers.

Results of many runs are read at once here, so the examples of latents, which are large, are not.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from saekit.dashboard._comparison import differing, made_with
from saekit.dashboard._folder import Folder
from saekit.dashboard.data import LOG, Run, show_token
from saekit.errors import SaekitError
from saekit.plot import Curves, Point
from saekit.results import Metric

State = Literal["finished", "training", "stopped", "broken"]

FRESH = 120.0
"""Seconds after the last line of its log for which an unfinished run counts as training."""

NUMBERS = {
    "l0_mean": "L0",
    "ev": "EV",
    "ce_recovered_zero": "CE recovered (zero)",
    "ce_recovered_mean": "CE recovered (mean)",
    "dead_share": "dead",
}
"""What the table shows of `core`."""

Y = {
    "ev": ("Explained variance", "explained variance"),
    "ce_recovered_zero": ("CE recovered (zero)", "share of the loss won back"),
    "ce_recovered_mean": ("CE recovered (mean)", "share of the loss won back"),
}
"""What can stand over L0: title, and title of the axis."""


@dataclass(frozen=True, eq=False)
class Brief:
    """One run of the folder."""

    name: str
    number: int
    """From 1; it has the colour of that number in plots."""
    state: State
    run: Run | None
    """Without its examples; None where it cannot be read."""
    problem: str = ""

    @classmethod
    def of(cls, path: Path, name: str, number: int, now: float) -> "Brief":
        try:
            run = Run.open(path)
        except SaekitError as error:
            return cls(name, number, "broken", None, str(error))
        if not run.training:
            return cls(name, number, "finished", run)
        log = path / LOG
        fresh = log.is_file() and now - log.stat().st_mtime < FRESH
        return cls(name, number, "training" if fresh else "stopped", run)

    @property
    def metrics(self) -> dict[str, Metric]:
        return self.run.core.metrics if self.run and self.run.core else {}

    @property
    def shown(self) -> str:
        """The name as text; a run that was opened by itself has its folder's."""
        return show_token(self.name or (self.run.path.resolve().name if self.run else "this run"))


def briefs(folder: Folder) -> list[Brief]:
    now = time.time()
    return [Brief.of(folder.path / name, name, i, now) for i, name in enumerate(folder.names, 1)]


def table(briefs: Sequence[Brief]) -> dict[str, list[Any]]:
    """A column each: what they are, and their numbers. None where something is not known."""
    columns: dict[str, list[Any]] = {
        "run": [each.shown for each in briefs],
        "state": [each.state for each in briefs],
        "kind": [show_token(each.run.kind) if each.run else None for each in briefs],
        "hook": [show_token(each.run.hook) if each.run else None for each in briefs],
        "d_sae": [each.run.d_sae if each.run else None for each in briefs],
        "tokens": [_seen(each) for each in briefs],
    }
    for key, label in NUMBERS.items():
        values = [each.metrics.get(key) for each in briefs]
        columns[label] = [None if value is None else value.value for value in values]
    return columns


def _seen(brief: Brief) -> int | None:
    """Activations trained on: as recorded at the end, or as far as the log goes."""
    if brief.run is None:
        return None
    if brief.run.provenance is not None:
        return brief.run.provenance.rows_seen
    tokens = brief.run.curves.get("tokens")
    return None if tokens is None else int(np.nanmax(tokens))


def points(briefs: Sequence[Brief], key: str) -> list[Point]:
    """L0 against a number of `core`, of every run that has both."""
    return [
        Point(each.number, each.shown, each.metrics["l0_mean"].value, each.metrics[key])
        for each in briefs
        if key in each.metrics and "l0_mean" in each.metrics and each.metrics["l0_mean"].value > 0
    ]


def incomparable(briefs: Sequence[Brief]) -> str | None:
    """Why points of one plot do not compare; None where they do."""
    found = {
        (core.hook, core.cache_fingerprint[:12], core.split)
        for each in briefs
        if each.run and (core := each.run.core)
    }
    if len(found) < 2:
        return None
    names = ("hooks", "caches", "splits")
    apart = [name for at, name in enumerate(names) if len({each[at] for each in found}) > 1]
    return f"These runs were measured on different {' and '.join(apart)}: points do not compare."


def curves(briefs: Sequence[Brief]) -> list[tuple[int, str, Curves]]:
    """How training went, by run; of a run without a log nothing."""
    found: list[tuple[int, str, Curves]] = []
    for each in briefs:
        log = each.run.curves if each.run else {}
        by_name: Curves = {name: (log["tokens"], y) for name, y in log.items() if "tokens" in log}
        if by_name:
            found.append((each.number, each.shown, by_name))
    return found


def differences(briefs: Sequence[Brief]) -> dict[str, list[str]]:
    """What the runs were made with where they differ: the keys, then a column for each run."""
    readable = [each for each in briefs if each.run]
    rows = differing([made_with(each.run) for each in readable if each.run])
    columns = {"": [show_token(key) for key, _ in rows]}
    for at, each in enumerate(readable):
        columns[f"{each.number} · {each.shown}"] = [show_token(values[at]) for _, values in rows]
    return columns
