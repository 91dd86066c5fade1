"""Writing large files past the page cache.

Copying gigabytes into the page cache takes as much of a CPU as some models do.
"""

import errno
import mmap
import os
from pathlib import Path

import numpy as np

_BLOCK = 4096  # bytes; a multiple of every disk's block
_STAGE = 4 << 20


class DirectWriter:
    """Writes a file past the page cache, where the system and the file system know how.

    Behind the writer the file is whole, and still to be synced.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        try:
            self._file = os.open(path, flags | getattr(os, "O_DIRECT", 0))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._file = os.open(path, flags)
        # Direct writes begin and end at whole blocks, in memory and on disk; a map does.
        self._map = mmap.mmap(-1, _STAGE)
        # Through numpy, which lets other threads run while it copies; a map's own copy does not,
        # and several writers would hold up the model.
        self._stage = np.frombuffer(self._map, dtype=np.uint8)
        self._staged = self._written = 0

    def write(self, content: memoryview) -> None:
        source = np.frombuffer(content, dtype=np.uint8)
        while len(source):
            some = source[: _STAGE - self._staged]
            self._stage[self._staged : self._staged + len(some)] = some
            self._staged += len(some)
            source = source[len(some) :]
            if self._staged == _STAGE:
                self._flush(_STAGE)

    def __enter__(self) -> "DirectWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                size = self._written + self._staged
                self._flush(-(-self._staged // _BLOCK) * _BLOCK)
                os.truncate(self._file, size)
        finally:
            os.close(self._file)

    def _flush(self, size: int) -> None:
        with memoryview(self._map) as whole:
            at = 0
            while at < size:
                at += os.write(self._file, whole[at:size])
        self._written += self._staged
        self._staged = 0
