"""A cache in a folder of this machine."""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from saekit import files
from saekit.activations_cache.storage_base import HOLDER, Holder, Storage, refusal
from saekit.errors import CacheError

_LOCK = ".lock"


class LocalStorage(Storage):
    """A folder on this machine, made when first written to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = str(path)

    def _path(self, name: str) -> Path:
        return self.path / self._checked(name)

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def names(self) -> list[str]:
        found = []
        for folder, subfolders, names in os.walk(self.path):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            at = Path(folder).relative_to(self.path)
            found += [(at / name).as_posix() for name in names if not name.startswith(".")]
        return sorted(found)

    def read_text(self, name: str) -> str:
        # Not read_text, which would take "\r" for "\n".
        return self._path(name).read_bytes().decode("utf-8")

    def new_file(self, name: str) -> AbstractContextManager[Path]:
        return files.new_file(self._path(name))

    def local(self, name: str, checksum: str) -> Path:
        path = self._path(name)
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return path

    def remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        there = next(
            folder for folder in (self.path, *self.path.absolute().parents) if folder.is_dir()
        )
        return shutil.disk_usage(there).free

    @contextmanager
    def lock(self) -> Iterator[None]:
        """The kernel holds it, so a killed writer lets go of it. Who holds it stands in a file
        beside, which means nothing unless the lock is held.

        Removes what a killed writer left half-written in this folder (not in those below).
        """
        self.path.mkdir(parents=True, exist_ok=True)
        # thread_local=False: a writer may be closed by another thread than the one that opened it.
        held = FileLock(self.path / _LOCK, blocking=False, thread_local=False)
        try:
            grip = held.acquire()
        except Timeout:
            raise CacheError(refusal(self.url, self._holder())) from None
        with grip:
            files.remove_partial(self.path)
            try:
                self.write_text(HOLDER, Holder.this_process(time.time()).text())
                yield
            finally:
                self.remove(HOLDER)

    def sub(self, name: str) -> "LocalStorage":
        return LocalStorage(self._path(name))
