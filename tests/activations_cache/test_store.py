import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit import ActivationCache
from saekit.documents import held_out
from saekit.errors import CacheError, ConfigError

HOOK = "resid_post.0"


@settings(max_examples=25, deadline=None)
@given(batch_size=st.integers(1, 1000), seed=st.integers(0, 5))
def test_an_epoch_gives_every_row_of_the_split_once(
    tiny_cache: ActivationCache, batch_size: int, seed: int
) -> None:
    batches = list(tiny_cache.batches(HOOK, batch_size, seed=seed))
    rows = torch.cat(batches)
    index = tiny_cache.indices("train")
    expected = tiny_cache.rows(HOOK, index)
    assert rows.shape == expected.shape
    order = sorted(map(tuple, rows.tolist()))
    assert order == sorted(map(tuple, expected.tolist()))


def test_the_order_is_set_by_the_seed_and_differs_by_epoch(tiny_cache: ActivationCache) -> None:
    def stream(seed: int) -> torch.Tensor:
        return torch.cat(list(tiny_cache.batches(HOOK, 64, seed=seed, epochs=2)))

    first, again, other = stream(1), stream(1), stream(2)
    assert first.equal(again)
    assert not first.equal(other)
    half = len(first) // 2
    assert not first[:half].equal(first[half:])


@pytest.mark.parametrize("start", [0, 1, 7, 40])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_reader_started_later_gives_the_rest_of_the_stream(
    tiny_cache: ActivationCache, start: int, drop_last: bool
) -> None:
    def stream(start: int) -> list[torch.Tensor]:
        options = {"seed": 3, "epochs": 4, "drop_last": drop_last, "start": start}
        return list(tiny_cache.batches(HOOK, 50, **options))  # type: ignore[arg-type]

    whole, rest = stream(0), stream(start)
    assert len(rest) == len(whole) - start > 0
    assert all(ours.equal(theirs) for ours, theirs in zip(rest, whole[start:], strict=True))


def test_splits_are_disjoint_by_document_and_together_everything(
    tiny_cache: ActivationCache,
) -> None:
    train, test = (set(tiny_cache.indices(split).tolist()) for split in ("train", "test"))
    assert train and test and not train & test
    assert train | test == set(tiny_cache.indices("all").tolist())
    for window in tiny_cache.windows("test"):
        assert held_out(tiny_cache.documents[window.document], 0.25)


def test_rows_come_in_the_order_asked_for_across_shards(tiny_cache: ActivationCache) -> None:
    index = torch.tensor([899, 0, 450, 0])
    expected = torch.stack([tiny_cache.row_slice(HOOK, i, i + 1)[0] for i in index.tolist()])
    assert tiny_cache.rows(HOOK, index).equal(expected)


def test_a_hook_that_was_not_harvested_is_refused_by_name(tiny_cache: ActivationCache) -> None:
    with pytest.raises(CacheError, match=r"no activations at 'mlp_out\.0'; it holds resid_post\.0"):
        next(tiny_cache.batches("mlp_out.0", 8))


def test_a_batch_larger_than_the_split_is_refused_where_it_must_be_full(
    tiny_cache: ActivationCache,
) -> None:
    with pytest.raises(ConfigError, match="too few for a batch of 5,000"):
        next(tiny_cache.batches(HOOK, 5_000, drop_last=True))


def test_aligned_columns_come_from_the_same_rows(tiny_cache: ActivationCache) -> None:
    columns = ("resid_post.0", "mlp_out.1")
    together = list(tiny_cache.aligned(columns, 50, seed=1))
    for column in columns:
        alone = list(tiny_cache.batches(column, 50, seed=1))
        assert len(alone) == len(together)
        assert all(b[column].equal(x) for b, x in zip(together, alone, strict=True))


def test_gradients_that_were_not_kept_are_refused(tiny_cache: ActivationCache) -> None:
    with pytest.raises(CacheError, match="holds no gradients: harvest again with --gradients"):
        tiny_cache.row_slice("resid_post.0.grad", 0, 1)


def test_an_unknown_kind_of_token_is_refused(tiny_cache: ActivationCache) -> None:
    with pytest.raises(ConfigError, match="token kind 'padding' is unknown"):
        tiny_cache.indices("all", ("padding",))
