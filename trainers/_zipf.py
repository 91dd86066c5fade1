"""The Zipf-like law that says how often the latent of each rank should fire:

    density of rank r  ~  (r + offset) ** -exponent,   r = 1 for the most frequent

Axes: latent, rank.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

OFFSETS = 24
"""Offsets that are tried in a fit."""


def law(
    density: Float[Tensor, " latent"],
    *,
    exponent: float | None,
    offset: float | None,
    mass: float,
) -> Float[Tensor, " latent"]:
    """What share of all firings each latent has by the law, given how often each fires now, which
    says its rank.

    An exponent or an offset that is None is fitted: least squares in log space, over the most
    frequent latents that have the share `mass` of all firings. The rest is the rare tail, which
    observed densities drop away from, and which the law is to lift.
    """
    ranked, order = density.double().sort(descending=True, stable=True)
    rank = torch.arange(1, len(density) + 1, device=density.device, dtype=torch.float64)
    share = ranked.cumsum(0) / ranked.sum().clamp_min(1e-300)
    # Two at least, for there is a slope to find, but none that never fires.
    few = min(max(2, int((share < mass).sum()) + 1), int((ranked > 0).sum()))
    if exponent is None or offset is None:
        exponent, offset = _fit(ranked[:few], rank[:few], exponent, offset)
    by_rank = (rank + offset) ** -exponent
    wanted = torch.empty_like(by_rank)
    wanted[order] = by_rank / by_rank.sum()
    return wanted.to(density.dtype)


def _fit(
    density: Float[Tensor, " rank"],
    rank: Float[Tensor, " rank"],
    exponent: float | None,
    offset: float | None,
) -> tuple[float, float]:
    """The exponent and the offset whose law is nearest; a flat one where there is nothing to
    fit."""
    if len(rank) < 2:
        return exponent or 0.0, offset or 0.0
    if offset is not None:
        offsets = rank.new_tensor([offset])
    else:
        tried = torch.logspace(-1, math.log10(len(rank)), OFFSETS - 1, dtype=torch.float64)
        offsets = torch.cat([rank.new_zeros(1), tried.to(rank)])
    x = -(rank + offsets[:, None]).log()
    x = x - x.mean(1, keepdim=True)
    y = density.log() - density.log().mean()
    if exponent is not None:
        slope = torch.full_like(offsets, exponent)
    else:
        slope = (x * y).sum(1) / x.square().sum(1)
    best = int((y - slope[:, None] * x).square().sum(1).argmin())
    return float(slope[best]), float(offsets[best])


def water_fill(
    share: Float[Tensor, " latent"], total: float, cap: float
) -> Float[Tensor, " latent"]:
    """`total`, given out in proportion to `share`, but to none more than `cap`: what some may not
    take goes to the others, in proportion again. `total` may not exceed what all caps add up to."""
    given = share.double()
    full = torch.zeros_like(given, dtype=torch.bool)
    while True:
        left = total - cap * float(full.sum())
        rest = given.masked_fill(full, 0)
        amount = torch.where(full, cap, left * rest / rest.sum().clamp_min(1e-300))
        over = (amount > cap) & ~full
        if not over.any():
            return amount.to(share.dtype)
        full |= over


def whole(amounts: Float[Tensor, " latent"], total: int, phase: float) -> Float[Tensor, " latent"]:
    """Each amount rounded down or up, so that they add up to `total`, as they do already.

    One of 0.3 becomes 1 for three tenths of the phases in [0, 1). With phases that are spread
    evenly, fractions are thereby paid out over the calls.
    """
    ends = amounts.double().cumsum(0)
    ends = ends * (total / ends[-1].clamp_min(1e-300))
    ends[-1] = total
    return (ends + phase).floor().diff(prepend=ends.new_zeros(1))
