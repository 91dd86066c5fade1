import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest

from saekit.activations_cache.direct import DirectWriter


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, (4 << 20) - 1, 4 << 20, (4 << 20) + 5000])
def test_what_is_written_past_the_page_cache_is_all_there(
    size: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if refused:  # as file systems do that do not know how

        def open_(path: Path, flags: int, *args: Any) -> int:
            if flags & getattr(os, "O_DIRECT", 0):
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(path, flags, *args)

        real = os.open
        monkeypatch.setattr(os, "open", open_)
    content = random.Random(size).randbytes(size)
    with DirectWriter(tmp_path / "file") as file:
        file.write(memoryview(content[: size // 3]))
        file.write(memoryview(content[size // 3 :]))
    assert (tmp_path / "file").read_bytes() == content


def test_an_error_while_writing_past_the_page_cache_reaches_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), DirectWriter(tmp_path / "file") as file:
        file.write(memoryview(b"abc"))
        _ = 1 / 0
