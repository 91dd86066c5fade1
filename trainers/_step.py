"""A step of training, of any kind: losses, gradients, constraints, the optimiser."""

import torch
from torch import Tensor

from saekit.config import TrainConfig
from saekit.trainers._base import Batch, Step, Trainer
from saekit.trainers._precision import Precision, multiplying_in, precision_on


class EagerStep(Step):
    """By autograd and one of torch's optimisers; of a kind that learns without gradients, the
    losses alone."""

    def __init__(
        self,
        cfg: TrainConfig,
        trainer: Trainer,
        optimiser: torch.optim.Optimizer | None,
        device: str,
    ) -> None:
        self._cfg, self._trainer, self._optimiser, self._device = cfg, trainer, optimiser, device
        self._precision: Precision = precision_on(device, cfg)
        self.clipped = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self, batch: Batch, lr: float) -> dict[str, Tensor]:
        cfg, trainer, optimiser = self._cfg, self._trainer, self._optimiser
        with multiplying_in(self._precision, self._device):
            losses = trainer.losses(batch)
            if optimiser is not None:
                optimiser.zero_grad(set_to_none=True)
                torch.stack(list(losses.values())).sum().backward()
        if optimiser is not None:
            for group in optimiser.param_groups:
                group["lr"] = lr
            trainer.before_step()
            if cfg.clip_norm is not None:
                norm = torch.nn.utils.clip_grad_norm_(
                    optimiser.param_groups[0]["params"], cfg.clip_norm
                )
                self.clipped += norm > cfg.clip_norm
            optimiser.step()
            trainer.after_step()
        return {name: loss.detach() for name, loss in losses.items()}
