"""The making of a feature store, started from the browser: a process of its own, and how far it
is."""

import subprocess
import sys
import threading
from pathlib import Path

from saekit.dashboard.data import quote
from saekit.features import NAME, Progress, progress
from saekit.results import RESULTS

_LOG = ".features.log"

_started: dict[Path, "subprocess.Popen[bytes]"] = {}
_lock = threading.Lock()


def arguments(run: Path) -> list[str]:
    return ["features", "build", str(run)]


def command(run: Path) -> str:
    """The command that makes the store."""
    return "saekit " + " ".join(map(quote, arguments(run)))


def writes(run: Path) -> str:
    """What it writes, and where."""
    return str(run / RESULTS / NAME)


def start(run: Path) -> None:
    """Start the command, unless this browser has it running."""
    with _lock:
        if running(run):
            return
        (run / RESULTS).mkdir(exist_ok=True)
        with (run / RESULTS / _LOG).open("wb") as log:
            _started[run.resolve()] = subprocess.Popen(
                [sys.executable, "-m", "saekit", *arguments(run)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def running(run: Path) -> bool:
    process = _started.get(run.resolve())
    return process is not None and process.poll() is None


def failure(run: Path) -> str | None:
    """What the command said last, where this browser started it and it failed."""
    process = _started.get(run.resolve())
    if process is None or process.poll() in (None, 0):
        return None
    text = (run / RESULTS / _LOG).read_text(encoding="utf-8", errors="replace").strip()
    return text.splitlines()[-1] if text else f"exit code {process.returncode}"


def reached(run: Path) -> Progress | None:
    """How far a store is that is being made, by whomever."""
    return progress(run / RESULTS)
