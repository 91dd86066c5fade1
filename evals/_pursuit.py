"""Inference-time gradient pursuit: the best that a decoder might do, were the encoder not in the
way.

The code of each row is sought anew over the SAE's fixed decoder (Blumensath and Davies 2008, as
used on SAEs by Smith 2024 and Engels et al. 2024, "Decomposing the Dark Matter"): with unit rows
D and the signal s = x - b_dec, each step adds to the support the atom with the largest inner
product p = r D^T with what is left, r = s - w D, then moves the weights on the support along the
gradient by the best step, w <- max(0, w + eta g), g = p on the support, c = g D,
eta = (c . r) / (c . c), 0 where c = 0.

Each row takes as many steps as the SAE fires latents on it. The atom may already be in the support
and a weight may be cut to 0, so the L0 that is reached can be smaller. Cost: steps times that of
the encoder. Axes: row, d, d_sae, step.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit import kernels
from saekit.sae import SAE, SparseCode

_SCORES_AT_ONCE = 2**24
"""Elements of one `[row, d_sae]` tensor."""


def gradient_pursuit(sae: SAE, x: Float[Tensor, "row d"], steps: Int[Tensor, " row"]) -> SparseCode:
    """The code of each row in units of the SAE's own decoder rows, after `steps` steps of it."""
    if len(x) == 0 or int(steps.max()) == 0:
        return SparseCode(x.new_zeros(len(x), 1), steps.new_zeros(len(x), 1))
    most = int(steps.max())
    norm = sae.W_dec.norm(dim=1)
    atoms = sae.W_dec / torch.where(norm > 0, norm, 1.0)[:, None]
    start = x - sae.b_dec if sae.W_skip is None else x - sae.b_dec - x @ sae.W_skip
    size = max(1, _SCORES_AT_ONCE // sae.d_sae)
    blocks = [
        _pursue(atoms, s, n, most)
        for s, n in zip(torch.split(start, size), torch.split(steps, size), strict=True)
    ]
    values = torch.cat([weights for weights, _ in blocks])
    indices = torch.cat([support for _, support in blocks])
    # An atom of length 0 never gains weight.
    return SparseCode(values / torch.where(norm > 0, norm, 1.0)[indices], indices)


def _pursue(
    atoms: Float[Tensor, "d_sae d"],
    signal: Float[Tensor, "row d"],
    steps: Int[Tensor, " row"],
    most: int,
) -> tuple[Float[Tensor, "row {most}"], Int[Tensor, "row {most}"]]:
    weights = signal.new_zeros(len(signal), most)
    support = torch.zeros(len(signal), most, dtype=torch.long, device=signal.device)
    # A slot is open once its atom is in the support, and is never filled by an atom that was there.
    is_open = torch.zeros_like(support, dtype=torch.bool)
    left = signal
    for step in range(most):
        running = step < steps
        scores = left @ atoms.T
        best = scores.argmax(1)
        known = ((support == best[:, None]) & is_open).any(1)
        support[:, step] = best
        is_open[:, step] = running & ~known
        gradient = scores.gather(1, support) * (is_open & running[:, None])
        direction = kernels.sparse_decode(gradient, support, atoms)
        length = direction.square().sum(1)
        eta = (direction * left).sum(1) / torch.where(length > 0, length, 1.0)
        weights = (weights + eta[:, None] * gradient).clamp_min(0)
        left = signal - kernels.sparse_decode(weights, support, atoms)
    return weights, support
