from pathlib import Path

import pytest
import torch
from torch import Tensor

from saekit.activations_cache.planted import (
    CONTEXT,
    DICTIONARY,
    HOOK,
    cache_of,
    fingerprint_of,
    planted_cache,
    synthetic_of,
)
from saekit.activations_cache.shuffle import shuffle
from saekit.activations_cache.store import ActivationCache
from saekit.activations_cache.verify import verify
from saekit.errors import CacheError
from saekit.synthetic import Synthetic, SyntheticConfig, hierarchical_tree


@pytest.fixture
def synthetic() -> Synthetic:
    return Synthetic.from_config(SyntheticConfig(n_features=12, d_in=6))


def test_a_planted_cache_holds_the_synthetic_rows_in_order(
    tmp_path: Path, synthetic: Synthetic
) -> None:
    cache = planted_cache(tmp_path, synthetic, 2500, shard_rows=1500)
    x = synthetic.rows(0, 2500)[0]
    torch.testing.assert_close(cache.row_slice(HOOK, 0, 2500), x)
    assert [reader.shard.rows for reader in cache.readers] == [1500, 1000]
    stats = cache.stats(HOOK)
    assert stats.mean_norm == pytest.approx(float(x.norm(dim=1).mean()))
    variance = float((x - x.mean(0)).square().sum(1).mean())
    assert stats.covariance_trace == pytest.approx(variance, rel=1e-4)


def test_its_documents_are_windows_some_of_which_can_be_held_out(
    tmp_path: Path, synthetic: Synthetic
) -> None:
    cache = planted_cache(tmp_path, synthetic, 3000, holdout=0.3, shard_rows=1000)
    windows = list(cache.windows("all"))
    assert sum(len(window.tokens) for window in windows) == 3000
    assert max(len(window.tokens) for window in windows) == CONTEXT
    assert [window.document for window in windows] == list(range(len(cache.documents)))
    train, test = len(cache.indices("train")), len(cache.indices("test"))
    assert train + test == 3000 and 0 < test < train


def test_its_gradients_are_what_the_function_says(tmp_path: Path, synthetic: Synthetic) -> None:
    def gradient(x: Tensor, codes: Tensor) -> Tensor:
        return codes[:, :1] * x

    cache = planted_cache(tmp_path, synthetic, 2000, gradient=gradient, shard_rows=1500)
    x, codes = synthetic.rows(0, 2000)
    got = cache.take(f"{HOOK}.grad", torch.arange(2000))
    torch.testing.assert_close(got, codes[:, :1] * x)


def test_rows_made_elsewhere_become_a_cache(tmp_path: Path) -> None:
    x = torch.randn(300, 4)
    cache = cache_of([(x[:200], None), (x[200:], None)], tmp_path)
    assert cache.row_slice(HOOK, 0, 300).equal(x)
    assert not cache.has_gradients


LAWS = [
    SyntheticConfig(n_features=12, d_in=6, magnitude=1.1, magnitude_sd=0.3, seed=5),
    SyntheticConfig(n_features=12, d_in=6, correlation=0.3, correlation_rank=4),
    SyntheticConfig(n_features=12, d_in=6, n_trees=2),
]


@pytest.mark.parametrize(
    "made", [*map(Synthetic.from_config, LAWS), hierarchical_tree(4)], ids=range(4)
)
def test_its_dictionary_is_read_back_and_makes_the_same_rows(
    tmp_path: Path, made: Synthetic
) -> None:
    cache = planted_cache(tmp_path, made, 1200)
    read = synthetic_of(ActivationCache.open(tmp_path))
    for name in ("directions", "p", "bias", "parent", "group", "magnitude", "magnitude_sd", "seed"):
        held, found = getattr(made, name), getattr(read, name)
        assert found.equal(held) if isinstance(held, Tensor) else found == held, name
    assert read.rows(0, 1200)[0].equal(cache.row_slice(HOOK, 0, 1200))
    assert cache.model_fingerprint == fingerprint_of(read) == fingerprint_of(made)
    assert not verify(cache)


def test_a_config_stands_in_the_manifest_and_gives_the_same_cache(tmp_path: Path) -> None:
    of_config = planted_cache(tmp_path / "a", LAWS[0], 500)
    of_made = planted_cache(tmp_path / "b", Synthetic.from_config(LAWS[0]), 500)
    assert of_config.fingerprint == of_made.fingerprint
    assert SyntheticConfig.from_dict(of_config.manifest.config["synthetic"]) == LAWS[0]
    assert "synthetic" not in of_made.manifest.config


def test_caches_of_two_dictionaries_are_of_two_models(tmp_path: Path) -> None:
    short, long, other = (
        planted_cache(tmp_path / str(i), law, n)
        for i, (law, n) in enumerate([(LAWS[0], 200), (LAWS[0], 300), (LAWS[1], 200)])
    )
    assert short.model_fingerprint == long.model_fingerprint != other.model_fingerprint


def test_a_dictionary_that_is_gone_altered_or_was_never_kept_is_refused(tmp_path: Path) -> None:
    cache = planted_cache(tmp_path / "cache", LAWS[0], 300)
    file = cache.path / DICTIONARY
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CacheError, match="has fingerprint .* it was altered. Put it back"):
        synthetic_of(cache)
    file.unlink()
    with pytest.raises(CacheError, match="has no planted.safetensors, which holds what its rows"):
        synthetic_of(cache)
    # As every planted cache was before the dictionary was kept: readable, but not the answer.
    before = cache_of([(torch.randn(300, 4), None)], tmp_path / "before")
    assert before.row_slice(HOOK, 0, 3).shape == (3, 4)
    with pytest.raises(CacheError, match="keeps no dictionary.*plant one with `saekit plant"):
        synthetic_of(before)


def test_a_shuffled_cache_is_sent_to_the_one_it_was_made_from(tmp_path: Path) -> None:
    shuffled = shuffle(planted_cache(tmp_path / "cache", LAWS[0], 300), tmp_path / "shuffled")
    with pytest.raises(CacheError, match="is shuffled: .* Give the cache that it was made from"):
        synthetic_of(shuffled)
