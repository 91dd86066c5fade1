"""Lines of benchmarks/results/, and how tables are made of them. Standard library only."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
DOCS = FOLDER.parent / "docs"
END = "<!-- end -->\n"

Line = dict[str, Any]
Results = dict[str, list[Line]]


def begin(name: str) -> str:
    return f"<!-- {name}: made by benchmarks/table.py -->\n"


def load(results: Path = RESULTS) -> dict[str, list[Line]]:
    """Lines of each file of results, oldest first."""
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted(results.glob("*.jsonl"))
    }


def newest(lines: list[Line], *key: str) -> list[Line]:
    """Of the lines that agree in these fields the last, in the order in which they first came."""
    found: dict[tuple[str, ...], Line] = {}
    for line in lines:
        found[tuple(str(line.get(field)) for field in key)] = line
    return list(found.values())


def hardware(line: Line) -> str:
    # A line of a GPU machine may be of its CPU.
    on_gpu = str(line.get("device", "")).startswith("cuda")
    return str(line["gpu"]) if on_gpu else f"{line['cpu']}, {line['cores']} cores"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def spread(line: Line) -> str:
    return f"{line['ratio']:.2f} ({line['ratio_min']:.2f} to {line['ratio_max']:.2f})"


def named(line: Line) -> str:
    name = str(line["impl"])
    versions: dict[str, str] = line.get("peer_versions") or line["versions"]
    version = versions.get(name.replace("_", "-"))
    return name if version is None else f"{name} {version}"


def cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")
