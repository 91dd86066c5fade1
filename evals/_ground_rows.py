"""What planted rows say of an SAE: whether a latent fires where its feature is there.

The features of a row are made again from the dictionary, and the row with them, which must be the
cache's: numbers over another row's features would mean nothing. Axes: row, feature, latent, k,
match (the ways in which latents are given features).
"""

import logging
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.errors import CacheError
from saekit.sae import SparseCode
from saekit.synthetic import BLOCK, Synthetic

log = logging.getLogger(__name__)

_APART = 1e-3
"""Distance from the cache's row, as a share of the rows' mean norm, at which a row is another."""
_FEW = 1e-3
"""Share of the rows that may be others: where a feature's chance lies within rounding of what was
drawn, another machine may let it fire or not."""


class Truth:
    """The features of a planted cache's rows."""

    def __init__(self, synthetic: Synthetic, mean_norm: float, where: str) -> None:
        self.synthetic = synthetic
        self._mean_norm = mean_norm
        self._where = where
        self._last = -1, torch.empty(0), torch.empty(0)
        self._seen = self._others = 0

    def present(
        self, index: Int[Tensor, " row"], x: Float[Tensor, "row d"]
    ) -> Bool[Tensor, "row feature"]:
        """Which features the rows `index` have, made block by block.

        Raises CacheError where more than a few rows are not the cache's `x`.
        """
        there = torch.empty(len(index), self.synthetic.n_features, dtype=torch.bool)
        apart = torch.empty(len(index))
        block = index // BLOCK
        for number in block.unique().tolist():
            rows = (block == number).nonzero().flatten()
            made, codes = self._block(number)
            local = index[rows] - number * BLOCK
            there[rows] = codes[local] > 0
            apart[rows] = (made[local] - x[rows].cpu()).norm(dim=1)
        self._compare(index, apart)
        return there

    def _block(self, number: int) -> tuple[Float[Tensor, "row d"], Float[Tensor, "row feature"]]:
        # The last one is kept: small batches take from one block again and again.
        if self._last[0] != number:
            self._last = number, *self.synthetic.rows(number * BLOCK, (number + 1) * BLOCK)
        return self._last[1:]

    def _compare(self, index: Int[Tensor, " row"], apart: Float[Tensor, " row"]) -> None:
        other = (apart > _APART * self._mean_norm).nonzero().flatten()
        self._seen += len(index)
        self._others += len(other)
        if self._others > 1 + _FEW * self._seen:
            raise CacheError(
                f"{self._others} of {self._seen} rows of {self._where} are not what their "
                f"dictionary makes here (row {int(index[apart.argmax()])} is "
                f"{float(apart.max()):.3g} away, and rows have a norm of {self._mean_norm:.3g}): "
                "they were altered, or another release drew them. Plant the cache again"
            )
        if len(other):
            log.warning(
                "row %d of %s is not what its dictionary makes here; a few such rows are rounding",
                *(int(index[other[0]]), self._where),
            )


@dataclass(frozen=True, eq=False)
class Told:
    """How well latents tell when their features are there, as counts that add up over batches."""

    n: int
    fired: Int[Tensor, " latent"]
    there: Int[Tensor, " feature"]
    """Rows that have each feature."""
    hits: Int[Tensor, "match latent"]
    """Rows on which a latent fires and its feature is there; 0 for a latent that has none."""

    @classmethod
    def of(
        cls,
        code: SparseCode,
        present: Bool[Tensor, "row feature"],
        feature: Int[Tensor, "match latent"],
    ) -> "Told":
        """`feature` says which one each latent is to tell; -1 for none. `code` names a latent at
        most once in a row."""
        d_sae = feature.shape[1]
        active = code.values != 0
        row, slot = active.nonzero(as_tuple=True)
        latent = code.indices[row, slot]
        of = feature[:, latent]
        hit = present[row, of.clamp_min(0)] & (of >= 0)
        hits = torch.stack([latent[some].bincount(minlength=d_sae) for some in hit])
        fired = latent.bincount(minlength=d_sae)
        return cls(len(active), fired.cpu(), present.sum(0).cpu(), hits.cpu())

    def __add__(self, other: "Told") -> "Told":
        return Told(
            self.n + other.n,
            self.fired + other.fired,
            self.there + other.there,
            self.hits + other.hits,
        )

    def scores(
        self, match: int, feature: Int[Tensor, " latent"]
    ) -> dict[str, Float[Tensor, " latent"]]:
        """Precision, recall and F1 of each latent; 0 for one that never fires or has no feature."""
        hits = self.hits[match].double()
        there = self.there[feature.clamp_min(0)].double()
        fired = self.fired.double()
        return {
            "precision": hits / fired.clamp_min(1),
            "recall": hits / there.clamp_min(1),
            "f1": 2 * hits / (fired + there).clamp_min(1),
        }
