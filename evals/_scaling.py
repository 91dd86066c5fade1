"""How error falls as dictionaries grow: a power law with a constant (Engels et al. 2024, arXiv
2410.14670, sec. 4).

    y(width) = floor + scale * (width / reference)^-exponent,    all three >= 0

with `reference` the geometric mean of the widths, by least squares. The paper fits the same by
gradient descent; here floor and scale follow in closed form from the exponent, which a grid and
golden sections find, so that the fit is the same each time and 1,000 resamples take a second.

Axes: sample (resamples of documents, the first of them the rows as they are), width.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.errors import SaekitError

EXPONENTS = (0.01, 3.0)
"""Least and largest exponent looked at. Below, an error hardly falls, and floor and scale cannot be
told apart; above, all of the fall is between the first two widths."""

_GRID = 200
_GOLDEN = (math.sqrt(5) - 1) / 2
_SECTIONS = 45


@dataclass(frozen=True, eq=False)
class PowerLaw:
    """A fit for each sample."""

    reference: float
    floor: Float[Tensor, " sample"]
    scale: Float[Tensor, " sample"]
    """What is above the floor at the reference width."""
    exponent: Float[Tensor, " sample"]

    @property
    def at_edge(self) -> bool:
        """Whether the sample itself is fitted best by the least or the largest exponent looked at,
        or falls by none: the widths then do not tell the floor."""
        low, high = EXPONENTS
        return (
            not float(self.scale[0]) > 0 or not low * 1.001 < float(self.exponent[0]) < high * 0.999
        )

    def __call__(self, width: float) -> Float[Tensor, " sample"]:
        return self.floor + self.scale * (-self.exponent * math.log(width / self.reference)).exp()


def power_law(widths: list[int], y: Float[Tensor, "sample width"]) -> PowerLaw:
    """Raises SaekitError for fewer than four widths: three numbers go through any three points."""
    if len(set(widths)) < 4:
        raise SaekitError(
            f"{len(set(widths))} widths do not test a power law with a constant: its three numbers "
            "go through any three points. Take four widths or more"
        )
    y = y.double()
    reference = math.exp(sum(map(math.log, widths)) / len(widths))
    logs = torch.tensor([math.log(width / reference) for width in widths]).to(y)
    low, high = EXPONENTS
    grid = torch.logspace(math.log10(low), math.log10(high), _GRID, dtype=torch.float64).to(y)
    at = torch.stack([_fit(logs, y, m.expand(len(y)))[2] for m in grid]).argmin(0)
    exponent = _golden(logs, y, grid[(at - 1).clamp_min(0)], grid[(at + 1).clamp_max(_GRID - 1)])
    floor, scale, _ = _fit(logs, y, exponent)
    return PowerLaw(reference, floor, scale, exponent)


def _fit(
    logs: Float[Tensor, " width"], y: Float[Tensor, "sample width"], exponent: Float[Tensor, " s"]
) -> tuple[Float[Tensor, " s"], Float[Tensor, " s"], Float[Tensor, " s"]]:
    """Floor and scale of the least squares with this exponent, none below 0, and what is left."""
    power = (-exponent[:, None] * logs).exp()
    centred = power - power.mean(1, keepdim=True)
    slope = (centred * y).sum(1) / centred.square().sum(1)
    scale = slope.clamp_min(0)
    floor = y.mean(1) - scale * power.mean(1)
    # The least squares under a bound that is passed lies on the bound.
    alone = (power * y).sum(1).clamp_min(0) / power.square().sum(1)
    scale = torch.where(floor < 0, alone, scale)
    floor = floor.clamp_min(0)
    left = y - floor[:, None] - scale[:, None] * power
    return floor, scale, left.square().sum(1)


def _golden(
    logs: Float[Tensor, " width"],
    y: Float[Tensor, "sample width"],
    low: Float[Tensor, " sample"],
    high: Float[Tensor, " sample"],
) -> Float[Tensor, " sample"]:
    """The exponent with the least left between the two."""
    for _ in range(_SECTIONS):
        a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        left = _fit(logs, y, a)[2] < _fit(logs, y, b)[2]
        low, high = torch.where(left, low, a), torch.where(left, b, high)
    return (low + high) / 2
