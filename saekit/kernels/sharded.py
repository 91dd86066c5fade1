"""The choices that have all latents in view, made by processes that hold a slice of them each.

What is exchanged is what the choice needs, never pre-activations: the k best of each slice for a
row's k best, counts of how many entries are how large for those of a whole batch, the best of each
slice for a step of a pursuit. Of equal entries those are kept that one process would keep first:
by row, then by latent.

Axes: batch (rows held here), d_in, d_sae (latents held here), kept (entries held here), rank.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.distributed import ALONE, Mesh
from saekit.kernels import ops, pursuit
from saekit.kernels.reference import Code, row_offsets

_SAMPLE = 1 << 18


def topk_code(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    mesh: Mesh = ALONE,
) -> Code:
    """`reference.topk_encode` over the latents of a mesh: the part of the code that is held here,
    with offsets where the mesh shares the latents out. Entries of 0 are left out there."""
    if mesh.latent == 1:
        return (*ops.topk_encode(x, W_enc, b_enc, k), None)
    return ops.encode(x, W_enc, b_enc, lambda pre: row_topk(pre, k, mesh, W_enc.shape[1], 0.0))


def row_topk(
    pre: Float[Tensor, "batch d_sae"], k: int, mesh: Mesh, most: int, least: float | None = None
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " offsets"]]:
    """Which entries held here are among the k largest of their row, over the latents of the mesh;
    with `least` only those above it. Processes hold `most` latents at most; together at least k.

    NaN counts as the largest, and where the k-th largest is NaN nothing is left out, so that it is
    seen in what comes of it.
    """
    width = min(k, most)
    indices = pre.topk(min(width, pre.shape[1]), dim=1, sorted=False).indices.sort(1).values
    values = pre.gather(1, indices)
    padded = torch.nn.functional.pad(values, (0, width - values.shape[1]), value=-torch.inf)
    every = mesh.gather(padded, "latent")
    cut = every.movedim(0, 1).flatten(1).topk(k, dim=1).values[:, -1:]
    larger = (~(every <= cut)).sum((0, 2))
    before = (every[: mesh.latent_rank] == cut).sum((0, 2))
    missing = (k - larger - before)[:, None]
    kept = _first(values, cut, missing)
    # Where equal entries were cut off here, torch took any of them.
    if width < pre.shape[1] and (edge := values.amin(1) == cut[:, 0]).any():
        wanted = _first(pre[edge], cut[edge], missing[edge])
        slots = wanted.byte().topk(width, dim=1, sorted=False).indices.sort(1).values
        indices[edge], kept[edge] = slots, wanted.gather(1, slots)
        values = pre.gather(1, indices)
    if least is not None:
        kept &= ~(values <= least)
    rows, slots = kept.nonzero(as_tuple=True)
    return indices[rows, slots], row_offsets(rows, len(pre))


def _first(
    values: Float[Tensor, "batch entry"], cut: Float[Tensor, "batch 1"], n: Int[Tensor, "batch 1"]
) -> Bool[Tensor, "batch entry"]:
    """What exceeds the cut of its row, and the first n of what equals it."""
    equal = values == cut
    return ~(values <= cut) | (equal & (equal.cumsum(1) <= n))


def batch_topk(
    pre: Float[Tensor, "batch d_sae"], n: int, mesh: Mesh = ALONE
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " offsets"]]:
    """`reference.batch_topk` over all rows and latents of a mesh: which of the n largest positive
    entries are held here."""
    if mesh.size == 1:
        return ops.batch_topk(pre, n)
    batch, d_sae = pre.shape
    flat = pre.detach().flatten()
    above = _likely(flat, n, mesh)
    found = flat[above].float()
    if int(mesh.reduce(torch.tensor(len(above), device=pre.device), "all")) > n:
        above = above[_largest(found, above // d_sae, batch, n, mesh)]
    return above % d_sae, row_offsets(above // d_sae, batch)


def _likely(flat: Float[Tensor, " entry"], n: int, mesh: Mesh) -> Int[Tensor, " above"]:
    """Where positive entries are that hold the n largest of the mesh; all, where those are fewer.

    A sample gives a bound that more than n should exceed, which spares counting all.
    """
    stride = flat.numel() // _SAMPLE | 1
    counts = _histogram(_bits(flat[::stride]) >> 16, mesh)
    # Half as many again as wanted, so that a sample rarely gives too high a bound.
    place = 3 * n // (2 * stride) + 16
    bound = torch.tensor([_reaching(counts, place)[0] << 16], dtype=torch.int32).view(torch.float32)
    bound = bound.to(flat.device)
    # Asked so that NaN is among them.
    above = (~(flat < bound) & (flat != 0)).nonzero().flatten()
    if bound > 0 and mesh.reduce(torch.tensor(len(above), device=flat.device), "all") < n:
        above = (~(flat <= 0)).nonzero().flatten()
    return above


def _largest(
    found: Float[Tensor, " above"], rows: Int[Tensor, " above"], batch: int, n: int, mesh: Mesh
) -> Int[Tensor, " kept"]:
    """Which of the entries found are among the n largest of the mesh, whose number exceeds n."""
    bits = _bits(found)
    high, more = _reaching(_histogram(bits >> 16, mesh), n)
    low, within = _reaching(_histogram(bits[bits >> 16 == high] & 0xFFFF, mesh), n - more)
    cut = high << 16 | low
    missing = n - more - within
    equal = bits == cut
    # How many equal ones stand in rows before, or in this row with an earlier process.
    counts = torch.bincount(rows[equal], minlength=batch)
    every = mesh.gather(counts, "all").view(mesh.data, mesh.latent, batch).transpose(1, 2)
    before = (every.flatten().cumsum(0).view(every.shape) - every)[
        mesh.data_rank, :, mesh.latent_rank
    ]
    first = counts.cumsum(0) - counts
    place = torch.arange(int(equal.sum()), device=bits.device) - first[rows[equal]]
    kept = bits > cut
    kept[equal] = before[rows[equal]] + place < missing
    return kept.nonzero().flatten()


def _bits(values: Float[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Integers in the order of the positive floats; 0 for all that are not above 0."""
    bits = values.float().view(torch.int32)
    return torch.where(values.isnan(), 0x7F800001, bits).clamp_min(0)


def _histogram(keys: Int[Tensor, " entry"], mesh: Mesh) -> Int[Tensor, " bin"]:
    """How many entries of the mesh have each of 2^16 keys."""
    return mesh.reduce(torch.bincount(keys, minlength=1 << 16), "all")


def _reaching(counts: Int[Tensor, " bin"], n: int) -> tuple[int, int]:
    """The largest key that n entries reach, or 0, and how many exceed it."""
    reach = counts.flip(0).cumsum(0).flip(0)
    key = max(0, int((reach >= n).sum()) - 1)
    return key, int(reach[key] - counts[key])


def matching_pursuit(
    x: Float[Tensor, "batch d"],
    W_dec: Float[Tensor, "d_sae d"],
    steps: int,
    residual: float = 0.0,
    signed: bool = False,
    mesh: Mesh = ALONE,
) -> tuple[Float[Tensor, "batch {steps}"], Int[Tensor, "batch {steps}"], Float[Tensor, "batch d"]]:
    """`reference.matching_pursuit` over the atoms of a mesh. Of the code, what other processes hold
    is 0 here."""
    if mesh.latent == 1:
        return pursuit.matching_pursuit(x, W_dec, steps, residual, signed)
    out: tuple[Tensor, Tensor, Tensor] = _Pursuit.apply(x, W_dec, steps, residual, signed, mesh)  # type: ignore[no-untyped-call]
    return out


class _Pursuit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_dec: Tensor,
        steps: int,
        residual: float,
        signed: bool,
        mesh: Mesh,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rest, values, indices, owned = x.clone(), [], [], []
        enough = residual * x.norm(dim=1)
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for _ in range(steps):
            scores = rest @ W_dec.T
            most, best = (scores.abs() if signed else scores).max(1)
            # The first of equal ones.
            mine = mesh.gather(most.float(), "latent").max(0).indices == mesh.latent_rank
            atoms = _atoms(W_dec, best, mine, mesh)
            value = (rest * atoms).sum(1)
            done = done | ((value == 0) if signed else (value <= 0)) | (rest.norm(dim=1) <= enough)
            value = value.masked_fill(done, 0)
            rest.addcmul_(value[:, None], atoms, value=-1)
            values.append(value)
            owned.append(mine & ~done)
            indices.append(best.masked_fill(~owned[-1], 0))
        value, index, mine = (torch.stack(part, 1) for part in (values, indices, owned))
        ctx.save_for_backward(W_dec, value, index, mine, rest)
        ctx.mesh = mesh
        ctx.mark_non_differentiable(index)
        return value * mine, index, rest

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        W_dec, values, indices, owned, rest = ctx.saved_tensors
        if grads[0].any():
            raise NotImplementedError("of a pursuit over a mesh, only what is left has a gradient")
        mesh, rest, d_rest = ctx.mesh, rest.clone(), grads[2].clone()
        d_W = torch.zeros_like(W_dec)
        for step in reversed(range(values.shape[1])):
            value, mine = values[:, step, None], owned[:, step]
            atoms = _atoms(W_dec, indices[:, step], mine, mesh)
            rest.addcmul_(value, atoms)
            d_value = -(d_rest * atoms).sum(1, keepdim=True).masked_fill_(value == 0, 0)
            d_W.index_add_(0, indices[mine, step], (d_value * rest - value * d_rest)[mine])
            d_rest.addcmul_(d_value, atoms)
        # As `Mesh.add_up` has it: each of those that hold these rows gave its share.
        return d_rest, d_W.mul_(mesh.latent), None, None, None, None


def _atoms(
    W_dec: Float[Tensor, "d_sae d"], best: Int[Tensor, " batch"], mine: Tensor, mesh: Mesh
) -> Float[Tensor, "batch d"]:
    """The atom of each row, from whoever holds it."""
    return mesh.reduce(W_dec[best].masked_fill_(~mine[:, None], 0), "latent")
