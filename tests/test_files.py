import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from saekit.errors import SaekitError
from saekit.files import (
    file_checksum,
    new_file,
    remove_partial,
    write_atomic,
    write_json,
    write_text,
)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# What Python's open and safetensors' Rust raise on a full file system (seen on a small tmpfs).
FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=["python", "safetensors"])
def test_a_full_disk_is_said_in_words(error: Exception, tmp_path: Path) -> None:
    def full(_: Path) -> None:
        raise error

    with pytest.raises(SaekitError, match="no space left while writing .*file"):
        write_atomic(tmp_path / "file", full)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "whole")
    (tmp_path / ".file.abc.partial").write_text("half")
    remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_json_that_others_cannot_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"ev": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_new_file_appears_when_its_block_ends_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with new_file(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_file_folder_and_new_parents_reach_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    path = tmp_path / "a" / "b" / "file"
    write_text(path, "x")
    assert synced == [found.stat().st_ino for found in (path, *path.parents[:3])]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO], ids=["cannot", "failed"])
def test_a_folder_that_cannot_be_synced_is_let_be_but_a_failing_disk_is_not(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if os.fstat(handle).st_ino == tmp_path.stat().st_ino:
            raise OSError(number, "fsync")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    if number == errno.EIO:
        with pytest.raises(OSError, match="fsync"):
            write_text(tmp_path / "file", "x")
    else:
        write_text(tmp_path / "file", "x")
        assert (tmp_path / "file").read_text() == "x"


def test_the_checksum_is_xxh3_128(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    assert (
        file_checksum(path) == "99aa06d3014798d86001c324468d497f"
    )  # from xxHash's own test vectors
    path.write_bytes(bytes(9 << 20))  # more than one block
    whole = file_checksum(path)
    with path.open("r+b") as file:
        file.seek(8 << 20)
        file.write(b"1")
    assert file_checksum(path) != whole
