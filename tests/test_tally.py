"""How processes that share work wait for each other."""

from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import pytest
from torch._C._distributed_c10d import HashStore

from saekit import tally
from saekit.distributed import Mesh
from saekit.errors import SaekitError
from saekit.tally import Tally


@pytest.fixture
def tallies(monkeypatch: pytest.MonkeyPatch) -> list[Tally]:
    """Those of three processes, of the same work."""
    monkeypatch.setattr(tally, "_numbers", repeat(0))
    store = HashStore()
    return [Tally(Mesh(data=3, rank=rank, store=store), 0.2) for rank in range(3)]


def test_all_meet_as_often_as_they_like(tallies: list[Tally]) -> None:
    told: list[int] = []
    for done in (3, 6):
        with ThreadPoolExecutor(3) as pool:
            for each in tallies:
                each.add(1)
            list(pool.map(lambda each: each.meet(told.append), tallies))
        assert told[-1] == done


def test_who_does_not_come_is_named(tallies: list[Tally]) -> None:
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(tallies[rank].meet) for rank in (0, 2)]
        for rank, one in zip((0, 2), waiting, strict=True):
            with pytest.raises(SaekitError, match=f"rank {rank} of 3 has waited 0.2 s.*rank 1: l"):
                one.result()


@pytest.mark.parametrize("work", ["add", "dealt"])
def test_whoever_works_is_waited_for(work: str, tallies: list[Tally]) -> None:
    first, second, third = tallies
    pieces = second.dealt(range(20))
    told: list[int] = []

    def goes_on(done: int) -> None:
        """Called by the first while it waits, for longer than it would for nothing."""
        told.append(done)
        if len(told) == 10:
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda each: each.meet(), (second, third)))
        elif len(told) < 10 and work == "add":
            second.add(1)
        elif len(told) < 10:
            next(pieces)

    first.meet(goes_on)
    assert told[-1] == (9 if work == "add" else 0)
