import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saekit import ActivationCache, checkpoint, evaluate
from saekit.errors import CacheError, CheckpointError, ConfigError
from saekit.evals.stability import StabilityConfig
from saekit.results import EvalResult
from saekit.sae import SAE, TopK

HOOK = "resid_post.0"
TrainedOn = Callable[..., SAE]


def stability(sae: SAE, cache: ActivationCache, *against: Path, **config: Any) -> EvalResult:
    cfg = StabilityConfig(against=against, **{"subspace_rank": 3, **config})
    return evaluate("stability", sae, cache, hook=None if sae.provenance else HOOK, config=cfg)


def values(result: EvalResult) -> dict[str, float]:
    return {name: metric.value for name, metric in result.metrics.items()}


def saved(sae: SAE, folder: Path) -> Path:
    checkpoint.save(sae, folder)
    return folder


def reordered(sae: SAE) -> SAE:
    """The same latents in another order, as another seed would bring them."""
    order = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(5))
    return dataclasses.replace(
        sae, W_enc=sae.W_enc[:, order], b_enc=sae.b_enc[order], W_dec=sae.W_dec[order]
    )


def another(d_sae: int = 24) -> SAE:
    generator = torch.Generator().manual_seed(9)
    W_enc, W_dec = (torch.randn(*s, generator=generator) for s in ((16, d_sae), (d_sae, 16)))
    return SAE(W_enc, torch.zeros(d_sae), W_dec, torch.zeros(16), TopK(3))


def alive_by_hand(sae: SAE, cache: ActivationCache, hook: str = HOOK) -> list[int]:
    z = sae.encode(cache.rows(hook, cache.indices("test")))
    return [i for i in range(sae.d_sae) if bool((z[:, i] != 0).any())]


def best_by_hand(of: SAE, among: SAE, i: list[int], j: list[int]) -> list[float]:
    """max_j cos of alive latents, in plain loops."""

    def unit(sae: SAE, k: int) -> list[float]:
        row = sae.W_dec[k].double().tolist()
        return [x / math.sqrt(sum(y * y for y in row)) for x in row]

    others = [unit(among, k) for k in j]
    return [max(sum(x * y for x, y in zip(unit(of, k), o, strict=True)) for o in others) for k in i]


def test_it_agrees_with_plain_loops_over_alive_latents_of_both(
    random_sae: SAE, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    other = dataclasses.replace(another(), b_enc=torch.tensor([-1e6] * 4 + [0.0] * 20))
    a, b = alive_by_hand(random_sae, tiny_cache), alive_by_hand(other, tiny_cache)
    assert len(b) <= 20 < len(a)
    forward = best_by_hand(random_sae, other, a, b)
    backward = best_by_hand(other, random_sae, b, a)
    result = stability(random_sae, tiny_cache, saved(other, tmp_path), over=(0.5,))
    found = values(result)
    expected = {
        "alive_share": len(a) / 40,
        "vs1_alive": len(b),
        "vs1_mmcs_signed_forward": sum(forward) / len(a),
        "vs1_mmcs_signed_backward": sum(backward) / len(b),
        "vs1_share_over_0.5_signed_forward": sum(c > 0.5 for c in forward) / len(a),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    metric = result.metrics["vs1_mmcs_signed_forward"]
    assert metric.n == len(b)
    assert f"Against {tmp_path} at {HOOK}; n counts latents" in metric.definition
    assert result.arrays["latent"].tolist() == a
    assert result.arrays["vs1_latent"].tolist() == b
    assert set(result.arrays["vs1_matched_signed_latent"].tolist()) == {-1, *b}
    for i, j in zip(a, result.arrays["vs1_nearest_signed_latent"].tolist(), strict=True):
        assert best_by_hand(random_sae, other, [i], [j])[0] == pytest.approx(
            forward[a.index(i)], abs=1e-6
        )


def test_the_same_latents_in_another_order_are_found(
    random_sae: SAE, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    result = stability(random_sae, tiny_cache, saved(reordered(random_sae), tmp_path))
    own = {n: v for n, v in values(result).items() if n.startswith("vs1") and "null" not in n}
    assert own.pop("vs1_alive") == len(result.arrays["latent"])
    assert own == pytest.approx(dict.fromkeys(own, 1), abs=1e-6)
    assert values(result)["vs1_mmcs_signed_forward_null"] < 0.7


def test_latents_that_point_the_other_way_count_by_absolute_cosine_alone(
    exact: SAE, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    half = dataclasses.replace(
        exact, W_enc=exact.W_enc[:, :16], b_enc=exact.b_enc[:16], W_dec=exact.W_dec[:16]
    )
    turned = dataclasses.replace(
        exact, W_enc=exact.W_enc[:, 16:], b_enc=exact.b_enc[16:], W_dec=exact.W_dec[16:]
    )
    found = values(stability(half, tiny_cache, saved(turned, tmp_path)))
    assert found["vs1_pw_mcc_abs"] == found["vs1_mmcs_abs_forward"] == 1
    assert found["vs1_pw_mcc_signed"] == found["vs1_mmcs_signed_forward"] == 0


def test_dead_latents_that_agree_count_for_nothing(
    random_sae: SAE, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    """The other SAE shares the dead latents' rows and none of the others."""
    dead = torch.arange(40) < 20
    own = dataclasses.replace(random_sae, b_enc=random_sae.b_enc.where(~dead, -1e6))
    fresh = torch.randn(40, 16, generator=torch.Generator().manual_seed(2))
    other = dataclasses.replace(own, W_dec=own.W_dec.where(dead[:, None], fresh))
    found = values(stability(own, tiny_cache, saved(other, tmp_path)))
    assert found["vs1_share_over_0.7_signed_forward"] < 0.2
    assert found["vs1_mmcs_signed_forward"] < 0.7


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_changes_no_number(
    batch_size: int, random_sae: SAE, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    other = saved(another(), tmp_path)
    config: dict[str, Any] = {"max_rows": 90, "covariance_rows": 50}
    whole = stability(random_sae, tiny_cache, other, **config)
    parts = stability(random_sae, tiny_cache, other, batch_size=batch_size, **config)
    assert values(parts) == pytest.approx(values(whole), abs=1e-6)


def test_each_number_stands_beside_both_nulls_and_each_other_sae_by_its_place(
    random_sae: SAE, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    paths = [saved(another(20 + i), tmp_path / str(i)) for i in range(2)]
    names = values(stability(random_sae, tiny_cache, *paths)).keys()
    for number in (1, 2):
        own = [n for n in names if n.startswith(f"vs{number}_") and "null" not in n]
        assert len(own) == 2 * 10 + 2
        for name in own:
            if name != f"vs{number}_alive":
                assert {f"{name}_null", f"{name}_null_cov"} <= names


@pytest.mark.parametrize(("signs", "without"), [("signed", "_abs"), ("abs", "_signed")])
def test_one_kind_of_cosine_may_be_enough(
    signs: str, without: str, random_sae: SAE, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    result = stability(random_sae, tiny_cache, saved(another(), tmp_path), signs=signs)
    assert f"vs1_pw_mcc_{signs}" in result.metrics
    assert not [name for name in result.metrics if without in name]


def test_too_many_latents_for_a_matching_are_said_and_mutual_pairs_named(
    random_sae: SAE,
    tiny_cache: ActivationCache,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = saved(another(), tmp_path)
    with caplog.at_level(logging.WARNING):
        result = stability(random_sae, tiny_cache, other, max_matching=10)
    assert "vs1 has no pw_mcc: " in caplog.text
    assert "more than max_matching=10. See vs1_mutual_share" in caplog.text
    assert not [name for name in result.metrics if "pw_" in name]
    assert not [name for name in result.arrays if "matched" in name]
    assert "vs1_mutual_cos_abs" in result.metrics


def test_an_sae_of_another_layer_is_looked_at_on_its_own_activations(
    random_sae: SAE, tiny_cache: ActivationCache, trained_on: TrainedOn, tmp_path: Path
) -> None:
    elsewhere = trained_on(another(), tiny_cache, hook="mlp_out.1")
    result = stability(trained_on(random_sae, tiny_cache), tiny_cache, saved(elsewhere, tmp_path))
    assert result.arrays["vs1_latent"].tolist() == alive_by_hand(elsewhere, tiny_cache, "mlp_out.1")
    assert "at mlp_out.1" in result.metrics["vs1_mmcs_abs_forward"].definition


def test_an_sae_of_another_model_is_refused(
    random_sae: SAE, tiny_cache: ActivationCache, trained_on: TrainedOn, tmp_path: Path
) -> None:
    stranger = trained_on(another(), tiny_cache, model="gpt9", model_fingerprint="f" * 64)
    with pytest.raises(CacheError, match="trained on model 'gpt9'"):
        stability(random_sae, tiny_cache, saved(stranger, tmp_path))


def test_an_sae_of_another_width_is_refused(
    random_sae: SAE, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    narrow = SAE(torch.eye(8), torch.zeros(8), torch.eye(8), torch.zeros(8), TopK(1))
    with pytest.raises(CacheError, match="width 8, but 'resid_post.0' of .* has width 16"):
        stability(random_sae, tiny_cache, saved(narrow, tmp_path))


def test_a_folder_without_an_sae_is_refused(
    random_sae: SAE, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="holds no finished SAE"):
        stability(random_sae, tiny_cache, tmp_path / "nothing")


def test_runs_that_began_alike_and_the_very_same_sae_are_pointed_out(
    random_sae: SAE,
    tiny_cache: ActivationCache,
    trained_on: TrainedOn,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = trained_on(random_sae, tiny_cache)
    twin = saved(trained_on(reordered(random_sae), tiny_cache), tmp_path / "twin")
    same = saved(own, tmp_path / "same")
    other_seed = trained_on(
        reordered(random_sae), tiny_cache, config={"seed": 1, "d_sae": random_sae.d_sae}
    )
    with caplog.at_level(logging.WARNING):
        stability(own, tiny_cache, twin, same, saved(other_seed, tmp_path / "other"))
    told = [r.getMessage() for r in caplog.records if r.name == "saekit.evals.stability"]
    assert len(told) == 2 + 3  # The last three: no latents are left for subspaces.
    assert "twin was trained from the seed of the SAE evaluated" in told[0]
    assert "same is the very SAE that is evaluated" in told[1]


def test_without_another_sae_that_is_said(
    random_sae: SAE, tiny_cache: ActivationCache, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = stability(random_sae, tiny_cache)
    assert list(result.metrics) == ["alive_share"]
    assert "against=() names no SAE to compare with" in caplog.text


def test_an_sae_that_never_fires_is_left_out_with_the_reason(
    random_sae: SAE,
    silent: SAE,
    tiny_cache: ActivationCache,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = saved(another(), tmp_path / "other")
    with caplog.at_level(logging.WARNING):
        result = stability(random_sae, tiny_cache, saved(silent, tmp_path / "silent"), other)
    assert "vs1 is left out: of " in caplog.text
    assert "vs2_mmcs_abs_forward" in result.metrics
    assert not [name for name in result.metrics if name.startswith("vs1")]


def test_a_latent_without_a_direction_is_left_out(
    exact: SAE, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    W_dec = exact.W_dec.clone()
    W_dec[3] = 0
    without = dataclasses.replace(exact, W_dec=W_dec)
    result = stability(without, tiny_cache, saved(exact, tmp_path))
    assert result.arrays["latent"].tolist() == [i for i in range(32) if i != 3]
    assert result.metrics["alive_share"].value == 31 / 32
    assert result.metrics["vs1_mmcs_signed_forward"].value == 1
    assert result.metrics["vs1_mmcs_signed_backward"].value == 31 / 32


def test_what_is_not_found_one_by_one_may_lie_in_the_same_subspace(
    tiny_cache: ActivationCache, exact: SAE, tmp_path: Path
) -> None:
    """Both have their rows in the first six dimensions; the second has them turned there."""
    generator = torch.Generator().manual_seed(4)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    eye = torch.eye(6, 16)
    rows, turned = eye, torch.cat([turn, torch.zeros(6, 10)], 1)

    def with_rows(W: torch.Tensor) -> SAE:
        both = torch.cat([W, -W])
        return SAE(both.T, torch.zeros(12), both, torch.zeros(16), exact.activation)

    found = values(
        stability(
            with_rows(rows),
            tiny_cache,
            saved(with_rows(turned), tmp_path),
            over=(0.99,),
            subspace_rank=6,
        )
    )
    assert found["vs1_unfound_subspace_6"] == pytest.approx(1, abs=1e-6)
    assert found["vs1_unfound_subspace_6_null"] < 0.7
    assert found["vs1_share_over_0.99_abs_forward"] == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"least": 0}, "least=0 must be at least 1"),
        ({"max_matching": -1}, "max_matching=-1 must not be negative"),
        ({"over": ()}, r"over=\(\) are cosines, at least one"),
    ],
)
def test_bad_values_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StabilityConfig(**config)


def test_paths_survive_as_plain_data() -> None:
    cfg = StabilityConfig(against=(Path("a"), Path("b/c")))
    assert cfg.to_dict()["against"] == ["a", "b/c"]
    assert StabilityConfig.from_dict(cfg.to_dict()) == cfg
