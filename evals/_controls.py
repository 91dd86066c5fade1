"""Controls: SAEs that learnt no features, for every evaluation to take beside a trained one.

What a trained SAE scores says little until something without learning has been put to the same
test (Korznikov et al. 2026, arXiv 2602.14111; Heap et al. 2025). Each control is an ordinary SAE of
the trained one's hook and, as near as can be, of its L0:

    random          random directions, as many latents, the same kind of activation
    random_pursuit  the same directions, encoded by matching pursuit
    pca             the rows' first l0 principal components
    neuron          the k coordinates of a row that are farthest from their mean

The random ones have learnt no directions, and score far apart: what lies between is owed to the
encoder alone. The last two have for each direction a latent either way, so that codes, which are
not negative, express signed scores. Two more controls are trained: `saekit train --freeze decoder`,
and any kind on a cache of an untrained model (`saekit harvest --model NAME#random=SEED`).

All are fitted on rows of the train split, evenly spread, without special tokens. Axes: row, d,
d_sae.
"""

import logging
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from saekit import seeds
from saekit.activations_cache.store import ActivationCache
from saekit.errors import CacheError, ConfigError
from saekit.evals._base import matching_hook
from saekit.evals._linear import Moments
from saekit.evals._metrics import Firing
from saekit.results import Provenance, versions
from saekit.sae import SAE, JumpReLU, MatchingPursuit, ReLU, TopK

log = logging.getLogger(__name__)

NAMES: tuple[str, ...] = ("random", "random_pursuit", "pca", "neuron")

_ROWS = 8192
"""Rows that L0, thresholds and gain of a random SAE are taken over."""

_BATCH = 4096
_PRE_AT_ONCE = 2**24
"""Elements of one `[row, d_sae]` tensor."""


def controls(
    like: SAE, cache: ActivationCache, hook: str | None = None, *, seed: int = 0
) -> dict[str, SAE]:
    """The controls of an SAE by name. One that cannot be had is left out, and the log says why.

    Raises what `evaluate` raises for an SAE and a cache that do not belong together.
    """
    hook = matching_hook(like, cache, hook)
    l0 = l0_of(like, cache, hook)
    unfit = misfits(like, l0)
    for name, reason in unfit.items():
        log.warning("no %s control: %s", name, reason)
    made = {}
    if "random" not in unfit:
        made["random"] = random_sae(like, cache, hook, seed=seed)
    if "random_pursuit" not in unfit:
        made["random_pursuit"] = random_pursuit_sae(like, cache, hook, seed=seed)
    if "pca" not in unfit:
        made["pca"] = pca_sae(cache, hook, round(l0))
    if "neuron" not in unfit:
        made["neuron"] = neuron_sae(cache, hook, round(l0))
    return made


def misfits(like: SAE, l0: float) -> dict[str, str]:
    """The controls that an SAE with this L0 cannot be compared with, and why."""
    if like.W_skip is not None or like.d_out != like.d_in:
        return dict.fromkeys(NAMES, "the SAE is a transcoder, or has a skip path")
    if round(l0) < 1:
        return dict.fromkeys(NAMES, f"the SAE's L0 is {l0:.3g}, and a control's is at least 1")
    unfit = {}
    if isinstance(like.activation, MatchingPursuit):
        unfit["random_pursuit"] = "the SAE is a matching pursuit, and so is its random control"
    if isinstance(like.activation, JumpReLU) and l0 >= like.d_sae / 2:
        unfit["random"] = (
            f"the SAE's L0 is {l0:.4g} of {like.d_sae} latents, and random directions are above "
            "their mean, where a threshold can keep them, on half of the rows"
        )
    if round(l0) > like.d_in:
        reason = f"the SAE's L0 is {l0:.4g}, and there are {like.d_in} directions in all"
        unfit |= {"pca": reason, "neuron": reason}
    return unfit


def l0_of(like: SAE, cache: ActivationCache, hook: str) -> float:
    """Mean over training rows of the number of latents != 0."""
    return _l0(like, _rows(cache, hook, _ROWS))


def random_sae(
    like: SAE,
    cache: ActivationCache,
    hook: str | None = None,
    *,
    seed: int = 0,
    fit_gain: bool = True,
) -> SAE:
    """Random unit decoder rows about the mean of the rows; the encoder is their transpose.

    It has as many latents as `like` and its kind of activation, set so that on training rows its
    mean L0 is that of `like`: TopK and matching pursuit by a whole number of latents or steps, the
    others by one threshold for all latents (a ReLU's stands in b_enc, and shrinks its values).
    Encoder and thresholds are then multiplied by the one gain that makes the squared error least,
    which chooses no other latents: without, overlapping directions add up to more than the row, and
    the control would be worse than its directions are. `fit_gain=False` leaves it out; a matching
    pursuit needs none.

    Raises ConfigError where `misfits` says why.
    """
    hook = matching_hook(like, cache, hook)
    x = _rows(cache, hook, _ROWS)
    l0 = _l0(like, x)
    if reason := misfits(like, l0).get("random"):
        raise ConfigError(f"there is no random control: {reason}")
    W_dec, mean = _directions(like, seed), x.double().mean(0).float()
    origin = _provenance("random", cache, hook, {"seed": seed, "l0": l0}, len(x))
    how = like.activation
    if isinstance(how, MatchingPursuit):
        pursuit = MatchingPursuit(steps=round(l0), signed=how.signed)
        return replace(SAE.of_atoms(W_dec, mean, pursuit), provenance=origin)
    W_enc = W_dec.T
    sae = SAE(W_enc, -mean @ W_enc, W_dec, mean, TopK(round(l0)), provenance=origin)
    if not isinstance(how, TopK):
        threshold = _threshold(sae, x, round(l0 * len(x)))
        if isinstance(how, ReLU):
            sae = replace(sae, b_enc=sae.b_enc - threshold, activation=ReLU())
        else:
            sae = replace(sae, activation=JumpReLU(threshold.clamp(min=0).expand(like.d_sae)))
    return _scaled(sae, _gain(sae, x)) if fit_gain else sae


def random_pursuit_sae(
    like: SAE, cache: ActivationCache, hook: str | None = None, *, seed: int = 0
) -> SAE:
    """The directions of `random_sae`, encoded by matching pursuit in as many steps as the L0 of
    `like`: the same latent may be taken twice, so that the L0 may be a little less.

    Raises ConfigError where `misfits` says why.
    """
    hook = matching_hook(like, cache, hook)
    x = _rows(cache, hook, _ROWS)
    l0 = _l0(like, x)
    if reason := misfits(like, l0).get("random_pursuit"):
        raise ConfigError(f"there is no random_pursuit control: {reason}")
    origin = _provenance("random_pursuit", cache, hook, {"seed": seed, "l0": l0}, len(x))
    pursuit = MatchingPursuit(steps=round(l0))
    mean = x.double().mean(0).float()
    return replace(SAE.of_atoms(_directions(like, seed), mean, pursuit), provenance=origin)


def _directions(like: SAE, seed: int) -> Float[Tensor, "d_sae d"]:
    generator = seeds.stream("random control", seed)
    directions = torch.randn(like.d_sae, like.d_in, generator=generator)
    return torch.nn.functional.normalize(directions, dim=1)


def pca_sae(
    cache: ActivationCache, hook: str, l0: int, *, max_rows: int = 400_000, batch_size: int = _BATCH
) -> SAE:
    """The first `l0` principal components about the mean, a latent for each of their two signs.

    One of the two fires on each row, so L0 is `l0` (less where a score is 0 exactly), and the
    explained variance on the rows that it is fitted on is the share of their variance in the first
    `l0` eigenvalues of the covariance.
    """
    _check_count("l0", l0, cache.width(hook), "principal components")
    moments = _moments(cache, hook, max_rows, batch_size)
    vectors = torch.linalg.eigh(moments.xx).eigenvectors.flip(1)[:, :l0]
    # Which of its two signs an eigenvector comes with is left to the library.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    origin = _provenance("pca", cache, hook, {"l0": l0}, moments.n)
    return _both_signs(vectors * largest.sign(), moments.x_mean, l0, origin)


def neuron_sae(
    cache: ActivationCache, hook: str, k: int, *, max_rows: int = 400_000, batch_size: int = _BATCH
) -> SAE:
    """The `k` coordinates of each row that are farthest from their mean, a latent for each of
    their two signs; all others are taken to be at the mean."""
    _check_count("k", k, cache.width(hook), "coordinates")
    moments = _moments(cache, hook, max_rows, batch_size)
    origin = _provenance("neuron", cache, hook, {"k": k}, moments.n)
    return _both_signs(torch.eye(cache.width(hook)).double(), moments.x_mean, k, origin)


def _both_signs(
    directions: Float64[Tensor, "d n"], mean: Float64[Tensor, " d"], k: int, origin: Provenance
) -> SAE:
    """The k largest scores of each row on orthonormal directions, and of the two signs of each."""
    W_enc = torch.cat([directions, -directions], 1)
    return SAE(
        W_enc.float(),
        (-mean @ W_enc).float(),
        W_enc.T.float(),
        mean.float(),
        TopK(k),
        provenance=origin,
    )


def _moments(cache: ActivationCache, hook: str, max_rows: int, batch_size: int) -> Moments:
    total: Moments | None = None
    for some in torch.split(_index(cache, max_rows), batch_size):
        here = Moments.of(cache.rows(hook, some))
        total = here if total is None else total + here
    assert total is not None
    return total


def _index(cache: ActivationCache, n: int) -> Int[Tensor, " row"]:
    """At most n rows of the train split, evenly spread. Raises CacheError where there are none."""
    index = cache.indices("train")
    if len(index) == 0:
        raise CacheError(
            f"{cache.url} has no rows in its train split, and controls are fitted there; harvest "
            "more documents"
        )
    return index if len(index) <= n else index[torch.arange(n) * len(index) // n]


def _rows(cache: ActivationCache, hook: str, n: int) -> Float[Tensor, "row d"]:
    return cache.rows(hook, _index(cache, n))


def _pieces(sae: SAE, x: Float[Tensor, "row d"]) -> tuple[Float[Tensor, "part d"], ...]:
    return torch.split(x, max(1, min(_BATCH, _PRE_AT_ONCE // sae.d_sae)))


def _l0(sae: SAE, x: Float[Tensor, "row d"]) -> float:
    sae = sae.to(torch.float32)
    fired = (
        Firing.of(sae.encode_sparse(part.to(sae.device)), sae.d_sae) for part in _pieces(sae, x)
    )
    return sum(int(part.count.sum()) for part in fired) / len(x)


def _threshold(sae: SAE, x: Float[Tensor, "row d"], count: int) -> Float[Tensor, ""]:
    """What just `count` pre-activations exceed, of all rows and latents together."""
    largest = x.new_zeros(0)
    for part in _pieces(sae, x):
        both = torch.cat([largest, sae.pre(part).flatten()])
        largest = both.topk(min(count + 1, len(both))).values
    if len(largest) <= count:  # Every latent fires on every row.
        return largest[-1] - 1
    # Halfway, so that rounding moves none over it.
    return largest[-2:].mean()


def _gain(sae: SAE, x: Float[Tensor, "row d"]) -> float:
    """The factor g on the SAE's part beside the mean, c = x_hat - b_dec, that makes
    sum |x - b_dec - g c|^2 least: sum (x - b_dec) . c / sum |c|^2; 1 where that is not above 0."""
    dot = square = 0.0
    for part in _pieces(sae, x):
        c = (sae(part) - sae.b_dec).double()
        dot += float(((part - sae.b_dec).double() * c).sum())
        square += float(c.square().sum())
    return dot / square if dot > 0 else 1.0


def _scaled(sae: SAE, gain: float) -> SAE:
    """The same latents on the same rows, each `gain` times as strong."""
    how = sae.activation
    return replace(
        sae,
        W_enc=sae.W_enc * gain,
        b_enc=sae.b_enc * gain,
        activation=JumpReLU(how.threshold * gain) if isinstance(how, JumpReLU) else how,
    )


def _check_count(name: str, value: int, most: int, what: str) -> None:
    if not 1 <= value <= most:
        raise ConfigError(f"{name}={value} must lie in 1..{most}: there are {most} {what}")


def _provenance(
    name: str, cache: ActivationCache, hook: str, config: dict[str, Any], rows: int
) -> Provenance:
    return Provenance(
        kind=f"{name} control",
        hook=hook,
        model=cache.model,
        model_fingerprint=cache.model_fingerprint,
        cache_fingerprint=cache.fingerprint,
        config=config,
        rows_seen=rows,
        versions=versions(),
    )
