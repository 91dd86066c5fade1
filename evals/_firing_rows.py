"""How sparse a row is, and means over rows with an interval from resampling documents.

The same three measures are taken of a model's own activations x and of an SAE's codes z, so that
one can be compared with the other. Each is invariant to scale. Axes: row, d (coordinates), k (slots
of a sparse code), measure,
sample (resamples of the documents).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import erf, sqrt

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.errors import SaekitError
from saekit.evals._resample import Estimate, Resamples
from saekit.sae import SparseCode

_SPARSITY = {
    "effective_l0": "(sum|a|)^2 / sum a^2, the number of equal coordinates as sparse as these",
    "participation": "(sum a^2)^2 / sum a^4, the number of equal coordinates that hold the energy",
    "hoyer": "(sqrt(width) - |a|_1 / |a|_2) / (sqrt(width) - 1); 1 is one coordinate alone, 0 all "
    "equal",
}


def measures(d_sae: int, near: Sequence[float], posterior: str | None) -> dict[str, str]:
    """What `measure` finds of each row: names with definitions of their means, in its order; and
    the KL of a posterior whose variance is "fixed" or "learned"."""
    own = {"l0_mean": "mean over rows of the number of latents != 0"}
    for of, what in (("z", f"the codes, of width d_sae = {d_sae}"), ("x", "the model's own x")):
        for name, equation in _SPARSITY.items():
            own[f"{of}_{name}"] = f"mean over rows other than 0 of {equation}; a is {what}"
    own["x_nonzero_share"] = "share of all coordinates of x that are not exactly 0"
    for share in near:
        own[f"x_near_zero_share_{share:g}"] = (
            f"share of all coordinates of x with |x_j| <= {share:g} * rms(x), the root mean square "
            f"of their own row; Gaussian ones have {erf(share / sqrt(2)):.3g}"
        )
    if posterior is not None:
        whole = {
            "fixed": "all of it, as the variance was fixed at the prior's",
            "learned": "a lower bound of it, as export does not keep the learned variance",
        }
        own["posterior_kl"] = (
            "mean over rows of sum_i mu_i^2 / 2, nats, in the units of training: the part of "
            f"KL(posterior || prior) that the means make, here {whole[posterior]}"
        )
    return own


def measure(
    x: Float[Tensor, "row d"], code: SparseCode, d_sae: int, near: Sequence[float]
) -> tuple[Float[Tensor, "row measure"], Bool[Tensor, "row measure"]]:
    """Of each row: l0, the sparsity of z and of x, the share of x that is not 0 and those near it;
    and which of them it has."""
    l0 = (code.values != 0).sum(1, keepdim=True).double()
    of_z, z_there = row_sparsity(code.values, d_sae)
    of_x, x_there = row_sparsity(x, x.shape[1])
    zeros = [(x != 0).double().mean(1), *(near_zero(x, share) for share in near)]
    there = torch.ones(len(x), 7 + len(zeros), dtype=torch.bool, device=x.device)
    there[:, 1:4], there[:, 4:7] = z_there[:, None], x_there[:, None]
    return torch.cat([l0, of_z, of_x, torch.stack(zeros, 1)], 1), there


def row_sparsity(
    a: Float[Tensor, "row k"], width: int
) -> tuple[Float[Tensor, "row measure"], Bool[Tensor, " row"]]:
    """Of each row: effective L0, participation ratio, Hoyer; and which rows have them (a != 0).

    - effective L0 `(sum|a|)^2 / sum a^2`: 1 for one coordinate alone, `width` for equal ones
      (Gaussian coordinates: 2/pi of the width)
    - participation ratio `(sum a^2)^2 / sum a^4`: the same of the energy (Gaussian: a third)
    - Hoyer `(sqrt(width) - |a|_1/|a|_2) / (sqrt(width) - 1)` (Hoyer 2004): 1 for one alone, 0 for
      equal ones; 0 where the width is 1

    Coordinates beyond the k given are zeros, of which `width` says how many there are in all.
    """
    if not bool(a.isfinite().all()):
        raise SaekitError(
            "activations contain NaN or infinity, so their sparsity means nothing; check the cache "
            "with `saekit verify`, then the SAE's weights"
        )
    a = a.double().abs()
    top = a.amax(1, keepdim=True)
    there = top[:, 0] > 0
    # In units of the largest, so that no fourth power is too small or too large for a number.
    a = a / top.where(top > 0, 1.0)
    one, two, four = a.sum(1), a.square().sum(1), a.pow(4).sum(1)
    two, four = two.where(there, 1.0), four.where(there, 1.0)
    root = width**0.5
    hoyer = (root - one / two.sqrt()) / (root - 1) if width > 1 else torch.zeros_like(one)
    return torch.stack([one.square() / two, two.square() / four, hoyer], 1), there


def near_zero(x: Float[Tensor, "row d"], share: float) -> Float[Tensor, " row"]:
    """Share of a row's coordinates with |x_j| <= share * rms(x), its own root mean square."""
    x = x.double()
    return (x.abs() <= share * x.square().mean(1, keepdim=True).sqrt()).double().mean(1)


@dataclass(frozen=True, eq=False)
class RowMeans:
    """Means over rows, each a ratio of sums over all rows that have it, in each resample of the
    documents; resample 0 is the rows as they are."""

    total: Float[Tensor, "sample measure"]
    count: Float[Tensor, "sample measure"]
    documents: int
    """Of all rows, seen and to be seen."""

    @classmethod
    def of(
        cls,
        values: Float[Tensor, "row measure"],
        there: Bool[Tensor, "row measure"],
        document: Int[Tensor, " row"],
        resamples: Resamples,
    ) -> "RowMeans":
        values, there = values.cpu(), there.cpu()
        return cls(
            resamples.sums(values.where(there, 0.0), document),
            resamples.sums(there.double(), document),
            len(resamples.documents),
        )

    def __add__(self, other: "RowMeans") -> "RowMeans":
        return RowMeans(self.total + other.total, self.count + other.count, self.documents)

    def n(self, measure: int) -> int:
        """Rows that have the measure."""
        return int(self.count[0, measure])

    def estimate(self, measure: int) -> Estimate | None:
        """None where no row has it; without an interval where nothing was resampled, or a resample
        holds no row that has it."""
        return Estimate.of(self.total[:, measure] / self.count[:, measure], self.documents)
