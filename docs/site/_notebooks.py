"""Notebooks as pages, with the outputs that they were saved with. Nothing runs."""

import json
from pathlib import Path
from typing import Any

from click import unstyle

PLOTLY = "assets/plotly.min.js"
_FIGURE = "application/vnd.plotly.v1+json"
_PLACE = '<div class="figure"'


def pages(root: Path) -> dict[str, str]:
    """Markdown by page; none where there are no notebooks."""
    found = {path: page(path) for path in sorted((root / "notebooks").glob("*.ipynb"))}
    return {f"notebooks/{path.stem}.md": text for path, text in found.items()}


def page(path: Path) -> str:
    book = json.loads(path.read_text(encoding="utf-8"))
    text = "\n".join(_cell(cell, f"{path.stem}-{i}") for i, cell in enumerate(book["cells"]))
    # Not before the title, which has to come first.
    text = text.replace(_PLACE, f'<script src="../{PLOTLY}"></script>\n{_PLACE}', 1)
    return text if text.lstrip().startswith("# ") else f"# {path.stem}\n\n{text}"


def _cell(cell: dict[str, Any], name: str) -> str:
    source = _text(cell["source"])
    if cell["cell_type"] == "markdown":
        return f"{source}\n"
    if cell["cell_type"] != "code" or not source.strip():
        return ""
    outputs = [_output(out, f"{name}-{i}") for i, out in enumerate(cell.get("outputs", []))]
    return f"````python\n{source}\n````\n\n" + "\n".join(outputs)


def _output(output: dict[str, Any], name: str) -> str:
    if output["output_type"] in ("stream", "error"):
        return _verbatim(_text(output.get("text") or output.get("traceback", [])))
    data = output.get("data", {})
    if _FIGURE in data:
        # A closing tag inside of it would end the script.
        figure = json.dumps(data[_FIGURE]).replace("</", "<\\/")
        return (
            f'{_PLACE} id="{name}"></div>\n<script>(figure => Plotly.newPlot("{name}", '
            f"figure.data, figure.layout, {{responsive: true}}))({figure})</script>\n"
        )
    for kind in ("image/png", "image/jpeg"):
        if kind in data:
            return f"![output](data:{kind};base64,{''.join(_text(data[kind]).split())})\n"
    if "image/svg+xml" in data:
        return f"<div>{''.join(_text(data['image/svg+xml']).splitlines())}</div>\n"
    html = _text(data.get("text/html", ""))
    # What is preformatted hangs on its lines, and has a plain form as well.
    if html and "<pre" not in html:
        return f"<div>{''.join(html.splitlines())}</div>\n"
    return _verbatim(_text(data.get("text/plain", "")))


def _verbatim(text: str) -> str:
    text = unstyle(text)  # of a terminal's colours
    return f"````text\n{text.rstrip()}\n````\n" if text.strip() else ""


def _text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)


def has_figures(made: dict[str, str]) -> bool:
    return any(PLOTLY in text for text in made.values())
