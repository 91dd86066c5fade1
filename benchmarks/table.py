"""Makes the tables of docs/peers.md from benchmarks/results/: python benchmarks/table.py

The newest line of each case is shown. Standard library only.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
PAGE = FOLDER.parent / "docs" / "peers.md"
END = "<!-- end -->\n"

Line = dict[str, Any]


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
    found: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        found[tuple(line.get(field) for field in key)] = line
    return list(found.values())


def hardware(line: Line) -> str:
    # A line of a GPU machine may be of its CPU.
    on_gpu = str(line.get("device", "")).startswith("cuda")
    return str(line["gpu"]) if on_gpu else f"{line['cpu']}, {line['cores']} cores"


def markdown(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _spread(line: Line) -> str:
    return f"{line['ratio']:.2f} ({line['ratio_min']:.2f} to {line['ratio_max']:.2f})"


def _growth(line: Line) -> str:
    return "" if line.get("growth_mib") is None else f"{line['growth_mib']:,.0f}"


def harvest(results: dict[str, list[Line]]) -> str:
    lines = [line for line in results.get("harvest", []) if line["op"] == "harvest"]
    shown = newest(lines, "model", "device", "gpu", "cpu", "cores", "hooks", "dtype", "file_system")
    rows = [
        (
            f"{line['model']}, {line['model_dtype']}",
            hardware(line),
            f"{line['hooks']}, {line['dtype']}",
            f"{line['bare_tokens_per_s']:,}",
            f"{line['tokens_per_s']:,}",
            _spread(line),
            f"{line['mb_per_s']:,.0f}",
            f"{line['disk_mb_per_s']:,.0f}, {line['file_system']}",
            f"{line['bare_growth_mib']:,.0f}, {_growth(line)}, {line['memory_mib']:,.0f}"
            if _growth(line)
            else f"?, ?, {line['memory_mib']:,.0f}",
        )
        for line in shown
    ]
    columns: tuple[str, ...] = (
        "model",
        "on",
        "hook points, on disk",
        "bare tokens/s",
        "harvest tokens/s",
        "ratio",
    )
    columns += (
        "MB/s",
        "plain write MB/s",
        "memory MiB: rise in a bare pass, in a harvest, limit of its rows",
    )
    return markdown(columns, rows)


def text_to_disk(results: dict[str, list[Line]]) -> str:
    lines = [line for line in results.get("harvest", []) if line["op"] == "text to disk"]
    shown = newest(lines, "impl", "hooks", "device", "gpu", "cpu", "cores")
    rows = [
        (
            _named(line),
            hardware(line),
            f"{line['hooks']} in {line['passes']}" if "passes" in line else str(line["hooks"]),
            line["dtype"] or "",
            f"{line['tokens_per_s']:,}" if "seconds" in line else "no",
            f"{line['mb_per_s']:,.1f}" if line.get("bytes") else "",
            _growth(line),
            _cell(line["refused"]),
        )
        for line in sorted(shown, key=lambda line: line["hooks"])
    ]
    columns = ("tool", "on", "hook points in passes", "kept as", "tokens/s", "MB/s written")
    return markdown((*columns, "memory MiB, rise", "what it refused"), rows)


def reader(results: dict[str, list[Line]]) -> str:
    lines = [line for line in results.get("reader", []) if line["op"] == "read"]
    key = ("impl", "order", "epoch", "split", "dtype", "given_as", "device", "gpu", "cpu", "cores")
    rows = [
        (
            _named(line),
            hardware(line),
            line["order"],
            line["epoch"],
            f"{line.get('dtype') or ''} as {line['given_as']}",
            f"{line['mb_per_s']:,.0f}" if "mb_per_s" in line else "no",
            f"{line['plain_mb_per_s']:,.0f}, {line['page_cache']}" if "ratio" in line else "",
            _spread(line) if "ratio" in line else _cell(line.get("refused")),
        )
        for line in newest(lines, *key, "page_cache")
    ]
    columns = ("tool", "on", "order", "epoch", "rows", "MB/s", "plain read MB/s, page cache")
    return markdown((*columns, "ratio"), rows)


def _named(line: Line) -> str:
    name = str(line["impl"])
    versions: dict[str, str] = line.get("peer_versions") or line["versions"]
    version = versions.get(name.replace("_", "-"))
    return name if version is None else f"{name} {version}"


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


TABLES: dict[str, Callable[[dict[str, list[Line]]], str]] = {
    "harvest": harvest,
    "text to disk": text_to_disk,
    "reader": reader,
}


def with_tables(page: str, results: dict[str, list[Line]]) -> str:
    """The page's text with its tables made anew."""
    for name, table in TABLES.items():
        before, rest = page.split(begin(name))
        _, after = rest.split(END, 1)
        page = before + begin(name) + table(results) + END + after
    return page


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_tables(page, load()), encoding="utf-8")


if __name__ == "__main__":
    main()
