"""Work that processes share without taking steps together: who takes which piece of it, how much
all have done, and when all are through.

It is counted in the store in which the processes met, so nobody waits for anybody but in `meet`;
and there for as long as the work of the others takes. Who dies is for torchrun to find out, which
then ends the others.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import TypeVar

from saekit.distributed import Mesh

_OFTEN = 0.05
"""Seconds between two looks at who is through."""

_T = TypeVar("_T")
_numbers = count()


class Tally:
    """One piece of work. All processes of a mesh make their tallies in the same order."""

    def __init__(self, mesh: Mesh) -> None:
        self._size, self._store = mesh.size, mesh.store
        self._name = f"tally {next(_numbers)}"
        self._own = {"done": 0, "taken": 0}

    def add(self, amount: int) -> int:
        """So much more is done; returns how much all have done."""
        return self._add("done", amount)

    def dealt(self, pieces: Sequence[_T]) -> Iterator[_T]:
        """Those that this process is to do: each goes to who is first to ask."""
        while (number := self._add("taken", 1) - 1) < len(pieces):
            yield pieces[number]

    def meet(self, told: Callable[[int], object] = lambda done: None) -> None:
        """Wait until all are here; meanwhile `told` is told how much all have done."""
        if self._size == 1:
            return
        here = self._add("here", 1)
        while here < self._size:
            time.sleep(_OFTEN)
            told(self.add(0))
            here = self._add("here", 0)
        told(self.add(0))

    def _add(self, what: str, amount: int) -> int:
        if self._store is None:
            self._own[what] += amount
            return self._own[what]
        return int(self._store.add(f"{self._name} {what}", amount))
