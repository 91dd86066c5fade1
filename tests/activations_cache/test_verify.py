import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saekit import ActivationCache
from saekit.activations_cache import shards
from saekit.activations_cache.shuffle import shuffle
from saekit.activations_cache.stats import HookStats
from saekit.activations_cache.storage import storage
from saekit.activations_cache.verify import repair, verify
from saekit.errors import CacheError

Make = Callable[..., ActivationCache]
SMALL = 0.002
"""MiB of a shard, so that the small cache has several."""


@pytest.fixture(params=["plain", "shuffled"])
def cache(request: pytest.FixtureRequest, make_cache: Make, tmp_path: Path) -> ActivationCache:
    plain = make_cache(tmp_path / "plain")
    if request.param == "plain":
        return plain
    return shuffle(plain, tmp_path / "shuffled", seed=1, shard_mib=SMALL)


@pytest.fixture
def shuffled(make_cache: Make, tmp_path: Path) -> ActivationCache:
    return shuffle(make_cache(tmp_path / "c"), tmp_path / "shuffled", seed=1, shard_mib=SMALL)


def flip(path: Path, at: int, by: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= by
    path.write_bytes(content)


def rewritten(
    cache: ActivationCache, number: int, change: Callable[[dict[str, Tensor]], None]
) -> ActivationCache:
    """The cache with a shard of other content, with a checksum that fits."""
    reader, shard = cache.readers[number], cache.manifest.shards[number]
    columns = {name: reader.column(name).clone() for name in cache.columns}
    names = reader.new_documents
    change(columns)
    shard = shards.write(cache.folder, shard.file, columns, names)
    held = list(cache.manifest.shards)
    held[number] = shard
    replace(cache.manifest, shards=tuple(held)).save(cache.folder)
    return ActivationCache.open(cache.path)


def test_a_whole_cache_has_no_faults(cache: ActivationCache) -> None:
    assert verify(cache) == []
    assert verify(cache.path) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_neither_has_one_of_another_type(
    make_cache: Make, tmp_path: Path, dtype: torch.dtype
) -> None:
    plain = make_cache(tmp_path / "c", dtype=dtype, numbered_apart=True)
    assert verify(plain) == []
    assert verify(shuffle(plain, tmp_path / "out")) == []


@pytest.mark.parametrize("kind", ["plain", "shuffled"])
def test_any_byte_that_is_altered_is_found(kind: str, make_cache: Make, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", rows=(25, 20))
    if kind == "shuffled":
        cache = shuffle(cache, tmp_path / "out", shard_mib=0.001)
    rng = random.Random(0)
    files = sorted(path for path in cache.path.iterdir() if not path.name.startswith("."))
    assert len(files) >= 3
    for number in range(200):
        path = files[number % len(files)]
        at, by = rng.randrange(path.stat().st_size), rng.randrange(1, 256)
        flip(path, at, by)
        try:
            found = bool(verify(cache.path))
        except CacheError:
            found = path.name == "manifest.json"
        assert found, (path.name, at, by)
        flip(path, at, by)
    assert verify(cache.path) == []


@pytest.mark.parametrize("mark", ["\n", '"', "{", " "])
def test_a_manifest_that_reads_the_same_is_altered_all_the_same(
    cache: ActivationCache, mark: str
) -> None:
    path = cache.path / "manifest.json"
    at = path.read_bytes().index(mark.encode(), 2 if mark == "\n" else 0)
    for by in range(1, 256, 6):
        flip(path, at, by)
        with pytest.raises(CacheError):
            ActivationCache.open(cache.path)
        flip(path, at, by)


def test_all_faults_are_listed_with_their_shards(cache: ActivationCache) -> None:
    first, last = cache.manifest.shards[0].file, cache.manifest.shards[-1].file
    flip(cache.path / first, 1000)
    (cache.path / last).unlink()
    faults = verify(cache.path)
    assert [fault.file for fault in faults] == [first, last]
    assert "does not match its checksum" in faults[0].problem
    assert "cannot be read" in faults[1].problem
    assert str(faults[0]).startswith(f"{first}: ")


def test_a_shard_that_was_read_before_is_read_again(cache: ActivationCache) -> None:
    cache.row_slice("h", 0, cache.n_rows)
    flip(cache.path / cache.manifest.shards[0].file, 1000)
    assert len(verify(cache)) == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c.pop("mask"), r"lacks the columns \['mask'\] and has \[\] beyond"),
        (lambda c: c.update(more=c["token"]), r"lacks the columns \[\] and has \['more'\]"),
        (lambda c: c.update(token=c["token"].long()), "'token' is of torch.int64, .* torch.int32"),
        (lambda c: c.update(h=c["h"].half()), "'h' is of torch.float16, .* torch.float32"),
        (
            lambda c: c.update(h=c["h"][:, :2].contiguous()),
            r"'h' has shape \[\d+, 2\], .* \[\d+, 3",
        ),
        (lambda c: c.update({"h.grad": c["h.grad"].int()}), "of torch.int32, .* floats"),
    ],
)
def test_columns_that_are_not_the_manifests_are_found(
    cache: ActivationCache, change: Any, problem: str
) -> None:
    faults = verify(rewritten(cache, 1, change))
    assert [fault.file for fault in faults] == [cache.manifest.shards[1].file]

    assert re.search(problem, faults[0].problem)


def test_rows_that_are_not_counted_rightly_are_found(cache: ActivationCache) -> None:
    n = cache.manifest.stats["h"].n
    counts = {
        "statistics of 'h' over 9": replace(cache.manifest, stats={"h": HookStats(n=9)}),
        f"statistics of 'h' over {n - 1}": replace(cache.manifest, stats={"h": HookStats(n=n - 1)}),
        "4 rows of kind 'special', and there are 31": replace(
            cache.manifest, marked={"special": 4}
        ),
    }
    for problem, held in counts.items():
        (fault,) = verify(ActivationCache(cache.path, held))
        assert fault.file == "manifest.json"
        assert problem in fault.problem


def test_documents_without_a_name_are_found(cache: ActivationCache) -> None:
    held = cache.manifest
    first = replace(held.shards[0], n_documents=held.shards[0].n_documents + 1)
    wrong = ActivationCache(cache.path, replace(held, shards=(first, *held.shards[1:])))
    (fault,) = verify(wrong)
    assert "documents, the manifest says" in fault.problem


def test_rows_in_another_order_are_found(shuffled: ActivationCache) -> None:
    def swap(columns: dict[str, Tensor]) -> None:
        for column in columns.values():
            column[:2] = column[:2].flip(0)

    (fault,) = verify(rewritten(shuffled, 2, swap))
    assert "rows are not where the shuffle's seed puts them" in fault.problem


@pytest.mark.parametrize("row", [-1, 0, 10**9])
def test_a_row_that_belongs_elsewhere_is_found(shuffled: ActivationCache, row: int) -> None:
    def other(columns: dict[str, Tensor]) -> None:
        columns["source"][3] = row if row else columns["source"][4]

    (fault,) = verify(rewritten(shuffled, 2, other))
    assert "not where the shuffle's seed puts them" in fault.problem


def test_another_seed_in_the_record_is_found_in_every_shard(shuffled: ActivationCache) -> None:
    assert shuffled.manifest.shuffle is not None
    record = replace(shuffled.manifest.shuffle, seed=2)
    wrong = ActivationCache(shuffled.path, replace(shuffled.manifest, shuffle=record))
    assert len(verify(wrong)) == len(shuffled.manifest.shards)


def test_faulty_shards_of_a_shuffled_cache_are_made_again(shuffled: ActivationCache) -> None:
    files = [shuffled.path / shard.file for shard in shuffled.manifest.shards]
    before = [file.read_bytes() for file in files]
    flip(files[0], 500)
    files[2].unlink()
    assert len(repair(shuffled.path)) == 2
    assert [file.read_bytes() for file in files] == before
    assert repair(shuffled.path) == []


def test_a_source_that_is_another_now_is_refused(
    shuffled: ActivationCache, make_cache: Make, tmp_path: Path
) -> None:
    flip(shuffled.path / shuffled.manifest.shards[0].file, 500)
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(CacheError, match="is no activation cache"):
        repair(shuffled.path)
    make_cache(tmp_path / "c", rows=(130, 70, 102))
    with pytest.raises(CacheError, match="is not the cache that .* was shuffled from any more"):
        repair(shuffled.path)


def test_a_shard_that_comes_out_otherwise_is_refused_and_left_as_it_is(
    shuffled: ActivationCache,
) -> None:
    """As another version of numpy might give another order."""
    shard = shuffled.manifest.shards[0]
    other = replace(shard, checksum="0" * 32)
    replace(shuffled.manifest, shards=(other, *shuffled.manifest.shards[1:])).save(
        storage(shuffled.path)
    )
    before = (shuffled.path / shard.file).read_bytes()
    with pytest.raises(CacheError, match="made again, is not what it was"):
        repair(shuffled.path)
    assert (shuffled.path / shard.file).read_bytes() == before


def test_miscounts_cannot_be_repaired(cache: ActivationCache) -> None:
    replace(cache.manifest, marked={"special": 4}).save(storage(cache.path))
    with pytest.raises(CacheError, match="no shard is at fault"):
        repair(cache.path)


def test_faulty_shards_of_a_harvest_are_harvested_again(
    tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    shutil.copytree(tiny_cache.path, tmp_path / "c")
    assert verify(tmp_path / "c") == []
    path = tmp_path / "c" / tiny_cache.manifest.shards[1].file
    whole = path.read_bytes()
    flip(path, 500)
    assert [fault.file for fault in repair(tmp_path / "c")] == [path.name]
    assert path.read_bytes() == whole
