"""A step of training, of any kind: losses, gradients, constraints, the optimiser."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from saekit.config import TrainConfig
from saekit.distributed import Axis, Mesh
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
        self._shared = None
        if trainer.mesh.size > 1 and optimiser is not None:
            self._shared = _SharedGradients(trainer)

    def __call__(self, batch: Batch, lr: float) -> dict[str, Tensor]:
        cfg, trainer, optimiser = self._cfg, self._trainer, self._optimiser
        with multiplying_in(self._precision, self._device):
            losses = self._differentiate(batch)
        if self._shared is not None:
            losses = self._shared.reduce(losses)
        if optimiser is not None:
            for group in optimiser.param_groups:
                group["lr"] = lr
            trainer.before_step()
            if cfg.clip_norm is not None:
                parameters = optimiser.param_groups[0]["params"]
                if self._shared is None:
                    norm = nn.utils.clip_grad_norm_(parameters, cfg.clip_norm)
                else:
                    norm = self._shared.norm()
                    nn.utils.clip_grads_with_norm_(parameters, cfg.clip_norm, norm)
                self.clipped += norm > cfg.clip_norm
            self._update(optimiser)
            trainer.after_step()
        return {name: loss.detach() for name, loss in losses.items()}

    @staticmethod
    def _update(optimiser: torch.optim.Optimizer) -> None:
        """The optimiser's step. On a CPU torch copies each gradient that does not lie row after
        row, to no use: what lies transposed is turned round for it."""
        turned = [
            p
            for group in optimiser.param_groups
            for p in group["params"]
            if p.device.type == "cpu" and p.ndim == 2 and not p.is_contiguous()
        ]
        _turn(turned, optimiser)
        try:
            optimiser.step()
        finally:
            _turn(turned, optimiser)

    def _differentiate(self, batch: Batch) -> dict[str, Tensor]:
        """The losses, and the parameters' gradients."""
        losses = self._trainer.losses(batch)
        if self._optimiser is not None:
            self._optimiser.zero_grad(set_to_none=True)
            total = torch.stack(list(losses.values())).sum()
            (total if self._shared is None else total / self._trainer.mesh.size).backward()
        return losses


def _turn(parameters: list[nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
    """Transpose parameters, and with each its gradient and its moments; nothing moves in memory."""
    for p in parameters:
        grad, p.grad = p.grad, None
        p.data = p.data.T
        p.grad = None if grad is None else grad.T
        state = optimiser.state.get(p, {})
        state.update({key: t.T for key, t in state.items() if t.ndim == 2})


class _SharedGradients:
    """Gradients of a trainer whose mesh shares out latents or rows.

    Each process differentiates an equal share of its loss (see `Mesh.add_up`), so whatever it
    holds of a parameter's gradient is a part of a sum: over those that hold the same latents, or
    for what has none, over all. A matrix goes on its way as soon as its gradient is whole here,
    while backward goes on; vectors and the losses go together at the end.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._mesh: Mesh = trainer.mesh
        learning = [(n, p) for n, p in trainer.named_parameters() if p.requires_grad]
        self._sliced = [p for n, p in learning if n in trainer.LATENTS]
        self._common = [p for n, p in learning if n not in trainer.LATENTS]
        self._nothing = torch.zeros((), device=trainer.dead.since.device)
        self._on_their_way: list[Any] = []
        if self._mesh.data > 1:
            for p in self._sliced:
                if p.ndim > 1:
                    p.register_post_accumulate_grad_hook(self._send)

    def _send(self, p: Tensor) -> None:
        assert p.grad is not None
        if not p.grad.is_contiguous() and not p.grad.T.is_contiguous():
            p.grad = p.grad.contiguous()
        grad = p.grad if p.grad.is_contiguous() else p.grad.T
        work = dist.all_reduce(grad, group=self._mesh.groups["data"], async_op=True)
        self._on_their_way.append(work)

    def reduce(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make the gradients whole; returns the losses of the whole batch."""
        mesh = self._mesh
        if mesh.data > 1:
            vectors = [p.grad for p in self._sliced if p.ndim == 1 and p.grad is not None]
            _reduce(vectors, mesh, "data")
        terms = torch.stack([loss.detach() for loss in losses.values()]) / mesh.size
        _reduce([terms, *(p.grad for p in self._common if p.grad is not None)], mesh, "all")
        for work in self._on_their_way:
            work.wait()
        self._on_their_way.clear()
        return dict(zip(losses, terms, strict=True))

    def norm(self) -> Tensor:
        """Of the whole gradient."""
        sliced, common = (
            sum((p.grad.square().sum() for p in some if p.grad is not None), self._nothing)
            for some in (self._sliced, self._common)
        )
        return (self._mesh.reduce(sliced.clone(), "latent") + common).sqrt()


def _reduce(tensors: list[Tensor], mesh: Mesh, axis: Axis) -> None:
    """Add the tensors up over the mesh, all at once; in place."""
    if not tensors:
        return
    flat = mesh.reduce(torch.cat([t.flatten() for t in tensors]), axis)
    for t, whole in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(whole.view_as(t))
