"""Which latents have stopped firing, counted in tokens."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class DeadLatents(nn.Module):
    """Tokens since each latent last fired; dead are those for which it is `after` or more."""

    since: Tensor

    def __init__(self, d_sae: int, after: int) -> None:
        super().__init__()
        self.after = after
        self.register_buffer("since", torch.zeros(d_sae, dtype=torch.int64))

    @torch.no_grad()
    def saw(self, values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"]) -> None:
        """Count a batch: a latent fires where its value is positive."""
        self.since += values.shape[0]
        self.since[indices[values > 0]] = 0

    @property
    def mask(self) -> Bool[Tensor, " d_sae"]:
        return self.since >= self.after

    @property
    def share(self) -> float:
        return float(self.mask.float().mean())
