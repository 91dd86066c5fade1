"""The log of a run: metrics.jsonl, one JSON object a line."""

import json
import os
from pathlib import Path

FILE = "metrics.jsonl"

Line = dict[str, float | int]
"""Figures of a moment, by name."""


class MetricsLog:
    """Appends lines to a run's log, from a given length on: what was written past it is dropped.
    Of a run without a folder nothing is kept."""

    def __init__(self, run: Path | None, keep_bytes: int) -> None:
        self._file = None if run is None else (run / FILE).open("ab")
        if self._file is not None:
            self._file.truncate(keep_bytes)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, line: Line) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()

    def size(self) -> int:
        """Bytes written, all of them on disk when this returns."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return self._file.tell()
