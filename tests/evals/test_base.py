import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from saekit import ActivationCache, checkpoint, evaluate
from saekit.errors import CacheError, ConfigError
from saekit.evals import _kinds
from saekit.evals._base import EvalConfig, matching_hook
from saekit.evals.core import CoreConfig
from saekit.evals.examples import ExamplesConfig
from saekit.results import EvalResult
from saekit.sae import SAE, TopK

HOOK = "resid_post.0"
TrainedOn = Callable[..., SAE]


def test_the_evaluations_are_the_public_modules_of_the_folder() -> None:
    assert {"core", "examples"} <= set(_kinds.names())
    assert not [name for name in _kinds.names() if name.startswith("_")]


def test_an_unknown_evaluation_is_refused_with_the_nearest_name(
    exact: SAE, tiny_cache: ActivationCache
) -> None:
    with pytest.raises(ConfigError, match="no evaluation 'cores'; did you mean 'core'"):
        evaluate("cores", exact, tiny_cache, hook=HOOK)


def test_the_hook_comes_from_the_sae(
    exact: SAE, tiny_cache: ActivationCache, trained_on: TrainedOn
) -> None:
    assert matching_hook(trained_on(exact, tiny_cache), tiny_cache, None) == HOOK


def test_an_sae_of_unknown_origin_needs_its_hook(exact: SAE, tiny_cache: ActivationCache) -> None:
    with pytest.raises(ConfigError, match="does not say which hook.*resid_post.0, attn_z.1"):
        evaluate("core", exact, tiny_cache)


def test_an_sae_of_another_model_is_refused(
    exact: SAE, tiny_cache: ActivationCache, trained_on: TrainedOn
) -> None:
    stranger = trained_on(exact, tiny_cache, model="gpt9", model_fingerprint="f" * 64)
    with pytest.raises(CacheError, match="trained on model 'gpt9' .fingerprint ffffffffffff"):
        evaluate("core", stranger, tiny_cache)


def test_an_sae_of_another_hook_is_refused(
    exact: SAE, tiny_cache: ActivationCache, trained_on: TrainedOn
) -> None:
    with pytest.raises(CacheError, match="trained on hook 'resid_post.0', but hook 'mlp_out.1'"):
        evaluate("core", trained_on(exact, tiny_cache), tiny_cache, hook="mlp_out.1")


def test_a_hook_that_was_not_harvested_is_refused(exact: SAE, tiny_cache: ActivationCache) -> None:
    with pytest.raises(CacheError, match="no activations at 'resid_post.7'"):
        evaluate("core", exact, tiny_cache, hook="resid_post.7")


def test_an_sae_of_another_width_is_refused(tiny_cache: ActivationCache) -> None:
    narrow = SAE(torch.eye(8), torch.zeros(8), torch.eye(8), torch.zeros(8), TopK(1))
    with pytest.raises(CacheError, match="width 8, but 'resid_post.0' of .* has width 16"):
        evaluate("core", narrow, tiny_cache, hook=HOOK)


def test_a_transcoder_is_refused(tiny_cache: ActivationCache) -> None:
    other = SAE(torch.eye(16), torch.zeros(16), torch.ones(16, 4), torch.zeros(4), TopK(1))
    with pytest.raises(CacheError, match="width 16 into width 4"):
        evaluate("core", other, tiny_cache, hook=HOOK)


def test_the_config_of_another_evaluation_is_refused(
    exact: SAE, tiny_cache: ActivationCache
) -> None:
    with pytest.raises(ConfigError, match="'core' takes a CoreConfig, not a ExamplesConfig"):
        evaluate("core", exact, tiny_cache, hook=HOOK, config=ExamplesConfig())


def test_a_model_that_is_no_longer_the_same_is_refused(
    exact: SAE, tiny_cache: ActivationCache
) -> None:
    altered = ActivationCache(
        tiny_cache.path, dataclasses.replace(tiny_cache.manifest, model_fingerprint="f" * 64)
    )
    with pytest.raises(CacheError, match="fingerprint ffffffffffff, but that name now leads to"):
        evaluate("core", exact, altered, hook=HOOK)


@pytest.mark.parametrize("field", ["max_rows", "batch_size"])
def test_counts_below_one_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}=0 must be at least 1"):
        EvalConfig.from_dict({field: 0})


def test_a_result_is_saved_and_says_what_it_is_about(
    exact: SAE, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    cfg = CoreConfig(ce_tokens=0, split="all")
    result = evaluate("core", exact, tiny_cache, hook=HOOK, config=cfg, out=tmp_path)
    read = EvalResult.load(tmp_path, "core")
    assert read.metrics == result.metrics
    assert (read.hook, read.split, read.exclude) == (HOOK, "all", ("special",))
    assert read.cache_fingerprint == tiny_cache.fingerprint
    assert CoreConfig.from_dict(read.config) == cfg


def test_the_fingerprint_is_that_of_the_saved_file(exact: SAE, tmp_path: Path) -> None:
    assert checkpoint.fingerprint(exact) == checkpoint.save(exact, tmp_path)
