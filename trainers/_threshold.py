"""Figures that are followed over the batches, foremost the thresholds that inference uses where
training chooses latents with more in view than one row.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saekit.distributed import ALONE, Mesh


class RunningMean(nn.Module):
    """An exponential moving average, one or several, each with a count of its own.

    The mean of t values weighs one by (1 - rate)^age, whatever t is, so it is the first value after
    one, and nearly their plain mean while they are few. An average that starts at 0 instead is too
    low for about 1 / rate values, and a threshold that is too low lets too many latents through.
    """

    value: Tensor
    count: Tensor
    """How many values were seen."""

    def __init__(self, rate: float, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("value", torch.zeros(shape))
        self.register_buffer("count", torch.zeros(shape, dtype=torch.int64))

    @torch.no_grad()
    def update(
        self, found: Float[Tensor, "*shape"], where: Bool[Tensor, "*shape"] | None = None
    ) -> None:
        """Take in one value each, or only where there is one."""
        if where is None:
            where = torch.ones_like(self.count, dtype=torch.bool)
        self.count += where
        weight = self.rate / (1 - (1 - self.rate) ** self.count.double())
        moved = self.value + weight.to(self.value.dtype) * (found - self.value)
        self.value.copy_(torch.where(where, moved, self.value))


def smallest(
    values: Float[Tensor, " kept"], mesh: Mesh = ALONE
) -> tuple[Float[Tensor, ""], Bool[Tensor, ""]]:
    """The smallest of what was kept, by anybody on the mesh, and whether anything was."""
    values = values.detach()
    if mesh.size > 1:
        values = torch.cat([values, values.new_full((1,), torch.inf)])
        found = mesh.reduce(values.min(), "all", "min")
        return found.nan_to_num(posinf=0), found.isfinite()
    some = torch.tensor(len(values) > 0, device=values.device)
    return values.min() if len(values) else values.new_zeros(()), some


def smallest_by_latent(
    values: Float[Tensor, " kept"], indices: Int[Tensor, " kept"], d_sae: int
) -> tuple[Float[Tensor, " {d_sae}"], Bool[Tensor, " {d_sae}"]]:
    """The smallest of what was kept of each latent, and of which latents anything was."""
    none = values.new_full((d_sae,), torch.inf)
    found = none.scatter_reduce(0, indices, values.detach(), "amin")
    return found, found.isfinite()
