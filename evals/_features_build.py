"""The making of a feature store: in steps, each of which leaves a file that appears whole.

What is being made lies in `results/.features.building` until all of it is there. The same command
goes on behind the last file, after a kill at any moment, and ends in the same store; another plan
(SAE, cache or config) starts afresh.

Several processes meet in that folder: each writes files of its own, rank 0 clears it and moves the
store, and the others see what it saw.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy import ndarray
from safetensors.numpy import load_file, save_file

from saekit.distributed import ALONE, Mesh
from saekit.errors import SaekitError
from saekit.features import BUILDING, HEADER, NAME, PROGRESS, Header
from saekit.files import remove_partial, write_atomic, write_json
from saekit.progress import Bar, bar
from saekit.tally import Tally

log = logging.getLogger(__name__)

_STORE, _PLAN, _OLD, _LOCK = "store", "plan.json", ".features.old", ".features.lock"


class Workshop:
    """The folder in which a store is made: by one process at a time, or by those of one mesh."""

    def __init__(
        self, results: Path, plan: dict[str, Any], *, progress: bool, mesh: Mesh = ALONE
    ) -> None:
        self.results, self.plan, self.progress, self.mesh = results, plan, progress, mesh
        self.folder = results / BUILDING
        self.store = self.folder / _STORE
        self._tally = Tally(mesh)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the folder, and clear away what another plan left; rank 0 does, and the others find
        it done after `finished`. Raises SaekitError where another process holds it."""
        if self.mesh.rank > 0:
            yield
            return
        self.results.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.results / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise SaekitError(
                f"another process is making the feature store in {self.results}: wait for it, or "
                "stop it"
            ) from error
        try:
            self._settle()
            yield
        finally:
            lock.release()

    def finished(self) -> bool:
        """Whether the store of this plan is there already, as rank 0 sees it."""
        own = [self._there()] if self.mesh.rank == 0 else []
        return bool(self.mesh.numbers(own)[0])

    def _there(self) -> bool:
        path = self.results / NAME / HEADER
        try:
            return bool(json.loads(path.read_text(encoding="utf-8"))["plan"] == self.plan)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def finish(self, header: Header) -> None:
        """Put the store in the place of the one before."""
        write_json(self.store / HEADER, {**header.to_dict(), "plan": self.plan})
        self._move()

    def meet(self) -> None:
        """Wait until all are here."""
        self._tally.meet()

    def works(self) -> None:
        """Tell those who wait for a step that this process gets on with it."""
        self._tally.add(1)

    def make(self, name: str, made: Callable[[], dict[str, ndarray]], by: int = 0) -> None:
        """The arrays of a step, made unless they are there; of several processes by number `by`,
        counted round. `arrays` has them once all have met."""
        path = self._path(name)
        if self.mesh.rank == by % self.mesh.size and not path.exists():
            self.say(name, 0, 1)
            found = {key: np.ascontiguousarray(value) for key, value in made().items()}
            write_atomic(path, lambda temporary: save_file(found, temporary))
            self.works()

    def arrays(self, name: str) -> dict[str, ndarray]:
        """Those of a step that was made."""
        return load_file(self._path(name))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    @contextmanager
    def bar(self, phase: str, total: int, done: int) -> Iterator["Told"]:
        """A progress bar over what all processes do, that is also told of in a file, for the
        browser to read. It ends when all are through."""
        with bar(f"features: {phase}", total, done=done, shown=self.progress) as shown:
            told = Told(self, phase, total, done, shown)
            yield told
            told.meet()

    def say(self, phase: str, done: int, total: int) -> None:
        if self.mesh.rank > 0:
            return
        write_json(self.folder / PROGRESS, {"phase": phase, "done": done, "total": total})

    def _settle(self) -> None:
        if (self.store / HEADER).is_file():
            # Stopped between the last file and the move.
            self._move()
        shutil.rmtree(self.results / _OLD, ignore_errors=True)
        if self._there():
            self._remove()
            return
        if self.folder.exists() and _read(self.folder / _PLAN) != self.plan:
            log.info("%s is of another SAE, cache or config: starting afresh", self.folder)
            self._remove()
        if not self.folder.exists():
            self.folder.mkdir()
            write_json(self.folder / _PLAN, self.plan)
        self.store.mkdir(exist_ok=True)
        remove_partial(self.folder)
        remove_partial(self.store)

    def _remove(self) -> None:
        """The plan first: what is left without one is not gone on with."""
        (self.folder / _PLAN).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _move(self) -> None:
        target, old = self.results / NAME, self.results / _OLD
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        self.store.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        self._remove()


class Told:
    """A running bar, of the work of all processes."""

    def __init__(self, shop: Workshop, phase: str, total: int, done: int, shown: Bar) -> None:
        self._shop, self._phase, self._total = shop, phase, total
        self._before = self._done = done
        self._shown = shown
        self._tally = Tally(shop.mesh)
        self.dealt = self._tally.dealt
        shop.say(phase, done, total)

    def advance(self, amount: int) -> None:
        self._show(self._tally.add(amount))

    def reached(self) -> None:
        """What is done so far is on disk."""
        self._shop.say(self._phase, self._done, self._total)

    def meet(self) -> None:
        self._tally.meet(self._show)

    def _show(self, done: int) -> None:
        moved, self._done = self._before + done - self._done, self._before + done
        if moved:
            self._shown.advance(moved)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
