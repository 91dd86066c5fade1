"""What a place for a cache can do, and what a writer says of itself while it holds the lock."""

import json
import os
import shlex
import socket
import sys
import uuid
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from saekit.errors import CacheError

HOLDER = ".lock.json"
"""The file that says who writes."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who writes: what `.lock.json` says."""

    pid: int
    host: str
    since: str
    command: str
    token: str
    """Tells two writers apart whatever their names and numbers."""
    refreshed: float
    """Unix time of the last sign of life; only a remote lock renews it."""

    @classmethod
    def this_process(cls, now: float) -> "Holder":
        return cls(
            pid=os.getpid(),
            host=socket.gethostname(),
            since=datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
            command=shlex.join(sys.argv),
            token=uuid.uuid4().hex,
            refreshed=now,
        )

    @classmethod
    def parse(cls, text: str) -> "Holder | None":
        """None for what no writer of ours wrote."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError):
            return None

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def refusal(where: str, holder: Holder | None) -> str:
    """What to say to a second writer."""
    who = (
        f"process {holder.pid} on {holder.host} since {holder.since} (command: {holder.command})"
        if holder
        else "another process"
    )
    return f"{where} is being written by {who}: wait for it, stop it, or give another --out"


class Storage(ABC):
    """A folder of a cache. Names are relative, with `/`; CacheError where one leads out of it."""

    url: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is a file of that name, now."""

    @abstractmethod
    def names(self) -> list[str]:
        """All files below, sorted; hidden ones, and those in hidden folders, left out."""

    @abstractmethod
    def read_text(self, name: str) -> str:
        """Raises FileNotFoundError where it is absent."""

    def write_text(self, name: str, text: str) -> None:
        """Replaces what is there in one step."""
        with self.new_file(name) as path:
            path.write_text(text, encoding="utf-8")

    @abstractmethod
    def new_file(self, name: str) -> AbstractContextManager[Path]:
        """An empty local file to fill. It appears as `name`, whole and durable, when the block ends
        without an error; else nothing is left, and what was there before stays.

        Raises SaekitError where the disk is full.
        """

    @abstractmethod
    def local(self, name: str, checksum: str) -> Path:
        """A local file with the content of `name`; only to be read.

        Raises FileNotFoundError where it is absent. `checksum` is the xxh3_128 in hex; a file that
        must be fetched is compared with it (CacheError), a local one is not.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """An absent file is no error."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Room for new files; None where that cannot be known."""

    @abstractmethod
    def lock(self) -> AbstractContextManager[None]:
        """Be the one writer. CacheError at once, naming the holder, where there is another."""

    @abstractmethod
    def sub(self, name: str) -> "Storage":
        """A folder inside. It has its own lock."""

    def _holder(self) -> Holder | None:
        try:
            return Holder.parse(self.read_text(HOLDER))
        except FileNotFoundError:
            return None

    def _checked(self, name: str) -> str:
        """Names come from manifests, which may come from anywhere."""
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name:
            raise CacheError(
                f"'{name}' is no name of a file in {self.url}: it must be relative and stay inside "
                "the folder. The manifest was altered, or made by something else"
            )
        return path.as_posix()
