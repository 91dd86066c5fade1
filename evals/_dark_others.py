"""Other SAEs of the same cache, as predictors of an SAE's error (arXiv 2410.14670, sec. 5 and 6).

Two questions. Does the *reconstruction* of another SAE, of an earlier hook or of the same, predict
what this one leaves, or either part of it? And does the *length* of one SAE's error on a token
predict that of another's, `|e_j| = alpha |e_i| + beta`, and how much better with `|NonlinErr_i|`
beside it? All fits on rows of the train split, all numbers on held-out rows.

Axes: row, d, pair (all ordered pairs of SAEs, the first of them the one evaluated).
"""

from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.evals._dark_parts import (
    Rows,
    Seen,
    Split,
    Subject,
    cross_moments,
    predict_parts,
    reconstruction_moments,
)
from saekit.evals._linear import Affine, Moments
from saekit.evals._resample import Explained, Resamples

PARTS = {"error": "e", "linear": "LinErr", "nonlinear": "NonlinErr"}
"""What is predicted, and what it is called."""


@dataclass(frozen=True, eq=False)
class Compared:
    """What another SAE's reconstruction explains, and what lengths explain of each other."""

    parts: tuple[tuple[Explained, ...], ...]
    """For each other SAE and each split: of error, linear and nonlinear part, side by side."""
    length: Explained
    """Of |e_j| by |e_i|, with the pairs (i, j) row by row."""
    length_with_nonlinear: Explained

    def __add__(self, other: "Compared") -> "Compared":
        return Compared(
            tuple(
                tuple(p + q for p, q in zip(a, b, strict=True))
                for a, b in zip(self.parts, other.parts, strict=True)
            ),
            self.length + other.length,
            self.length_with_nonlinear + other.length_with_nonlinear,
        )


def compare(
    subjects: tuple[Subject, ...],
    splits: tuple[Split, ...],
    intercepts: tuple[bool, ...],
    fit: Rows,
    held_out: Rows,
    resamples: Resamples,
    ridge: float,
) -> Compared:
    """The first of the subjects is the SAE evaluated, whose splits these are: one for each of
    `intercepts`, the first of them with an intercept."""
    own, others = subjects[0], subjects[1:]

    def cross(other: Subject) -> Moments:
        batches = fit.seen(f"fit from {other.name}", own, other)
        return reduce(add, (cross_moments(seen[1], seen[0]) for _, seen in batches))

    def split(other: Subject) -> Split:
        batches = fit.seen(f"fit to {other.name}", other)
        moments = reduce(add, (reconstruction_moments(seen[0]) for _, seen in batches))
        return Split.fit(moments, intercept=True, ridge=ridge, rescale=False)

    crosses = [cross(other) for other in others]
    maps = [
        [
            predict_parts(moments, part, intercept=intercept, ridge=ridge)
            for part, intercept in zip(splits, intercepts, strict=True)
        ]
        for moments in crosses
    ]
    # A weight for each resample and dimension of every other SAE is more than there is room for.
    alone = resamples.sample
    each = (splits[0], *map(split, others))
    batches = fit.seen("fit of lengths", *subjects)
    lengths = reduce(add, (_length_moments(seen, each) for _, seen in batches))
    by_length, with_nonlinear = _length_fits(lengths, len(subjects))

    def judge(index: Tensor, seen: tuple[Seen, ...]) -> Compared:
        document = held_out.documents(index)
        return Compared(
            tuple(
                tuple(
                    _judge_parts(seen[0], other, fitted, part, alone, document)
                    for fitted, part in zip(ways, splits, strict=True)
                )
                for other, ways in zip(seen[1:], maps, strict=True)
            ),
            *(
                _judge_lengths(_lengths(seen, each), fits, resamples, document)
                for fits in (by_length, with_nonlinear)
            ),
        )

    return reduce(add, (judge(*some) for some in held_out.seen("held-out rows", *subjects)))


def _judge_parts(
    seen: Seen, other: Seen, fitted: Affine, split: Split, resamples: Resamples, document: Tensor
) -> Explained:
    part = split.parts(seen)
    y = torch.cat([seen.error, part.linear, part.nonlinear], 1)
    return Explained.of(resamples, y, fitted(other.x_hat), document, fitted.y_mean)


def _lengths(seen: tuple[Seen, ...], splits: tuple[Split, ...]) -> Float[Tensor, "row twice"]:
    """|e_i| of each SAE, then |NonlinErr_i| of each."""
    parts = [split.parts(one) for split, one in zip(splits, seen, strict=True)]
    vectors = [one.error for one in seen] + [part.nonlinear for part in parts]
    return torch.stack([vector.norm(dim=1) for vector in vectors], 1)


def _length_moments(seen: tuple[Seen, ...], splits: tuple[Split, ...]) -> Moments:
    lengths = _lengths(seen, splits)
    return Moments.of(lengths, lengths[:, : len(seen)])


def _length_fits(lengths: Moments, n: int) -> tuple[list[tuple[list[int], Affine]], ...]:
    """For each SAE i which lengths it predicts from, and the map to all |e_j|: from |e_i| alone,
    then with |NonlinErr_i|."""
    ways = ([[i] for i in range(n)], [[i, n + i] for i in range(n)])
    return tuple(
        [(columns, lengths[columns].solve(intercept=True)) for columns in way] for way in ways
    )


def _judge_lengths(
    lengths: Float[Tensor, "row twice"],
    fits: list[tuple[list[int], Affine]],
    resamples: Resamples,
    document: Tensor,
) -> Explained:
    y = lengths[:, : len(fits)].repeat(1, len(fits))
    y_hat = torch.cat([fitted(lengths[:, columns]) for columns, fitted in fits], 1)
    pilot = torch.cat([fitted.y_mean for _, fitted in fits])
    return Explained.of(resamples, y, y_hat, document, pilot)
