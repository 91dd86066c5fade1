"""Supervised dictionaries: what activations would be if they were a sum of codes of known
attributes (Makelov, Lange and Nanda 2024, arXiv 2405.08366, section 3).

    a_hat = mu + sum_i u[i, v_i]        mu the mean activation, v_i the row's value of attribute i

    mean code   u[i, v] = mean(a | a_i = v) - mu
    MSE code    U = pinv(C^T C) C^T (A - mu), with C the one-hot values: the least squares fit

The two agree where attributes are independent; where they are correlated, the mean code counts in
each attribute what the others bring. Both follow from one set of sums (`Design`), in fp64 and
joined by `+`, so no code depends on how the rows were cut into batches.

Activations of several places, laid side by side, may be given as one wide row: the codes of each
place then are those that it would have alone.

Axes: row, d (width), attribute, value (the values of all attributes, one attribute after another).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.errors import SaekitError

Code = Literal["mean", "mse"]


@dataclass(frozen=True, eq=False)
class Design:
    """What rows with known attributes add up to."""

    sizes: dict[str, int]
    """How many values each attribute has, by its name."""
    total: Float[Tensor, " d"]
    """sum of a."""
    by_value: Float[Tensor, "value d"]
    """C^T A: the sum of a over the rows with each value."""
    together: Float[Tensor, "value value"]
    """C^T C: on how many rows two values meet; its diagonal counts the rows with each."""
    n: int

    @classmethod
    def of(
        cls,
        a: Float[Tensor, "row d"],
        values: Int[Tensor, "row attribute"],
        sizes: Mapping[str, int],
    ) -> "Design":
        """Sums of some rows. `values` count from 0 in each attribute, in the order of `sizes`.

        Raises SaekitError for activations that are not finite and for a value out of range.
        """
        a = a.double()
        if not a.isfinite().all():
            raise SaekitError(
                "the activations contain NaN or infinity, so no code of them would mean anything; "
                "run the model in a wider dtype"
            )
        place = _places(values, sizes)
        hot = a.new_zeros(len(a), sum(sizes.values())).scatter_(1, place.to(a.device), 1)
        return cls(dict(sizes), a.sum(0), hot.T @ a, hot.T @ hot, len(a))

    def __add__(self, other: "Design") -> "Design":
        return Design(
            self.sizes,
            self.total + other.total,
            self.by_value + other.by_value,
            self.together + other.together,
            self.n + other.n,
        )

    @property
    def mean(self) -> Float[Tensor, " d"]:
        if self.n == 0:
            raise SaekitError("there are no rows to fit a dictionary to; give at least one")
        return self.total / self.n


@dataclass(frozen=True, eq=False)
class SupervisedDictionary:
    """A code for each value of each attribute, in fp64."""

    sizes: dict[str, int]
    mean: Float[Tensor, " d"]
    codes: Float[Tensor, "value d"]
    seen: Int[Tensor, " value"]
    """Rows of the fit with each value: without one, a value has no code."""

    @classmethod
    def fit(cls, design: Design, code: Code) -> "SupervisedDictionary":
        mean, seen = design.mean, design.together.diagonal()
        centred = design.by_value - seen[:, None] * mean
        if code == "mean":
            codes = centred / seen.clamp(min=1)[:, None]
        else:
            codes = torch.linalg.pinv(design.together, hermitian=True) @ centred
        return cls(design.sizes, mean, codes, seen.long())

    def part(self, attribute: str, value: Int[Tensor, " row"]) -> Float[Tensor, "row d"]:
        """u[attribute, value] of each row."""
        names = list(self.sizes)
        start = sum(self.sizes[name] for name in names[: names.index(attribute)])
        if len(value) and not 0 <= int(value.min()) <= int(value.max()) < self.sizes[attribute]:
            raise SaekitError(
                f"'{attribute}' has values 0 to {self.sizes[attribute] - 1}, not "
                f"{int(value.min())} to {int(value.max())}: number them from 0"
            )
        place = (start + value).to(self.codes.device)
        if (unseen := self.seen[place] == 0).any():
            raise SaekitError(
                f"no row of the fit has value {int(value[unseen.to(value.device)][0])} of "
                f"'{attribute}', so it has no code: fit to more rows, or leave the value out"
            )
        return self.codes[place]

    def reconstruct(self, values: Int[Tensor, "row attribute"]) -> Float[Tensor, "row d"]:
        """mu + sum_i u[i, v_i], in fp64."""
        parts = (self.part(name, values[:, i]) for i, name in enumerate(self.sizes))
        return sum(parts, self.mean.expand(len(values), -1))

    def edit(
        self,
        a: Float[Tensor, "row d"],
        attribute: str,
        old: Int[Tensor, " row"],
        new: Int[Tensor, " row"],
    ) -> Float[Tensor, "row d"]:
        """a - u[attribute, old] + u[attribute, new], in fp64."""
        return a.double() - self.part(attribute, old) + self.part(attribute, new)


def _places(
    values: Int[Tensor, "row attribute"], sizes: Mapping[str, int]
) -> Int[Tensor, "row attribute"]:
    """The column of each value among those of all attributes."""
    most = torch.tensor(list(sizes.values()), device=values.device)
    if values.shape[1] != len(most) or (values < 0).any() or (values >= most).any():
        raise SaekitError(
            f"values of {values.shape[1]} attributes do not fit {dict(sizes)}: each row needs a "
            "value of every attribute, counted from 0 and below its size"
        )
    starts = [0, *accumulate(sizes.values())][:-1]
    return values.long() + torch.tensor(starts, device=values.device)
