"""Ends a process that has waited too long for others, and says for which.

What torch says of an exchange that others do not join depends on the library beneath, and names
nobody. So each process tells all, through the store in which torchrun's processes meet, in which
step it is and how many exchanges it has entered; one that gets no further reads there who has
entered fewer.
"""

import logging
import os
import threading
import time
from datetime import timedelta

import torch.distributed as dist

log = logging.getLogger(__name__)

_OFTEN = 10
"""Times in the longest wait that a process says where it is."""


class Watch:
    """Watches over one of `ranks` processes that take steps together, from its first step on."""

    def __init__(self, rank: int, ranks: int, seconds: float) -> None:
        self._rank, self._ranks, self._seconds = rank, ranks, seconds
        self._step, self._since = 0, time.monotonic()
        self.entered = 0
        """Exchanges, which all enter in the same order."""
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, step: int) -> None:
        """This process begins a step."""
        self._step, self._since = step, time.monotonic()
        if self._thread is None:
            self._over.clear()
            self._thread = threading.Thread(target=self._watch, name="saekit-watch", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """No more steps are taken for now."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = None

    def _watch(self) -> None:
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        said = ""
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=timedelta(seconds=self._seconds),
            )
            while not self._over.wait(self._seconds / _OFTEN):
                now = f"{self._step} {self.entered}"
                if said != now:
                    said = now
                    store.set(f"saekit/{restart}/{self._rank}", said)
                if time.monotonic() - self._since > self._seconds:
                    at = {
                        rank: tuple(map(int, store.get(key).split()))
                        for rank in range(self._ranks)
                        if store.check([key := f"saekit/{restart}/{rank}"])
                    }
                    log.error("%s", stalled(at, self._rank, self._ranks, self._seconds))
                    # The main thread waits in a library, where no exception reaches it. What is on
                    # disk is whole at any moment.
                    os._exit(1)
        except dist.DistError as error:
            # Who keeps the store has gone; the exchanges will say so.
            log.warning("no longer watching for stalled processes: %s", error)


def stalled(at: dict[int, tuple[int, ...]], rank: int, ranks: int, seconds: float) -> str:
    """What is wrong, from the step and the exchanges that each process said that it has entered."""
    step, entered = at.get(rank, (0, 0))
    behind = [
        f"rank {other} (in step {at[other][0]})" if other in at else f"rank {other} (in no step)"
        for other in range(ranks)
        if at.get(other, (0, -1))[1] < entered
    ]
    whom = ", ".join(behind) or "none: all have come as far, so look at the network between them"
    return (
        f"rank {rank} of {ranks} has waited {seconds:g} s in step {step}. Behind it: {whom}. Look "
        "at those processes and their machines, or wait longer with --stall-seconds; the same "
        "command goes on from the last checkpoint, with any number of processes"
    )
