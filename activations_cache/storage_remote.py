"""A cache behind a URL: any kind that fsspec knows."""

import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from filelock import FileLock
from fsspec.core import url_to_fs

from saekit import files
from saekit.activations_cache import retry
from saekit.activations_cache.storage_base import HOLDER, Holder, Storage, refusal
from saekit.errors import CacheError, ConfigError, first_line

log = logging.getLogger(__name__)

_HEARTBEAT = 60.0
_STALE = 300.0  # several heartbeats, one of which may have needed all its tries


class RemoteStorage(Storage):
    """A folder behind a URL. What may pass by itself is tried again for about a minute; after that,
    and for what will not pass, CacheError.

    A file is uploaded under its final name. An object store shows it only once it is whole; where a
    server (sftp) shows it earlier, a shard is safe all the same, as the manifest names it only
    afterwards, but the manifest itself is then not replaced in one step.
    """

    def __init__(
        self,
        url: str,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.url = url if url.endswith("://") else url.rstrip("/")
        self._sleep = sleep
        self._clock = clock
        self._fs, root = _driver(self.url)
        self._root = root.rstrip("/")

    def _remote(self, name: str) -> str:
        return f"{self._root}/{self._checked(name)}"

    def exists(self, name: str) -> bool:
        # Not fs.exists nor fs.isfile: those take a network that is down for an absent file.
        self._fs.invalidate_cache()
        try:
            return bool(self._call(name, self._fs.info, self._remote(name))["type"] == "file")
        except FileNotFoundError:
            return False

    def names(self) -> list[str]:
        # Not fs.find: it leaves out a folder that it cannot list.
        self._fs.invalidate_cache()
        found: list[str] = []
        folders = [self._root]
        while folders:
            folder = folders.pop()
            try:
                entries = self._call("", self._fs.ls, folder, detail=True)
            except FileNotFoundError:
                continue
            for entry in entries:
                path = entry["name"].rstrip("/")
                if path == folder or path.rpartition("/")[2].startswith("."):
                    continue  # an object store may list a folder as an empty file in itself
                (folders if entry["type"] == "directory" else found).append(path)
        return sorted(path.removeprefix(f"{self._root}/") for path in found)

    def read_text(self, name: str) -> str:
        content: bytes = self._call(name, self._fs.cat_file, self._remote(name))
        return content.decode("utf-8")

    @contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        target = self._remote(name)
        with tempfile.TemporaryDirectory(prefix="saekit-") as folder:
            path = Path(folder) / PurePosixPath(name).name
            with files.full_disk_in_words(f"{path} (the folder is set by TMPDIR)"):
                path.touch()
                yield path
            try:
                self._call(name, self._fs.put_file, str(path), target)
            except FileNotFoundError as error:
                raise CacheError(
                    f"{self.url} cannot be written to ({first_line(error)}). Make the bucket "
                    "first, or mend the URL"
                ) from error

    def local(self, name: str, checksum: str) -> Path:
        """Kept in SAEKIT_CACHE_DIR (by default `saekit/shards` in the user's cache folder) under
        its checksum; nothing is ever removed from there, so to make room delete the folder.

        A copy that was damaged there is fetched anew.
        """
        if not re.fullmatch(r"[0-9a-f]{32}", checksum):
            raise CacheError(
                f"{self.url}/{name}: '{checksum}' is no checksum (32 hex digits). The manifest was "
                "altered, or made by something else"
            )
        remote = self._remote(name)
        folder = _cache_folder()
        path = folder / f"{checksum}{PurePosixPath(name).suffix}"
        folder.mkdir(parents=True, exist_ok=True)
        # Many processes of one machine ask for the same shard: one fetches it, the others wait.
        with FileLock(folder / f".{checksum}.lock"):
            if not path.exists() or files.file_checksum(path) != checksum:
                with files.new_file(path) as temporary:
                    self._call(name, self._fs.get_file, remote, str(temporary))
                    found = files.file_checksum(temporary)
                    if found != checksum:
                        raise CacheError(
                            f"{self.url}/{name} does not match its checksum in the manifest "
                            f"({found} instead of {checksum}): the shard was cut short or altered. "
                            f"`saekit verify {self.url} --repair` makes it again"
                        )
        return path

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._call(name, self._fs.rm_file, self._remote(name))

    def free_bytes(self) -> int | None:
        return None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """An object that says who writes, renewed every minute by a thread.

        It is advice among writers of this kind, not a barrier: two that start within the same
        moments may both get it, the hosts' clocks must agree to a minute or two, and what a killed
        writer held is free only after five minutes.
        """
        other = self._holder()
        if other and (silent := self._clock() - other.refreshed) < _STALE:
            raise CacheError(
                f"{refusal(self.url, other)}. Its last sign of life was {silent:.0f} s ago: if it "
                f"was killed, the lock is free {_STALE / 60:.0f} minutes after that"
            )
        mine = Holder.this_process(self._clock())
        self.write_text(HOLDER, mine.text())
        if (winner := self._holder()) is None or winner.token != mine.token:
            raise CacheError(refusal(self.url, winner))
        stop = threading.Event()
        thread = threading.Thread(target=self._keep, args=(mine, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self._release(mine)

    def _keep(self, mine: Holder, stop: threading.Event) -> None:
        while not stop.wait(_HEARTBEAT):
            try:
                if not self._renew(mine):
                    return
            except CacheError as error:
                log.warning("the lock could not be renewed: %s", error)

    def _renew(self, mine: Holder) -> bool:
        """False where another writer has taken the lock over."""
        holder = self._holder()
        if holder and holder.token != mine.token:
            log.error("the lock was lost: %s", refusal(self.url, holder))
            return False
        self.write_text(HOLDER, replace(mine, refreshed=self._clock()).text())
        return True

    def _release(self, mine: Holder) -> None:
        # What was written under the lock is written; that the lock stays for a while is no failure.
        try:
            holder = self._holder()
            if holder and holder.token == mine.token:
                self.remove(HOLDER)
        except CacheError as error:
            log.warning("the lock could not be released: %s", error)

    def sub(self, name: str) -> "RemoteStorage":
        url = f"{self.url}/{self._checked(name)}"
        return RemoteStorage(url, sleep=self._sleep, clock=self._clock)

    def _call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        where = f"{self.url}/{name}".rstrip("/")
        return retry.call(where, function, *args, sleep=self._sleep, **kwargs)


def _driver(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it."""
    try:
        driver, root = url_to_fs(url)
    except ImportError as error:
        missing = getattr(error.__cause__, "name", None) or getattr(error, "name", None)
        hint = f": pip install {missing}" if missing else ""
        raise ConfigError(
            f"{url} needs a driver that cannot be imported ({first_line(error)}){hint}"
        ) from error
    except ValueError as error:
        known = ", ".join(("s3", "gs", "az", "hf", "sftp", "memory", "file"))
        raise ConfigError(
            f"{url} is of no kind that fsspec {fsspec.__version__} knows ({first_line(error)}); "
            f"it knows {known} and more"
        ) from error
    return driver, root


def _cache_folder() -> Path:
    if given := os.environ.get("SAEKIT_CACHE_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saekit" / "shards"
