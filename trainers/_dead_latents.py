"""Which latents have stopped firing, counted in tokens."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saekit.distributed import ALONE, Mesh


class DeadLatents(nn.Module):
    """Tokens since each latent last fired; dead are those for which it is `after` or more."""

    since: Tensor
    fired: Tensor
    """Rows on which each latent fired since `fired` was last taken."""

    def __init__(self, d_sae: int, after: int, mesh: Mesh = ALONE) -> None:
        super().__init__()
        self.after, self.mesh = after, mesh
        self.register_buffer("since", torch.zeros(d_sae, dtype=torch.int64))
        self.register_buffer("fired", torch.zeros(d_sae, dtype=torch.int64))

    @torch.no_grad()
    def saw(self, values: Float[Tensor, "..."], indices: Int[Tensor, "..."], rows: int) -> None:
        """Count a batch of `rows` from its code, with or without offsets: a latent fires where its
        value is not 0."""
        self.count(torch.bincount(indices[values != 0], minlength=len(self.since)), rows)

    @torch.no_grad()
    def saw_dense(self, z: Float[Tensor, "batch d_sae"]) -> None:
        """Count a batch from its latents: one fires where it is not 0."""
        self.count((z != 0).sum(0), len(z))

    @torch.no_grad()
    def count(self, fired: Int[Tensor, " d_sae"], rows: int) -> None:
        """Count a batch of `rows`, on `fired` of which each latent fired; of a mesh, the rows that
        are held here."""
        fired = self.mesh.reduce(fired, "data")
        self.fired += fired
        self.since += rows * self.mesh.data
        self.since.masked_fill_(fired > 0, 0)

    def take_fired(self) -> Int[Tensor, " d_sae"]:
        """What `fired` holds, which begins anew."""
        taken = self.fired.clone()
        self.fired.zero_()
        return taken

    @property
    def mask(self) -> Bool[Tensor, " d_sae"]:
        return self.since >= self.after

    @property
    def share(self) -> float:
        share = self.mask.float().mean()
        return float(self.mesh.reduce(share, "latent") / self.mesh.latent)
