"""Steps of TopK, BatchTopK, mutual choice and JumpReLU SAEs by the fused kernels."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saekit import kernels
from saekit.kernels.auxk import AuxKConfig
from saekit.trainers._autoencoder import Autoencoder
from saekit.trainers._base import Batch, Step
from saekit.trainers._precision import precision_on
from saekit.trainers._step import EagerStep

if TYPE_CHECKING:
    from saekit.trainers.batch_topk import BatchTopKTrainer
    from saekit.trainers.jumprelu import JumpReLUTrainer
    from saekit.trainers.mutual_choice import MutualChoiceTrainer

log = logging.getLogger(__name__)

WORTH_TUNING = 5_000
"""Steps from which on a run takes the best configuration of its shape, and looks for it where the
shape is new to the GPU."""

DENSE_ABOVE = 0.02
"""Share of the entries that fire or move a threshold from which on a JumpReLU's step is left to
the eager path, whose dense products then take less time."""

NAMES = {"W_enc_T": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
"""Of the parameters, as kernels and as trainers call them."""


class FusedStep(Step):
    """TopK's; see `kernels.triton_step`. The optimiser's moments are its own, so what is kept and
    resumed is the same as on the eager path."""

    def __init__(
        self, trainer: Autoencoder, optimiser: torch.optim.Optimizer, k: int, device: str
    ) -> None:
        self._trainer, self._optimiser = trainer, optimiser
        self._parameters = {
            name: trainer.get_parameter(ours)
            for name, ours in {**NAMES, "level": "level"}.items()
            if name != "level" or hasattr(trainer, "level")
        }
        given = {
            name: _as_held(name, p.data) for name, p in self._parameters.items() if name in NAMES
        }
        options = self._options(k, device)
        self._revives = options["auxk"] is not None
        self._step = self._form(*given.values(), **options)
        state = getattr(self._step, "whole_state", self._step.state)
        for name, p in self._parameters.items():
            held = state[name]
            optimiser.state[p] = {key: _as_held(name, t) for key, t in held.items()}
        self.clipped = self._step.clipped

    def _form(self, *parameters: Tensor, **options: Any) -> Any:
        if self._trainer.mesh.size > 1:
            from saekit.kernels.triton_step_mesh import FusedMeshStep

            return FusedMeshStep(*parameters, mesh=self._trainer.mesh, **options)
        from saekit.kernels.triton_step import FusedTopKStep

        candidates = self._candidates(options["k"], options["precision"])
        return FusedTopKStep(*parameters, candidates=candidates, **options)

    def _candidates(self, k: int, precision: str) -> int | None:
        """How many latents a row are looked for in float8, where the config asks for economy."""
        from saekit.kernels import triton_candidates

        trainer, cfg = self._trainer, self._trainer.cfg
        wide = trainer.d_in >= triton_candidates.LEAST_WIDTH
        served = wide and triton_candidates.served(trainer.W_dec.device, trainer.d_in)
        if not (cfg.economy and precision == "bfloat16" and served):
            return None
        return min(cfg.d_sae, triton_candidates.candidates_of(k))

    def _options(self, k: int, device: str) -> dict[str, Any]:
        """What every form is made with."""
        from saekit.kernels.triton_tune import tune, tuned

        trainer, cfg, state = self._trainer, self._trainer.cfg, self._optimiser.state
        precision = precision_on(device, cfg)
        # Resampling reads and writes the parameters between steps.
        split = precision == "bfloat16" and cfg.revive != "resample"
        moments = torch.bfloat16 if cfg.economy else torch.float32
        shape = trainer.W_dec.device, trainer.d_in, cfg.d_sae, k, moments
        config = None
        alone = trainer.mesh.size == 1
        if cfg.n_steps >= WORTH_TUNING and shape[0].type == "cuda" and alone:
            # Not so in shorter runs, which would else end in other bits once another has tuned.
            config = tuned(*shape) or tune(*shape, cfg.batch_size, split)
        return {
            "k": k,
            "batch_size": cfg.batch_size,
            "betas": cfg.adam_betas,
            "weight_decay": cfg.weight_decay,
            "clip_norm": cfg.clip_norm,
            "precision": precision,
            "state": {
                name: {key: _as_held(name, t) for key, t in state[p].items()}
                for name, p in self._parameters.items()
                if p in state
            },
            "since": trainer.dead.since,
            "fired": trainer.dead.fired,
            "auxk": self._auxk(),
            "deterministic": True,
            "split_master": split,
            "moments": moments,
            "graph": True,
            "config": config,
        }

    def _auxk(self) -> AuxKConfig | None:
        return self._trainer.auxk()

    def __call__(self, batch: Batch, lr: float) -> dict[str, Tensor]:
        self._begin(lr)
        self._step(batch.x)
        return self._losses()

    def _begin(self, lr: float) -> None:
        self._step.lr.fill_(lr)
        for group in self._optimiser.param_groups:
            group["lr"] = lr

    def _losses(self, revival: str = "auxk") -> dict[str, Tensor]:
        self._trainer.l0 = self._step.l0
        losses = {"mse": self._step.loss.clone()}
        if self._revives:
            losses[revival] = self._step.auxk_loss.clone()
        return losses

    def settle(self) -> None:
        self._step.write_back()

    def take_over(self) -> None:
        self._step.take_over()


class FusedBatchTopK(FusedStep):
    """BatchTopK's."""

    _trainer: "BatchTopKTrainer"

    def _form(self, *parameters: Tensor, **options: Any) -> Any:
        from saekit.kernels.triton_step_forms import FusedBatchTopKStep

        n_kept = self._trainer.entries(options["batch_size"])
        return FusedBatchTopKStep(*parameters, n_kept=n_kept, **options)

    def _losses(self, revival: str = "auxk") -> dict[str, Tensor]:
        self._trainer.threshold.update(*self._step.smallest())
        return super()._losses(revival)


class FusedMutualChoice(FusedBatchTopK):
    """Mutual choice's."""

    _trainer: "MutualChoiceTrainer"

    def _form(self, *parameters: Tensor, **options: Any) -> Any:
        from saekit.kernels.triton_step_forms import FusedMutualChoiceStep

        if not self._revives or not self._trainer.cfg.zipf:
            return super()._form(*parameters, **options)
        n_kept = self._trainer.entries(options["batch_size"])
        step = FusedMutualChoiceStep(*parameters, n_kept=n_kept, **options)
        step.weigh = self._weigh
        return step

    def _auxk(self) -> AuxKConfig | None:
        auxk = super()._auxk()
        if auxk is not None and self._trainer.cfg.zipf:
            auxk = replace(auxk, weight=torch.zeros_like(self._trainer.expected))
        self._weight = auxk.weight if auxk is not None else None
        return auxk

    @torch.no_grad()
    def _weigh(self, count: Tensor) -> Tensor:
        trainer = self._trainer
        assert self._weight is not None
        trainer.density.update(count / trainer.cfg.batch_size)
        trainer.renew()
        deficit = trainer.deficit()
        revived = deficit > trainer.cfg.under_used
        self._weight.copy_(deficit * revived)
        n = revived.sum()
        trainer.revived = n / trainer.cfg.d_sae
        return n

    def _losses(self, revival: str = "auxk") -> dict[str, Tensor]:
        if self._weight is not None:
            return super()._losses("aux_zipf")
        self._trainer.density.update(self._step.count / self._trainer.cfg.batch_size)
        return super()._losses(revival)


class FusedJumpReLU(FusedStep):
    """JumpReLU's. While many entries fire or move thresholds, as they do at first, its steps are
    the eager ones."""

    _trainer: "JumpReLUTrainer"

    def __init__(
        self,
        trainer: "JumpReLUTrainer",
        optimiser: torch.optim.Optimizer,
        k: int,
        device: str,
    ) -> None:
        super().__init__(trainer, optimiser, k, device)
        self._eager = EagerStep(trainer.cfg, trainer, optimiser, device)
        self._eager.clipped = self.clipped
        self._fused = True
        """Whether the last step was; what is split is else held by the trainer alone."""
        self._density: float | None = None
        """Of the last batch, where its step was fused; else the trainer has it on the device."""

    def _form(self, *parameters: Tensor, **options: Any) -> Any:
        from saekit.kernels.triton_step_forms import FusedJumpReLUStep

        trainer = self._trainer
        factor, half = trainer.cfg.threshold_lr * trainer.unit, trainer.width / 2
        level = trainer.level.data
        return FusedJumpReLUStep(*parameters, level=level, factor=factor, half=half, **options)

    def __call__(self, batch: Batch, lr: float) -> dict[str, Tensor]:
        trainer, step = self._trainer, self._step
        # What the last batch had decides, which is kept and resumed with the rest.
        density = float(trainer.density) if self._density is None else self._density
        if density > DENSE_ABOVE:
            if self._fused:
                self.settle()
                self._fused, self._density = False, None
            return self._eager(batch, lr)
        if not self._fused:
            step.take_over()
            self._fused = True
        step.look(batch.x)
        # While the device looks.
        self._begin(lr)
        l0 = step.l0
        weight = trainer.coefficient.weigh(l0, trainer.step)
        torch.div(weight, trainer.cfg.batch_size, out=step.jump[2])
        self._density = density = step.found() / (trainer.cfg.batch_size * trainer.cfg.d_sae)
        trainer.density.fill_(density)
        step.take()
        losses = self._losses()
        return {"mse": losses.pop("mse"), "sparsity": weight * l0, **losses}

    def settle(self) -> None:
        if self._fused:
            super().settle()

    def take_over(self) -> None:
        self._density = None
        if self._fused:
            super().take_over()


def _as_held(name: str, tensor: Tensor) -> Tensor:
    """W_enc and its moments lie transposed in memory, and are given as they lie."""
    return tensor.T if name == "W_enc_T" and tensor.ndim == 2 else tensor


def fused_step(
    form: type[FusedStep],
    trainer: Autoencoder,
    optimiser: torch.optim.Optimizer,
    k: int,
    device: str,
    obstacle: str = "",
) -> Step | None:
    """Fused steps for a trainer with about k latents a row; None, and the reason in the log, where
    it takes those of the eager path: for the `obstacle` that is given, or for one of its config."""
    choice = kernels.choose(torch.device(device), torch.float32, trainer.d_in)
    if choice.backend != "triton":
        return None  # which `choose` has logged, and why
    cfg = trainer.cfg
    if cfg.freeze != "none":
        obstacle = f"freeze='{cfg.freeze}'"
    elif cfg.revive == "ghost":
        obstacle = "revive='ghost'"
    elif trainer.mesh.size > 1 and form is not FusedStep:
        obstacle = "of the kinds that several processes train, topk alone has fused steps for them"
    elif trainer.n_latents // trainer.mesh.data < k:
        obstacle = f"fewer than k={k} latents for each process of mesh {trainer.mesh}"
    log.info("steps on %s: %s", device, f"eager ({obstacle})" if obstacle else "fused (Triton)")
    return None if obstacle else form(trainer, optimiser, k, device)
