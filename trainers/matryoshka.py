"""Matryoshka SAE (Bussmann, Nabeshima, Karvonen and Nanda 2025, arXiv 2503.17547): the first
latents reconstruct x alone, and so do the first and second groups, and so on, so that coarse
features come first and need not be split up to be sparse.

    z as in BatchTopK: one choice over all latents
    x_hat_g = z[:, :w_g] @ W_dec[:w_g] + b_dec,     w_1 < ... < w_G = d_sae
    loss = mean over g of mean |x - x_hat_g|^2  +  AuxK on the error of the whole (`_autoencoder`)

Logged is `mse`, the error of the whole, and `nested`, what the mean over prefixes has beyond it.
With one group this is BatchTopK. Departures: the original's mean has one term more, for b_dec
alone; prefixes are fixed rather than drawn anew each batch, as Nabeshima's are.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from saekit import kernels
from saekit.errors import ConfigError
from saekit.trainers.batch_topk import BatchTopKConfig, BatchTopKTrainer


@dataclass(frozen=True, kw_only=True)
class MatryoshkaConfig(BatchTopKConfig):
    """Matryoshka SAE: a BatchTopK SAE whose first latents also reconstruct alone, at several
    widths."""

    groups: tuple[float, ...] = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
    """Share of the latents in each group; the widths that reconstruct alone end where a group
    does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = ", ".join(f"{share:g}" for share in self.groups)
        if abs(sum(self.groups) - 1) > 1e-3:
            raise ConfigError(
                f"groups=({shares}) add up to {sum(self.groups):g}, and must to 1: they are shares "
                "of the latents"
            )
        widths = self.widths
        if any(a >= b for a, b in zip((0, *widths), widths, strict=False)):
            raise ConfigError(
                f"groups=({shares}) leave a group empty at d_sae={self.d_sae}: give fewer groups, "
                "or more latents"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Latents of each prefix."""
        ends = tuple(round(share * self.d_sae) for share in accumulate(self.groups))
        return (*ends[:-1], self.d_sae)


class MatryoshkaTrainer(BatchTopKTrainer):
    """See the module."""

    Config = MatryoshkaConfig
    cfg: MatryoshkaConfig
    prefix_mse: Tensor
    """Of the last batch, by prefix."""

    def __init__(self, cfg: MatryoshkaConfig, d_in: int) -> None:
        super().__init__(cfg, d_in)
        self.register_buffer("prefix_mse", torch.zeros(len(cfg.widths)), persistent=False)

    def reconstruct(
        self, code: kernels.Code, centred: Float[Tensor, "batch d_in"]
    ) -> dict[str, Float[Tensor, ""]]:
        values, indices, _ = code
        # One decode makes every group's part, as if each were a row of its own.
        parts = kernels.sparse_decode(values, indices, self.W_dec, self._group_offsets(code))
        error, squares = centred, []
        for part in parts.view(len(centred), len(self.cfg.widths), -1).unbind(1):
            error = error - part
            squares.append(error.square().sum(1).mean())
        mse = torch.stack(squares)
        self.prefix_mse = mse.detach()
        self.count(code, len(centred))
        return {"mse": mse[-1], "nested": mse.mean() - mse[-1], **self.revival(centred, error)}

    def _group_offsets(self, code: kernels.Code) -> Tensor:
        """Where each group begins within each row of a code whose rows are in ascending order."""
        _, indices, offsets = code
        assert offsets is not None
        d_sae = self.cfg.d_sae
        flat = kernels.rows_of(offsets) * d_sae + indices
        rows = torch.arange(len(offsets) - 1, device=indices.device)
        starts = torch.tensor((0, *self.cfg.widths[:-1]), device=indices.device)
        bounds = (rows[:, None] * d_sae + starts).flatten()
        return torch.cat([torch.searchsorted(flat, bounds), offsets[-1:]])

    def metrics(self) -> dict[str, float]:
        by_width = zip(self.cfg.widths, self.prefix_mse.tolist(), strict=True)
        return {**super().metrics(), **{f"mse_{width}": mse for width, mse in by_width}}


KIND = MatryoshkaTrainer
