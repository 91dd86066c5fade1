"""What every benchmark here shares: how it measures, and what it writes down."""

import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
RESULTS = FOLDER / "results"
MIB = 1 << 20
_PACKAGES = ("torch", "transformers", "safetensors", "xxhash")


def append(name: str, case: dict[str, Any], folder: Path = RESULTS) -> dict[str, Any]:
    """Write one case as a line of `results/<name>.jsonl`; returns all of the line."""
    import saekit

    line = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        **machine(),
        "versions": {"python": platform.python_version(), "saekit": saekit.__version__}
        | {package: importlib.metadata.version(package) for package in _PACKAGES},
        **case,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")
    return line


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, and GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _processor(), "cores": cores, "gpu": gpu}


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    named = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return named[0] if named else platform.machine()


def commit() -> str | None:
    """Of the checkout, with a + where files were changed since; None outside of one."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True)
        changed = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+" if changed.strip() else "")


def summary(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 5),
        "min": round(min(values), 5),
        "max": round(max(values), 5),
        "n": len(values),
    }


def ratio(slower: list[float], quicker: list[float]) -> dict[str, float]:
    """The second's speed as a part of the first's: of the medians, and pair by pair at least and at
    most. Both did the same work."""
    pairs = [b / a for a, b in zip(slower, quicker, strict=True)]
    of_medians = statistics.median(quicker) / statistics.median(slower)
    return {
        "ratio": round(of_medians, 4),
        "ratio_min": round(min(pairs), 4),
        "ratio_max": round(max(pairs), 4),
    }


def write_seconds(folder: Path, n_bytes: int) -> float:
    """Seconds that a plain sequential write of so many bytes takes, until they are on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    block = os.urandom(16 * MIB)
    path = folder / ".plain-write"
    begun = time.perf_counter()
    try:
        with path.open("wb", buffering=0) as file:
            left = n_bytes
            while left:
                left -= file.write(block[: min(left, len(block))])
            os.fsync(file.fileno())
        return time.perf_counter() - begun
    finally:
        path.unlink()


def file_system(folder: Path) -> str:
    """Type of the file system that a folder lies on, such as ext4 or tmpfs."""
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    types = {Path(line.split()[1]): line.split()[2] for line in mounts}
    here = folder.resolve()
    return next((types[path] for path in (here, *here.parents) if path in types), "unknown")


def to_host_seconds(device: torch.device, n_bytes: int) -> float:
    """Seconds that a GPU takes to copy so many bytes into pinned memory, by its own clock."""
    here = torch.randint(0, 255, (n_bytes,), dtype=torch.uint8, device=device)
    there = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
    seconds: list[float] = []
    for _ in range(7):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        there.copy_(here, non_blocking=True)
        ended.record()
        torch.cuda.synchronize(device)
        seconds.append(begun.elapsed_time(ended) / 1e3)
    return statistics.median(seconds[2:])


def clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def show(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=160).print(table)
