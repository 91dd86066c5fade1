"""Runs the notebooks of this folder from top to bottom and keeps their outputs:
python notebooks/run.py [--check] [NAME ...]

Names are beginnings: `01` is enough. With --check nothing is written. What the notebooks make lies
in `notebooks/work/`, which each of them may begin without. Ends with 1 where one fails, or grew too
large.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parent
MOST_BYTES = 300_000
MOST_SECONDS = 120


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", default=[""])
    parser.add_argument("--check", action="store_true", help="run them, and write nothing")
    args = parser.parse_args()
    paths = [
        path
        for path in sorted(FOLDER.glob("*.ipynb"))
        if any(path.name.startswith(name) for name in args.names)
    ]
    if not paths:
        sys.exit(f"no notebook in {FOLDER} begins with any of {args.names}")
    # Figures as plotly's own JSON: small, and drawn by Jupyter and editors without a network.
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    # Of a progress bar that nobody asked for, with a path of this machine.
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
    return max(run(path, keep=not args.check) for path in paths)


def run(path: Path, *, keep: bool) -> int:
    """1 where something is wrong with it, which is said."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        # Jupyter's name for the interpreter that runs this.
        kernel_name="python3",
        startup_timeout=10 * MOST_SECONDS,
        timeout=10 * MOST_SECONDS,
        resources={"metadata": {"path": str(FOLDER)}},
        record_timing=False,
    )
    begin = time.monotonic()
    try:
        client.execute()
    except CellExecutionError as error:
        print(f"{path.name}: {error}")
        return 1
    seconds = time.monotonic() - begin
    text = nbformat.writes(tidy(notebook)) + "\n"
    if keep:
        path.write_text(text, encoding="utf-8")
    size = len(text.encode())
    print(f"{path.name}: {seconds:.0f} s, {size / 1000:.0f} kB")
    if seconds > MOST_SECONDS:
        # No failure: other work on the machine may be why.
        print(f"{path.name}: it shall take {MOST_SECONDS} s on two free cores")
    if size > MOST_BYTES:
        print(f"{path.name}: {size} bytes are more than {MOST_BYTES}: make its outputs smaller")
        return 1
    return 0


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what differs from run to run and says nothing."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number:02}", {}
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    return notebook


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """With what was printed in one piece, which came in as many as the time of day made of it."""
    found: list[nbformat.NotebookNode] = []
    for output in outputs:
        last = found[-1] if found else output
        same = output.output_type == last.output_type == "stream" and output.name == last.name
        if found and same:
            last.text += output.text
            continue
        found.append(output)
    return found


if __name__ == "__main__":
    sys.exit(main())
