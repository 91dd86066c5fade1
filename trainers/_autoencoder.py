"""What the kinds with an encoder and a decoder matrix have in common: weights, initial values,
constraints, and how dead latents are revived.

    pre = (x - b_dec) @ W_enc + b_enc,   x_hat = z @ W_dec + b_dec

Rows of W_dec have norm 1 unless a kind says otherwise. W_enc begins as W_dec's transpose, made
shorter: latents that start small compete for what is there instead of adding up to too much.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit import kernels
from saekit.config import TrainConfig
from saekit.errors import ConfigError
from saekit.kernels.auxk import AuxKConfig
from saekit.trainers._base import (
    Batch,
    Centre,
    Trainer,
    centre,
    keep_near,
    normalise_rows,
    project_out_rows,
    unit_rows,
    variance_of,
)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(TrainConfig):
    """What every kind with an encoder and a decoder matrix is trained with."""

    b_dec_init: Centre = "geometric_median"
    """What the decoder bias starts as, over a sample of the activations."""

    encoder_norm: float | None = None
    """Norm of the columns of W_enc at first; where not given, what the kind does best with, and 1
    where they are frozen."""

    revive: Literal["none", "auxk", "resample", "ghost"] | None = "none"
    """How dead latents are brought back: an auxiliary loss on the error ("auxk", Gao et al. 2024;
    "ghost", Jermyn and Templeton 2024), or new weights from rows with a high error ("resample",
    Bricken et al. 2023)."""

    auxk_coef: float = 1 / 32
    """Weight of the auxiliary loss of "auxk"; 0 switches it off."""

    k_aux: int | None = None
    """Dead latents that "auxk" uses per token; d_in / 2 where not given."""

    resample_every: int = 2_500
    """Steps between two times that "resample" gives dead latents new weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_norm is not None and not self.encoder_norm > 0:
            raise ConfigError(
                f"encoder_norm={self.encoder_norm:g} must be positive: a column of zeros has no "
                "direction to learn"
            )
        if self.k_aux is not None and self.k_aux < 1:
            raise ConfigError(
                f"k_aux={self.k_aux} must be at least 1; auxk_coef=0 switches AuxK off"
            )
        if self.revive == "auxk" and self.auxk_coef > 0 and self.batch_size < 2:
            raise ConfigError(
                f"batch_size={self.batch_size} must be at least 2 with revive='auxk', which "
                "divides by the variance of a batch's errors"
            )
        if self.auxk_coef < 0:
            raise ConfigError(f"auxk_coef={self.auxk_coef} may not be negative: it weighs a loss")
        if self.revive == "resample" and self.freeze != "none":
            raise ConfigError(
                f"revive='resample' gives new weights to what freeze='{self.freeze}' keeps: take "
                "another way to revive"
            )
        if self.resample_every < 1:
            raise ConfigError(f"resample_every={self.resample_every} must be at least 1 step")


LATENTS = {
    "W_enc": 1,
    "W_dec": 0,
    "b_enc": 0,
    "anchor": 0,
    "dead.since": 0,
    "dead.fired": 0,
}
"""See `Trainer.LATENTS`."""


class Autoencoder(Trainer):
    """See the module. A kind gives `losses` and `export`."""

    FREEZES = {"encoder": ("W_enc",), "decoder": ("W_dec",)}
    UNIT_ROWS = True
    """Whether rows of W_dec are held at norm 1."""
    cfg: AutoencoderConfig
    variance: Tensor
    """Of x about its mean, summed over d_in, from a sample."""
    l0: Tensor
    """Latents that fire a token, on the mean over the last batch."""

    def __init__(self, cfg: AutoencoderConfig, d_in: int) -> None:
        super().__init__(cfg, d_in)
        rows = unit_rows(cfg.d_sae, d_in, self.mesh)
        self.W_dec = nn.Parameter(rows)
        norm = cfg.encoder_norm or (1.0 if "W_enc" in self.frozen() else self.encoder_norm())
        # Transposed in memory: a latent's encoder weights lie together, as its gradient is made.
        self.W_enc = nn.Parameter((norm * rows).T)
        self.b_enc = nn.Parameter(torch.zeros(self.n_latents))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("variance", torch.ones(()))
        self.register_buffer("l0", torch.zeros(()), persistent=False)
        if cfg.soft_cosine is not None:
            self.register_buffer("anchor", rows.clone())

    def encoder_norm(self) -> float:
        """Of the columns of W_enc at first, where the config does not say."""
        return 0.25

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "row d_in"]) -> None:
        self.variance.copy_(variance_of(sample))
        self.b_dec.copy_(centre(sample, self.cfg.b_dec_init))

    def reconstruct(
        self, code: kernels.Code, centred: Float[Tensor, "batch d_in"]
    ) -> dict[str, Float[Tensor, ""]]:
        """The losses of a sparse code: its error, and what revives the dead. Counts what fired."""
        values, indices, offsets = code
        part = kernels.sparse_decode(values, indices, self.W_dec, offsets)
        error = centred - self.mesh.add_up(part)
        self.count(code, len(centred))
        return {"mse": error.square().sum(1).mean(), **self.revival(centred, error)}

    def count(self, code: kernels.Code, rows: int) -> None:
        """Note what fired in a batch of so many rows."""
        values, indices, _ = code
        self.dead.saw(values, indices, rows)
        self.l0 = self.per_row((values.detach() != 0).sum(), rows)

    def revival(
        self, centred: Float[Tensor, "batch d_in"], error: Float[Tensor, "batch d_in"]
    ) -> dict[str, Float[Tensor, ""]]:
        """The auxiliary loss of the config's policy; none where it has none."""
        cfg = self.cfg
        if cfg.revive == "auxk" and cfg.auxk_coef > 0:
            return {"auxk": self._auxk(centred.detach(), error.detach())}
        if cfg.revive == "ghost":
            return {"ghost": self._ghost(centred.detach(), error.detach())}
        return {}

    def auxk(self) -> AuxKConfig | None:
        """What AuxK needs to know; None where the config has none."""
        cfg = self.cfg
        if cfg.revive != "auxk" or cfg.auxk_coef == 0:
            return None
        k_aux = cfg.k_aux or self.d_in // 2 or 1
        return AuxKConfig(cfg.dead_after, k_aux, cfg.auxk_coef, self.variance)

    def _dead(self) -> Int[Tensor, " latent"]:
        return self.dead.mask.nonzero().flatten()

    def _auxk(
        self,
        centred: Float[Tensor, "batch d_in"],
        error: Float[Tensor, "batch d_in"],
        latents: Int[Tensor, " latent"] | None = None,
        weight: Float[Tensor, " latent"] | None = None,
    ) -> Float[Tensor, ""]:
        """auxk_coef * V * mean |e - e_hat|^2 / Var(e) (Gao et al. 2024, arXiv 2406.04093).

        e is the error, held fixed, and e_hat the best that k_aux dead latents make of it, or k_aux
        of `latents`, whose pre-activations are multiplied by `weight` where it is given. V is the
        variance of x, so that auxk_coef means what it does in the paper, whose reconstruction loss
        is normalised by V. A departure: a latent that is negative on every row of the batch enters
        with its sign, without the ReLU, because it would else get no gradient and stay dead. Others
        do not: where few are dead, k_aux takes all of them on every row, and with signs they would
        learn to explain the error together, densely, in place of a feature each.
        """
        if latents is None:
            latents = self._dead()
        n_latents = self.over_latents(len(latents))
        if n_latents == 0:
            return error.new_zeros(())
        k_aux = min(self.cfg.k_aux or self.d_in // 2 or 1, n_latents)
        pre = centred @ self.W_enc[:, latents] + self.b_enc[latents]
        if weight is not None:
            pre = pre * weight
        mute = self.mesh.reduce(pre.detach().amax(0), "data", "max") <= 0
        offsets = None
        if self.mesh.latent == 1:
            values, indices = pre.topk(k_aux, dim=1, sorted=False)
        else:
            most = self.over_latents(len(latents), "max")
            indices, offsets = kernels.row_topk(pre.detach(), k_aux, self.mesh, most)
            values = pre[kernels.rows_of(offsets), indices]
        values = torch.where(mute[indices], values, values.relu())
        part = kernels.sparse_decode(values, indices, self.W_dec[latents], offsets)
        missed = error - self.mesh.add_up(part)
        share = missed.square().sum(1).mean() / variance_of(error, self.mesh)
        return self.cfg.auxk_coef * self.variance * share

    def _ghost(
        self, centred: Float[Tensor, "batch d_in"], error: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, ""]:
        """mean |e - s exp(pre) W_dec|^2 over the dead latents, as large as the loss itself (Jermyn
        and Templeton, Anthropic's update of January 2024).

        s gives each row of the ghosts' output half the norm of its error, and a last factor gives
        the term the size of the reconstruction loss; neither is differentiated.
        """
        dead = self._dead()
        if len(dead) == 0:
            return error.new_zeros(())
        pre = centred @ self.W_enc[:, dead] + self.b_enc[dead]
        # Which s undoes: nothing overflows, and nothing far below zero vanishes.
        pre = pre - pre.detach().amax(1, keepdim=True)
        out = pre.exp() @ self.W_dec[dead]
        length = out.detach().norm(dim=1, keepdim=True).clamp_min(1e-6)
        out = out * (error.norm(dim=1, keepdim=True) / (2 * length))
        loss: Tensor = (error - out).square().sum(1).mean()
        return loss * (error.square().sum(1).mean() / loss.detach().clamp_min(1e-12))

    def before_step(self) -> None:
        if self.UNIT_ROWS and self.W_dec.grad is not None:
            project_out_rows(self.W_dec.grad, self.W_dec)

    def after_step(self) -> None:
        if self.cfg.soft_cosine is not None:
            assert isinstance(self.anchor, Tensor)
            keep_near(self.W_dec, self.anchor, self.cfg.soft_cosine)
        if self.UNIT_ROWS and self.W_dec.requires_grad:
            normalise_rows(self.W_dec)

    @torch.no_grad()
    def replant(
        self, batch: Batch, optimiser: torch.optim.Optimizer
    ) -> Int[Tensor, " latent"] | None:
        """ "resample" (Bricken et al. 2023, "Towards Monosemanticity", appendix): a dead latent
        takes the direction of a row, drawn by its squared loss, as its decoder row, and a fifth of
        the living latents' mean encoder norm in the same direction as its encoder; its bias and
        its moments begin at 0."""
        cfg = self.cfg
        # What is planted behind the last step would be exported as it is.
        if cfg.revive != "resample" or self.step % cfg.resample_every or self.step == cfg.n_steps:
            return None
        dead = self._dead()
        if len(dead) == 0:
            return dead
        centred = batch.x - self.b_dec
        error = batch.x - self.export()(batch.x)
        loss = error.square().sum(1)
        weight = (loss / loss.max()).square()
        # Either training diverged, which is for the loop to say, or there is no error at all.
        if not weight.isfinite().all():
            return dead[:0]
        rows = torch.multinomial(weight, len(dead), replacement=True, generator=self.generator)
        directions = centred[rows] / centred[rows].norm(dim=1, keepdim=True).clamp_min(1e-12)
        living = ~self.dead.mask
        norm = self.W_enc[:, living].norm(dim=0).mean() if living.any() else self.W_enc.new_ones(())
        self.W_dec[dead] = directions
        self.W_enc[:, dead] = 0.2 * norm * directions.T
        self.b_enc[dead] = 0
        forget(optimiser, self.W_dec, dead, 0)
        forget(optimiser, self.W_enc, dead, 1)
        forget(optimiser, self.b_enc, dead, 0)
        self.dead.since[dead] = 0
        return dead

    def metrics(self) -> dict[str, float]:
        return {"l0": float(self.l0), **super().metrics()}


def forget(
    optimiser: torch.optim.Optimizer,
    parameter: nn.Parameter,
    latents: Int[Tensor, " latent"],
    axis: int,
) -> None:
    """Set to 0 the moments of some latents, which lie along `axis` of the parameter."""
    for moment in optimiser.state.get(parameter, {}).values():
        if moment.shape == parameter.shape:
            moment.index_fill_(axis, latents, 0)
