"""Gradient SAE, g-SAE (Olmo et al. 2024, "Features that Make a Difference", arXiv 2411.10397): TopK
whose choice of latents in training also weighs how much each would change the model's loss.

    pre = (x - b_dec) @ W_enc + b_enc,   A = |g @ W_dec^T|
    score = pre * (1 + beta * A / mean A)
    training:   z = relu(pre) at the k largest scores of each row, x_hat = z @ W_dec + b_dec
    inference:  z = relu(pre) at the k largest pre of each row
    loss = mean |x - x_hat|^2  +  AuxK (see `_autoencoder`), which chooses by pre alone

g is the gradient of the model's next-token loss with respect to x, so that pre * A is to first
order what removing the latent would do to that loss.

A RECONSTRUCTION. There is no code, and the full text was not to be had: the score is that of a
third party's summary, pre + beta * pre * |g @ W_dec^T|. Ours is what that leaves open: that A is
divided by its mean, a moving one, which makes beta free of units; that the value kept is pre rather
than the score; that nothing is differentiated through the choice; AuxK; the default beta; and
inference, which has no gradients, as plain TopK. The log's `overlap` tells how far the two choices
agree.

g must come from a loss *summed* over tokens: divided by the number of tokens it underflows in
bfloat16, and what is lost there no normalisation brings back.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit import kernels
from saekit.errors import ConfigError
from saekit.trainers._base import Batch
from saekit.trainers._threshold import RunningMean
from saekit.trainers.topk import TopKConfig, TopKTrainer

OVERLAP_ROWS = 256
"""Rows of a batch that the overlap is taken over, at most: it costs a second TopK."""


@dataclass(frozen=True, kw_only=True)
class GradientTopKConfig(TopKConfig):
    """Gradient SAE (g-SAE): a TopK SAE that chooses by activation and by effect on the model's loss
    while it trains. Wants a cache with gradients."""

    beta: float = 0.3
    """Weight of a latent's effect on the loss in the choice, where the mean effect is 1; 0 is plain
    TopK. Worth a sweep: of 0 to 10 this did best by the loss, within the noise (docs/kinds.md)."""

    gradient_rate: float = 0.01
    """Rate of the moving average of that mean effect."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 0:
            raise ConfigError(
                f"beta={self.beta} may not be negative: it would shun latents that matter"
            )
        if not 0 < self.gradient_rate <= 1:
            raise ConfigError(
                f"gradient_rate={self.gradient_rate} must lie above 0 and not above 1: it is the "
                "share of a moving average that each batch replaces"
            )


class GradientTopKTrainer(TopKTrainer):
    """See the module."""

    Config = GradientTopKConfig
    NEEDS = frozenset({"grad"})
    cfg: GradientTopKConfig
    overlap: Tensor
    """Share of the latents chosen in the last batch that inference would choose, too."""

    def __init__(self, cfg: GradientTopKConfig, d_in: int) -> None:
        super().__init__(cfg, d_in)
        self.effect = RunningMean(cfg.gradient_rate)
        self.register_buffer("overlap", torch.ones(()), persistent=False)

    def losses(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        centred = batch.x - self.b_dec

        def rule(pre: Tensor) -> tuple[Tensor, None]:
            assert batch.grad is not None
            return self.choose(pre, batch.grad), None

        return self.reconstruct(kernels.encode(centred, self.W_enc, self.b_enc, rule), centred)

    @torch.no_grad()
    def choose(
        self, pre: Float[Tensor, "batch d_sae"], grad: Float[Tensor, "batch d_in"]
    ) -> Int[Tensor, "batch k"]:
        """The latents of each row."""
        k = self.cfg.k
        if self.cfg.beta == 0:
            return pre.topk(k, dim=-1, sorted=False).indices
        effect = (grad @ self.W_dec.T).abs_()
        mean = effect.mean(dtype=torch.float32)
        self.effect.update(mean, mean > 0)
        # In place: at a time, one matrix of this size beside `pre` is enough.
        scale = self.cfg.beta / self.effect.value.clamp_min(torch.finfo(torch.float32).tiny)
        score = effect.mul_(scale).add_(1).mul_(pre)
        chosen = score.topk(k, dim=-1, sorted=False).indices
        few = pre[:OVERLAP_ROWS]
        least = few.topk(k, dim=-1, sorted=False).values.amin(1, keepdim=True)
        self.overlap = (few.gather(1, chosen[:OVERLAP_ROWS]) >= least).float().mean()
        return chosen

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), "overlap": float(self.overlap)}


KIND = GradientTopKTrainer
