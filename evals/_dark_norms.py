"""What is measured of an error's parts on held-out rows, and the predictors of its length: sums
that are joined by `+`.

The test of the norm (arXiv 2410.14670, sec. 3): how well a linear map of x predicts the squared
length of the error, beside what a token's id, the length of x and the L0 predict. Axes: row, d,
norm (the vectors of `NORMS`), baseline (those of `BASELINES`), sample (resamples of documents),
left (columns of `Parts.unexplained`).
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.evals._dark_parts import NORMS, Parts, Seen, Split
from saekit.evals._linear import Affine, Moments
from saekit.evals._resample import Explained, Resamples, Scatter

BASELINES = {
    "token": "the mean over fitted rows of the same token id (of all rows, for a token that is not "
    "among them)",
    "length": "an affine function of |x|, by least squares on the fitted rows",
    "l0": "an affine function of the number of latents != 0, by least squares on the fitted rows",
}
"""What else predicts |e|^2, by name."""

_T = TypeVar("_T", Explained, Tensor)


@dataclass(frozen=True, eq=False)
class TokenMeans:
    """Mean of a number by token id."""

    total: Float[Tensor, " vocab"]
    count: Float[Tensor, " vocab"]

    @classmethod
    def of(
        cls, values: Float[Tensor, " row"], token: Int[Tensor, " row"], vocab: int
    ) -> "TokenMeans":
        empty = values.new_zeros(vocab)
        return cls(
            empty.index_add(0, token, values),
            empty.index_add(0, token, torch.ones_like(values)),
        )

    def __add__(self, other: "TokenMeans") -> "TokenMeans":
        return TokenMeans(self.total + other.total, self.count + other.count)

    def __call__(self, token: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        overall = self.total.sum() / self.count.sum()
        return (self.total / self.count.clamp_min(1)).where(self.count > 0, overall)[token]


@dataclass(frozen=True, eq=False)
class NormMoments:
    """What the fits of squared lengths need to know of the rows."""

    by_x: Moments
    """Of the squared norms of each split's parts, split after split."""
    by_size: Moments
    """Of |e|^2, seen from |x| and the L0."""
    tokens: TokenMeans

    @classmethod
    def of(
        cls, seen: Seen, splits: tuple[Split, ...], token: Int[Tensor, " row"], vocab: int
    ) -> "NormMoments":
        norms = torch.cat([split.parts(seen).squared_norms for split in splits], 1)
        sizes = torch.stack([seen.x.norm(dim=1), seen.l0], 1)
        return cls(
            Moments.of(seen.x, norms),
            Moments.of(sizes, norms[:, :1]),
            TokenMeans.of(norms[:, 0], token, vocab),
        )

    def __add__(self, other: "NormMoments") -> "NormMoments":
        return NormMoments(
            self.by_x + other.by_x, self.by_size + other.by_size, self.tokens + other.tokens
        )

    def fit(self, intercepts: tuple[bool, ...], ridge: float) -> "NormFits":
        at = len(NORMS)
        by_x = tuple(
            self.by_x.solve(intercept=intercept, ridge=ridge)[at * i : at * (i + 1)]
            for i, intercept in enumerate(intercepts)
        )
        length, l0 = (self.by_size[[i]].solve(intercept=True) for i in (0, 1))
        return NormFits(by_x, length, l0, self.tokens)


@dataclass(frozen=True, eq=False)
class NormFits:
    """Predictors of squared lengths."""

    by_x: tuple[Affine, ...]
    """One for each split: from x to the squared norms of its parts."""
    by_length: Affine
    """To |e|^2."""
    by_l0: Affine
    tokens: TokenMeans

    def baselines(self, seen: Seen, token: Int[Tensor, " row"]) -> Float[Tensor, "row baseline"]:
        return torch.stack(
            [
                self.tokens(token),
                self.by_length(seen.x.norm(dim=1, keepdim=True))[:, 0],
                self.by_l0(seen.l0[:, None])[:, 0],
            ],
            1,
        )


@dataclass(frozen=True, eq=False)
class Measured:
    """Held-out rows, judged by what was fitted on others. A tuple holds one value a split."""

    x: Scatter
    vectors: tuple[Explained, ...]
    """Of e, and of x - gamma* x_hat, side by side, by x."""
    norms: tuple[Explained, ...]
    left: tuple[Float[Tensor, "sample left"], ...]
    baselines: Explained
    """Of |e|^2, once for each of `BASELINES`."""

    def __add__(self, other: "Measured") -> "Measured":
        return Measured(
            self.x + other.x,
            _joined(self.vectors, other.vectors),
            _joined(self.norms, other.norms),
            _joined(self.left, other.left),
            self.baselines + other.baselines,
        )


@dataclass(frozen=True, eq=False)
class Judge:
    """What was fitted, and where its targets lie about."""

    splits: tuple[Split, ...]
    norms: NormFits
    resamples: Resamples
    x_mean: Float[Tensor, " d"]
    """Over the rows of the fit."""

    def of(self, seen: Seen, token: Int[Tensor, " row"], document: Int[Tensor, " row"]) -> Measured:
        parts = [split.parts(seen) for split in self.splits]
        n_baselines = len(BASELINES)

        def vectors(split: Split, part: Parts) -> Explained:
            return Explained.of(
                self.resamples,
                torch.cat([seen.error, part.rescaled_error], 1),
                torch.cat([part.linear, part.rescaled_linear], 1),
                document,
                torch.cat([split.error.y_mean, split.rescaled.y_mean]),
            )

        def norms(fit: Affine, part: Parts) -> Explained:
            norms = part.squared_norms
            return Explained.of(self.resamples, norms, fit(seen.x), document, fit.y_mean)

        return Measured(
            Scatter.of(self.resamples, seen.x, document, self.x_mean),
            tuple(map(vectors, self.splits, parts)),
            tuple(map(norms, self.norms.by_x, parts)),
            tuple(self.resamples.sums(part.unexplained, document) for part in parts),
            Explained.of(
                self.resamples,
                seen.error.square().sum(1, keepdim=True).expand(-1, n_baselines),
                self.norms.baselines(seen, token),
                document,
                self.norms.by_length.y_mean.expand(n_baselines),
            ),
        )


def _joined(a: tuple[_T, ...], b: tuple[_T, ...]) -> tuple[_T, ...]:
    return tuple(p + q for p, q in zip(a, b, strict=True))
