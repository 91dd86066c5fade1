"""What screens ask of single latents, in one place: what they fire on, how often, and where."""

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from saekit.dashboard import features
from saekit.dashboard.data import Context, Run


def fires_on(run: Run, latents: list[int]) -> list[str]:
    """The tokens that each of the latents fires on; empty where there is no feature store."""
    if run.features is None:
        return ["" for _ in latents]
    return [features.fires_on(run.features, latent) for latent in latents]


def density(run: Run) -> Float[ndarray, " d_sae"] | None:
    """Share of the tokens on which each latent fires; None where that was not measured."""
    if run.features is not None:
        return run.features.column("density")
    return run.core.arrays.get("density") if run.core is not None else None


def contexts(run: Run, latent: int, limit: int) -> tuple[list[Context], float]:
    """Where a latent fires most, and its maximum; nothing where there is no feature store."""
    if run.features is None:
        return [], 0.0
    found = run.features.latent(latent)
    return features.contexts(run.features, found, limit=limit), found.numbers["maximum"]


def most_active(run: Run, n: int) -> list[int]:
    """Latents that fire most often, as a place to begin; the first ones where nothing is known."""
    known = density(run)
    if known is None:
        return list(range(min(n, run.d_sae or 0)))
    return [int(latent) for latent in np.argsort(-known, kind="stable")[:n]]
