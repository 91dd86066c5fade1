"""Files that appear whole or not at all, and their checksums."""

import errno
import json
import os
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from saekit.errors import SaekitError

_PARTIAL = ".partial"


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour of `path`, then move it into place in one step.

    Raises SaekitError where the disk is full; whatever stood at `path` before still stands there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PARTIAL, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        if not disk_full(error):
            raise
        raise SaekitError(
            f"no space left while writing {path}; what was complete before is untouched. "
            "Make room, then give the same command again: it goes on from there"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


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
