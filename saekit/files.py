"""Files that appear whole or not at all, and their checksums."""

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError

from saekit.errors import SaekitError

_PARTIAL = ".partial"


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path` to fill, which is moved into place in one step at the end.

    Where the block fails nothing is left of it, and what stood at `path` before still stands there.
    Missing folders are made. Raises SaekitError where the disk is full.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PARTIAL, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with full_disk_in_words(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
            for folder in (path.parent, *(folder.parent for folder in made)):
                _sync_folder(folder)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """`new_file` for what one call of `write` fills."""
    with new_file(path) as temporary:
        write(temporary)


def _sync_folder(folder: Path) -> None:
    """A name outlives a power cut once its folder is on the disk too."""
    if os.name == "nt":  # a folder cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network and user-space file systems cannot; the file itself is written all the same.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(handle)


@contextmanager
def full_disk_in_words(path: Path | str) -> Iterator[None]:
    """Raises SaekitError, naming what was being written, where the block meets a full disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not disk_full(error):
            raise
        raise SaekitError(
            f"no space left while writing {path}; what was complete before is untouched. "
            "Make room, then give the same command again: it goes on from there"
        ) from error


def disk_full(error: Exception) -> bool:
    """Whether the disk's end, or the user's share of it, is what went wrong."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors writes in Rust, and gives the system's error number in its message alone.
    return any(f"os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def remove_partial(folder: Path) -> None:
    """Remove what a killed writer left behind; only the folder's one writer may call this."""
    for leftover in folder.glob(f".*{_PARTIAL}"):
        leftover.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Readable JSON. NaN and infinities are refused: other readers would choke on them."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def file_sha256(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_checksum(path: Path) -> str:
    """xxh3_128 in hex: finds damage as fast as a disk reads, but is no proof against forgery."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
