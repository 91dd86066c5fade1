"""Steps of a TopK SAE on a CPU whose gradients are in closed form; see `kernels.eager_step`."""

import logging

import torch
from torch import Tensor

from saekit import kernels
from saekit.kernels.eager_step import Parameters, Room, TopKPass
from saekit.trainers._autoencoder import Autoencoder
from saekit.trainers._base import Batch
from saekit.trainers._step import EagerStep

log = logging.getLogger(__name__)


class ClosedTopKStep(EagerStep):
    """TopK's."""

    _trainer: Autoencoder

    def __init__(
        self, trainer: Autoencoder, optimiser: torch.optim.Optimizer, k: int, device: str
    ) -> None:
        super().__init__(trainer.cfg, trainer, optimiser, device)
        self._k, self._room = k, Room()

    @torch.no_grad()
    def _differentiate(self, batch: Batch) -> dict[str, Tensor]:
        trainer, since = self._trainer, self._trainer.dead.since
        auxk = trainer.auxk()
        apart = since[:0]
        if auxk is not None:
            # What may be dead once this batch is counted.
            apart = (since + len(batch.x) >= auxk.after).nonzero().flatten()
        dtype = batch.x.dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        held = Parameters(trainer.W_enc.T, trainer.W_dec, trainer.b_enc, trainer.b_dec)
        # Written over in each step: fresh memory would cost more than what is written.
        for p in trainer.parameters():
            p.grad = torch.empty_like(p) if p.grad is None else p.grad
        W_enc, W_dec, b_enc, b_dec = (
            p.grad for p in (trainer.W_enc, trainer.W_dec, trainer.b_enc, trainer.b_dec)
        )
        assert W_enc is not None and W_dec is not None and b_enc is not None and b_dec is not None
        grads = Parameters(W_enc.T, W_dec, b_enc, b_dec)
        with torch.autocast("cpu", enabled=False):
            found = TopKPass(batch.x, held, self._k, dtype, apart, self._room)
            found.backward(grads)
            trainer.count((found.values, found.indices, None), len(batch.x))
            losses = {"mse": found.mse}
            if auxk is not None:
                losses["auxk"] = found.revive(auxk, trainer.dead.mask[apart], grads)
        return losses


def closed_step(
    trainer: Autoencoder, optimiser: torch.optim.Optimizer, k: int, device: str
) -> ClosedTopKStep | None:
    """Such steps for a trainer; None where it takes others."""
    on = torch.device(device)
    if on.type != "cpu" or kernels.choose(on, torch.float32, trainer.d_in).backend != "eager":
        return None
    if trainer.frozen() or trainer.cfg.revive == "ghost" or trainer.mesh.size > 1:
        return None
    return ClosedTopKStep(trainer, optimiser, k, device)
