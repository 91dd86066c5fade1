"""Steps of TopK and BatchTopK SAEs by the fused kernels."""

import logging

import torch
from torch import Tensor

from saekit import kernels
from saekit.kernels.auxk import AuxKConfig
from saekit.trainers._autoencoder import Autoencoder
from saekit.trainers._base import Batch, Step
from saekit.trainers._precision import precision_on
from saekit.trainers._threshold import RunningMean

log = logging.getLogger(__name__)

WORTH_TUNING = 5_000
"""Steps from which on a run takes the best configuration of its shape, and looks for it where the
shape is new to the GPU."""


class FusedStep(Step):
    """See `kernels.triton_step`. The optimiser's moments are its own, so what is
    kept and resumed is the same as on the eager path."""

    def __init__(
        self,
        trainer: Autoencoder,
        optimiser: torch.optim.Optimizer,
        k: int,
        device: str,
        threshold: RunningMean | None,
    ) -> None:
        from saekit.kernels import triton_candidates
        from saekit.kernels.triton_step import FusedBatchTopKStep, FusedTopKStep
        from saekit.kernels.triton_tune import tune, tuned

        cfg = trainer.cfg
        precision = precision_on(device, cfg)
        self._trainer, self._threshold = trainer, threshold
        parameters = {
            "W_enc_T": trainer.W_enc,
            "W_dec": trainer.W_dec,
            "b_enc": trainer.b_enc,
            "b_dec": trainer.b_dec,
        }
        auxk = None
        if cfg.revive == "auxk" and cfg.auxk_coef > 0:
            k_aux = cfg.k_aux or trainer.d_in // 2 or 1
            auxk = AuxKConfig(cfg.dead_after, k_aux, cfg.auxk_coef, trainer.variance)
        # Resampling reads and writes the parameters between steps.
        split = precision == "bfloat16" and cfg.revive != "resample"
        shape = trainer.W_dec.device, trainer.d_in, cfg.d_sae, k
        config = None
        if cfg.n_steps >= WORTH_TUNING and shape[0].type == "cuda":
            # Not so in shorter runs, which would else end in other bits once another has tuned.
            config = tuned(*shape) or tune(*shape, cfg.batch_size, split)
        candidates = None
        wide = trainer.d_in >= triton_candidates.LEAST_WIDTH
        served = wide and triton_candidates.served(trainer.W_dec.device, trainer.d_in)
        if cfg.economy and threshold is None and precision == "bfloat16" and served:
            candidates = min(cfg.d_sae, triton_candidates.candidates_of(k))
        form = FusedTopKStep if threshold is None else FusedBatchTopKStep
        self._step = form(
            *(_as_held(name, p.data) for name, p in parameters.items()),
            k=k,
            batch_size=cfg.batch_size,
            betas=cfg.adam_betas,
            weight_decay=cfg.weight_decay,
            clip_norm=cfg.clip_norm,
            precision=precision,
            state={
                name: {key: _as_held(name, t) for key, t in optimiser.state[p].items()}
                for name, p in parameters.items()
                if p in optimiser.state
            },
            since=trainer.dead.since,
            fired=trainer.dead.fired,
            auxk=auxk,
            deterministic=True,
            split_master=split,
            moments=torch.bfloat16 if cfg.economy else torch.float32,
            candidates=candidates,
            graph=True,
            config=config,
        )
        for name, p in parameters.items():
            held = self._step.state[name]
            optimiser.state[p] = {key: _as_held(name, t) for key, t in held.items()}
        self._optimiser = optimiser
        self.clipped = self._step.clipped
        self._revives = auxk is not None

    def __call__(self, batch: Batch, lr: float) -> dict[str, Tensor]:
        self._step.lr.fill_(lr)
        for group in self._optimiser.param_groups:
            group["lr"] = lr
        losses = {"mse": self._step(batch.x).clone()}
        if self._revives:
            losses["auxk"] = self._step.auxk_loss.clone()
        self._trainer.l0 = self._step.l0
        if self._threshold is not None:
            self._threshold.update(*self._step.smallest())
        return losses

    def settle(self) -> None:
        self._step.write_back()

    def take_over(self) -> None:
        self._step.take_over()


def _as_held(name: str, tensor: Tensor) -> Tensor:
    """W_enc and its moments lie transposed in memory, and are given as they lie."""
    return tensor.T if name == "W_enc_T" and tensor.ndim == 2 else tensor


def fused_step(
    trainer: Autoencoder,
    optimiser: torch.optim.Optimizer,
    k: int,
    device: str,
    threshold: RunningMean | None = None,
) -> Step | None:
    """Fused steps for a trainer that keeps the k largest latents of each row; or, with `threshold`,
    which takes in the smallest entry kept, k times as many of a batch as it has rows. None, and the
    reason in the log, where it takes those of the eager path."""
    choice = kernels.choose(torch.device(device), torch.float32, trainer.d_in)
    if choice.backend != "triton":
        return None  # which `choose` has logged, and why
    cfg, reason = trainer.cfg, ""
    if cfg.freeze != "none":
        reason = f"freeze='{cfg.freeze}'"
    elif cfg.revive == "ghost":
        reason = "revive='ghost'"
    log.info("steps on %s: %s", device, f"eager ({reason})" if reason else "fused (Triton)")
    return None if reason else FusedStep(trainer, optimiser, k, device, threshold)
