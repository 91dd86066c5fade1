"""Which latent of one SAE is which of another: by the cosine of their decoder rows, of the latents
that fire where that is known."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from saekit.errors import SaekitError
from saekit.matching import matched, nearest, unit_rows
from saekit.sae import SAE

MAX_MATCHING = 2048
"""Latents that are matched one to one at most, in some seconds; of more, each has its nearest."""


@dataclass(frozen=True, eq=False)
class Matches:
    """For latents of the first SAE their counterparts in the second."""

    latent: Int[ndarray, " pair"]
    other: Int[ndarray, " pair"]
    cosine: Float[ndarray, " pair"]
    """Signed."""
    one_to_one: bool
    """Whether the pairs are those whose cosines add up to most, no latent twice; otherwise each
    latent has its nearest, and some may share one."""
    n: tuple[int, int]
    """Latents of either that were compared."""

    @property
    def mean(self) -> float:
        return float(self.cosine.mean())

    def share(self, over: float) -> float:
        """Of the pairs with a cosine above `over`."""
        return float((self.cosine > over).mean())

    def of(self, latent: int) -> tuple[int, float] | None:
        """The counterpart of a latent; None where it has none."""
        at = np.flatnonzero(self.latent == latent)
        return (int(self.other[at[0]]), float(self.cosine[at[0]])) if len(at) else None


def match(
    a: SAE,
    b: SAE,
    alive: tuple[ndarray | None, ndarray | None],
    max_matching: int = MAX_MATCHING,
) -> Matches:
    """`alive` are the densities of the latents of both, or None where they are not known: then all
    latents count. Raises SaekitError for SAEs of two widths, and where none is left to compare."""
    if a.d_out != b.d_out:
        raise SaekitError(
            f"the SAEs are of widths {a.d_out} and {b.d_out}: rows of two widths have no cosine; "
            "choose two of one width"
        )
    rows, latents = [], []
    for sae, density in zip((a, b), alive, strict=True):
        fires = torch.ones(sae.d_sae, dtype=torch.bool)
        if density is not None:
            fires = torch.from_numpy(np.asarray(density) > 0)
        numbers = fires.nonzero().flatten()
        unit, there = unit_rows(sae.W_dec[numbers])
        rows.append(unit)
        latents.append(numbers[there])
    one_to_one = 0 < max(map(len, rows)) <= max_matching and min(map(len, rows)) > 0
    if one_to_one:
        pairs = matched(rows[0], rows[1], "signed")
        here, there, cosine = pairs.a, pairs.b, pairs.cosine
    else:
        found = nearest(rows[0], rows[1])["signed"]
        here, there, cosine = torch.arange(len(rows[0])), found.row, found.cosine
    order = cosine.argsort(descending=True, stable=True)
    return Matches(
        latent=latents[0][here[order]].numpy(),
        other=latents[1][there[order]].numpy(),
        cosine=cosine[order].numpy(),
        one_to_one=one_to_one,
        n=(len(rows[0]), len(rows[1])),
    )
