"""BatchTopK SAE (Bussmann, Leask and Nanda 2024, arXiv 2412.06410): k latents fire a token on the
mean over a batch, so that a token that needs more can have more.

    pre = (x - b_dec) @ W_enc + b_enc
    training:   z = the k * batch largest entries of relu(pre), x_hat = z @ W_dec + b_dec
    inference:  z = pre where pre > threshold, a moving average of the smallest entry kept
    loss = mean |x - x_hat|^2  +  AuxK (see `_autoencoder`)

What a token gets in training depends on the other tokens of its batch; the exported SAE looks at
each token alone. Departures: the moving average does not start at 0 (see `_threshold`).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saekit import kernels
from saekit.errors import ConfigError
from saekit.sae import SAE, JumpReLU
from saekit.trainers._autoencoder import LATENTS, Autoencoder, AutoencoderConfig
from saekit.trainers._base import Batch, Step
from saekit.trainers._fused import FusedBatchTopK, fused_step
from saekit.trainers._threshold import RunningMean, smallest


@dataclass(frozen=True, kw_only=True)
class BatchTopKConfig(AutoencoderConfig):
    """BatchTopK SAE: k latents fire a token on the mean over a batch, some tokens get more than
    others; dead latents are revived by an auxiliary loss (AuxK)."""

    k: int = 32
    """Latents kept per token, on the mean over a batch."""

    threshold_rate: float = 0.01
    """Rate of the moving average that becomes the threshold of the exported SAE."""

    revive: Literal["none", "auxk", "resample", "ghost"] = "auxk"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.k <= self.d_sae:
            raise ConfigError(
                f"k={self.k} must lie in 1..d_sae={self.d_sae}: it is how many latents stay active"
            )
        if not 0 < self.threshold_rate <= 1:
            raise ConfigError(
                f"threshold_rate={self.threshold_rate} must lie above 0 and not above 1: it is the "
                "share of a moving average that each batch replaces"
            )


class BatchTopKTrainer(Autoencoder):
    """See the module."""

    Config = BatchTopKConfig
    LATENTS = LATENTS
    cfg: BatchTopKConfig

    def __init__(self, cfg: BatchTopKConfig, d_in: int) -> None:
        super().__init__(cfg, d_in)
        self.threshold = RunningMean(cfg.threshold_rate)

    def entries(self, rows: int) -> int:
        """How many entries a batch of so many rows may keep."""
        return self.cfg.k * rows

    def losses(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        centred = batch.x - self.b_dec
        return self.reconstruct(self.choose(centred), centred)

    def fused_step(self, optimiser: torch.optim.Optimizer, device: str) -> Step | None:
        # A kind made from this one has losses of its own.
        if type(self) is not BatchTopKTrainer:
            return None
        return fused_step(FusedBatchTopK, self, optimiser, self.cfg.k, device)

    def choose(self, centred: Float[Tensor, "batch d_in"]) -> kernels.Code:
        """The code of a batch. What it tells of thresholds is taken in."""
        code = kernels.encode(
            centred,
            self.W_enc,
            self.b_enc,
            lambda pre: kernels.batch_topk(pre, self.entries(self.mesh.data * len(pre)), self.mesh),
        )
        self.threshold.update(*smallest(code[0], self.mesh))
        return code

    def thresholds(self) -> Float[Tensor, " d_sae"]:
        """What each latent must exceed at inference."""
        return self.threshold.value.repeat(self.n_latents)

    def export(self) -> SAE:
        b_enc = self.b_enc - self.b_dec @ self.W_enc
        return SAE(self.W_enc, b_enc, self.W_dec, self.b_dec, JumpReLU(self.thresholds()))

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), "threshold": float(self.thresholds().mean())}


KIND = BatchTopKTrainer
