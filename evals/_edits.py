"""Sparse edits: exchange a few latents of an activation, so that it comes to resemble another one
(Makelov, Lange and Nanda 2024, arXiv 2405.08366, section 4).

From the activation a_s of a source, with latents f(s), towards a_t, with latents f(t):

    min over |J| <= k of | a_s + sum_{j in J} (f_j(t) - f_j(s)) d_j - a_t |

`greedy` takes one latent at a time: that whose exchange leaves the shortest residual. It is
measured to the activation a_t itself, not to its reconstruction. A latent that is active in both
is exchanged in one go and counts once. It stops early where no exchange shortens the residual (how
the paper's code ends is not verified). Its choices are nested: the first k are those of budget k.

How much of a reconstruction an edit changes is its latents' share of
w_j = f_j(s) d_j . v / |v|^2, with v = sum_j f_j(s) d_j: over all latents these sum to 1. A latent
that only the target has weighs nothing.

Everything is computed in fp64, a few rows at a time. Axes: row, d, slot (candidates of a row: the
latents active in source or target), step (in order of exchange), d_sae.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit import kernels
from saekit.sae import SparseCode

_AT_ONCE = 2**23
"""Elements of one `[row, slot, d]` tensor of directions."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """The latents that source and target differ in, each once, by rising number."""

    latent: Int[Tensor, "row slot"]
    source: Float[Tensor, "row slot"]
    """f(s), in fp64; 0 where the latent is not active."""
    target: Float[Tensor, "row slot"]
    """f(t)."""

    @classmethod
    def of(cls, source: SparseCode, target: SparseCode) -> "Candidates":
        latent = torch.cat([source.indices, target.indices], 1)
        f_s, f_t = source.values.double(), target.values.double()
        none_s, none_t = torch.zeros_like(f_s), torch.zeros_like(f_t)
        merged_s, merged = kernels.merge_repeats(torch.cat([f_s, none_t], 1), latent)
        merged_t, _ = kernels.merge_repeats(torch.cat([none_s, f_t], 1), latent)
        return cls(merged, merged_s, merged_t)

    @property
    def usable(self) -> Bool[Tensor, "row slot"]:
        """Slots that hold a latent whose exchange changes anything."""
        return self.source != self.target

    def __getitem__(self, rows: slice) -> "Candidates":
        return Candidates(self.latent[rows], self.source[rows], self.target[rows])


Order = Int[Tensor, "row step"]
"""Slots in the order of their exchange; -1 once there is none left."""


def greedy(
    start: Float[Tensor, "row d"],
    goal: Float[Tensor, "row d"],
    candidates: Candidates,
    W_dec: Float[Tensor, "d_sae d"],
    k: int,
) -> Order:
    """The k exchanges, one after another, that bring `start` nearest to `goal`."""
    orders = []
    for rows in _chunks(candidates, W_dec.shape[1]):
        some = candidates[rows]
        step = _steps(some, W_dec)
        length = step.square().sum(2)
        rest = start[rows].double() - goal[rows].double()
        free, chosen = some.usable, []
        for _ in range(k):
            # |rest + step|^2 - |rest|^2. A row where none is below 0 has stopped for good.
            change = 2 * (step @ rest[:, :, None])[:, :, 0] + length
            best = change.masked_fill(~free, torch.inf).min(1)
            better = best.values < 0
            rest += step[torch.arange(len(rest)), best.indices] * better[:, None]
            free = free.scatter(1, best.indices[:, None], False)
            chosen.append(best.indices.where(better, -1))
            if not better.any():
                break
        order = torch.stack(chosen, 1)
        orders.append(torch.nn.functional.pad(order, (0, k - len(chosen)), value=-1))
    return torch.cat(orders)


def by_score(candidates: Candidates, score: Float[Tensor, "row slot"], k: int) -> Order:
    """The k candidates with the highest score; of equal ones, the latent with the lower number."""
    usable = candidates.usable
    scored = score.masked_fill(~usable, -torch.inf)
    order = scored.sort(dim=1, descending=True, stable=True).indices[:, :k]
    order = order.where(usable.gather(1, order), -1)
    missing = k - order.shape[1]
    return torch.nn.functional.pad(order, (0, max(0, missing)), value=-1)


def apply(
    start: Float[Tensor, "row d"],
    candidates: Candidates,
    W_dec: Float[Tensor, "d_sae d"],
    order: Order,
) -> Float[Tensor, "row d"]:
    """start + sum over the slots of `order` of (f(t) - f(s)) d, in fp64."""
    taken = candidates.target - candidates.source
    values, latent = _picked(taken, order), candidates.latent.gather(1, order.clamp(min=0))
    parts = []
    for rows in _chunks(candidates, W_dec.shape[1]):
        directions = W_dec[latent[rows]].double()
        change = (values[rows][:, None] @ directions)[:, 0]
        parts.append(start[rows].double() + change)
    return torch.cat(parts)


def share_changed(
    candidates: Candidates, W_dec: Float[Tensor, "d_sae d"], order: Order
) -> Float[Tensor, " row"]:
    """The weight in the source's reconstruction of the latents that `order` exchanges; 0 for a
    source that has none."""
    parts = []
    for rows in _chunks(candidates, W_dec.shape[1]):
        some = candidates[rows]
        part = some.source[:, :, None] * W_dec[some.latent].double()
        whole = part.sum(1)
        square = whole.square().sum(1, keepdim=True)
        weight = (part @ whole[:, :, None])[:, :, 0] / square.where(square > 0, 1)
        parts.append(_picked(weight, order[rows]).sum(1))
    return torch.cat(parts)


def _picked(of: Float[Tensor, "row slot"], order: Order) -> Float[Tensor, "row step"]:
    return of.gather(1, order.clamp(min=0)) * (order >= 0)


def _steps(candidates: Candidates, W_dec: Float[Tensor, "d_sae d"]) -> Float[Tensor, "row slot d"]:
    """What each exchange adds to the activation."""
    taken = candidates.target - candidates.source
    return taken[:, :, None] * W_dec[candidates.latent].double()


def _chunks(candidates: Candidates, d: int) -> list[slice]:
    n, slots = candidates.latent.shape
    size = max(1, _AT_ONCE // max(1, slots * d))
    return [slice(first, first + size) for first in range(0, n, size)]
