"""How alike two dictionaries are: nearest rows, one-to-one matching, subspaces, and what random
dictionaries of the same sizes would score.

Rows are compared by cosine, signed or absolute: where it is absolute, a latent that points the
other way counts as the same. Products are in fp32, a block of rows at a time, so that no matrix of
all pairs is held; only `matched` holds one. Axes: a, b (rows of the two dictionaries), d.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit import synthetic
from saekit.evals._metrics import Undefined

Sign = Literal["signed", "abs"]
SIGNS: tuple[Sign, ...] = ("signed", "abs")

_COSINES_AT_ONCE = 2**24
"""Elements of one fp32 `[a, b]` block: 64 MiB."""


def unit_rows(W: Float[Tensor, "a d"]) -> tuple[Float[Tensor, "some d"], Bool[Tensor, " a"]]:
    """The rows that have a direction, with length 1, and which they are."""
    length = torch.linalg.vector_norm(W, dim=1, dtype=torch.float64)
    there = length > 0
    return (W[there].double() / length[there, None]).float(), there


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


@dataclass(frozen=True, eq=False)
class Nearest:
    """The row of b that each row of a is most like; of equals, any."""

    cosine: Float[Tensor, " a"]
    """By "abs", the absolute one."""
    row: Int[Tensor, " a"]

    @property
    def mean(self) -> float:
        """Mean over a of the largest cosine with any row of b: the mean max cosine similarity,
        MMCS. It is not symmetric, and many rows of a may share one of b."""
        return float(self.cosine.double().mean())

    @property
    def uniqueness(self) -> float:
        """Different rows of b that rows of a are nearest to, as a share of the rows of a."""
        return len(self.row.unique()) / len(self.row)

    def share(self, over: float) -> float:
        """Of the rows of a whose nearest has a cosine above `over`."""
        return float((self.cosine > over).double().mean())


def nearest(
    a: Float[Tensor, "a d"],
    b: Float[Tensor, "b d"],
    own: Int[Tensor, " a"] | None = None,
) -> dict[Sign, Nearest]:
    """The nearest of b to each row of a, both of unit rows, by both kinds of cosine.

    `own` names for each row of a the one of b that is itself, and does not count. It takes
    |a| |b| d multiplications. Raises Undefined where there is nothing to compare with.
    """
    if len(a) == 0 or len(b) < (1 if own is None else 2):
        raise Undefined(
            f"of {len(a)} and {len(b)} latents none has another to be compared with: look at more "
            "rows, so that more latents are alive"
        )
    found: dict[Sign, list[tuple[Tensor, Tensor]]] = {sign: [] for sign in SIGNS}
    for rows in torch.arange(len(a)).split(max(1, _COSINES_AT_ONCE // len(b))):
        cosine = a[rows] @ b.T
        here = torch.arange(len(rows))
        for sign in SIGNS:
            if sign == "abs":
                cosine = cosine.abs()
            if own is not None:
                cosine[here, own[rows]] = -torch.inf
            found[sign].append(cosine.max(1))
    return {
        sign: Nearest(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))
        for sign, parts in found.items()
    }


@dataclass(frozen=True, eq=False)
class Pairs:
    """Rows of a and b, one to one."""

    a: Int[Tensor, " pair"]
    b: Int[Tensor, " pair"]
    cosine: Float[Tensor, " pair"]

    @property
    def mean(self) -> float:
        """Raises Undefined where there is no pair."""
        if len(self.a) == 0:
            raise Undefined("no two latents are each other's nearest, so there are none to average")
        return float(self.cosine.double().mean())


def mutual(forward: Nearest, backward: Nearest) -> Pairs:
    """Rows that are each other's nearest; `forward` is of a in b, `backward` of b in a."""
    here = torch.arange(len(forward.row))
    a = here[backward.row[forward.row] == here]
    return Pairs(a, forward.row[a], forward.cosine[a])


def matched(a: Float[Tensor, "a d"], b: Float[Tensor, "b d"], sign: Sign) -> Pairs:
    """The one-to-one matching of min(|a|, |b|) pairs whose cosines add up to most (Hungarian
    method); what is left over where the sizes differ has no pair. It holds |a| |b| cosines in fp64
    and takes up to |a|^2 |b| steps."""
    cosine = a @ b.T
    if sign == "abs":
        cosine = cosine.abs()
    of = synthetic.matching(cosine)
    rows = (of >= 0).nonzero().flatten()
    return Pairs(rows, of[rows], cosine.cpu()[rows, of[rows]])


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
