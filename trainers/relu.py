"""ReLU SAE with an L1 penalty, after either of two recipes of Anthropic's.

`april` ("Update on how we train SAEs", Circuits Updates of April 2024), norms of decoder rows free:

    z = relu(x @ W_enc + b_enc),  x_hat = z @ W_dec + b_dec
    loss = mean |x - x_hat|^2  +  c mean sum_i z_i |W_dec_i|

A latent is penalised by the length of what it adds to x_hat, so nothing is gained by small z and
long rows. At export the norms are folded: z_i |W_dec_i| are the latents, of rows with norm 1.

`unit_norm` (Bricken et al. 2023, "Towards Monosemanticity"), rows of W_dec held at norm 1:

    z = relu((x - b_dec) @ W_enc + b_enc),  x_hat = z @ W_dec + b_dec
    loss = mean |x - x_hat|^2  +  c mean sum_i z_i

with dead latents resampled (see `_autoencoder`).

Departures: `april` begins where `unit_norm` does, with b_dec as the config says and b_enc such that
pre-activations are those of x - b_dec; with b_dec_init="zero" both are 0, as published. `unit_norm`
draws rows for dead latents whenever it is time, not four times a run, and holds rows at norm 1
by normalising them after each step.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.sae import SAE, ReLU
from saekit.trainers._base import Batch
from saekit.trainers._sparsity import L1Penalised, PenalisedConfig, check_l1


@dataclass(frozen=True, kw_only=True)
class ReLUConfig(PenalisedConfig):
    """ReLU SAE: an L1 penalty keeps most latents at 0."""

    recipe: Literal["april", "unit_norm"] = "april"
    """Anthropic's of April 2024, with free norms of decoder rows and an L1 penalty that they
    weigh, or the one of 2023, with norms of 1 and dead latents resampled."""

    l1_coef: float = 5.0
    """Weight of the L1 penalty."""

    revive: Literal["none", "auxk", "resample", "ghost"] | None = None
    """How dead latents are brought back (see the other kinds); as the recipe has it where not
    given: "none" for "april", "resample" for "unit_norm" unless something is frozen."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_l1(self.l1_coef)


class ReLUTrainer(L1Penalised):
    """See the module."""

    Config = ReLUConfig
    cfg: ReLUConfig

    def __init__(self, cfg: ReLUConfig, d_in: int) -> None:
        # What is frozen cannot be resampled.
        resampled = cfg.recipe == "unit_norm" and cfg.freeze == "none"
        super().__init__(
            replace(cfg, revive=cfg.revive or ("resample" if resampled else "none")), d_in
        )
        self.UNIT_ROWS = cfg.recipe == "unit_norm"

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "row d_in"]) -> None:
        super().initialise(sample)
        if not self.UNIT_ROWS:
            self.b_enc.copy_(-self.b_dec @ self.W_enc)

    def losses(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        x = batch.x - self.b_dec if self.UNIT_ROWS else batch.x
        kept = self.keep(x)
        z = kept.pre.relu()
        error = batch.x - self.b_dec - kept.decode(z, self.W_dec)
        self.saw(kept, z)
        size = z if self.UNIT_ROWS else z * kept.of(self.W_dec.norm(dim=1))
        return {
            "mse": error.square().sum(1).mean(),
            "sparsity": self.penalty(size, kept),
            **self.revival(x, error),
        }

    @torch.no_grad()
    def replant(
        self, batch: Batch, optimiser: torch.optim.Optimizer
    ) -> Int[Tensor, " latent"] | None:
        planted = super().replant(batch, optimiser)
        if planted is not None and not self.UNIT_ROWS:
            # Rows as long as the others, and pre-activations of x - b_dec.
            others = torch.ones_like(self.dead.mask).index_fill_(0, planted, False)
            self.W_dec[planted] *= self.W_dec[others].norm(dim=1).mean()
            self.b_enc[planted] = -self.b_dec @ self.W_enc[:, planted]
        return planted

    def export(self) -> SAE:
        if self.UNIT_ROWS:
            b_enc = self.b_enc - self.b_dec @ self.W_enc
            return SAE(self.W_enc, b_enc, self.W_dec, self.b_dec, ReLU())
        norm = self.W_dec.norm(dim=1).clamp_min(1e-12)
        W_dec = self.W_dec / norm[:, None]
        return SAE(self.W_enc * norm, self.b_enc * norm, W_dec, self.b_dec, ReLU())


KIND = ReLUTrainer
