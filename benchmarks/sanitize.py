"""Every Triton kernel under CUDA's compute-sanitizer: accesses outside of what is allocated, races
in shared memory, barriers that not all threads reach.

    python benchmarks/sanitize.py                       # needs a GPU and compute-sanitizer
    python benchmarks/sanitize.py --tools memcheck --tests tests/kernels/test_triton_select.py

What runs the kernels are their tests, which have odd sizes, empty rows, and memory that is filled
with NaN before a launch. Torch's own allocator is off, so that memory beside a tensor is nobody's.
One line for each tool: its verdict, and how often each of saekit's kernels was launched under it.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _record import RESULTS, ROOT, append, show

NAME = "sanitize"
TOOLS = ("memcheck", "racecheck", "synccheck")
TESTS = ("tests/kernels", "tests/trainers/test_fused.py")
COUNTED = "SAEKIT_LAUNCHES"
"""Says to the tests' process, which is this file as a plugin of pytest, where to write counts."""


def pytest_configure(config: Any) -> None:
    """Of the plugin: count the launches of every kernel by its name."""
    import atexit

    from triton import knobs

    from saekit.kernels.triton_step import FusedTopKStep

    # A graph cannot be captured without torch's allocator; it launches the same kernels.
    FusedTopKStep._launch = lambda self, part, x: part(x)  # type: ignore[method-assign]
    counts: dict[str, int] = {}

    def launched(metadata: Any) -> None:
        name = metadata.get()["name"]
        counts[name] = counts.get(name, 0) + 1

    knobs.runtime.launch_enter_hook.add(launched)
    path = Path(os.environ[COUNTED])
    atexit.register(lambda: path.write_text(json.dumps(counts), encoding="utf-8"))


def kernels() -> set[str]:
    """Names of all that may be launched."""
    found: set[str] = set()
    for path in (ROOT / "saekit" / "kernels").glob("triton_*.py"):
        text = path.read_text(encoding="utf-8")
        found |= set(re.findall(r"^def (\w*kernel)\(", text, re.MULTILINE))
    return found


def sanitized(tool: str, tests: list[str], marks: str, timeout: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.json"
        command = ["compute-sanitizer", "--tool", tool, "--print-limit", "20"]
        command += [sys.executable, "-P", "-m", "pytest", "-q", "-p", "sanitize", *tests]
        command += ["-m", marks, "-p", "no:cacheprovider", "-p", "no:benchmark", "-n", "0"]
        env = os.environ | {
            COUNTED: str(counts),
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")])
            ),
        }
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
        )
        said = done.stdout + done.stderr
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", said)
        tested = re.findall(r"^(.*(?:passed|failed|error).*) in .*s", said, re.MULTILINE)
        if not (summary and tested and counts.exists()):
            raise SystemExit(f"{tool} gave no verdict:\n{said[-4_000:]}")
        launches: dict[str, int] = json.loads(counts.read_text(encoding="utf-8"))
    clean = bool(re.match(r"0 (errors|hazards)", summary[-1]))
    if not clean or done.returncode:
        print(said[-8_000:])
    return {
        "op": tool,
        "impl": "saekit",
        "summary": summary[-1],
        "clean": clean,
        "tests": tested[-1],
        "launches": {name: n for name, n in sorted(launches.items()) if name in kernels()},
        "not_launched": sorted(kernels() - launches.keys()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--tests", nargs="+", default=list(TESTS))
    parser.add_argument("--marks", default="not slow and not network", help="as pytest's -m")
    parser.add_argument("--timeout", type=float, default=1_800, help="seconds a tool")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    lines = [
        append(NAME, sanitized(tool, args.tests, args.marks, args.timeout), args.results)
        for tool in args.tools
    ]
    show(
        "saekit's kernels under compute-sanitizer",
        ("tool", "verdict", "tests", "launches", "not launched"),
        [
            (
                line["op"],
                line["summary"],
                line["tests"],
                f"{sum(line['launches'].values()):,}",
                " ".join(line["not_launched"]) or "none",
            )
            for line in lines
        ],
    )


if __name__ == "__main__":
    main()
