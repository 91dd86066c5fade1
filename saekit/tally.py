"""Work that processes share without taking steps together: who takes which piece of it, how much
all have done, and when all are through.

It is counted in the store in which the processes met, so nobody waits for anybody but in `meet`;
and there for as long as the work of the others goes on.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import TypeVar

from saekit.distributed import STALL_SECONDS, Mesh
from saekit.errors import SaekitError

_OFTEN = 0.05
"""Seconds between two looks at who is through."""

_T = TypeVar("_T")
_numbers = count()


class Tally:
    """One piece of work. All processes of a mesh make their tallies in the same order."""

    def __init__(self, mesh: Mesh, stall_seconds: float = STALL_SECONDS) -> None:
        self._mesh, self._stall_seconds = mesh, stall_seconds
        self._name = f"tally {next(_numbers)}"
        self._own = {"done": 0, "taken": 0}
        self._met = 0

    def add(self, amount: int) -> int:
        """So much more is done; returns how much all have done."""
        return self._add("done", amount)

    def dealt(self, pieces: Sequence[_T]) -> Iterator[_T]:
        """Those that this process is to do: each goes to who is first to ask."""
        while (number := self._add("taken", 1) - 1) < len(pieces):
            yield pieces[number]

    def meet(self, told: Callable[[int], object] = lambda done: None) -> None:
        """Wait until all are here; meanwhile `told` is told how much all have done.

        Raises SaekitError, with the ranks that are not here, once for `stall_seconds` nobody has
        come, taken a piece of the work or done any of it.
        """
        if self._mesh.size == 1:
            return
        self._met += 1
        self._add(self._at(self._mesh.rank), 1)
        seen, since = self._seen(1), time.monotonic()
        while seen["here"] < self._mesh.size:
            time.sleep(_OFTEN)
            before, seen = seen, self._seen(0)
            told(seen["done"])
            if seen != before:
                since = time.monotonic()
            elif time.monotonic() - since > self._stall_seconds:
                raise SaekitError(self._stalled())
        told(self.add(0))

    def _seen(self, coming: int) -> dict[str, int]:
        here = self._add(f"here {self._met}", coming)
        return {"here": here, "done": self._add("done", 0), "taken": self._add("taken", 0)}

    def _at(self, rank: int) -> str:
        return f"here {self._met} of rank {rank}"

    def _stalled(self) -> str:
        ranks = range(self._mesh.size)
        missing = ", ".join(str(rank) for rank in ranks if not self._add(self._at(rank), 0))
        return (
            f"rank {self._mesh.rank} of {self._mesh.size} has waited {self._stall_seconds:g} s, in "
            f"which nothing was done, for rank {missing}: look at those processes and their "
            "machines. The same command goes on behind what is complete on disk, with any number "
            "of processes"
        )

    def _add(self, what: str, amount: int) -> int:
        if self._mesh.store is None:
            self._own[what] += amount
            return self._own[what]
        return int(self._mesh.store.add(f"{self._name} {what}", amount))
