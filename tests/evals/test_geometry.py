import dataclasses
import logging
import math
from typing import Any

import numpy as np
import pytest
import torch

from saekit import ActivationCache, evaluate
from saekit.errors import ConfigError, Undefined
from saekit.evals._geometry_nulls import beside_nulls, nulls
from saekit.evals._geometry_pass import root
from saekit.evals._linear import Moments
from saekit.evals._matching import random_rows
from saekit.evals.geometry import GeometryConfig, pair_cosines, summary
from saekit.matching import nearest
from saekit.results import EvalResult
from saekit.sae import SAE

HOOK = "resid_post.0"


def geometry(sae: SAE, cache: ActivationCache, **config: Any) -> EvalResult:
    return evaluate("geometry", sae, cache, hook=HOOK, config=GeometryConfig(**config))


def values(result: EvalResult) -> dict[str, float]:
    return {name: metric.value for name, metric in result.metrics.items()}


def cosine(p: list[float], q: list[float]) -> float:
    dot = sum(x * y for x, y in zip(p, q, strict=True))
    return dot / math.sqrt(sum(x * x for x in p) * sum(y * y for y in q))


def alive_by_hand(sae: SAE, cache: ActivationCache, least: int = 1) -> list[int]:
    z = sae.encode(cache.rows(HOOK, cache.indices("test")))
    return [i for i in range(sae.d_sae) if int((z[:, i] != 0).sum()) >= least]


@pytest.fixture
def partly_dead(random_sae: SAE) -> SAE:
    """Latents 0..9 never fire, and their decoder rows are those of 10..19."""
    W_dec, b_enc = random_sae.W_dec.clone(), random_sae.b_enc.clone()
    W_dec[:10], b_enc[:10] = W_dec[10:20], -1e6
    return dataclasses.replace(random_sae, W_dec=W_dec, b_enc=b_enc)


def test_it_agrees_with_plain_loops_over_alive_latents(
    partly_dead: SAE, tiny_cache: ActivationCache
) -> None:
    alive = alive_by_hand(partly_dead, tiny_cache)
    assert 20 < len(alive) <= 30
    d = [partly_dead.W_dec[i].double().tolist() for i in alive]
    e = [partly_dead.W_enc[:, i].double().tolist() for i in alive]
    n = len(alive)
    signed = [max(cosine(d[i], d[j]) for j in range(n) if j != i) for i in range(n)]
    absolute = [max(abs(cosine(d[i], d[j])) for j in range(n) if j != i) for i in range(n)]
    pairs = [cosine(d[i], d[j]) for i in range(n) for j in range(n) if i != j]
    own = [cosine(e[i], d[i]) for i in range(n)]
    length = [math.sqrt(sum(x * x for x in row)) for row in d]
    expected = {
        "alive_share": n / 40,
        "max_cos_dec_signed_mean": sum(signed) / n,
        "max_cos_dec_signed_median": float(np.median(signed)),
        "max_cos_dec_signed_p99": float(np.percentile(signed, 99)),
        "max_cos_dec_signed_share_over_0.5": sum(c > 0.5 for c in signed) / n,
        "max_cos_dec_abs_mean": sum(absolute) / n,
        "max_cos_enc_abs_mean": sum(
            max(abs(cosine(e[i], e[j])) for j in range(n) if j != i) for i in range(n)
        )
        / n,
        "pair_cos_dec_mean": sum(pairs) / len(pairs),
        "pair_cos_dec_rms": math.sqrt(sum(c * c for c in pairs) / len(pairs)),
        "enc_dec_cos_mean": sum(own) / n,
        "enc_dec_cos_p95": float(np.percentile(own, 95)),
        "dec_norm_mean": sum(length) / n,
        "dec_norm_p5": float(np.percentile(length, 5)),
    }
    result = geometry(partly_dead, tiny_cache, over=(0.5,))
    found = values(result)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert result.arrays["latent"].tolist() == alive
    assert result.arrays["nearest_dec_signed_cosine"].tolist() == pytest.approx(signed, abs=1e-6)
    others = result.arrays["nearest_dec_signed_latent"].tolist()
    for i, j in zip(alive, others, strict=True):
        assert cosine(
            partly_dead.W_dec[i].tolist(), partly_dead.W_dec[j].tolist()
        ) == pytest.approx(signed[alive.index(i)], abs=1e-6)


def test_dead_latents_would_have_hidden_what_alive_ones_are(
    partly_dead: SAE, tiny_cache: ActivationCache
) -> None:
    """Ten of the dead rows have a twin, whose cosine is 1."""
    assert values(geometry(partly_dead, tiny_cache))["max_cos_dec_signed_p99"] < 0.99


def test_a_stricter_rule_leaves_fewer_alive(random_sae: SAE, tiny_cache: ActivationCache) -> None:
    strict = geometry(random_sae, tiny_cache, least=30)
    alive = alive_by_hand(random_sae, tiny_cache, 30)
    assert strict.arrays["latent"].tolist() == alive
    assert 0 < len(alive) < len(alive_by_hand(random_sae, tiny_cache))
    metric = strict.metrics["max_cos_dec_abs_mean"]
    assert metric.n == len(alive)
    assert "fire on at least 30 of" in metric.definition


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_changes_no_number(
    batch_size: int, random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    whole = geometry(random_sae, tiny_cache, max_rows=90, covariance_rows=50)
    parts = geometry(random_sae, tiny_cache, max_rows=90, covariance_rows=50, batch_size=batch_size)
    assert values(parts) == pytest.approx(values(whole), abs=1e-6)


def test_each_number_of_the_decoder_stands_beside_both_nulls(
    random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    names = values(geometry(random_sae, tiny_cache)).keys()
    own = [n for n in names if n.startswith(("max_cos_dec", "pair_cos_dec")) and "null" not in n]
    assert len(own) == 10
    for name in own:
        assert {f"{name}_null", f"{name}_null_cov"} <= names
    assert not [name for name in names if "enc" in name and name.endswith("null_cov")]
    without = values(geometry(random_sae, tiny_cache, covariance_rows=0)).keys()
    assert not [name for name in without if name.endswith("null_cov")]


def test_a_random_dictionary_is_like_its_null(tiny_cache: ActivationCache, exact: SAE) -> None:
    rows = random_rows(32, 16, torch.Generator().manual_seed(3))
    found = values(geometry(dataclasses.replace(exact, W_dec=rows), tiny_cache, null_draws=30))
    for name in ("max_cos_dec_signed_mean", "max_cos_dec_abs_mean", "pair_cos_dec_rms"):
        assert found[name] == pytest.approx(found[f"{name}_null"], abs=0.05)


def test_the_null_is_that_of_its_size() -> None:
    """In 768 dimensions, 1032 random rows have a median of 0.1146 and a 99th percentile of 0.1516
    (published figures)."""
    rows = random_rows(1032, 768, torch.Generator().manual_seed(0))
    found = summary(nearest(rows, rows, torch.arange(1032))["signed"].cosine, (0.7,))
    assert found["median"] == pytest.approx(0.1146, abs=0.001)
    assert found["p99"] == pytest.approx(0.1516, abs=0.004)


def test_opposite_and_orthogonal_rows_worked_by_hand(
    exact: SAE, tiny_cache: ActivationCache
) -> None:
    """The rows are the axes, either way: signed neighbours at 0, absolute ones at 1."""
    found = values(geometry(exact, tiny_cache))
    assert found["max_cos_dec_signed_mean"] == 0
    assert found["max_cos_dec_abs_mean"] == 1
    assert found["max_cos_dec_abs_share_over_0.7"] == 1
    assert found["enc_dec_cos_mean"] == found["enc_dec_cos_p5"] == 1
    assert found["dec_norm_mean"] == 1
    # Of the 31 others, one is at -1.
    assert found["pair_cos_dec_mean"] == pytest.approx(-1 / 31)
    assert found["pair_cos_dec_rms"] == pytest.approx(31**-0.5)


def test_some_latents_alone_may_be_asked_but_all_others_count(
    random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    whole = geometry(random_sae, tiny_cache)
    some = geometry(random_sae, tiny_cache, max_latents=6)
    of = whole.arrays["nearest_dec_of"].tolist()
    asked = some.arrays["nearest_dec_of"].tolist()
    assert len(asked) == 6 and set(asked) < set(of) and asked == sorted(asked)
    everyone = dict(zip(of, whole.arrays["nearest_dec_abs_cosine"].tolist(), strict=True))
    assert some.arrays["nearest_dec_abs_cosine"].tolist() == pytest.approx(
        [everyone[i] for i in asked]
    )
    metric = some.metrics["max_cos_dec_abs_mean"]
    assert metric.n == 6 and "over 6 of the latents" in metric.definition
    assert some.metrics["pair_cos_dec_mean"].n == len(of)


def test_where_nothing_is_alive_only_that_is_said(
    silent: SAE, tiny_cache: ActivationCache, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = values(geometry(silent, tiny_cache))
    assert found == {"alive_share": 0}
    assert "max_cos_dec and pair_cos_dec are left out: of 0 and 0 latents" in caplog.text
    assert "enc_dec_cos is left out: 0 latents" in caplog.text


def test_a_row_without_direction_is_left_out(
    exact: SAE, tiny_cache: ActivationCache, caplog: pytest.LogCaptureFixture
) -> None:
    W_dec = exact.W_dec.clone()
    W_dec[3] = 0
    with caplog.at_level(logging.WARNING):
        result = geometry(dataclasses.replace(exact, W_dec=W_dec), tiny_cache)
    assert "1 latents whose decoder row is 0 are left out" in caplog.text
    assert result.metrics["max_cos_dec_abs_mean"].n == 31
    assert 3 not in result.arrays["nearest_dec_of"]
    assert result.metrics["enc_dec_cos_mean"].n == 31


def test_the_root_gives_the_covariance_back() -> None:
    x = torch.randn(40, 5).double() @ torch.randn(5, 5).double() + 3
    R = root(Moments.of(x.float()[:13]) + Moments.of(x.float()[13:]))
    centred = x - x.mean(0)
    torch.testing.assert_close(R @ R.T, centred.T @ centred / 40, rtol=1e-5, atol=1e-5)


def test_equal_rows_have_no_second_null(caplog: pytest.LogCaptureFixture) -> None:
    moments = Moments.of(torch.full((5, 3), 0.1))
    with pytest.raises(Undefined, match="the 5 activations are all the same"):
        root(moments)
    with caplog.at_level(logging.WARNING):
        assert list(nulls([moments])) == ["null"]
    assert "null_cov is left out: the 5 activations" in caplog.text


def test_a_null_is_the_mean_of_its_draws() -> None:
    rows = torch.eye(4)
    seen: list[float] = []

    def first(random: torch.Tensor) -> dict[str, float]:
        seen.append(float(random[0, 0]))
        return {"first": seen[-1]}

    metrics = beside_nulls(
        {"first": 1.0}, first, [rows], nulls([None]), {"first": "what"}, draws=5, seed=0
    )
    assert metrics["first"].value == 1
    assert len(set(seen)) == 5
    assert metrics["first_null"].value == pytest.approx(sum(seen) / 5)
    assert f"standard deviation {np.std(seen):.2g}" in metrics["first_null"].definition


def test_pairs_agree_with_the_matrix_of_all_pairs() -> None:
    rows = torch.nn.functional.normalize(torch.randn(9, 4).double()).float()
    table = rows.double() @ rows.double().T
    off = table[~torch.eye(9, dtype=torch.bool)]
    assert pair_cosines(rows) == pytest.approx(
        {"mean": float(off.mean()), "rms": float(off.square().mean().sqrt())}, abs=1e-6
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"least": 0}, "least=0 must be at least 1"),
        ({"null_draws": 0}, "null_draws=0 must be at least 1"),
        ({"covariance_rows": -1}, "covariance_rows=-1 must not be negative"),
        ({"over": (1.0,)}, r"over=\(1.0,\) are cosines"),
    ],
)
def test_bad_values_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GeometryConfig(**config)
