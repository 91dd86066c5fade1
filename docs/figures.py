"""Writes the README's figures from the demo's own result: python docs/figures.py [demo_run]

With a folder, its `run/results/core.json` is kept as `docs/demo_core.json` first, so that the table
has its source beside it.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "docs" / "demo_core.json"
BEGIN = "<!-- demo figures: made by docs/figures.py -->\n"
END = "<!-- end of demo figures -->\n"
SHOWN = ("ev", "ce_recovered_zero", "ce_recovered_mean", "ce_delta", "l0_mean", "dead_share")


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown: value, rows or tokens, and the first words of the definition."""
    lines = ["| metric | value | over | definition |", "|---|---|---|---|"]
    for name in SHOWN:
        metric = result["metrics"][name]
        meaning = metric["definition"].split(";")[0].replace("|", "\\|")
        lines.append(f"| `{name}` | {metric['value']:.4g} | {metric['n']:,} | {meaning} |")
    return "\n".join(lines) + "\n"


def with_figures(readme: str, result: dict[str, Any]) -> str:
    """The README's text with its table made anew."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table(result) + END + after


def main() -> None:
    if len(sys.argv) > 1:
        RESULT.write_bytes((Path(sys.argv[1]) / "run" / "results" / "core.json").read_bytes())
    readme = ROOT / "README.md"
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    readme.write_text(with_figures(readme.read_text(encoding="utf-8"), result), encoding="utf-8")


if __name__ == "__main__":
    main()
