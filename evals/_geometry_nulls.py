"""Numbers of dictionaries beside what random dictionaries of the same sizes score.

A maximum over many latents is large by chance alone, and the larger the more latents there are, so
a number of two dictionaries says little without. Axes: d.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from saekit.errors import Undefined
from saekit.evals._geometry_pass import root
from saekit.evals._linear import Moments
from saekit.evals._matching import random_rows
from saekit.results import Metric
from saekit.seeds import stream

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Null:
    """How random rows are drawn."""

    what: str
    roots: tuple[Float[Tensor, "d d"] | None, ...]
    """For each dictionary, of the covariance (see `root`); None for directions all alike."""


def nulls(moments: Sequence[Moments | None]) -> dict[str, Null]:
    """The nulls by what they add to a metric's name, given the moments of the activations that
    each dictionary is of, or None for no second null."""
    found = {"null": Null("random unit rows", (None,) * len(moments))}
    if all(m is not None for m in moments):
        try:
            roots = tuple(root(m) for m in moments if m is not None)
        except Undefined as reason:
            log.warning("null_cov is left out: %s", reason)
        else:
            what = "random rows with the covariance of the activations"
            found["null_cov"] = Null(what, roots)
    return found


def beside_nulls(
    values: Mapping[str, float],
    measured: Callable[..., Mapping[str, float]],
    dictionaries: Sequence[Float[Tensor, "_ d"]],
    against: Mapping[str, Null],
    definitions: Mapping[str, str],
    *,
    draws: int,
    seed: int,
) -> dict[str, Metric]:
    """`values` of the dictionaries, and what `measured` says of random ones in their place: the
    mean over `draws`. What it leaves out of one of them is left out.

    `n` is how many rows the smallest dictionary has.
    """
    n = min(map(len, dictionaries))
    metrics = {
        name: Metric(value=value, definition=definitions[name], n=n)
        for name, value in values.items()
    }
    sizes = " and ".join(f"{len(one)}" for one in dictionaries)
    for suffix, null in against.items():
        drawn = []
        for draw in range(draws):
            generator = stream(suffix, seed, draw)
            random = [
                random_rows(len(one), one.shape[1], generator, root).to(one.device)
                for one, root in zip(dictionaries, null.roots, strict=True)
            ]
            drawn.append(measured(*random))
        for name in values:
            found = [one[name] for one in drawn if name in one]
            if len(found) < draws:
                log.warning("%s_%s is left out: a random draw has no such number", name, suffix)
                continue
            how = "one draw"
            if draws > 1:
                how = f"mean of {draws} draws (standard deviation {np.std(found):.2g})"
            metrics[f"{name}_{suffix}"] = Metric(
                value=float(np.mean(found)),
                definition=f"{name} of {null.what}, {sizes} of width {dictionaries[0].shape[1]}: "
                + how,
                n=n,
            )
    return metrics
