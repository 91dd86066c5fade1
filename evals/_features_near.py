"""Which latents are near to which, by decoder rows and by where they fire; a map of the decoder
rows; and their direct effect on the model's logits.

Direct logit attribution is `(W_dec[i] @ M * g) @ W_U`, less its mean over the vocabulary, with M
the map from the hook to the residual stream and g the final norm's gain. That is the straight path
alone. It leaves out what later layers make of the direction, the final norm's division by the
length of the residual stream (so logits compare within a latent, not between tokens of a text) and,
in a LayerNorm, its centring.

Axes: d_sae, d, near (nearest others, the nearest first), vocab, top, pair.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32
from numpy import ndarray
from torch import Tensor

from saekit import seeds
from saekit.activations_cache.model import LanguageModel
from saekit.evals._features_latents import divided
from saekit.evals._features_spool import Actives, Spool
from saekit.sae import SAE

_AT_ONCE = 2**24
"""Elements of one `[latents, vocab]` or `[latents, d_sae]` tensor."""

_EPOCHS, _AGAINST = 200, 4


def decoder_neighbours(
    W_dec: Float[Tensor, "d_sae d"], n: int, works: Callable[[], object]
) -> dict[str, ndarray]:
    """`near` and `near_cosine`: the n latents with the largest cosine of decoder rows, and it.
    `works` is called every now and then.

    A row of zeros is near to none: cosine 0.
    """
    unit = torch.nn.functional.normalize(W_dec, dim=1)
    n = min(n, len(unit) - 1)
    near, cosine = [], []
    for at, some in enumerate(torch.split(unit, step := max(1, _AT_ONCE // len(unit)))):
        alike = some @ unit.T
        alike[torch.arange(len(some)), at * step + torch.arange(len(some))] = -torch.inf
        best = alike.topk(n)
        near.append(best.indices.int().cpu())
        cosine.append(best.values.cpu())
        works()
    return {"near": torch.cat(near).numpy(), "near_cosine": torch.cat(cosine).numpy()}


def coactive(
    actives: Actives, n_latents: int, first: int, spool: Spool, n: int
) -> tuple[Int32[ndarray, "latents near"], Float32[ndarray, "latents near"]]:
    """For each of the latents that begin at number `first`: those that fire on the same places
    most, by Jaccard index, places where both fire over places where either does; -1 and 0 for no
    more."""
    d_sae = len(spool.count)
    keys = np.zeros(0, dtype=np.int64)
    counts = np.zeros(0, dtype=np.int64)
    for latent, other in spool.beside(actives):
        found, count = np.unique(latent * d_sae + other, return_counts=True)
        keys, of = np.unique(np.concatenate([keys, found]), return_inverse=True)
        counts = np.bincount(of, np.concatenate([counts, count]), len(keys)).astype(np.int64)
    latent, other = np.divmod(keys, d_sae)
    apart = latent + first != other
    latent, other, both = latent[apart], other[apart], counts[apart]
    jaccard = both / (spool.count[latent + first] + spool.count[other] - both)
    order = np.lexsort((other, -jaccard, latent))
    begin = np.searchsorted(latent[order], np.arange(n_latents + 1))
    rank = np.arange(len(order)) - begin[latent[order]]
    order, rank = order[rank < n], rank[rank < n]
    near = np.full((n_latents, n), -1, dtype=np.int32)
    share = np.zeros((n_latents, n), dtype=np.float32)
    near[latent[order], rank] = other[order]
    share[latent[order], rank] = jaccard[order]
    return near, share


def map_of(
    W_dec: Float[Tensor, "d_sae d"],
    near: Int32[ndarray, "d_sae near"],
    cosine: ndarray,
    works: Callable[[], object],
) -> Float32[ndarray, "d_sae 2"]:
    """A place in the plane for each latent, near latents close to each other.

    From the first two principal components of the unit decoder rows, moved by the forces of UMAP
    (McInnes et al. 2018, a = b = 1): along each edge to a near latent, weighted by its cosine above
    0, and apart from others drawn at random. Distances on it mean little beyond "near"; the seed is
    fixed.
    """
    n = len(W_dec)
    unit = torch.nn.functional.normalize(W_dec.cpu().float(), dim=1)
    if n < 3:
        return np.zeros((n, 2), dtype=np.float32)
    generator = seeds.stream("feature map", 0)
    centred = unit - unit.mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)
    place = centred @ axes[:, -2:] if axes.shape[1] > 1 else centred.repeat(1, 2)
    place = 10 * place / place.std(0).clamp(min=1e-6)
    place += 0.01 * torch.randn(place.shape, generator=generator)
    source = torch.arange(n).repeat_interleave(near.shape[1])
    target = torch.from_numpy(near).long().flatten()
    weight = torch.from_numpy(cosine).float().flatten().clamp(min=0)[:, None]
    for epoch in range(_EPOCHS):
        step = 1 - epoch / _EPOCHS
        apart = place[source] - place[target]
        square = apart.square().sum(1, keepdim=True)
        pull = (-2 * weight * apart / (1 + square)).clamp(-4, 4)
        move = torch.zeros_like(place)
        move.index_add_(0, source, pull).index_add_(0, target, -pull)
        for _ in range(_AGAINST):
            other = torch.randint(n, (n,), generator=generator)
            apart = place - place[other]
            square = apart.square().sum(1, keepdim=True)
            move += (2 * apart / ((0.001 + square) * (1 + square))).clamp(-4, 4)
        place = place + step * move / near.shape[1]
        works()
    return place.numpy()


def logit_effects(
    sae: SAE, model: LanguageModel, hook: str, top: int, works: Callable[[], object]
) -> dict[str, ndarray]:
    """Tokens that each decoder row raises and lowers most and by how much, and the moments of its
    effects over the vocabulary. Empty lists and NaN where the hook does not reach the logits."""
    to_residual = model.residual_map(hook)
    d_sae, top = sae.d_sae, min(top, len(model.vocab))
    moments = ("logit_std", "logit_skewness", "logit_kurtosis")
    if to_residual is None:
        none = {"": np.zeros((d_sae, 0), np.int32), "_logit": np.zeros((d_sae, 0), np.float32)}
        lists = {way + end: a for way in ("promoted", "suppressed") for end, a in none.items()}
        return lists | {name: np.full(d_sae, np.nan) for name in moments}
    gain, W_U = model.unembed()
    parts: dict[str, list[ndarray]] = {}
    for W_dec in torch.split(sae.W_dec, max(1, _AT_ONCE // W_U.shape[1])):
        logits = (W_dec @ to_residual * gain) @ W_U
        logits -= logits.mean(1, keepdim=True)
        m2, m3, m4 = (logits.pow(p).mean(1).double().cpu().numpy() for p in (2, 3, 4))
        up, down = logits.topk(top), logits.topk(top, largest=False)
        for name, values in {
            "promoted": up.indices.int().cpu().numpy(),
            "promoted_logit": up.values.cpu().numpy(),
            "suppressed": down.indices.int().cpu().numpy(),
            "suppressed_logit": down.values.cpu().numpy(),
            "logit_std": np.sqrt(m2),
            "logit_skewness": divided(m3, m2**1.5),
            "logit_kurtosis": divided(m4, m2**2),
        }.items():
            parts.setdefault(name, []).append(values)
        works()
    return {name: np.concatenate(values) for name, values in parts.items()}
