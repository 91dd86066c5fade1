"""TopK SAE (Gao et al. 2024, arXiv 2406.04093): k latents fire a token, so L0 needs no penalty.

    z = relu(topk((x - b_dec) @ W_enc + b_enc)),  x_hat = z @ W_dec + b_dec
    loss = mean |x - x_hat|^2  +  AuxK (see `_autoencoder`)

A departure: decoder rows are normalised after each step rather than before.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saekit import kernels
from saekit.errors import ConfigError
from saekit.sae import SAE, TopK
from saekit.trainers._autoencoder import LATENTS, Autoencoder, AutoencoderConfig
from saekit.trainers._base import Batch, Step
from saekit.trainers._closed import closed_step
from saekit.trainers._fused import FusedStep, fused_step


@dataclass(frozen=True, kw_only=True)
class TopKConfig(AutoencoderConfig):
    """TopK SAE: exactly k latents fire a token; dead ones are revived by an auxiliary loss
    (AuxK)."""

    k: int = 32
    """Latents kept per token."""

    revive: Literal["none", "auxk", "resample", "ghost"] = "auxk"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.k <= self.d_sae:
            raise ConfigError(
                f"k={self.k} must lie in 1..d_sae={self.d_sae}: it is how many latents stay active"
            )


class TopKTrainer(Autoencoder):
    """See the module."""

    Config = TopKConfig
    LATENTS = LATENTS
    cfg: TopKConfig

    def losses(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        centred = batch.x - self.b_dec
        code = kernels.topk_code(centred, self.W_enc, self.b_enc, self.cfg.k, self.mesh)
        return self.reconstruct(code, centred)

    def fused_step(self, optimiser: torch.optim.Optimizer, device: str) -> Step | None:
        # A kind made from this one has losses of its own.
        if type(self) is not TopKTrainer:
            return None
        closed = closed_step(self, optimiser, self.cfg.k, device)
        return closed or fused_step(FusedStep, self, optimiser, self.cfg.k, device)

    def export(self) -> SAE:
        b_enc = self.b_enc - self.b_dec @ self.W_enc
        return SAE(self.W_enc, b_enc, self.W_dec, self.b_dec, TopK(self.cfg.k))


KIND = TopKTrainer
