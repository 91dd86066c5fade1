import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from saekit.errors import SaekitError
from saekit.files import remove_partial, write_atomic, write_json, write_text


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
