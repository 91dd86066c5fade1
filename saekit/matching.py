"""Which row of one dictionary is which of another: nearest rows, and one-to-one matchings.

Rows are compared by cosine, signed or absolute: where it is absolute, a latent that points the
other way counts as the same. Products are in fp32, a block of rows at a time, so that no matrix of
all pairs is held; only `matched` holds one. Axes: a, b (rows of the two dictionaries), d.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit import synthetic
from saekit.errors import Undefined

Sign = Literal["signed", "abs"]
SIGNS: tuple[Sign, ...] = ("signed", "abs")

_COSINES_AT_ONCE = 2**24
"""Elements of one fp32 `[a, b]` block: 64 MiB."""


def unit_rows(W: Float[Tensor, "a d"]) -> tuple[Float[Tensor, "some d"], Bool[Tensor, " a"]]:
    """The rows that have a direction, with length 1, and which they are."""
    length = torch.linalg.vector_norm(W, dim=1, dtype=torch.float64)
    there = length > 0
    return (W[there].double() / length[there, None]).float(), there


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


def rows_at_once(n: int) -> int:
    """How many rows are compared at once with n others."""
    return max(1, _COSINES_AT_ONCE // n)


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
    for rows in torch.arange(len(a)).split(rows_at_once(len(b))):
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
