"""Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014): which latents fire is decided apart from
how strongly, so that the penalty does not shrink what fires.

    gate = (x - b_dec) @ W_enc + b_enc
    mag  = (x - b_dec) @ (W_enc exp(r_mag)) + b_mag
    z = H(gate) relu(mag),  x_hat = z @ W_dec + b_dec
    loss = mean |x - x_hat|^2  +  c mean sum_i relu(gate_i)
           + mean |x - (relu(gate) @ W_dec + b_dec)|^2

b_enc is the paper's b_gate; rows of W_dec have norm 1. The last term makes the gates work as an SAE
of their own, and teaches them alone: neither W_dec nor b_dec gets any gradient from it, b_dec not
even through x - b_dec.

Exported as the JumpReLU that it is: where r_mag and the biases are shared so, gate > 0 just where
mag > b_mag - exp(r_mag) b_enc.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.sae import SAE, JumpReLU
from saekit.trainers._autoencoder import forget
from saekit.trainers._base import Batch
from saekit.trainers._sparsity import L1Penalised, PenalisedConfig, check_l1


@dataclass(frozen=True, kw_only=True)
class GatedConfig(PenalisedConfig):
    """Gated SAE: which latents fire is decided apart from how strongly, so that the L1 penalty does
    not shrink what fires."""

    l1_coef: float = 5.0
    """Weight of the L1 penalty on the gates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_l1(self.l1_coef)


class GatedTrainer(L1Penalised):
    """See the module."""

    Config = GatedConfig
    cfg: GatedConfig

    def __init__(self, cfg: GatedConfig, d_in: int) -> None:
        super().__init__(cfg, d_in)
        self.r_mag = nn.Parameter(torch.zeros(cfg.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(cfg.d_sae))

    def losses(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        centred = batch.x - self.b_dec
        # The gates as the auxiliary term may move them, and as all else does: `through` is 0, and
        # has the gradient by which b_dec reaches the gates.
        kept = self.keep(centred.detach())
        through = (self.b_dec.detach() - self.b_dec) @ self.W_enc.detach()
        gate = kept.pre + kept.of(through)
        mag = (gate - kept.of(self.b_enc)) * kept.of(self.r_mag.exp()) + kept.of(self.b_mag)
        z = mag.relu() * (kept.pre > 0)
        error = centred - kept.decode(z, self.W_dec)
        self.saw(kept, z)
        missed = centred.detach() - kept.decode(kept.pre.relu(), self.W_dec.detach())
        return {
            "mse": error.square().sum(1).mean(),
            "sparsity": self.penalty(gate.relu(), kept),
            "aux": missed.square().sum(1).mean(),
            **self.revival(centred, error),
        }

    @torch.no_grad()
    def replant(
        self, batch: Batch, optimiser: torch.optim.Optimizer
    ) -> Int[Tensor, " latent"] | None:
        planted = super().replant(batch, optimiser)
        if planted is not None:
            for parameter in (self.r_mag, self.b_mag):
                parameter[planted] = 0
                forget(optimiser, parameter, planted, 0)
        return planted

    def export(self) -> SAE:
        scale = self.r_mag.exp()
        W_enc = self.W_enc * scale
        b_enc = self.b_mag - self.b_dec @ W_enc
        threshold = (self.b_mag - scale * self.b_enc).relu()
        return SAE(W_enc, b_enc, self.W_dec, self.b_dec, JumpReLU(threshold))


KIND = GatedTrainer
