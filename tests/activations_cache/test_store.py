from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit import ActivationCache
from saekit.activations_cache.shards import ShardReader
from saekit.activations_cache.shuffle import shuffle
from saekit.activations_cache.storage import storage
from saekit.documents import held_out
from saekit.errors import CacheError, ConfigError

Make = Callable[..., ActivationCache]


@pytest.fixture(scope="module")
def cache(make_cache: Make, tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    return make_cache(tmp_path_factory.mktemp("store") / "c")


def test_splits_are_disjoint_by_document_and_together_everything(cache: ActivationCache) -> None:
    train, test = (set(cache.indices(split).tolist()) for split in ("train", "test"))
    assert train and test and not train & test
    assert train | test == set(cache.indices("all").tolist())
    document = cache.take("document", torch.arange(cache.n_rows)).tolist()
    assert all(held_out(cache.documents[document[row]], 0.25) for row in test)


@pytest.mark.parametrize("exclude", [(), ("special",)])
def test_rows_that_are_not_finite_are_left_out_whatever_is_asked_for(
    cache: ActivationCache, exclude: tuple[str, ...]
) -> None:
    index = cache.indices("all", exclude)
    assert cache.rows("h", index).isfinite().all()
    left_out = {row for row in range(cache.n_rows) if row % 37 == 36}
    kept = {w.start + i for w in cache.windows("all", ()) for i in w.keep.nonzero().flatten()}
    assert left_out and not left_out & set(index.tolist()) | left_out & {int(i) for i in kept}


@given(index=st.lists(st.integers(0, 300), max_size=60), dtype=st.sampled_from([None, "float"]))
def test_rows_come_in_the_order_asked_for_across_shards(
    cache: ActivationCache, index: list[int], dtype: str | None
) -> None:
    """Dense runs are read, scattered rows sought out: lists of 60 of 301 are of both kinds."""
    rows = cache.take(
        "h", torch.tensor(index, dtype=torch.int64), dtype=getattr(torch, dtype or "float")
    )
    assert rows.shape == (len(index), 3)
    for row, x in zip(index, rows, strict=True):
        assert row % 37 == 36 or x.tolist() == [row, row + 0.25, row + 0.5]


@pytest.mark.parametrize("rows", [range(300), range(100, 180), range(0, 300, 2), range(0, 300, 20)])
def test_long_runs_are_read_and_scattered_rows_are_sought_out(
    cache: ActivationCache, rows: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    for unwanted in ("rows_into", "bytes_into") if rows.step < 4 else ("read", "read_into"):
        monkeypatch.delattr(ShardReader, unwanted)
    assert cache.take("token", torch.tensor(rows)).tolist() == list(rows)


def test_int8_rows_are_scaled_and_others_come_as_stored_where_no_type_is_asked_for(
    make_cache: Make, tmp_path: Path
) -> None:
    index = torch.tensor([3, 200])
    x = make_cache(tmp_path / "8", dtype=torch.int8).take("h", index, dtype=None)
    assert x.dtype == torch.float32 and x.tolist() == [[3.0] * 3, [200.0] * 3]
    half = make_cache(tmp_path / "16", dtype=torch.bfloat16)
    assert half.take("h", index, dtype=None).dtype == torch.bfloat16
    assert half.rows("h", index).dtype == torch.float32


def test_documents_that_each_shard_numbers_from_0_get_numbers_of_the_cache(
    cache: ActivationCache, make_cache: Make, tmp_path: Path
) -> None:
    apart = make_cache(tmp_path / "apart", numbered_apart=True)
    every = torch.arange(cache.n_rows)
    assert apart.take("document", every).equal(cache.take("document", every))
    assert apart.indices("test").equal(cache.indices("test"))
    ours, theirs = (list(c.windows("test")) for c in (apart, cache))
    assert [w.document for w in ours] == [w.document for w in theirs]


def test_windows_are_those_of_the_text_in_order(cache: ActivationCache) -> None:
    windows = list(cache.windows("all"))
    assert torch.cat([w.tokens for w in windows]).equal(torch.arange(cache.n_rows))
    lengths = [len(w.tokens) for w in windows]
    assert lengths == [10] * 13 + [10] * 7 + [10] * 10 + [1]
    assert all(int(w.tokens[0]) == w.start and not w.keep[0] for w in windows)
    test = [w.start for w in cache.windows("test")]
    assert test == [w.start for w in windows if held_out(cache.documents[w.document], 0.25)]


def test_a_shuffled_cache_has_no_windows_and_names_the_one_that_has(
    make_cache: Make, tmp_path: Path
) -> None:
    source = make_cache(tmp_path / "source")
    shuffled = shuffle(source, tmp_path / "out")
    with pytest.raises(CacheError, match=rf"made from, {source.url}"):
        shuffled.windows()


def test_batches_are_one_shuffled_epoch_in_float32(make_cache: Make, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", dtype=torch.float16)
    batches = list(cache.batches("h", 50, seed=1))
    assert {x.dtype for x in batches} == {torch.float32}
    assert sorted(torch.cat(batches)[:, 0].tolist()) == cache.indices("train").tolist()
    assert torch.cat(batches)[:, 0].tolist() != cache.indices("train").tolist()


def test_a_hook_that_was_not_harvested_is_refused_by_name(cache: ActivationCache) -> None:
    with pytest.raises(CacheError, match=r"no activations at 'mlp_out\.0'; it holds h"):
        cache.batches("mlp_out.0", 8)
    with pytest.raises(CacheError, match="no activations at 'source'"):
        cache.take("source", torch.tensor([0]))
    with pytest.raises(CacheError, match="no activations at 'g'"):
        cache.stats("g")


def test_gradients_that_were_not_kept_are_refused(cache: ActivationCache) -> None:
    config = {**cache.manifest.config, "gradients": False}
    without = ActivationCache(cache.path, replace(cache.manifest, config=config))
    with pytest.raises(CacheError, match="holds no gradients: harvest again with --gradients"):
        without.row_slice("h.grad", 0, 1)


def test_an_unknown_kind_of_token_is_refused(cache: ActivationCache) -> None:
    with pytest.raises(ConfigError, match="token kind 'padding' is unknown"):
        cache.indices("all", ("padding",))


def test_an_unfinished_cache_is_refused_with_the_command_that_finishes_it(
    cache: ActivationCache, tmp_path: Path
) -> None:
    replace(cache.manifest, complete=False).save(storage(tmp_path))
    with pytest.raises(CacheError, match=r"not complete \(301 rows so far\).*saekit harvest"):
        ActivationCache.open(tmp_path)


@pytest.mark.parametrize(("column", "chooses"), [("h", True), ("mask", False), ("document", False)])
def test_choosing_rows_compares_what_they_are_and_reading_them_the_rest(
    column: str, chooses: bool, make_cache: Make, tmp_path: Path
) -> None:
    cache = make_cache(tmp_path / "c")
    path = tmp_path / "c" / "shard-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[cache.readers[0]._offset(column)] ^= 1
    path.write_bytes(content)
    damaged = ActivationCache.open(tmp_path / "c")
    if chooses:
        index = damaged.indices("all")
    else:
        with pytest.raises(CacheError, match=r"shard-00000\.safetensors does not match"):
            damaged.indices("all")
        index = torch.arange(10)
    with pytest.raises(CacheError, match=r"shard-00000\.safetensors does not match"):
        damaged.rows("h", index)
