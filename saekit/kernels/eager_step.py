"""The losses and gradients of a TopK SAE on a CPU in closed form, AuxK with them.

What autograd gives by the ops of `eager`, without what costs there as much as the arithmetic: fresh
memory for pre-activations and gradients, whose pages the system has to clear, a second product for
the dead latents, and dense gradients of what is sparse.

    e = x - b_dec - z @ W_dec,   mse = mean |e|^2
    auxk = coef * V * mean |e - e_hat|^2 / Var(e)      (as `trainers._autoencoder` defines it)

Axes: batch, d_in, d_sae, k (entries of a row), dead (latents that AuxK may use).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.kernels import eager
from saekit.kernels.auxk import AuxKConfig

_ENTRIES_AT_ONCE = 1 << 23
"""Pre-activations made at a time: enough rows for the product, and no more than a cache holds."""
_DEAD_AT_ONCE = 1 << 20
"""Pre-activations of dead latents that are ranked at a time."""
_LATENTS_AT_ONCE = 1_024
"""Latents whose gradients are summed at a time, in memory that stays in the cache."""


@dataclass(frozen=True)
class Parameters:
    """Of a TopK SAE, or their gradients."""

    W_enc_T: Float[Tensor, "d_sae d_in"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_in"]


class Room:
    """Memory that each step takes anew, by name."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Holds what was left there."""
        n, held = math.prod(shape), self._held.get(name)
        if held is None or held.numel() < n or held.dtype != dtype:
            self._held[name] = held = torch.empty(n, dtype=dtype)
        return held[:n].view(shape)


class TopKPass:
    """A batch on its way through an SAE: the forward pass when it is made, then `backward`, and
    after that, where some of the latents are dead, `revive`."""

    def __init__(
        self,
        x: Float[Tensor, "batch d_in"],
        held: Parameters,
        k: int,
        dtype: torch.dtype,
        apart: Int[Tensor, " dead"],
        room: Room,
    ) -> None:
        """Pre-activations are made in `dtype`; those of the latents `apart` are kept for `revive`.
        What the pass holds lies in `room`, until the next takes it."""
        (batch, d_in), d_sae = x.shape, len(held.W_enc_T)
        self.held, self.apart, self._room = held, apart, room
        self.centred = torch.sub(x, held.b_dec, out=room.take("centred", x.dtype, batch, d_in))
        self.error = room.take("error", x.dtype, batch, d_in)
        self.values = room.take("values", x.dtype, batch, k)
        self.indices = room.take("indices", torch.int32, batch, k)
        self.pre = room.take("apart", dtype, batch, len(apart))
        rows, W = self.centred, held.W_enc_T
        if dtype != x.dtype:
            rows = room.take("rows", dtype, batch, d_in).copy_(rows)
            W = room.take("W", dtype, d_sae, d_in).copy_(W)
        b = held.b_enc.to(dtype)
        squares = x.new_zeros(())
        for part in _slices(batch, max(1, _ENTRIES_AT_ONCE // d_sae)):
            n = part.stop - part.start
            pre = torch.addmm(b, rows[part], W.T, out=room.take("pre", dtype, n, d_sae))
            indices = eager.topk(pre, k)
            self.indices[part] = indices
            values = self.values[part].copy_(pre.gather(1, indices)).relu_()
            torch.gather(pre, 1, apart.expand(n, -1), out=self.pre[part])
            x_hat = eager.weighted_rows(values, indices, None, held.W_dec)
            error = torch.sub(self.centred[part], x_hat, out=self.error[part])
            squares += error.square().sum()
        self.mse = squares / batch

    def backward(self, grads: Parameters) -> None:
        """Fills the gradients of the mse."""
        held, scale = self.held, -2 / len(self.error)
        d_pre = eager.products(self.indices, None, self.error, held.W_dec)
        d_pre.mul_(self.values > 0).mul_(scale)
        by_latent = _ByLatent(self.indices, len(held.W_dec))
        by_latent.sums(d_pre, self.centred, grads.W_enc_T)
        by_latent.sums(self.values * scale, self.error, grads.W_dec)
        grads.b_enc.zero_().index_add_(0, self.indices.flatten(), d_pre.flatten())
        # Of x - b_dec: all that reaches a latent's pre-activations, and the error's own.
        torch.mv(held.W_enc_T.T, grads.b_enc, out=grads.b_dec).neg_()
        grads.b_dec.add_(self.error.sum(0), alpha=scale)

    def revive(
        self, cfg: AuxKConfig, dead: Bool[Tensor, " dead"], grads: Parameters
    ) -> Float[Tensor, ""]:
        """AuxK by those of the latents `apart` that are `dead`; adds its gradients to the others.

        Needs the error no more, and leaves what AuxK misses of it there."""
        latents, pre, error, room = self.apart, self.pre, self.error, self._room
        if not dead.all():
            latents, pre = latents[dead], pre[:, dead]
        if len(latents) == 0:
            return self.mse.new_zeros(())
        batch, k = len(error), min(cfg.k, len(latents))
        mute = pre.amax(0) <= 0
        W_dec = self.held.W_dec[latents]
        variance = (self.mse - error.mean(0).square().sum()).clamp_min(1e-12)
        weight = cfg.coef * cfg.variance / variance
        values = room.take("dead values", error.dtype, batch, k)
        d_pre = room.take("dead d_pre", error.dtype, batch, k)
        indices = room.take("dead indices", torch.int32, batch, k)
        total = torch.zeros_like(self.mse)
        for part in _slices(batch, max(1, _DEAD_AT_ONCE // len(latents))):
            best = _ordered(pre[part]).topk(k, dim=1, sorted=False)
            index = indices[part].copy_(best.indices)
            value = values[part].copy_(_unordered(best.values, pre.dtype))
            kept = (value > 0).logical_or_(mute[best.indices])
            value.mul_(kept)
            missed = error[part].sub_(eager.weighted_rows(value, index, None, W_dec))
            total += missed.square().sum()
            torch.mul(eager.products(index, None, missed, W_dec), kept, out=d_pre[part])
        by_latent = _ByLatent(indices, len(latents))
        scale = -2 * weight / batch
        d_pre *= scale
        values *= scale
        sums = room.take("sums", error.dtype, *W_dec.shape)
        grads.W_enc_T.index_add_(0, latents, by_latent.sums(d_pre, self.centred, sums))
        grads.W_dec.index_add_(0, latents, by_latent.sums(values, error, sums))
        bias = error.new_zeros(len(latents)).index_add_(0, indices.flatten(), d_pre.flatten())
        grads.b_enc.index_add_(0, latents, bias)
        return weight * total / batch


class _ByLatent:
    """A code's entries in the order of their latents."""

    def __init__(self, indices: Int[Tensor, "batch k"], n_latents: int) -> None:
        # Short integers are sorted in less time.
        short = torch.int16 if n_latents < 1 << 15 else torch.int32
        latent, self._order = indices.flatten().to(short).sort(stable=True)
        self._rows = self._order.int().floor_divide_(indices.shape[1])
        edges = torch.arange(n_latents + 1, dtype=short)
        self._bags = torch.searchsorted(latent, edges, out_int32=True)

    def sums(
        self,
        weights: Float[Tensor, "batch k"],
        table: Float[Tensor, "batch d_in"],
        out: Float[Tensor, "n_latents d_in"],
    ) -> Float[Tensor, "n_latents d_in"]:
        """`out[i] = sum of weights[b, j] * table[b] over all (b, j) where indices[b, j] == i`."""
        weights = weights.flatten().index_select(0, self._order)
        for part in _slices(len(out), _LATENTS_AT_ONCE):
            bags = self._bags[part.start : part.stop + 1]
            ours = slice(int(bags[0]), int(bags[-1]))
            out[part] = eager.weighted_rows(weights[ours], self._rows[ours], bags - bags[0], table)
        return out


def _slices(n: int, at_once: int) -> list[slice]:
    return [slice(i, min(n, i + at_once)) for i in range(0, n, at_once)]


def _ordered(x: Float[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Integers in the order of the floats, which are compared in less time."""
    bits = x.view(eager.BITS[x.dtype])
    form = torch.iinfo(bits.dtype)
    return (bits >> (form.bits - 1)).bitwise_and_(form.max).bitwise_xor_(bits)


def _unordered(bits: Int[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    return _ordered(bits.view(dtype)).view(dtype)
