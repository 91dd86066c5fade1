import dataclasses
import logging
from typing import Any

import pytest
import torch

from saekit import ActivationCache, evaluate
from saekit.activations_cache.model import LanguageModel
from saekit.errors import CacheError, ConfigError
from saekit.evals._metrics import Mean
from saekit.evals._resample import Resamples
from saekit.evals._splice import Losses
from saekit.evals.core import Core, CoreConfig
from saekit.results import EvalResult
from saekit.sae import SAE

HOOK = "resid_post.0"


def core(sae: SAE, cache: ActivationCache, **config: Any) -> EvalResult:
    return evaluate("core", sae, cache, hook=HOOK, config=CoreConfig(**config))


def values(result: EvalResult) -> dict[str, float]:
    return {name: metric.value for name, metric in result.metrics.items()}


def test_an_exact_sae_loses_nothing(exact: SAE, tiny_cache: ActivationCache) -> None:
    found = values(core(exact, tiny_cache))
    assert found["ev"] == 1
    assert found["mse"] == 0
    assert found["ce_delta"] == 0
    assert found["kl_sae"] == 0
    assert found["relative_reconstruction_bias"] == pytest.approx(1)
    assert found["l0_mean"] == found["l0_p5"] == found["l0_p95"] == 16


def test_a_silent_sae_is_zero_ablation(silent: SAE, tiny_cache: ActivationCache) -> None:
    found = values(core(silent, tiny_cache))
    assert found["ce_sae"] == found["ce_zero"] != found["ce_clean"]
    assert found["ce_recovered_zero"] == 0
    assert found["dead_share"] == 1
    assert found["l0_mean"] == 0


def test_an_sae_that_gives_the_train_mean_is_mean_ablation(
    silent: SAE, tiny_cache: ActivationCache
) -> None:
    mean = tiny_cache.rows(HOOK, tiny_cache.indices("train")).double().mean(0).float()
    found = values(core(dataclasses.replace(silent, b_dec=mean), tiny_cache))
    assert found["ce_sae"] == pytest.approx(found["ce_mean"], rel=1e-6)


def test_reconstruction_agrees_with_the_whole_split_at_once(
    random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    x = tiny_cache.rows(HOOK, tiny_cache.indices("test"))
    z = random_sae.encode(x)
    error = (x - z @ random_sae.W_dec).square().sum().double()
    result = core(random_sae, tiny_cache, ce_tokens=0, batch_size=50)
    assert result.metrics["ev"].n == len(x)
    assert result.metrics["ev"].value == pytest.approx(
        float(1 - error / (x - x.mean(0)).square().sum()), rel=1e-5
    )
    assert result.metrics["l0_mean"].value == pytest.approx(float((z > 0).sum(1).float().mean()))
    assert result.arrays["density"].tolist() == pytest.approx((z > 0).float().mean(0).tolist())


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_changes_no_number(
    batch_size: int, random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    whole = core(random_sae, tiny_cache, ce_tokens=0, max_rows=100)
    parts = core(random_sae, tiny_cache, ce_tokens=0, max_rows=100, batch_size=batch_size)
    assert values(parts) == pytest.approx(values(whole), rel=1e-5)


def test_without_ce_tokens_the_model_is_not_loaded(
    exact: SAE, tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanguageModel, "load", None)
    assert not [name for name in core(exact, tiny_cache, ce_tokens=0).metrics if "ce_" in name]


def test_each_number_says_over_how_many_it_is_taken(
    exact: SAE, tiny_cache: ActivationCache
) -> None:
    metrics = core(exact, tiny_cache, ce_tokens=60, max_rows=100).metrics
    assert {metrics[name].n for name in ("ev", "mse", "l0_mean", "dead_share")} == {100}
    assert {metrics[name].n for name in ("ce_clean", "ce_sae", "kl_sae")} == {60}
    assert "none of these 100 rows" in metrics["dead_share"].definition
    assert "below 3/n = 0.03" in metrics["dead_share"].definition


def test_a_ratio_without_meaning_is_left_out_and_the_reason_given(
    silent: SAE, tiny_cache: ActivationCache, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        metrics = core(silent, tiny_cache, ce_tokens=0).metrics
    assert "relative_reconstruction_bias" not in metrics
    assert "No relative_reconstruction_bias: " in metrics["mse"].definition
    assert "relative_reconstruction_bias is left out" in caplog.text


def test_an_ablation_that_helps_gives_no_share(
    exact: SAE, tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saekit.evals._metrics.MIN_CE_RISE", 1e9)
    metrics = core(exact, tiny_cache).metrics
    assert not {"ce_recovered_zero", "ce_recovered_mean"} & set(metrics)
    assert "there is nothing to win back" in metrics["ce_zero"].definition


def test_excluded_rows_alter_no_number(
    random_sae: SAE, tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = core(random_sae, tiny_cache)
    kept = torch.zeros(tiny_cache.n_rows, dtype=torch.bool)
    kept[tiny_cache.indices("all")] = True
    read, read_slice = ActivationCache.rows, ActivationCache.row_slice

    def spoilt(self: ActivationCache, hook: str, index: torch.Tensor) -> torch.Tensor:
        return read(self, hook, index).where(kept[index][:, None], torch.nan)

    def spoilt_slice(self: ActivationCache, hook: str, start: int, stop: int) -> torch.Tensor:
        return read_slice(self, hook, start, stop).where(kept[start:stop][:, None], torch.nan)

    monkeypatch.setattr(ActivationCache, "rows", spoilt)
    monkeypatch.setattr(ActivationCache, "row_slice", spoilt_slice)
    assert not kept.all()
    assert core(random_sae, tiny_cache).metrics == before.metrics


def test_a_mask_that_keeps_the_special_tokens_gives_other_numbers(
    random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    masked, unmasked = core(random_sae, tiny_cache), core(random_sae, tiny_cache, exclude=())
    assert unmasked.metrics["ev"].n > masked.metrics["ev"].n
    assert unmasked.metrics["ce_sae"].value != masked.metrics["ce_sae"].value


def test_activations_that_the_model_does_not_give_are_refused(
    random_sae: SAE, tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ActivationCache.row_slice
    monkeypatch.setattr(ActivationCache, "row_slice", lambda *where: 1.1 * read(*where))
    with pytest.raises(CacheError, match="now gives other activations at 'resid_post.0'"):
        core(random_sae, tiny_cache)


def test_a_split_without_rows_is_refused(exact: SAE, tiny_cache: ActivationCache) -> None:
    config = {**tiny_cache.manifest.config, "holdout": 0.0}
    cache = ActivationCache(
        tiny_cache.path, dataclasses.replace(tiny_cache.manifest, config=config)
    )
    with pytest.raises(CacheError, match="split 'test' of .* has no rows outside"):
        core(exact, cache)


@pytest.mark.parametrize("name", ["ce_tokens", "n_bootstrap"])
def test_a_negative_number_is_refused(name: str) -> None:
    given: dict[str, Any] = {name: -1}
    with pytest.raises(ConfigError, match=f"{name}=-1 must not be negative"):
        CoreConfig(**given)


def test_numbers_have_intervals_by_document(random_sae: SAE, tiny_cache: ActivationCache) -> None:
    metrics = core(random_sae, tiny_cache).metrics
    for name in (
        "ev",
        "ev_token_mean",
        "mse",
        "l1_mean",
        "ce_clean",
        "ce_sae",
        "kl_sae",
    ):
        interval = metrics[name].interval
        assert interval is not None and interval[0] < metrics[name].value < interval[1], name
    assert metrics["dead_share"].interval is None
    again = core(random_sae, tiny_cache, batch_size=50).metrics["ev"].interval
    assert again == pytest.approx(metrics["ev"].interval, rel=1e-9)
    assert core(random_sae, tiny_cache, seed=1).metrics["ev"].interval != metrics["ev"].interval
    without = core(random_sae, tiny_cache, n_bootstrap=0)
    assert not any(metric.interval for metric in without.metrics.values())
    assert without.metrics["ev"].value == metrics["ev"].value


def test_the_loss_of_a_resample_is_that_of_its_documents(
    random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    eval_ = Core(CoreConfig(n_bootstrap=3), random_sae, tiny_cache, HOOK)
    of = {5: 1.0, 8: 3.0}
    losses = {
        name: Losses(documents={d: (Mean(more * v, 2), Mean(v, 1)) for d, v in of.items()})
        for name, more in (("clean", 2.0), ("sae", 3.0), ("zero", 10.0), ("mean", 2.0))
    }
    found = eval_._loss_samples(losses)
    weights = Resamples.of(torch.tensor([5, 8]), 3, 0).weights.double()
    ce = (weights @ torch.tensor([1.0, 3.0]).double()) / weights.sum(1) / 2
    assert found["ce_sae"].tolist() == pytest.approx((3 * ce).tolist())
    assert found["ce_recovered_zero"].tolist() == pytest.approx([7 / 8] * 4)
    assert found["ce_recovered_mean"].isnan().all()
