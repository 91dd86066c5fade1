"""Answers that are known beforehand, and what saekit's own metrics say: `saekit conformance`.

Small enough to be worked out by hand, or printed by others; each names its number as results do.
Axes: row, d.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from saekit.conformance import Check
from saekit.evals._core_rows import CoreRows
from saekit.evals._firing_windows import Windows
from saekit.evals._ground_matching import find, scores
from saekit.evals._ground_rows import Told
from saekit.evals._linear import Moments
from saekit.evals._metrics import (
    Firing,
    Reconstruction,
    ce_recovered,
    cross_entropy,
    kl_divergence,
)
from saekit.evals._resample import Explained, Resamples
from saekit.sae import SparseCode

X = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 10.0]])
X_HAT = torch.tensor([[1.0, 1.0], [3.0, 5.0], [4.0, 6.0], [8.0, 9.0]])

DIGITS = 1e-6
"""What a number may be off; expected ones are printed to as many digits."""


def checks() -> list[Check]:
    parts = (_variance(), _invariances(), _losses(), _firing(), _matching(), _error(), _detection())
    return [one for part in parts for one in part]


def _check(name: str, expected: float, found: float, off: float = DIGITS) -> Check:
    return Check(
        name,
        f"{expected:.6g}",
        f"{found:.6g}",
        math.isfinite(found) and abs(found - expected) <= off,
    )


def _found(x: Tensor, x_hat: Tensor) -> dict[str, float]:
    """What the core row takes of rows, about their own mean."""
    document = torch.zeros(len(x), dtype=torch.long)
    z = SparseCode(torch.ones(len(x), 1), torch.zeros(len(x), 1, dtype=torch.long))
    rows = CoreRows.of(
        Resamples.of(document, 0, 0), x, x_hat, z, torch.ones(1), document, x.double().mean(0)
    )
    return {name: float(values[0]) for name, values in rows.found().items()}


def _variance() -> Iterator[Check]:
    """Four rows: sum of squared errors 5, scatter about the mean 55."""
    of = "four rows"
    whole, found = Reconstruction.of(X, X_HAT), _found(X, X_HAT)
    for name, expected in {
        "ev": 0.909091,
        "fvu": 0.090909,
        "mse": 1.25,
        "cosine": 0.982743,
        "l2_ratio": 0.927105,
        "relative_reconstruction_bias": 0.995726,
    }.items():
        yield _check(f"{name}, {of}", expected, float(getattr(whole, name)))
        yield _check(f"{name}, {of}, in resamples", expected, found[name])
    for name, expected in {
        "ev_dimension_mean": 0.907143,
        "ev_token_mean": 0.694218,
        "ev_uncentred": 0.979167,
        "ev_centred_error": 0.913636,
        "ev_scalar_mean": 0.915966,
        "gain": 1.004292,
    }.items():
        yield _check(f"{name}, {of}", expected, found[name])


def _invariances() -> Iterator[Check]:
    x, x_hat = X.double(), X_HAT.double()
    moved = Reconstruction.of(x * 7 + 1000, x_hat * 7 + 1000)
    yield _check("ev, rows times 7 and shifted by 1000", 10 / 11, moved.ev)
    parts = [Reconstruction.of(x[i : i + 1], x_hat[i : i + 1]) for i in (2, 0, 3, 1)]
    yield _check("ev, row by row in another order", 10 / 11, sum(parts[1:], parts[0]).ev, 1e-12)
    yield _check("ev, x_hat = x", 1.0, Reconstruction.of(x, x).ev, 1e-12)
    yield _check(
        "ev, x_hat = the mean", 0.0, Reconstruction.of(x, x.mean(0).expand_as(x)).ev, 1e-12
    )
    short = Reconstruction.of(x, 0.8 * x)
    yield _check(
        "relative_reconstruction_bias, x_hat = 0.8 x", 0.8, short.relative_reconstruction_bias
    )
    yield _check("gain, x_hat = 0.8 x", 1.25, _found(x, 0.8 * x)["gain"])
    apart = _found(x, x_hat + 3)
    yield _check("ev, x_hat shifted by 3: the constant counts", 1 - 71 / 55, apart["ev"])
    yield _check(
        "ev_centred_error, x_hat shifted by 3: it does not", 0.913636, apart["ev_centred_error"]
    )


def _losses() -> Iterator[Check]:
    clean, sae = 3.2, 3.5
    yield _check("ce_recovered_zero, 3.2 clean, 3.5 sae, 9.2", 0.95, ce_recovered(clean, sae, 9.2))
    yield _check("ce_recovered_mean, 3.2 clean, 3.5 sae, 6.2", 0.90, ce_recovered(clean, sae, 6.2))
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    yield _check(
        "kl, (2, 1, 1) / 4 from (1, 2, 1) / 4", 0.173287, float(kl_divergence(p.log(), q.log()))
    )
    far = [torch.tensor([row]).log_softmax(1) for row in ([0.0, -300.0], [-300.0, 0.0])]
    yield _check("kl, of logits 300 apart", 300.0, float(kl_divergence(*far)), 1e-3)
    at = torch.tensor([1])
    yield _check("cross-entropy, of p = 1/4", 1.386294, float(cross_entropy(p.log(), at)))


def _firing() -> Iterator[Check]:
    """Rows fire 2, 1, 0 and 1 of four latents; the index beside a 0 counts for nothing."""
    code = SparseCode(
        torch.tensor([[1.0, 2.0], [0.0, 3.0], [0.0, 0.0], [0.5, 0.0]]),
        torch.tensor([[0, 2], [1, 2], [0, 1], [2, 2]]),
    )
    firing = Firing.of(code, 4)
    yield _check("l0_mean", 1.0, firing.l0_mean)
    for percent, expected in ((5, 0.0), (50, 1.0), (95, 2.0)):
        yield _check(f"l0_p{percent}", expected, firing.l0_quantile(percent / 100))
    yield _check("density of latent 2", 0.75, float(firing.density[2]))
    yield _check("dead_share, 4 rows", 0.5, firing.dead_share)
    yield _check("dense_share", 0.5, firing.dense_share)
    window = Windows(2, 4, (1,))
    window.add(code)
    yield _check("dead_share_lt1_in_2, two windows", (2 + 3) / 8, window.dead_share(1))


def _matching() -> Iterator[Check]:
    """A = (1, 0), (0, 1), (.6, .8) and B = (1, 0), (.8, .6), (0, -1)."""
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    b = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, -1.0]])
    got = scores(find(a, b, match=True), torch.ones(3), ())
    yield _check("mmcs, signed, A in B", 0.853333, got["mmcs_signed_features"])
    yield _check("mmcs, signed, B in A", 0.653333, got["mmcs_signed_latents"])
    yield _check("mcc, signed: not by order, nor by greed", 0.4, got["mcc_signed"])
    yield _check("mcc, absolute", (1 + 1 + 0.96) / 3, got["mcc_abs"])
    yield _check("uniqueness, signed", 2 / 3, got["uniqueness_signed"])


def _error() -> Iterator[Check]:
    """4000 rows x ~ N(0.5, 1) of width 32 and noise of 0.3, fitted on half without intercept: R2 of
    the error on the other half, by the mean over dimensions and by all of them at once."""
    draw = np.random.default_rng(0)
    x = torch.from_numpy(draw.normal(0.5, 1, (4000, 32)))
    noise = torch.from_numpy(draw.normal(0, 0.3, (4000, 32)))
    one = noise.clone()
    one[:, 0] = 20 * x[:, 0]
    document = torch.zeros(2000, dtype=torch.long)
    for what, e, uniform, pooled in (
        ("noise", noise, -0.017, -0.017),
        ("0.3 x + noise", 0.3 * x + noise, 0.495, 0.495),
        ("noise but for one dimension 20 x", one, 0.015, 0.993),
    ):
        fit = Moments.of(x[:2000], e[:2000]).solve(intercept=False)
        held = e[2000:]
        explained = Explained.of(
            Resamples.of(document, 0, 0), held, fit(x[2000:]), document, held.mean(0)
        )
        yield _check(f"r2 of {what}, dimensions alike", uniform, float(explained.uniform), 5e-4)
        yield _check(f"r2 of {what}, pooled", pooled, float(explained.pooled), 5e-4)


def _detection() -> Iterator[Check]:
    """Latents 0, 1 and 2 tell features 0, 1 and 1 on four rows; the last never fires."""
    code = SparseCode(torch.ones(4, 1), torch.tensor([[0], [0], [1], [0]]))
    there = torch.tensor([[1, 0], [0, 1], [0, 1], [1, 1]]).bool()
    feature = torch.tensor([0, 1, 1])
    told = Told.of(code, there, feature[None]).scores(0, feature)
    for name, expected in {
        "precision": (2 / 3 + 1 + 0) / 3,
        "recall": (1 + 1 / 3 + 0) / 3,
        "f1": (0.8 + 0.5 + 0) / 3,
    }.items():
        yield _check(f"{name}, a dead latent counting 0", expected, float(told[name].mean()))
