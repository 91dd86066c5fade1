"""The log of a run: metrics.jsonl, one JSON object a line."""

import json
import os
from pathlib import Path
from types import TracebackType

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends lines to a run's log, from a given length on: what was written past it is dropped."""

    def __init__(self, run: Path, keep_bytes: int) -> None:
        self._file = (run / FILE).open("ab")
        self._file.truncate(keep_bytes)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, line: dict[str, float]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def size(self) -> int:
        """Bytes written, all of them on disk when this returns."""
        os.fsync(self._file.fileno())
        return self._file.tell()
