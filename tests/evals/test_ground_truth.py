import math
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saekit import ActivationCache, evaluate
from saekit.activations_cache.planted import HOOK, cache_of, planted_cache, synthetic_of
from saekit.errors import CacheError, ConfigError
from saekit.evals._ground_matching import definitions, find, scores
from saekit.evals._ground_rows import Told, Truth
from saekit.evals.core import CoreConfig
from saekit.evals.ground_truth import GroundTruthConfig
from saekit.results import EvalResult
from saekit.sae import SAE, ReLU, SparseCode, TopK
from saekit.seeds import stream
from saekit.synthetic import Synthetic, SyntheticConfig

LAW = SyntheticConfig(n_features=7, d_in=16, p_max=0.4, p_min=0.1, magnitude_sd=0.3)
N_ROWS = 3000
Row = list[float]
Matching = tuple[list[tuple[int, int]], list[int]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    """Seven features in sixteen dimensions, at right angles to each other."""
    return planted_cache(tmp_path_factory.mktemp("planted"), LAW, N_ROWS, holdout=0.4)


@pytest.fixture(scope="module")
def truth(cache: ActivationCache) -> Synthetic:
    return synthetic_of(cache)


def reader(W_dec: Tensor, synthetic: Synthetic, at: float = 0.5) -> SAE:
    """Fires where a row has more than `at` of a decoder row, as the inverse of all of them says."""
    W_enc = torch.linalg.pinv(W_dec)
    return SAE(W_enc, -synthetic.bias @ W_enc - at, W_dec, synthetic.bias, ReLU())


def found_in(sae: SAE, cache: ActivationCache, **options: Any) -> EvalResult:
    config = GroundTruthConfig(**{"n_bootstrap": 20, **options})
    return evaluate("ground_truth", sae, cache, hook=HOOK, config=config)


def values(result: EvalResult) -> dict[str, float]:
    return {name: metric.value for name, metric in result.metrics.items()}


def cos(a: list[float], b: list[float]) -> float:
    def dot(p: list[float], q: list[float]) -> float:
        return sum(s * t for s, t in zip(p, q, strict=True))

    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


# Known answers.


def test_three_against_three_in_the_plane_worked_by_hand() -> None:
    """Cosines (1, .8, 0), (0, .6, -1), (.6, .96, -.8); the matching is 1-3, 2-2, 3-1."""
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    W_dec = torch.tensor([[2.0, 0.0], [0.4, 0.3], [0.0, -3.0]])
    found = find(directions, W_dec, match=True)
    assert found["signed"].latent.tolist() == [2, 1, 0]
    assert found["signed"].partner.tolist() == [2, 1, 0]
    got = scores(found, torch.tensor([0.5, 0.3, 0.2]), (0.9, 0.55))
    assert got["mcc_signed"] == pytest.approx(0.4)
    assert got["mmcs_signed_features"] == pytest.approx((1 + 0.6 + 0.96) / 3)
    assert got["mmcs_signed_latents"] == pytest.approx((1 + 0.96 + 0) / 3)
    assert got["uniqueness_signed"] == pytest.approx(2 / 3)
    assert got["found_share_signed_over_0.55"] == pytest.approx(2 / 3)
    assert got["found_firing_share_signed_over_0.55"] == pytest.approx(0.5)
    assert got["near_share_signed_over_0.9"] == pytest.approx(2 / 3)
    # By absolute cosine feature 2 is the latent that points away from it.
    assert found["abs"].latent.tolist() == [0, 2, 1]
    assert got["mcc_abs"] == pytest.approx((1 + 1 + 0.96) / 3)
    assert got["found_share_abs_over_0.9"] == 1
    assert got["found_firing_share_abs_over_0.9"] == pytest.approx(1)
    assert set(got) == set(definitions((0.9, 0.55)))


def test_what_is_left_over_counts_zero_in_the_number_of_its_side() -> None:
    directions = torch.eye(4)
    W_dec = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.6, 0.8, 0.0]])
    found = find(directions, W_dec, match=True)
    got = scores(found, torch.ones(4), (0.9,))
    assert found["abs"].latent.tolist() == [-1, 0, 1, -1]
    assert got["mcc_abs"] == pytest.approx(0.9)
    assert got["mcc_abs_of_latents"] == pytest.approx(0.9)
    assert got["mcc_abs_of_features"] == pytest.approx(0.45)
    assert got["found_share_abs_over_0.9"] == 0.25
    wide = scores(find(W_dec, directions, match=True), torch.ones(2), (0.9,))
    assert wide["mcc_abs_of_features"] == pytest.approx(0.9)
    assert wide["mcc_abs_of_latents"] == pytest.approx(0.45)


def test_a_latent_without_a_direction_is_found_by_nothing() -> None:
    W_dec = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    found = find(torch.eye(2), W_dec, match=True)["abs"]
    assert found.latent.tolist() == [-1, 1]
    assert found.feature.tolist() == [-1, 1] and found.partner.tolist() == [-1, 1]
    nothing = find(torch.eye(2), torch.zeros(3, 2), match=True)
    assert scores(nothing, torch.ones(2), (0.9,))["mmcs_abs_features"] == 0
    assert "mcc_abs" not in scores(nothing, torch.ones(2), (0.9,))


def test_counts_of_four_rows_worked_by_hand() -> None:
    """The index beside a 0 counts for nothing; latent 2 has no feature."""
    code = SparseCode(
        torch.tensor([[1.0, 0.0], [2.0, 1.0], [-1.0, 0.0], [0.5, 3.0]]),
        torch.tensor([[0, 1], [0, 2], [1, 0], [0, 2]]),
    )
    there = torch.tensor([[1, 0], [0, 1], [0, 1], [1, 1]]).bool()
    feature = torch.tensor([[0, 1, -1], [1, 0, -1]])
    whole = Told.of(code, there, feature)
    parts = [
        Told.of(SparseCode(code.values[at], code.indices[at]), there[at], feature)
        for at in (slice(0, 1), slice(1, 4))
    ]
    for told in (whole, parts[0] + parts[1]):
        assert told.n == 4 and told.fired.tolist() == [3, 1, 2] and told.there.tolist() == [2, 3]
        near = told.scores(0, feature[0])
        torch.testing.assert_close(near["precision"], torch.tensor([2 / 3, 1, 0]).double())
        torch.testing.assert_close(near["recall"], torch.tensor([1, 1 / 3, 0]).double())
        torch.testing.assert_close(near["f1"], torch.tensor([0.8, 0.5, 0]).double())
        other = told.scores(1, feature[1])
        torch.testing.assert_close(other["f1"], torch.tensor([2 * 2 / 6, 0, 0]).double())


def test_the_dictionary_itself_scores_one(cache: ActivationCache, truth: Synthetic) -> None:
    order = torch.randperm(7)
    result = found_in(reader(truth.directions[order] * 2, truth, at=0.01), cache)
    got = values(result)
    for name in ("mcc_abs", "mcc_signed", "mcc_alive_abs", "uniqueness_abs", "mmcs_abs_latents"):
        assert got[name] == pytest.approx(1, abs=1e-6), name
    for name in ("found_share_signed_over_0.9", "found_firing_share_abs_over_0.9"):
        assert got[name] == pytest.approx(1, abs=1e-9), name
    # The few values that lie below the threshold are missed.
    assert 0.98 < got["f1"] <= got["precision"] == 1
    assert got["f1"] == pytest.approx(got["f1_matched"], abs=1e-12)
    assert got["l0_mean"] == pytest.approx(got["true_l0"], abs=0.02)
    assert got["ev"] > 0.99 and got["dead_share"] == 0
    assert got["mcc_abs_null"] < 0.6
    assert result.arrays["latent_feature_abs"].tolist() == order.tolist()


def test_an_opposite_dictionary_is_found_by_absolute_cosine_alone(
    cache: ActivationCache, truth: Synthetic
) -> None:
    sae = reader(truth.directions, truth)
    got = values(found_in(replace(sae, W_dec=-sae.W_dec), cache))
    assert got["mcc_abs"] == pytest.approx(1, abs=1e-6)
    assert got["mcc_signed"] < 0.05 and got["found_share_signed_over_0.9"] == 0
    assert got["f1"] > 0.5 and got["ev"] < 0


def test_dead_latents_count_zero_and_leave_mcc_alive_alone(
    cache: ActivationCache, truth: Synthetic
) -> None:
    sae = reader(truth.directions, truth)
    b_enc = sae.b_enc.clone()
    b_enc[[1, 4]] = -1e3
    W_dec = sae.W_dec.clone()
    W_dec[[1, 4]] = torch.randn(2, 16)
    whole = values(found_in(sae, cache))
    some = found_in(replace(sae, b_enc=b_enc, W_dec=W_dec), cache)
    got = values(some)
    told = some.arrays["latent_f1"]
    assert told[[1, 4]].tolist() == [0, 0]
    assert got["f1"] == pytest.approx(float(told.sum()) / 7, abs=1e-12)
    assert got["f1"] < whole["f1"] and got["dead_share"] == pytest.approx(2 / 7)
    assert "of the 5 latents that fire" in some.metrics["mcc_alive_abs"].definition
    assert got["mcc_alive_abs"] == pytest.approx(1, abs=1e-6) and got["mcc_abs"] < 0.95


# Against loops.


def by_cosine(
    directions: list[Row], rows: list[Row], count: list[int]
) -> tuple[dict[str, float], dict[str, Matching]]:
    """All numbers by cosine, and of each sign the matching (feature, latent) and the feature that
    each latent is nearest to."""
    found: dict[str, float] = {}
    matching: dict[str, Matching] = {}
    n = len(rows)
    small, large = min(7, n), max(7, n)
    for sign in ("signed", "abs"):
        size = abs if sign == "abs" else float
        table = [[size(cos(f, r)) for r in rows] for f in directions]
        best, columns = [max(line) for line in table], list(zip(*table, strict=True))
        nearest = [c.index(max(c)) for c in columns]
        # The shorter side chooses from the longer.
        short, turned = (columns, False) if n < 7 else (table, True)
        most = max(
            permutations(range(large), small),
            key=lambda p, short=short: sum(short[i][j] for i, j in enumerate(p)),  # type: ignore[misc]
        )
        pairs = [(i, j) if turned else (j, i) for i, j in enumerate(most)]
        total = sum(table[g][i] for g, i in pairs)
        hit = {g for g, i in pairs if table[g][i] > 0.9}
        found |= {
            f"mcc_{sign}": total / small,
            f"mcc_{sign}_of_features": total / 7,
            f"mcc_{sign}_of_latents": total / n,
            f"mmcs_{sign}_features": sum(best) / 7,
            f"mmcs_{sign}_latents": sum(map(max, columns)) / n,
            f"uniqueness_{sign}": len(set(nearest)) / n,
            f"found_share_{sign}_over_0.9": len(hit) / 7,
            f"found_firing_share_{sign}_over_0.9": sum(count[g] for g in hit) / sum(count),
            f"near_share_{sign}_over_0.9": sum(c > 0.9 for c in best) / 7,
        }
        matching[sign] = pairs, nearest
    return found, matching


def drawn(draw: int, n: int) -> list[Row]:
    """Random unit rows in the place of n latents; as many as features were drawn before them."""
    generator = stream("null", 0, draw)
    torch.randn(7, 16, generator=generator, dtype=torch.float64)
    rows: list[Row] = torch.randn(n, 16, generator=generator, dtype=torch.float64).tolist()
    return [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in rows]


def null(found: dict[str, float]) -> dict[str, float]:
    return {f"{name}_null": value for name, value in found.items()}


def alive_only(found: dict[str, float]) -> dict[str, float]:
    """`mcc`, under the name it has of latents that fire."""
    names = ("mcc_signed", "mcc_abs", "mcc_signed_null", "mcc_abs_null")
    return {name.replace("mcc", "mcc_alive"): found[name] for name in names if name in found}


@pytest.mark.parametrize("d_sae", [5, 7, 8])
def test_every_number_agrees_with_a_plain_loop(
    d_sae: int, cache: ActivationCache, truth: Synthetic, agree: Callable[..., None]
) -> None:
    """One of the latents never fires."""
    generator = torch.Generator().manual_seed(d_sae)
    own = torch.randn(d_sae, 16, generator=generator) * 0.3
    n = min(d_sae, 7)
    own[:n] += truth.directions[torch.randperm(7, generator=generator)[:n]]
    b_enc = -0.2 - own @ truth.bias
    b_enc[2] = -1e6
    sae = SAE(own.T, b_enc, own * 1.7, truth.bias, TopK(3))
    result = found_in(sae, cache, max_rows=500)

    directions, rows = truth.directions.double().tolist(), sae.W_dec.double().tolist()
    index = cache.indices("test")[:500].tolist()
    stored, codes = truth.rows(0, N_ROWS)
    z = sae.encode(stored[index])
    there = [[float(codes[row, g]) > 0 for g in range(7)] for row in index]
    fires = [[float(v) != 0 for v in line] for line in z]
    alive = [i for i in range(d_sae) if any(line[i] for line in fires)]
    count = [sum(line[g] for line in there) for g in range(7)]
    assert len(alive) == d_sae - 1
    expected, matching = by_cosine(directions, rows, count)
    expected |= null(by_cosine(directions, drawn(0, d_sae), count)[0])
    expected |= alive_only(by_cosine(directions, [rows[i] for i in alive], count)[0])
    of_random = null(by_cosine(directions, drawn(0, len(alive)), count)[0])
    expected |= alive_only(of_random)
    for sign, (pairs, _) in matching.items():
        matched = result.arrays[f"feature_latent_{sign}"].tolist()
        assert {(g, i) for g, i in enumerate(matched) if i >= 0} == set(pairs)
    pairs, nearest = matching["abs"]
    small = min(7, d_sae)

    def told(i: int, g: int) -> tuple[float, float, float]:
        both = sum(f[i] and t[g] for f, t in zip(fires, there, strict=True))
        fired, present = sum(f[i] for f in fires), sum(t[g] for t in there)
        return (
            both / fired if fired else 0.0,
            both / present if present else 0.0,
            2 * both / (fired + present) if both else 0.0,
        )

    by_near = [told(i, g) for i, g in enumerate(nearest)]
    by_pair = {g: told(i, g) for g, i in pairs}
    for at, name in enumerate(("precision", "recall", "f1")):
        expected[name] = sum(t[at] for t in by_near) / d_sae
        expected[f"{name}_matched"] = sum(t[at] for t in by_pair.values()) / small
        own_of = [by_pair[g][at] if g in by_pair else 0.0 for g in range(7)]
        assert result.arrays[f"feature_{name}"].tolist() == pytest.approx(own_of, abs=1e-9)
    f1s = [by_pair[g][2] if g in by_pair else 0.0 for g in range(7)]
    expected["f1_matched_of_features"] = sum(f1s) / 7

    x = stored[index].double()
    x_hat = sae(stored[index]).double()
    error = sum(float(e @ e) for e in x - x_hat)
    spread = sum(float(e @ e) for e in x - x.mean(0))
    ratio = sum(float(b.norm() / a.norm()) for a, b in zip(x, x_hat, strict=True)) / len(index)
    expected |= {
        "ev": 1 - error / spread,
        "l2_ratio": ratio,
        "true_l0": sum(map(sum, there)) / len(index),
        "l0_mean": sum(map(sum, fires)) / len(index),
        "dead_share": 1 - len(alive) / d_sae,
    }
    agree(result, expected, abs=1e-6)  # Cosines are in fp32.
    density = [sum(t[g] for t in there) / len(index) for g in range(7)]
    assert result.arrays["feature_density"].tolist() == pytest.approx(density)


@pytest.mark.parametrize("size", [11, 129, 100_000])
def test_the_batch_size_changes_no_number(
    size: int, cache: ActivationCache, truth: Synthetic
) -> None:
    sae = reader(truth.directions + 0.3 * torch.randn(7, 16), truth)
    whole = found_in(sae, cache, batch_size=512, max_rows=300)
    parts = found_in(sae, cache, batch_size=size, max_rows=300)
    assert values(parts) == pytest.approx(values(whole), rel=1e-6)
    for name, metric in parts.metrics.items():
        of = whole.metrics[name].interval
        assert metric.interval == (None if of is None else pytest.approx(of, rel=1e-6))
    for name, array in parts.arrays.items():
        assert (array == whole.arrays[name]).all()


def test_means_over_rows_have_intervals_and_the_others_none(
    cache: ActivationCache, truth: Synthetic
) -> None:
    sae = reader(truth.directions, truth)
    result = found_in(sae, cache, n_bootstrap=300, split="all")
    having = {name for name, metric in result.metrics.items() if metric.interval is not None}
    assert having == {"true_l0", "l0_mean", "ev", "l2_ratio"}
    low, high = result.metrics["true_l0"].interval or (0.0, 0.0)
    assert low < float(truth.rate.sum()) < high


def test_every_metric_is_finite_counted_and_defined_and_a_second_run_identical(
    cache: ActivationCache, truth: Synthetic, tmp_path: Path
) -> None:
    sae = reader(truth.directions + 0.1, truth)
    before = {name: tensor.clone() for name, tensor in sae.tensors().items()}
    config = GroundTruthConfig(n_bootstrap=20)
    for folder in ("first", "second"):
        result = evaluate(
            "ground_truth", sae, cache, hook=HOOK, config=config, out=tmp_path / folder
        )
        for metric in result.metrics.values():
            assert math.isfinite(metric.value) and metric.n > 0 and metric.definition
    for file in sorted((tmp_path / "first").iterdir()):
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()
    assert all((before[name] == tensor).all() for name, tensor in sae.tensors().items())


def test_a_null_is_of_as_many_random_rows(cache: ActivationCache, truth: Synthetic) -> None:
    few = reader(truth.directions[:2], truth)
    many = reader(torch.randn(300, 16), truth)
    of_few, of_many = (values(found_in(sae, cache, null_draws=3)) for sae in (few, many))
    # The best of 300 random directions is nearer than the best of 2.
    assert of_many["mcc_abs_null"] > of_few["mcc_abs_null"] + 0.1
    # A random dictionary is its own null.
    assert of_many["mcc_abs"] == pytest.approx(of_many["mcc_abs_null"], abs=0.05)
    assert not [name for name in values(found_in(few, cache, null_draws=0)) if "null" in name]


def test_beyond_max_matching_the_nearest_are_left(
    cache: ActivationCache, truth: Synthetic, caplog: pytest.LogCaptureFixture
) -> None:
    got = values(found_in(reader(truth.directions, truth), cache, max_matching=6))
    assert "7 features and 7 latents, more than max_matching=6" in caplog.text
    assert not [name for name in got if "mcc" in name or "matched" in name or "found" in name]
    assert got["near_share_abs_over_0.9"] == 1 and got["f1"] > 0.5


# What is refused.


def test_a_cache_of_a_model_has_no_true_features(
    random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    with pytest.raises(CacheError, match="nobody knows the true features.*saekit plant --out"):
        found_in(random_sae, tiny_cache)


def test_core_says_the_same_and_has_no_model_to_run(
    cache: ActivationCache, truth: Synthetic
) -> None:
    sae = reader(truth.directions + 0.1, truth)
    with pytest.raises(CacheError, match="no language model made the rows.*core with ce_tokens=0"):
        evaluate("core", sae, cache, hook=HOOK)
    core = evaluate("core", sae, cache, hook=HOOK, config=CoreConfig(ce_tokens=0, n_bootstrap=20))
    own = found_in(sae, cache)
    for name in ("ev", "l2_ratio", "l0_mean", "dead_share"):
        assert own.metrics[name].value == pytest.approx(core.metrics[name].value, rel=1e-12)
        assert own.metrics[name].interval == core.metrics[name].interval, name


def test_a_cache_that_keeps_no_dictionary_is_refused(tmp_path: Path, exact: SAE) -> None:
    cache = cache_of([(torch.randn(300, 16), None)], tmp_path, holdout=0.5)
    with pytest.raises(CacheError, match="keeps no dictionary.*plant one with"):
        found_in(exact, cache)


def test_an_sae_of_another_dictionary_is_refused(
    cache: ActivationCache, truth: Synthetic, trained_on: Callable[..., SAE], tmp_path: Path
) -> None:
    other = planted_cache(tmp_path, replace(LAW, seed=1), 300, holdout=0.5)
    sae = trained_on(reader(truth.directions, truth), other, hook=HOOK)
    with pytest.raises(CacheError, match="trained on model 'planted' .fingerprint"):
        found_in(sae, cache)


def test_rows_that_the_dictionary_does_not_make_are_refused(
    truth: Synthetic, caplog: pytest.LogCaptureFixture
) -> None:
    index = torch.arange(5, 2000, 3)
    x, codes = truth.rows(0, 2000)
    there = Truth(truth, 1.0, "c").present(index, x[index])
    assert there.equal(codes[index] > 0) and not caplog.text
    one = x.clone()
    one[8] += 1
    assert Truth(truth, 1.0, "c").present(index, one[index]).equal(there)
    assert "row 8 of c is not what its dictionary makes here" in caplog.text
    far = Truth(replace(truth, bias=truth.bias + 1), 1.0, "c")
    far.present(index[:1], x[index[:1]])
    with pytest.raises(CacheError, match="2 of 2 rows of c are not what their dictionary"):
        far.present(index[1:2], x[index[1:2]])
    with pytest.raises(CacheError, match="665 of 665 rows of c are not what their dictionary"):
        Truth(replace(truth, bias=truth.bias + 1), 1.0, "c").present(index, x[index])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"null_draws": -1}, "null_draws=-1 must not be negative"),
        ({"max_matching": -1}, "max_matching=-1 must not be negative"),
        ({"over": (1.0,)}, r"over=\(1\.0,\) are cosines"),
        ({"n_bootstrap": -1}, "n_bootstrap=-1 must not be negative"),
    ],
)
def test_bad_values_are_refused_with_the_rule(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GroundTruthConfig(**options)
