"""Variational TopK SAE (Baker and Li 2025, "Analysis of Variational Sparse Autoencoders", arXiv
2509.22994; code: ZachData/SPAR-Variational-Sparse-Autoencoders, trainers/vsae_topk.py).

    mu     = relu((x - b_dec) @ W_enc + b_enc)
    logvar = clamp((x - b_dec) @ W_var + b_var, -6, 2)          where the variance is learned
    z      = mu + sigma * noise                                  where it is sampled, else mu
    x_hat  = topk(z by |z|, with signs) @ W_dec + b_dec
    KL     = 1/2 sum (mu^2 + sigma^2 - 1 - log sigma^2),         1/2 sum mu^2 where sigma is 1
    loss   = mean |x - x_hat|^2 + kl_coef * ramp * mean KL + AuxK (see `_autoencoder`)

Inference is TopK of mu. The paper describes sampling from learned posteriors; what its published
script runs is variance "fixed" without sampling, which is TopK with a penalty on mu. With variance
"none" this is TopK itself.

Departures: latents see x - b_dec (the script's "April" mode does not centre), so that "none" is
TopK bit for bit; decoder rows are held at norm 1 (there they begin at 0.1 and are free, so that
longer rows escape the KL; here kl_coef=1 shrinks a latent to about two thirds); AuxK revives dead
latents unless told otherwise (the paper's runs had it off and its TopK baseline on, which
confounds the count of dead latents). Where z is sampled, a latent counts as firing where it is kept
and its mu is above 0: noise alone wakes nothing.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit import kernels
from saekit.errors import ConfigError
from saekit.trainers._autoencoder import forget
from saekit.trainers._base import Batch
from saekit.trainers.topk import TopKConfig, TopKTrainer

LOG_VAR = (-6.0, 2.0)
"""Bounds of a learned log-variance."""
LOG_VAR_INIT = -2.0
COLLAPSED = 1e-3
"""KL, in nats a token, below which a latent's posterior counts as the prior."""


@dataclass(frozen=True, kw_only=True)
class VariationalConfig(TopKConfig):
    """Variational TopK SAE: latents have posteriors, which a KL term draws to a standard normal."""

    variance: Literal["none", "fixed", "learned"] = "fixed"
    """Of the posteriors: 1 for all, or learned from x. "none" leaves the posteriors and the KL
    out, which is TopK."""

    sample: bool | None = None
    """Draw latents from their posteriors in training. Where not given they are drawn where the
    variance is learned, as in the authors' code."""

    kl_coef: float = 1.0
    """Weight of the KL."""

    kl_over: Literal["all", "selected"] = "all"
    """The latents whose KL counts: all of them, or those that TopK kept. All press about three
    times as hard."""

    kl_warmup: float = 0.1
    """Share of the steps over which the weight of the KL rises from 0."""

    kl_clamp: float = 10.0
    """Means above this press no harder; in the units that training sees (see input_scaling)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample and self.variance == "none":
            raise ConfigError(
                "sample=True, but variance='none' leaves nothing to draw from: choose 'fixed' or "
                "'learned'"
            )
        if self.kl_coef < 0:
            raise ConfigError(f"kl_coef={self.kl_coef} may not be negative: it weighs a loss")
        if not 0 <= self.kl_warmup <= 1:
            raise ConfigError(f"kl_warmup={self.kl_warmup} is a share of the steps: 0 to 1")
        if not self.kl_clamp > 0:
            raise ConfigError(f"kl_clamp={self.kl_clamp} must be positive; inf clamps nothing")


class _Posterior(NamedTuple):
    """Of the latents whose KL counts: all, `[batch, d_sae]`, or those kept, `[batch, k]`."""

    mean: Float[Tensor, "batch _"]
    log_var: Float[Tensor, "batch _"] | None
    """None for a variance of 1."""


class _Kept(NamedTuple):
    """The latents that TopK kept, after sampling."""

    values: Float[Tensor, "batch k"]
    mean: Float[Tensor, "batch k"]
    indices: Int[Tensor, "batch k"]


class VariationalTrainer(TopKTrainer):
    """See the module."""

    Config = VariationalConfig
    cfg: VariationalConfig
    collapsed: Tensor
    """Share of the latents whose posterior was the prior, on the mean over the last batch."""

    def __init__(self, cfg: VariationalConfig, d_in: int) -> None:
        super().__init__(cfg, d_in)
        self.learned = cfg.variance == "learned"
        self.sampled = self.learned if cfg.sample is None else cfg.sample
        if self.learned:
            rows = nn.init.kaiming_uniform_(torch.empty(cfg.d_sae, d_in), a=0.01)
            self.W_var = nn.Parameter(rows.T)
            self.b_var = nn.Parameter(torch.full((cfg.d_sae,), LOG_VAR_INIT))
        self.register_buffer("collapsed", torch.zeros(()), persistent=False)

    def losses(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        if self.cfg.variance == "none":
            return super().losses(batch)
        centred = batch.x - self.b_dec
        everywhere = self.cfg.kl_over == "all"
        kept, posterior = self._everywhere(centred) if everywhere else self._selected(centred)
        error = centred - kernels.sparse_decode(kept.values, kept.indices, self.W_dec)
        self.count((kept.mean, kept.indices, None), len(centred))
        kl = self._divergence(posterior)
        each = kl.sum(0) if everywhere else self._by_latent(kl, kept.indices)
        self.collapsed = (each.detach() < COLLAPSED * len(centred)).float().mean()
        return {
            "mse": error.square().sum(1).mean(),
            "kl": self.cfg.kl_coef * self._ramp() * each.sum() / len(centred),
            **self.revival(centred, error),
        }

    def _everywhere(self, centred: Float[Tensor, "batch d_in"]) -> tuple[_Kept, _Posterior]:
        """With gradients to every latent."""
        mean = torch.addmm(self.b_enc, centred, self.W_enc).to(self.W_enc.dtype).relu()
        log_var = self._log_var(centred) if self.learned else None
        z = size = mean
        if self.sampled:
            z = mean + _deviation(self._noise(mean), log_var)
            size = z.abs()
        indices = size.detach().topk(self.cfg.k, dim=1, sorted=False).indices
        kept = _Kept(z.gather(1, indices), mean.detach().gather(1, indices), indices)
        return kept, _Posterior(mean, log_var)

    def _selected(self, centred: Float[Tensor, "batch d_in"]) -> tuple[_Kept, _Posterior]:
        """With gradients to the latents that are kept alone."""
        noise: list[Tensor] = []

        def largest(pre: Tensor) -> tuple[Tensor, None]:
            size = pre
            if self.sampled:
                mean = pre.to(self.W_enc.dtype).relu()
                noise.append(self._noise(mean))
                log_var = self._log_var(centred) if self.learned else None
                size = (mean + _deviation(noise[0], log_var)).abs()
            return size.topk(self.cfg.k, dim=1, sorted=False).indices, None

        mean, indices, _ = kernels.encode(centred, self.W_enc, self.b_enc, largest)
        log_var = None
        if self.learned:
            low, high = LOG_VAR
            # A clamp from below is a ReLU that was moved.
            above, _, _ = kernels.encode(
                centred, self.W_var, self.b_var - low, lambda _: (indices, None)
            )
            log_var = (above + low).clamp_max(high)
        values = mean
        if self.sampled:
            values = mean + _deviation(noise[0].gather(1, indices), log_var)
        return _Kept(values, mean.detach(), indices), _Posterior(mean, log_var)

    def _log_var(self, centred: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        log_var = torch.addmm(self.b_var, centred, self.W_var).to(self.W_var.dtype)
        return log_var.clamp(*LOG_VAR)

    def _noise(self, mean: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        return torch.empty_like(mean).normal_(generator=self.generator)

    def _divergence(self, posterior: _Posterior) -> Float[Tensor, "batch _"]:
        """From a standard normal, of each latent of each row."""
        kl: Tensor = 0.5 * posterior.mean.clamp_max(self.cfg.kl_clamp).square()
        if posterior.log_var is not None:
            kl = kl + 0.5 * (posterior.log_var.expm1() - posterior.log_var)
        return kl

    def _by_latent(
        self, kl: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"]
    ) -> Float[Tensor, " d_sae"]:
        zeros = kl.new_zeros(self.cfg.d_sae)
        return zeros.index_add(0, indices.flatten(), kl.flatten())

    def _ramp(self) -> float:
        return min(1.0, (self.step + 1) / max(1, round(self.cfg.kl_warmup * self.cfg.n_steps)))

    @torch.no_grad()
    def replant(
        self, batch: Batch, optimiser: torch.optim.Optimizer
    ) -> Int[Tensor, " latent"] | None:
        """A latent with new weights is as sure of itself, on every row, as one was at first."""
        latents = super().replant(batch, optimiser)
        if latents is not None and self.learned:
            self.W_var[:, latents] = 0
            self.b_var[latents] = LOG_VAR_INIT
            forget(optimiser, self.W_var, latents, 1)
            forget(optimiser, self.b_var, latents, 0)
        return latents

    def metrics(self) -> dict[str, float]:
        if self.cfg.variance == "none":
            return super().metrics()
        return {"collapsed": float(self.collapsed), **super().metrics()}


def _deviation(
    noise: Float[Tensor, "batch n"], log_var: Float[Tensor, "batch n"] | None
) -> Float[Tensor, "batch n"]:
    """Noise of variance 1 as that of a posterior."""
    return noise if log_var is None else noise * (0.5 * log_var).exp()


KIND = VariationalTrainer
