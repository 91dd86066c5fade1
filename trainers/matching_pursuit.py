"""Matching-pursuit SAE (Costa, Fel, Lubana, Tolooshams and Ba 2025, arXiv 2506.03093; code:
mpsae/MP-SAE): latents are found one after the other, each in what those before it have left.

    r_0 = x - b_dec
    j_t = argmax_j  W_dec[j] . r_{t-1},   a_t = relu(W_dec[j_t] . r_{t-1})
    r_t = r_{t-1} - a_t W_dec[j_t]                                    t = 1 .. steps
    z_j = sum of the a_t with j_t = j,    x_hat = z @ W_dec + b_dec
    loss = mean |x - x_hat|^2 = mean |r_steps|^2

There is no encoder beside W_dec, no penalty, and no auxiliary loss. The gradient passes through all
steps, for each a_t depends on W_dec and on r_{t-1}; only j_t counts as constant. To hold the codes
fixed would be another method, which learns from the last product alone.

Departures:

- Rows of W_dec have norm 1 throughout: the gradient's part along them is taken out before each
  step, and they are normalised after it. The published code normalises at the start alone, or in
  each forward pass. With longer rows a pursuit may leave more than it found.
- A row does not stop where a latent would be taken a second time, which would end a pursuit early:
  the values add up. So fewer latents fire than there are steps.
- The published code stops at a length of the rest; `residual` is a share of that of x - b_dec, as
  the input's scale is arbitrary.
- b_dec is there, and learned; without one (`b_dec_init` "zero", `learn_b_dec` false) it is the
  published method.

"resample" is our own: none of the published codes does anything about latents that stop firing.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit import kernels
from saekit.config import TrainConfig
from saekit.errors import ConfigError
from saekit.sae import SAE, MatchingPursuit
from saekit.trainers._autoencoder import forget
from saekit.trainers._base import Batch, Centre, centre, normalise_rows
from saekit.trainers._tied import LATENTS, Tied


@dataclass(frozen=True, kw_only=True)
class MatchingPursuitConfig(TrainConfig):
    """Matching-pursuit SAE: latents are found one after the other, each in what those before it
    have left."""

    steps: int = 32
    """Latents that are taken per token, one a step. The trained SAE can be used with another
    number."""

    residual: float = 0.0
    """Share of a token's length (of x - b_dec) at or below which what is left is not looked at any
    more."""

    b_dec_init: Centre = "geometric_median"
    """What the decoder bias starts as, over a sample of the activations."""

    learn_b_dec: bool = True
    """Train the decoder bias; otherwise it stays what it started as."""

    revive: Literal["none", "resample"] = "none"
    """How dead latents are brought back: "resample" gives them the directions in which tokens with
    a high error lack most."""

    resample_every: int = 2_500
    """Steps between two times that "resample" gives dead latents new weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        MatchingPursuit(self.steps, self.residual)
        if self.resample_every < 1:
            raise ConfigError(f"resample_every={self.resample_every} must be at least 1 step")
        if self.revive == "resample" and self.freeze != "none":
            raise ConfigError(
                f"revive='resample' gives decoder rows new directions, and freeze='{self.freeze}' "
                "keeps them near the old ones: set revive to none"
            )


class MatchingPursuitTrainer(Tied):
    """See the module."""

    Config = MatchingPursuitConfig
    LATENTS = LATENTS
    cfg: MatchingPursuitConfig
    l0: Tensor
    """Latents that fire a token, on the mean over the last batch."""

    def __init__(self, cfg: MatchingPursuitConfig, d_in: int) -> None:
        super().__init__(cfg, d_in)
        self.b_dec.requires_grad_(cfg.learn_b_dec)
        self.register_buffer("l0", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "row d_in"]) -> None:
        self.b_dec.copy_(centre(sample, self.cfg.b_dec_init))

    def _pursue(
        self, x: Float[Tensor, "batch d_in"]
    ) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"], Float[Tensor, "batch d_in"]]:
        """Values, latents, and what is left of x - b_dec."""
        cfg = self.cfg
        return kernels.matching_pursuit(
            x - self.b_dec, self.W_dec, cfg.steps, cfg.residual, mesh=self.mesh
        )

    def losses(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        values, indices, rest = self._pursue(batch.x)
        values, indices = kernels.merge_repeats(values.detach(), indices)
        self.dead.saw(values, indices, len(batch.x))
        self.l0 = self.per_row((values != 0).sum(), len(batch.x))
        return {"mse": rest.square().sum(1).mean()}

    @torch.no_grad()
    def replant(
        self, batch: Batch, optimiser: torch.optim.Optimizer
    ) -> Int[Tensor, " latent"] | None:
        """A dead latent takes the direction of what is left of a row, drawn by its squared loss
        and for one latent only; its moments begin at 0."""
        cfg = self.cfg
        # What is planted after the last step would be exported untrained.
        if cfg.revive != "resample" or self.step % cfg.resample_every or self.step == cfg.n_steps:
            return None
        dead = self.dead.mask.nonzero().flatten()
        *_, rest = self._pursue(batch.x)
        # Where training diverged, that is for the loop to say.
        weight = rest.square().sum(1).square().nan_to_num(0, 0, 0)
        dead = dead[: int((weight > 0).sum())]
        if len(dead) == 0:
            return dead
        rows = torch.multinomial(weight, len(dead), generator=self.generator)
        self.W_dec[dead] = rest[rows]
        normalise_rows(self.W_dec)
        forget(optimiser, self.W_dec, dead, 0)
        self.dead.since[dead] = 0
        return dead

    def metrics(self) -> dict[str, float]:
        return {"l0": float(self.l0), **super().metrics()}

    def export(self) -> SAE:
        pursuit = MatchingPursuit(self.cfg.steps, self.cfg.residual)
        return SAE.of_atoms(self.W_dec, self.b_dec, pursuit)


KIND = MatchingPursuitTrainer
