"""Runs as the feature browser holds them: each read once for each state of its files, and shared by
all who look at it.
"""

from functools import lru_cache
from pathlib import Path
from threading import Lock

from saekit.dashboard.data import Run

State = tuple[tuple[str, int], ...]

_READING = Lock()


def opened(path: Path) -> Run:
    """Shared: nothing may change it. Raises SaekitError as `Run.open` does."""
    with _READING:  # who comes meanwhile waits for the run, and does not read it, too
        return _read(path, state(path))


def state(path: Path) -> State:
    """When each file of the run was last written, so that a run still training is read afresh."""
    files = [*path.glob("*.*"), *path.glob("results/*.*"), *path.glob("results/features/*.json")]
    return tuple(sorted((str(file), file.stat().st_mtime_ns) for file in files if file.is_file()))


@lru_cache(maxsize=3)
def _read(path: Path, state: State) -> Run:
    return Run.open(path)
