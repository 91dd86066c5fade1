"""How much of a planted dictionary a decoder has found, by cosine alone, beside what random
directions would score.

Directions of features and decoder rows are compared with signed and with absolute cosines; where
they are absolute, a latent that points the other way counts as found. A decoder row of length 0 has
no direction: it is found by nothing and finds nothing. Axes: feature, latent, d.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.evals._geometry_nulls import Null, beside_nulls
from saekit.matching import SIGNS, Sign, matched, nearest, unit_rows
from saekit.results import Metric

COS = {"signed": "cos", "abs": "|cos|"}


@dataclass(frozen=True, eq=False)
class Found:
    """Of each feature and each latent, its counterpart, by one kind of cosine."""

    cosine: Float[Tensor, " feature"]
    """With the latent that the one-to-one matching gives it; 0 where it has none."""
    latent: Int[Tensor, " feature"]
    """That latent; -1 for none."""
    best: Float[Tensor, " feature"]
    """The largest with any latent."""
    feature: Int[Tensor, " latent"]
    """The feature that each latent is nearest to; -1 for a row of length 0."""
    nearest: Float[Tensor, " latent"]
    """Its cosine with that feature."""

    @property
    def partner(self) -> Int[Tensor, " latent"]:
        """The feature that is matched to each latent; -1 for none."""
        features = (self.latent >= 0).nonzero().flatten()
        partner = torch.full_like(self.feature, -1)
        partner[self.latent[features]] = features
        return partner


def find(
    directions: Float[Tensor, "feature d"], W_dec: Float[Tensor, "latent d"], *, match: bool
) -> dict[Sign, Found]:
    """Without `match` no feature has a latent of its own; `best` and `nearest` are there always."""
    features, _ = unit_rows(directions)
    rows, there = unit_rows(W_dec)
    which = there.cpu().nonzero().flatten()
    found: dict[Sign, Found] = {}
    if len(rows) == 0:
        zero = Found(*_nothing(len(features), len(W_dec)))
        return dict.fromkeys(SIGNS, zero)
    forward, backward = nearest(features, rows), nearest(rows, features)
    for sign in SIGNS:
        cosine, latent, _, feature, near = _nothing(len(features), len(W_dec))
        if match:
            pairs = matched(features, rows, sign)
            cosine[pairs.a], latent[pairs.a] = pairs.cosine, which[pairs.b]
        feature[which], near[which] = backward[sign].row, backward[sign].cosine
        found[sign] = Found(cosine, latent, forward[sign].cosine, feature, near)
    return found


def _nothing(features: int, latents: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    none = torch.full((features,), -1)
    nowhere = torch.full((latents,), -1)
    zero = torch.zeros(features)
    return zero, none, zero.clone(), nowhere, torch.zeros(latents)


def scores(
    found: dict[Sign, Found], density: Float[Tensor, " feature"], over: Sequence[float]
) -> dict[str, float]:
    """Every number by its name; see `definitions`."""
    values: dict[str, float] = {}
    for sign, of in found.items():
        values[f"mmcs_{sign}_features"] = _mean(of.best)
        values[f"mmcs_{sign}_latents"] = _mean(of.nearest)
        values[f"uniqueness_{sign}"] = len(of.feature[of.feature >= 0].unique()) / len(of.feature)
        pairs = of.cosine[of.latent >= 0]
        if len(pairs):
            total = float(pairs.double().sum())
            values[f"mcc_{sign}"] = total / len(pairs)
            values[f"mcc_{sign}_of_features"] = total / len(of.cosine)
            values[f"mcc_{sign}_of_latents"] = total / len(of.feature)
        for least in over:
            if len(pairs):
                hit = of.cosine > least
                values[f"found_share_{sign}_over_{least:g}"] = _mean(hit)
                if float(density.sum()) > 0:
                    share = float(density.double() @ hit.double() / density.double().sum())
                    values[f"found_firing_share_{sign}_over_{least:g}"] = share
            values[f"near_share_{sign}_over_{least:g}"] = _mean(of.best > least)
    return values


def definitions(over: Sequence[float]) -> dict[str, str]:
    """Of everything that `scores` may give."""
    said: dict[str, str] = {}
    for sign in SIGNS:
        cos = COS[sign]
        matching = f"the one-to-one matching of features and latents with the largest sum of {cos}"
        pairs = f"{matching}, min(features, latents) pairs"
        said[f"mcc_{sign}"] = f"mean of {cos} over {pairs}; those left over do not count"
        for side in ("features", "latents"):
            said[f"mcc_{sign}_of_{side}"] = (
                f"sum of {cos} over {pairs}, divided by all {side}: one left over counts 0"
            )
        said[f"mmcs_{sign}_features"] = (
            f"mean over features of the largest {cos} with any latent; many may share one"
        )
        said[f"mmcs_{sign}_latents"] = (
            f"mean over latents of the largest {cos} with any feature; many may share one"
        )
        said[f"uniqueness_{sign}"] = (
            f"different features that latents are nearest to by {cos}, divided by the latents"
        )
        for least in over:
            above = f"{cos} above {least:g} with their latent in {matching}"
            said[f"found_share_{sign}_over_{least:g}"] = f"share of features that have a {above}"
            said[f"found_firing_share_{sign}_over_{least:g}"] = (
                f"share of all firings, over the rows, that are of features that have a {above}"
            )
            said[f"near_share_{sign}_over_{least:g}"] = (
                f"share of features that have a {cos} above {least:g} with any latent"
            )
    return said


def beside_random(
    directions: Float[Tensor, "feature d"],
    W_dec: Float[Tensor, "latent d"],
    found: dict[Sign, Found],
    density: Float[Tensor, " feature"],
    over: Sequence[float],
    *,
    match: bool,
    draws: int,
    seed: int,
) -> dict[str, Metric]:
    """All numbers, each beside that of random unit rows, as many as latents, in their place; the
    features stay as they are."""
    said = {
        name: f"{definition}; n counts the fewer of features and latents"
        for name, definition in definitions(over).items()
    }

    def of_random(_: Tensor, random: Tensor) -> dict[str, float]:
        return scores(find(directions, random, match=match), density, over)

    null = Null("random unit rows in the latents' place: features and latents", (None, None))
    return beside_nulls(
        scores(found, density, over),
        of_random,
        [directions, W_dec],
        {"null": null} if draws else {},
        said,
        draws=draws,
        seed=seed,
    )


def arrays(found: dict[Sign, Found]) -> dict[str, np.ndarray]:
    """Per feature and per latent, for plots of what is missed."""
    held: dict[str, Tensor] = {}
    for sign, of in found.items():
        held[f"feature_cosine_{sign}"] = of.cosine
        held[f"feature_latent_{sign}"] = of.latent
        held[f"feature_best_{sign}"] = of.best
        held[f"latent_feature_{sign}"] = of.feature
        held[f"latent_cosine_{sign}"] = of.nearest
    return {name: tensor.numpy() for name, tensor in held.items()}


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
