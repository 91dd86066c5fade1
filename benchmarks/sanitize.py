"""Every Triton kernel under CUDA's compute-sanitizer: accesses outside of what is allocated, races
in shared memory, barriers that not all threads reach.

    python benchmarks/sanitize.py                       # needs a GPU and compute-sanitizer
    python benchmarks/sanitize.py --tools memcheck --tests tests/kernels/test_triton_select.py
    python benchmarks/sanitize.py --within 500          # no file is begun that late, in seconds

What runs the kernels are their tests, which have odd sizes, empty rows, and memory that is filled
with NaN before a launch. Torch's own allocator is off, so that memory beside a tensor is nobody's.
One line for each tool and file of tests, written as soon as it is through: the verdict, and how
often each of saekit's kernels was launched. All is slowed down a hundredfold, compilers too, so the
tests are those that a CPU's interpreter runs, which are small.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _record import RESULTS, ROOT, append, show

NAME = "sanitize"
TOOLS = ("memcheck", "racecheck", "synccheck")
TESTS = (
    *(f"tests/kernels/test_triton_{name}.py" for name in ("select", "decode", "candidates")),
    "tests/kernels/test_triton_step.py",
    "tests/kernels/test_triton_pursuit.py",
    "tests/kernels/test_auxk.py",
    "tests/trainers/test_fused.py",
)
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


def sanitized(tool: str, tests: str, marks: str, timeout: float) -> dict[str, Any] | None:
    """None where the time was not enough."""
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.json"
        command = ["compute-sanitizer", "--tool", tool, "--print-limit", "20"]
        command += [sys.executable, "-P", "-m", "pytest", "-q", "-p", "sanitize", tests]
        command += ["-m", marks, "-p", "no:cacheprovider", "-p", "no:benchmark", "-n", "0"]
        env = os.environ | {
            COUNTED: str(counts),
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")])
            ),
        }
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            print(f"{tool}: {tests} was not through after {timeout:.0f} s")
            return None
        said = done.stdout + done.stderr
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", said)
        tested = re.findall(r"^(.*(?:passed|failed|error).*) in .*s", said, re.MULTILINE)
        if not (summary and tested and counts.exists()):
            raise SystemExit(f"{tool} gave no verdict on {tests}:\n{said[-4_000:]}")
        launches: dict[str, int] = json.loads(counts.read_text(encoding="utf-8"))
    clean = bool(re.match(r"0 (errors|hazards)", summary[-1]))
    if not clean or done.returncode:
        print(said[-8_000:])
    return {
        "op": tool,
        "impl": "saekit",
        "file": tests,
        "summary": summary[-1],
        "clean": clean,
        "tests": tested[-1],
        "launches": {name: n for name, n in sorted(launches.items()) if name in kernels()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--tests", nargs="+", default=list(TESTS))
    parser.add_argument("--marks", default="not slow and not network and not gpu")
    parser.add_argument("--timeout", type=float, default=1_800, help="seconds a tool and file")
    parser.add_argument("--within", type=float, default=float("inf"), help="seconds of all")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    begun, lines = time.monotonic(), []
    for tests in args.tests:
        for tool in args.tools:
            left = args.within - (time.monotonic() - begun)
            if left < 1:
                print(f"{tool}: there was no time left for {tests}")
            elif found := sanitized(tool, tests, args.marks, min(args.timeout, left)):
                lines.append(append(NAME, found, args.results))
    show(
        "saekit's kernels under compute-sanitizer",
        ("file", "tool", "verdict", "tests", "launches", "kernels"),
        [
            (
                line["file"],
                line["op"],
                line["summary"],
                line["tests"],
                f"{sum(line['launches'].values()):,}",
                str(len(line["launches"])),
            )
            for line in lines
        ],
    )


if __name__ == "__main__":
    main()
