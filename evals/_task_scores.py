"""Scores over task prompts, with intervals: prompts are drawn with replacement, and every score is
a ratio of means over the drawn prompts.

With LD the mean of logit(right) - logit(wrong), LD_abl that with the activation replaced by its
mean over the task's prompts, and LD_x that with it replaced by x:

    sufficiency   LD_x_hat / LD_clean                              1: as good as the activation
    recovered     |LD_x_hat - LD_abl| / |LD_clean - LD_abl|        1: the same, 0: as mean ablation
    necessity     1 - |LD_abl - LD_n| / |LD_abl - LD_clean|        1: all that counts was explained

where n = mean + (x - x_hat) lacks what the dictionary explains (Makelov, Lange and Nanda 2024,
arXiv 2405.08366, section 3; `recovered` is that of its code). Absolute values: what overshoots on
the far side of mean ablation counts as recovered. The raw LD tell.

Axes: sample (resamples, the first of them the prompts as they are), row (prompts).
"""

import logging
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from saekit.evals._resample import Estimate, Resamples, few
from saekit.results import Metric

log = logging.getLogger(__name__)

MIN_LOGIT = 1e-2
"""Logits that an ablation or a patch must move the mean difference before a share of that means
anything. Its interval must not hold 0 either."""

Samples = Float[Tensor, " sample"]


@dataclass(frozen=True)
class Table:
    """Metrics as they are found, with what each number was made of."""

    resamples: Resamples
    metrics: dict[str, Metric] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def over(cls, n: int, n_bootstrap: int, seed: int) -> "Table":
        """Of n prompts."""
        return cls(Resamples.of(torch.arange(n), n_bootstrap, seed))

    def mean(self, values: Shaped[Tensor, " row"]) -> Samples:
        """The mean over prompts, in each resample."""
        n = len(values)
        return self.resamples.sums(values.double()[:, None], torch.arange(n))[:, 0] / n

    def add_count(self, name: str, samples: Samples, definition: str) -> None:
        """A count of what passes a threshold.

        Resamples repeat some prompts and lack others, so that more latents pass a threshold by
        chance, or fewer: their counts lie about another one. What they tell is the spread.
        """
        moved = samples - samples[1:].median() + samples[0] if len(samples) > 1 else samples
        told = f"{definition} (the interval is the resamples' spread, moved to lie about the count)"
        self.add(name, torch.cat([samples[:1], moved[1:]]), told)

    def add(self, name: str, samples: Samples, definition: str) -> None:
        """A number with its interval; one that is undefined is left out, and the log says so."""
        prompts = self.resamples.weights.shape[1]
        estimate = Estimate.of(samples, prompts)
        if estimate is None:
            log.warning(
                "%s is left out: what it is a share of is no more than %g logits, or cannot be "
                "told from 0 on these prompts; take positions that the task depends on, or more "
                "prompts",
                name,
                MIN_LOGIT,
            )
            return
        if estimate.interval is None:
            definition += "; undefined in a resample of the prompts, so without an interval"
        else:
            definition += few(prompts, "prompts")
        self.metrics[name] = Metric(
            value=estimate.value,
            definition=definition,
            n=prompts,
            interval=estimate.interval,
        )

    def add_mean(self, name: str, values: Shaped[Tensor, " row"], definition: str) -> None:
        """The mean over prompts; the values go into the arrays."""
        self.arrays[f"rows.{name}"] = values.numpy()
        self.add(name, self.mean(values), definition)


def sufficiency(clean: Samples, encoded: Samples) -> Samples:
    """LD_x_hat / LD_clean."""
    return _ratio(encoded, clean)


def recovered(clean: Samples, ablated: Samples, encoded: Samples) -> Samples:
    """|LD_x_hat - LD_abl| / |LD_clean - LD_abl|."""
    return _ratio(encoded - ablated, clean - ablated).abs()


def necessity(clean: Samples, ablated: Samples, without: Samples) -> Samples:
    """1 - |LD_abl - LD_n| / |LD_abl - LD_clean|."""
    return 1 - _ratio(ablated - without, ablated - clean).abs()


def effect(clean: Samples, patched: Samples, edited: Samples) -> Samples:
    """(LD_edited - LD_clean) / (LD_patched - LD_clean)."""
    return _ratio(edited - clean, patched - clean)


def _ratio(part: Samples, whole: Samples) -> Samples:
    """NaN, for `Table.add` to leave out, where the whole says nothing."""
    found = Estimate.of(whole)
    if found is not None and found.interval is not None:
        low, high = found.interval
        if low <= 0 <= high:
            return torch.full_like(part, math.nan)
    return (part / whole).where(whole.abs() > MIN_LOGIT, math.nan)
