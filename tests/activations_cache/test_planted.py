from pathlib import Path

import pytest
import torch
from torch import Tensor

from saekit.activations_cache.planted import CONTEXT, HOOK, cache_of, planted_cache
from saekit.synthetic import Synthetic, SyntheticConfig


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
