"""The table that `dark_matter` fills: each number under its name, with its definition and its
interval.

Axes: sample (resamples of documents, the first of them the rows as they are).
"""

import logging
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float
from torch import Tensor

from saekit.evals._resample import Estimate, few
from saekit.results import Metric

log = logging.getLogger(__name__)

_FITTED = (
    "rows of the train split that all maps are fitted on. Intervals hold the fit fixed, and the "
    "mean that variance is taken about"
)


@dataclass(frozen=True, eq=False)
class Table:
    """Metrics and arrays as they come in. What is undefined is left out, and the notes say why."""

    n: int
    """Held-out rows, which numbers are taken over where nothing else is said."""
    n_fit: int
    documents: int
    """Held-out documents, which intervals are over."""
    metrics: dict[str, Metric] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, value: float, definition: str, n: int | None = None) -> None:
        self.metrics[name] = Metric(
            value=value, definition=definition, n=self.n if n is None else n
        )

    def note(self, text: str) -> None:
        log.warning("%s", text)
        self.notes.append(text)

    def leave_out(self, name: str, reason: str) -> None:
        self.note(f"{name} is left out: {reason}")

    def estimate(
        self,
        name: str,
        values: Float[Tensor, " sample"],
        definition: str,
        undefined: str,
        n: int | None = None,
        documents: int | None = None,
    ) -> None:
        """A ratio with its interval, over these documents where not over all. `undefined` is why it
        may have no value."""
        found = Estimate.of(values, documents or self.documents)
        if found is None:
            self.leave_out(name, undefined)
            return
        self.add(name, found.value, definition, n)
        told = definition + (few(documents or self.documents) if found.interval else "")
        self.metrics[name] = replace(self.metrics[name], interval=found.interval, definition=told)
        if len(values) > 1 and found.interval is None:
            self.note(f"{name} has no interval: it is undefined on some resamples of the documents")

    def finished(self) -> dict[str, Metric]:
        """All metrics, and with the number of fitted rows the notes."""
        text = ". ".join([_FITTED, *self.notes])
        fit_rows = Metric(value=float(self.n_fit), definition=text, n=self.n_fit)
        return {**self.metrics, "fit_rows": fit_rows}
