"""How alike two dictionaries are, in numbers: by nearest rows, by one-to-one matching, by subspaces
(`saekit.matching` says which row is which), and random dictionaries to compare with.

Axes: a, b (rows of the two dictionaries), d.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.errors import Undefined
from saekit.matching import Nearest, Pairs, Sign, matched, mutual, nearest


def random_rows(
    n: int,
    d: int,
    generator: torch.Generator,
    root: Float[Tensor, "d d"] | None = None,
) -> Float[Tensor, "{n} {d}"]:
    """Random unit rows: Gaussian with covariance root @ root.T, or with directions all alike."""
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if root is not None:
        rows = rows @ root.T
    return torch.nn.functional.normalize(rows, eps=1e-300).float()


def subspace_overlap(a: Float[Tensor, "a d"], b: Float[Tensor, "b d"], rank: int) -> float:
    """How far the leading `rank`-dimensional subspaces of two sets of rows are the same: the mean
    of cos^2 of their principal angles, 1 for the same and 0 for orthogonal ones. Each is spanned by
    the leading right singular vectors of its rows. Raises Undefined for fewer rows than that."""
    if min(len(a), len(b), a.shape[1]) < rank:
        raise Undefined(
            f"{len(a)} and {len(b)} rows of width {a.shape[1]} span no subspaces of rank {rank}"
        )
    first, second = (
        torch.linalg.eigh(rows.double().T @ rows.double()).eigenvectors[:, -rank:]
        for rows in (a, b)
    )
    return float((first.T @ second).square().sum() / rank)


@dataclass(frozen=True, eq=False)
class Compared:
    """Two dictionaries, both ways."""

    values: dict[str, float]
    """By name; see `definitions`."""
    forward: dict[Sign, Nearest]
    """Of a in b."""
    backward: dict[Sign, Nearest]
    pairs: dict[Sign, Pairs]
    """The best one-to-one matching; empty where there are too many rows for one."""


def compare(
    a: Float[Tensor, "a d"],
    b: Float[Tensor, "b d"],
    *,
    signs: Sequence[Sign],
    over: Sequence[float],
    max_matching: int,
) -> Compared:
    """All numbers of two dictionaries of unit rows, matched one to one where neither has more than
    `max_matching` rows. A number without a meaning is left out."""
    forward, backward = nearest(a, b), nearest(b, a)
    values: dict[str, float] = {}
    pairs: dict[Sign, Pairs] = {}
    for sign in signs:
        for way, found in (("forward", forward[sign]), ("backward", backward[sign])):
            values[f"mmcs_{sign}_{way}"] = found.mean
            values[f"uniqueness_{sign}_{way}"] = found.uniqueness
            for least in over:
                values[f"share_over_{least:g}_{sign}_{way}"] = found.share(least)
        both = mutual(forward[sign], backward[sign])
        values[f"mutual_share_{sign}"] = len(both.a) / min(len(a), len(b))
        if len(both.a):
            values[f"mutual_cos_{sign}"] = both.mean
        if max(len(a), len(b)) <= max_matching:
            pairs[sign] = matched(a, b, sign)
            values[f"pw_mcc_{sign}"] = pairs[sign].mean
            for least in over:
                share = float((pairs[sign].cosine > least).double().mean())
                values[f"pw_share_over_{least:g}_{sign}"] = share
    return Compared(values, forward, backward, pairs)


def definitions(signs: Sequence[Sign], over: Sequence[float]) -> dict[str, str]:
    """Of everything that `compare` may give."""
    said = {}
    for sign in signs:
        cos = {"signed": "cos", "abs": "|cos|"}[sign]
        for way, i, j in (("forward", "this", "the other"), ("backward", "the other", "this")):
            best = f"max_j {cos}(i, j), i over the latents of {i} SAE and j of {j}"
            said[f"mmcs_{sign}_{way}"] = f"mean over i of {best}; 1 is found, many may share one j"
            said[f"uniqueness_{sign}_{way}"] = (
                f"different j that attain {best}, as a share of the i"
            )
            for least in over:
                said[f"share_over_{least:g}_{sign}_{way}"] = f"share of i above {least:g} in {best}"
        said[f"mutual_share_{sign}"] = (
            f"pairs of latents that are each other's nearest by {cos}, as a share of the smaller "
            "SAE's"
        )
        said[f"mutual_cos_{sign}"] = f"mean of {cos} over the pairs that are each other's nearest"
        matching = f"the one-to-one matching of the latents with the largest sum of {cos}"
        said[f"pw_mcc_{sign}"] = (
            f"mean of {cos} over {matching} (signed={sign == 'signed'}); the larger SAE's latents "
            "that are left over do not count"
        )
        for least in over:
            said[f"pw_share_over_{least:g}_{sign}"] = (
                f"share of pairs with {cos} above {least:g} in {matching}"
            )
    return said
