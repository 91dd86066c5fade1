"""AuxK (Gao et al. 2024, arXiv 2406.04093) beside a fused step: its gradients, for the few latents
that are dead, without autograd and without waiting for the device.

    loss = coef * V * mean |e - e_hat|^2 / Var(e),   e_hat = topk(pre of the dead) @ W_dec

as `trainers._autoencoder` defines it. How many are dead is known on the device alone; what is
computed with is a bound on it, which the host has from a few steps before.

Axes: batch, d_in, d_sae, room (places for dead latents, some of them empty).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.distributed import ALONE, Mesh

EVERY = 8
"""Steps between two times that the device is asked how many latents could die soon, at most."""
_LEAST_ROOM = 256
_AT_ONCE = 1 << 26
"""Pre-activations of dead latents held at a time."""


@dataclass(frozen=True)
class AuxKConfig:
    """What AuxK needs to know of a trainer."""

    after: int
    """Tokens without firing from which on a latent is dead."""
    k: int
    """Dead latents used a row."""
    coef: float
    variance: Float[Tensor, ""]
    """V: of x about its mean, summed over d_in."""
    weight: Float[Tensor, " d_sae"] | None = None
    """What pre-activations are multiplied by. Given, it says which latents are to be revived: those
    above 0, dead or not (`trainers.mutual_choice`)."""


class DeadCount:
    """How many latents may be dead in the next step, without waiting for the device: those that
    will be if they do not fire until its answer is replaced.

    An answer serves from `every` steps after the question, when it has long come, for as many
    steps. So what is computed with depends on the steps taken since `forget` alone.
    """

    def __init__(
        self,
        since: Int[Tensor, " d_sae"],
        after: int,
        batch_size: int,
        mesh: Mesh = ALONE,
    ) -> None:
        """Of a mesh, the most that any process may have."""
        self._mesh = mesh
        # Over half of the tokens that a latent may be silent for, or almost all would count.
        self.every = max(1, min(EVERY, after // (4 * batch_size)))
        self._since, self._least = since, after - 2 * self.every * batch_size
        on_gpu = since.device.type == "cuda"
        self._answer = torch.zeros((), dtype=torch.int64, pin_memory=on_gpu)
        self._answered = torch.cuda.Event() if on_gpu else None
        self._step, self._bound = 0, 0

    def forget(self) -> None:
        """What was asked before no longer counts; the next step waits for an answer."""
        self._step = 0

    def bound(self) -> int:
        """To be called once before each step."""
        if self._step == 0:
            self._ask()
        if self._step % self.every == 0:
            if self._answered is not None:
                self._answered.synchronize()
            self._bound = int(self._answer)
            if self._step:
                self._ask()
        self._step += 1
        return self._bound

    def _ask(self) -> None:
        dead = (self._since >= self._least).sum()
        self._answer.copy_(self._mesh.reduce(dead, "all", "max"), non_blocking=True)
        if self._answered is not None:
            self._answered.record()


def room_for(bound: int, d_sae: int) -> int:
    """Places for so many dead latents: few different numbers, each of which is a graph."""
    if bound == 0:
        return 0
    return min(d_sae, max(_LEAST_ROOM, 1 << (bound - 1).bit_length()))


class AuxKGradients:
    """Of the dead latents: `slot[i]` is the place of latent i in `rows` (of W_dec and of W_enc) and
    `bias`, -1 where it is not dead."""

    def __init__(
        self,
        cfg: AuxKConfig,
        since: Int[Tensor, " d_sae"],
        d_in: int,
        room: int,
        mesh: Mesh = ALONE,
    ) -> None:
        """Of a mesh, each process has latents of its own, all rows, and the same room."""
        self._mesh = mesh
        device = since.device
        self.cfg, self.room, self._since = cfg, room, since
        self.slot = torch.full_like(since, -1, dtype=torch.int32)
        self.rows = torch.zeros(room, 2, d_in, device=device)
        self.bias = torch.zeros(room, device=device)
        self._latents = torch.arange(len(since), device=device)
        self._places = torch.arange(room, device=device)

    def compute(
        self,
        centred: Float[Tensor, "batch d_in"],
        residual: Float[Tensor, "batch d_in"],
        mse: Float[Tensor, ""],
        W_enc_T: Float[Tensor, "d_sae d_in"],
        W_dec: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, " d_sae"],
        loss: Float[Tensor, ""],
    ) -> None:
        """Fills `slot`, `rows` and `bias`, and writes the loss. `residual` is x_hat - x, whose mean
        square, summed over d_in, is `mse`."""
        cfg, room, batch = self.cfg, self.room, len(centred)
        dead = self._since >= cfg.after if cfg.weight is None else cfg.weight > 0
        place = dead.cumsum(0) - 1
        self.slot.copy_(torch.where(dead, place, -1))
        # One place more, for all that are not dead.
        latent = torch.zeros(room + 1, dtype=torch.int64, device=dead.device)
        latent.scatter_(0, torch.where(dead, place, room), self._latents)
        latent = latent[:room]
        empty = self._places > place[-1]
        enc, dec, bias = W_enc_T[latent], W_dec[latent], b_enc[latent]
        weight_of = None if cfg.weight is None else cfg.weight[latent].to(enc.dtype)
        self.rows.zero_()
        self.bias.zero_()
        d_dec, d_enc = self.rows[:, 0], self.rows[:, 1]
        total = torch.zeros_like(mse)
        at_once = max(1, _AT_ONCE // room)
        chunks = [slice(i, i + at_once) for i in range(0, batch, at_once)]
        # Of the whole batch, before any of it is used.
        tops = [torch.addmm(bias, centred[chunk], enc.T).amax(0) for chunk in chunks]
        mute = torch.stack(tops).amax(0) <= 0
        for chunk in chunks:
            x, rest = centred[chunk], residual[chunk]
            pre = torch.addmm(bias, x, enc.T)
            if weight_of is not None:
                pre *= weight_of
            pre.masked_fill_(empty, -torch.inf)
            unused = empty
            if self._mesh.size > 1:
                unused = ~self._best(pre)
            elif room > cfg.k:
                best = pre.topk(cfg.k, dim=1, sorted=False).indices
                unused = torch.ones_like(pre, dtype=torch.bool).scatter_(1, best, False) | empty
            unused = unused | ((pre <= 0) & ~mute)
            z = pre.masked_fill_(unused, 0)
            if self._mesh.size > 1:
                part = self._mesh.reduce((z @ dec).float(), "all")
                missed = (-rest.float() - part).to(rest.dtype)
            else:
                missed = torch.addmm(rest, z, dec, beta=-1, alpha=-1)
            total += missed.float().square().sum()
            d_z = (missed @ dec.T).masked_fill_(unused, 0)
            d_pre = d_z if weight_of is None else d_z * weight_of
            d_dec += z.T @ missed
            d_enc += d_pre.T @ x
            self.bias += d_pre.sum(0, dtype=torch.float32)
        mean = residual.mean(0, dtype=torch.float32)
        variance = (mse - mean.square().sum()).clamp_min(1e-12)
        weight = cfg.coef * cfg.variance / (variance * batch)
        # Where none is dead there is no loss, as on the eager path.
        some = self._mesh.reduce(place[-1:].clone(), "all", "max")[0] >= 0
        torch.where(some, weight * total, torch.zeros_like(total), out=loss)
        self.rows *= -2 * weight
        self.bias *= -2 * weight

    def _best(self, pre: Float[Tensor, "rows room"]) -> Bool[Tensor, "rows room"]:
        """Which are among the k largest of their row, over the dead latents of all; where equal
        ones stand at the k-th place, all of those."""
        k, mesh = self.cfg.k, self._mesh
        if mesh.size * self.room <= k:
            return pre > -torch.inf
        best = pre.topk(min(k, self.room), dim=1).values
        every = mesh.gather(best, "all").movedim(0, 1).flatten(1)
        cut = every.topk(k, dim=1).values[:, -1:]
        return ~(pre < cut) & (pre > -torch.inf)
