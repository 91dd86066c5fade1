import gc
import json
import os
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saekit import ActivationCache
from saekit.activations_cache import reader
from saekit.activations_cache.reader import Reader, Shuffle
from saekit.activations_cache.shards import ShardReader
from saekit.activations_cache.shuffle import shuffle
from saekit.errors import CacheError, ConfigError

Make = Callable[..., ActivationCache]
ALL = list(get_args(Shuffle))


@pytest.fixture(scope="module")
def cache(make_cache: Make, tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    return make_cache(tmp_path_factory.mktemp("reader") / "c")


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "CHUNK", 16)
        yield


def tokens(of: Reader) -> list[list[int]]:
    return [batch["token"].tolist() for batch in of]


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


@settings(deadline=None, max_examples=25)
@given(
    how=st.sampled_from(ALL),
    size=st.integers(1, 300),
    seed=st.integers(0, 5),
    ranks=st.integers(1, 4),
    split=st.sampled_from(["train", "test", "all"]),
    drop_last=st.booleans(),
)
def test_an_epoch_gives_every_row_of_the_split_once_to_one_rank(
    cache: ActivationCache,
    how: Shuffle,
    size: int,
    seed: int,
    ranks: int,
    split: Any,
    drop_last: bool,
) -> None:
    index = cache.indices(split).tolist()
    each = len(index) // ranks
    size = min(size, each)
    options: dict[str, Any] = {"seed": seed, "split": split, "shuffle": how, "drop_last": drop_last}
    shares = [
        flat(tokens(Reader(cache, ["token"], size, rank=rank, ranks=ranks, prefetch=0, **options)))
        for rank in range(ranks)
    ]
    dropped = each % size if drop_last else 0
    assert [len(share) for share in shares] == [each - dropped] * ranks
    rows = flat(shares)
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(index)


@pytest.mark.parametrize("how", ALL)
def test_the_order_is_set_by_the_seed_and_the_epoch(cache: ActivationCache, how: Shuffle) -> None:
    def order(seed: int, epochs: int = 1) -> list[int]:
        return flat(tokens(Reader(cache, ["token"], 50, seed=seed, epochs=epochs, shuffle=how)))

    stored = cache.indices("train").tolist()
    two = order(1, epochs=2)
    first, second = two[: len(stored)], two[len(stored) :]
    assert sorted(first) == sorted(second) == stored
    assert first == order(1)
    shuffled = how != "none"
    assert (first != order(2)) == (first != second) == (first != stored) == shuffled


def test_rows_of_a_block_stay_together_and_blocks_are_shuffled(cache: ActivationCache) -> None:
    stored = cache.indices("all").tolist()
    (order,) = tokens(Reader(cache, ["token"], 1000, split="all", shuffle="blocks"))
    blocks = [stored[i : i + 16] for i in range(0, len(stored), 16)]
    seen = []
    while order:
        (block,) = [block for block in blocks if block[0] == order[0]]
        assert order[: len(block)] == block
        seen.append(block)
        order = order[len(block) :]
    assert sorted(seen) == blocks != seen


def test_columns_of_a_batch_come_from_the_same_rows(cache: ActivationCache) -> None:
    batches = list(Reader(cache, ["h", "h.grad", "token", "mask"], 40))
    assert len(batches) > 2
    for batch in batches:
        assert batch["h"][:, 0].equal(batch["token"].float())
        assert batch["h.grad"].equal(-batch["h"])
        assert batch["mask"].eq(0).all()


@pytest.mark.parametrize("how", ALL)
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_reader_goes_on_behind_any_batch_with_the_rest_of_the_stream(
    cache: ActivationCache, how: Shuffle, drop_last: bool
) -> None:
    options: dict[str, Any] = {"seed": 3, "epochs": 2, "drop_last": drop_last, "shuffle": how}
    running = Reader(cache, ["token"], 60, **options)
    options["prefetch"] = 0
    whole = tokens(Reader(cache, ["token"], 60, **options))
    for number in range(len(whole) + 1):
        # As a checkpoint keeps it.
        state = json.loads(json.dumps(running.state()))
        assert tokens(Reader(cache, ["token"], 60, state=state, **options)) == whole[number:]
        assert tokens(Reader(cache, ["token"], 60, start=number, **options)) == whole[number:]
        if not drop_last:
            rest = flat(tokens(Reader(cache, ["h", "token"], 25, state=state, **options)))
            assert rest == flat(whole[number:])
        assert next(running, {}).get("token", torch.empty(0)).tolist() == (
            whole[number] if number < len(whole) else []
        )


def test_a_reader_in_use_can_be_put_back(cache: ActivationCache) -> None:
    running = Reader(cache, ["token"], 30)
    next(running)
    state = running.state()
    rest = tokens(running)
    running.restore(state)
    assert tokens(running) == rest


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"seed": 4}, "seed: 3 there, 4 here"),
        ({"split": "test"}, "split: 'train' there, 'test' here"),
        ({"exclude": ()}, r"exclude: \['special'\] there, \[\] here"),
        ({"shuffle": "none"}, "shuffle: 'rows' there, 'none' here"),
        ({"rank": 1, "ranks": 2}, "rank: 0 there, 1 here, ranks: 1 there, 2 here"),
    ],
)
def test_the_state_of_another_stream_is_refused_with_the_difference(
    cache: ActivationCache, other: dict[str, Any], difference: str
) -> None:
    state = Reader(cache, ["token"], 30, seed=3).state()
    with pytest.raises(ConfigError, match=difference):
        Reader(cache, ["token"], 30, state=state, **{"seed": 3, **other})


def test_the_state_of_another_cache_is_refused(
    cache: ActivationCache, make_cache: Make, tmp_path: Path
) -> None:
    state = Reader(cache, ["token"], 30).state()
    other = make_cache(tmp_path / "c", rows=(100, 90))
    with pytest.raises(ConfigError, match="of another stream .cache: '.*' there, '.*' here"):
        Reader(other, ["token"], 30, state=state)


@pytest.mark.parametrize("altered", [{"row": 10_000}, {"row": None}, {"epoch": "1"}])
def test_an_altered_state_is_refused(cache: ActivationCache, altered: dict[str, Any]) -> None:
    state = Reader(cache, ["token"], 30).state()
    with pytest.raises(ConfigError, match="it was altered"):
        Reader(cache, ["token"], 30, state={**state, **altered})


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_what_is_held_ready_changes_nothing_but_the_time(
    cache: ActivationCache, prefetch: int
) -> None:
    some = Reader(cache, ["token"], 30, prefetch=prefetch)
    states = []
    batches = []
    for batch in some:
        states.append(some.state()["row"])
        batches.append(batch["token"].tolist())
    assert batches == tokens(Reader(cache, ["token"], 30))
    assert states == [min(30 * (i + 1), len(flat(batches))) for i in range(len(batches))]


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_no_more_batches_are_made_than_may_be_held_ready(
    cache: ActivationCache, prefetch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    take = ActivationCache.take_rising

    def counted(self: ActivationCache, column: str, rows: Any, out: Tensor) -> None:
        if len(rows):
            made.append(threading.current_thread())
        take(self, column, rows, out)

    monkeypatch.setattr(ActivationCache, "take_rising", counted)
    some = Reader(cache, ["h"], 10, prefetch=prefetch)
    for number in range(1, 6):
        next(some)
        # Ends the thread, so that there is nothing still to come.
        if some._pool is not None:
            some._pool.shutdown()
        assert len(made) == number + prefetch
        some._pool = None
    main = threading.current_thread()
    assert all((thread is main) == (prefetch == 0) for thread in made)


def threads_of(reader: Reader) -> list[threading.Thread]:
    pools: Any = (reader._pool, reader._ordering)
    return [thread for pool in pools for thread in pool._threads]


@pytest.fixture
def slow_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other batch is gathered only once the one behind it is: where there are threads for it,
    what is begun first is through last."""
    batch, met = reader._Source.batch, threading.Condition()
    begun, through = count(), set[int]()

    def turned(self: Any, rows: Any, space: Any) -> Any:
        with met:
            number = next(begun)
            if number % 2 == 0:
                met.wait_for(lambda: number + 1 in through, timeout=0.2)
        made = batch(self, rows, space)
        with met:
            through.add(number)
            met.notify_all()
        return made

    monkeypatch.setattr(reader._Source, "batch", turned)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize(
    ("how", "stored", "dtype"),
    [
        ("rows", torch.bfloat16, None),
        ("rows", torch.bfloat16, torch.float32),
        ("rows", torch.int8, torch.float32),
        ("blocks", torch.bfloat16, torch.float32),
    ],
)
def test_any_number_of_threads_gives_the_same_bytes_from_the_start_and_from_the_middle(
    make_cache: Make,
    tmp_path: Path,
    threads: int,
    how: Shuffle,
    stored: torch.dtype,
    dtype: torch.dtype | None,
) -> None:
    cache = make_cache(tmp_path / "c", dtype=stored)
    columns = ["h", "h.grad", "token", "document"]
    options: dict[str, Any] = {"seed": 3, "epochs": 2, "shuffle": how, "dtype": dtype}
    plain = list(Reader(cache, columns, 40, prefetch=0, **options))
    options |= {"threads": threads, "prefetch": 4}
    some = Reader(cache, columns, 40, **options)
    first = [next(some) for _ in range(len(plain) // 2)]
    resumed = Reader(cache, columns, 40, state=json.loads(json.dumps(some.state())), **options)
    for rest in (some, resumed):
        whole = [*first, *rest]
        assert len(whole) == len(plain)
        for ours, theirs in zip(whole, plain, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(same_bytes(ours[column], theirs[column]) for column in theirs)


@pytest.mark.parametrize("part", [(0, 1), (1, 2)])
@pytest.mark.parametrize("how", ALL)
def test_batches_that_are_gathered_together_are_those_that_are_gathered_alone(
    cache: ActivationCache, how: Shuffle, part: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"epochs": 3, "shuffle": how, "drop_last": True, "part": part}
    plain = list(Reader(cache, ["h", "token"], 20, prefetch=0, **options))
    # As for a GPU, where alone it pays.
    monkeypatch.setattr(reader._Source, "on_gpu", True)
    some = Reader(cache, ["h", "token"], 20, prefetch=7, threads=2, **options)
    assert some._together == 3
    made = []
    take = ActivationCache.take_rising

    def counted(self: ActivationCache, column: str, rows: Any, out: Tensor) -> None:
        made.append(len(rows))
        take(self, column, rows, out)

    monkeypatch.setattr(ActivationCache, "take_rising", counted)
    for number in range(4):
        assert all(torch.equal(x, plain[number][name]) for name, x in next(some).items())
    assert max(made) == 3 * 20 // part[1]
    resumed = Reader(cache, ["h", "token"], 20, state=some.state(), **options)
    for rest in (some, resumed):
        whole = [*plain[:4], *rest]
        assert len(whole) == len(plain)
        for ours, theirs in zip(whole, plain, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """NaN and all."""
    return a.dtype == b.dtype and a.view(torch.uint8).equal(b.view(torch.uint8))


def test_batches_that_are_through_in_another_order_come_in_their_own(
    cache: ActivationCache, slow_first: None
) -> None:
    plain = tokens(Reader(cache, ["token"], 60, prefetch=0))
    assert tokens(Reader(cache, ["token"], 60, threads=2)) == plain


def test_threads_are_half_of_the_cores_shared_with_the_other_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {}
    for cores, near in ((1, 1), (2, 1), (4, 1), (16, 1), (16, 4), (128, 8), (8, 8)):
        mine = set(range(cores))
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, mine=mine: mine, raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(near))
        found[cores, near] = reader.threads_here()
    assert list(found.values()) == [1, 1, 2, 8, 2, 8, 1]


def test_large_batches_are_not_held_ready_by_the_dozen(
    cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_AHEAD", 3 * 10 * 12)
    assert Reader(cache, ["h"], 10, threads=8)._prefetch == 3
    assert Reader(cache, ["h"], 100, threads=8)._prefetch == 2
    assert Reader(cache, ["h"], 10, threads=1)._prefetch == 2
    assert Reader(cache, ["h"], 1, threads=8)._prefetch == 8


def test_a_row_that_is_not_there_is_refused(cache: ActivationCache) -> None:
    for row in (-1, cache.n_rows):
        with pytest.raises(IndexError, match=f"it has {cache.n_rows}"):
            cache.take("h", torch.tensor([3, row]))


def test_closing_a_reader_ends_its_threads_and_reading_on_begins_others(
    cache: ActivationCache,
) -> None:
    with Reader(cache, ["token"], 30, threads=2) as some:
        first = next(some)["token"].tolist()
        running = threads_of(some)
        assert len(running) == 3 and all(thread.is_alive() for thread in running)
    assert not any(thread.is_alive() for thread in running)
    assert [first, *tokens(some)] == tokens(Reader(cache, ["token"], 30))


def test_a_reader_that_is_dropped_takes_its_thread_with_it(cache: ActivationCache) -> None:
    some = Reader(cache, ["token"], 30, threads=2)
    next(some)
    running = threads_of(some)
    del some
    gc.collect()
    for thread in running:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in running)


def test_what_goes_wrong_in_the_thread_reaches_the_caller(make_cache: Make, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c")
    some = Reader(cache, ["h"], 300, shuffle="none")
    ShardReader.check(cache.readers[2])
    some._source._cache.readers[2] = ShardReader(
        cache.folder, cache.manifest.shards[2]
    )  # as if it had not been opened yet
    path = cache.path / cache.manifest.shards[2].file
    path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(CacheError, match="cannot be read"):
            next(some)


def test_an_interrupt_while_waiting_loses_no_batch(
    cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tokens(Reader(cache, ["token"], 30))
    some = Reader(cache, ["token"], 30)
    seen = [next(some)["token"].tolist()]
    at, future = some._ahead[0]
    with monkeypatch.context() as patch:

        def interrupted() -> None:
            raise KeyboardInterrupt

        patch.setattr(future, "result", interrupted)
        state = some.state()
        with pytest.raises(KeyboardInterrupt):
            next(some)
        assert some.state() == state
    assert seen + tokens(some) == whole


def test_a_shuffled_cache_is_read_in_long_runs_unless_rows_are_asked_for(
    cache: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shuffled = shuffle(cache, tmp_path / "out")
    assert Reader(shuffled, ["h"], 30).state()["shuffle"] == "blocks"
    assert Reader(shuffled, ["h"], 30, shuffle="rows").state()["shuffle"] == "rows"
    assert Reader(cache, ["h"], 30).state()["shuffle"] == "rows"
    for unwanted in ("rows_into", "bytes_into"):
        monkeypatch.delattr(ShardReader, unwanted)
    batches = list(Reader(shuffled, ["h", "source"], 30, epochs=2))
    source = torch.cat([batch["source"] for batch in batches])
    assert torch.cat([batch["h"] for batch in batches])[:, 0].equal(source.float())
    assert sorted(source.tolist()) == sorted(2 * cache.indices("train").tolist())


@pytest.mark.parametrize(
    ("stored", "dtype", "given_out"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, torch.float16, torch.float16),
        (torch.int8, None, torch.float32),
    ],
)
def test_activations_come_in_the_type_asked_for_and_tokens_as_they_are(
    make_cache: Make,
    tmp_path: Path,
    stored: torch.dtype,
    dtype: torch.dtype | None,
    given_out: torch.dtype,
) -> None:
    cache = make_cache(tmp_path / "c", dtype=stored)
    batch = next(Reader(cache, ["h", "token"], 30, dtype=dtype))
    assert batch["h"].dtype == given_out
    assert batch["token"].dtype == torch.int32


def test_a_batch_larger_than_the_split_is_refused_where_it_must_be_full(
    cache: ActivationCache,
) -> None:
    with pytest.raises(ConfigError, match="too few for a batch of 5,000"):
        Reader(cache, ["h"], 5_000, drop_last=True)


@pytest.mark.parametrize(
    "options", [{"rank": 2, "ranks": 2}, {"prefetch": -1}, {"start": -1}, {"threads": 0}]
)
def test_options_that_cannot_work_are_refused(
    cache: ActivationCache, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="must"):
        Reader(cache, ["h"], 10, **options)


def test_a_column_that_is_not_there_is_refused_at_once(cache: ActivationCache) -> None:
    with pytest.raises(CacheError, match="no activations at 'g'"):
        Reader(cache, ["h", "g"], 10)


@pytest.mark.gpu
def test_batches_on_a_gpu_equal_those_on_the_cpu(make_cache: Make, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", dtype=torch.bfloat16)
    for dtype in (None, torch.float32):
        for prefetch in (0, 2, 9, None):
            options: dict[str, Any] = {"dtype": dtype, "epochs": 5}
            plain = Reader(cache, ["h", "token"], 30, **options)
            there = Reader(cache, ["h", "token"], 30, device="cuda", prefetch=prefetch, **options)
            for ours, theirs in zip(there, plain, strict=True):
                assert all(x.device.type == "cuda" for x in ours.values())
                assert all(ours[name].cpu().equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
def test_memory_that_is_used_again_holds_for_as_many_batches_as_promised(
    cache: ActivationCache, prefetch: int, shuffle: Any
) -> None:
    fresh = list(Reader(cache, ["h", "token"], 30, shuffle=shuffle, seed=3))
    reader = Reader(
        cache, ["h", "token"], 30, shuffle=shuffle, seed=3, prefetch=prefetch, reuse=True
    )
    held: list[dict[str, Tensor]] = []
    for number, batch in enumerate(reader):
        held = [*held, batch][-2:]
        for kept, expected in zip(held, fresh[number + 1 - len(held) :], strict=False):
            assert all(torch.equal(kept[column], expected[column]) for column in expected)
    places = {batch["h"].data_ptr() for batch in Reader(cache, ["h"], 30, prefetch=2, reuse=True)}
    assert len(places) <= 4
