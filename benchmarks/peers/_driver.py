"""What the drivers share. Standard library only: they run in other environments than saekit's."""

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="a folder in transformers format")
    parser.add_argument("--text", required=True, help=".jsonl of {text}, one document a line")
    parser.add_argument("--layer", type=int, default=1, help="its residual stream, going out")
    parser.add_argument("--hooks", nargs="*", default=[], help="places by their names in saekit")
    parser.add_argument("--n-tokens", type=int, required=True)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32, help="windows in a forward pass")
    parser.add_argument("--dtype", default="bfloat16", help="on disk")
    parser.add_argument("--out", required=True, help="folder for the cache; it must not exist")
    parser.add_argument("--read-batch", type=int, default=4096, help="rows of a batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def documents(path: str) -> list[str]:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


class Measured:
    """Wall-clock seconds, and how far memory rose above where it stood at the beginning."""

    seconds = 0.0
    growth_mib: float | None = None


@contextmanager
def measured() -> Iterator[Measured]:
    found = Measured()
    before = _reset_peak()
    begun = time.perf_counter()
    yield found
    found.seconds = time.perf_counter() - begun
    if before is not None:
        found.growth_mib = round(_memory("VmHWM") - before, 1)


def _reset_peak() -> float | None:
    """Memory in use in MiB, and the kernel's record of its peak set to that; None where the system
    keeps none."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _memory("VmRSS")
    except OSError:
        return None


def _memory(field: str) -> float:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def folder_bytes(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def plain_read(folder: str, pattern: str) -> tuple[int, float]:
    """Bytes of a folder's files and the seconds that a plain read of them takes."""
    buffer = bytearray(16 << 20)
    total, begun = 0, time.perf_counter()
    for path in sorted(Path(folder).rglob(pattern)):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total, time.perf_counter() - begun


def tell(record: dict[str, Any], packages: tuple[str, ...]) -> None:
    """The last line of the output: what the benchmark reads."""
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(json.dumps({"python": sys.version.split()[0], "versions": versions, **record}))
