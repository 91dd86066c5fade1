"""The notebooks as they are kept; `make notebooks` runs them."""

import json
import runpy
from pathlib import Path
from typing import Any

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
RUN = runpy.run_path(str(FOLDER / "run.py"), run_name="run")
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_its_outputs(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text) < RUN["MOST_BYTES"]
    for place in ("/home/", "/root/", "/tmp/", "site-packages", " object at 0x"):
        assert place not in text, f"{place} is of one machine"
    cells = json.loads(text)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert "error" not in kinds
    figures = (output.get("data", {}) for cell in code for output in cell["outputs"])
    if not path.stem.startswith("07"):
        assert any("application/vnd.plotly.v1+json" in data for data in figures)


def test_every_notebook_is_listed() -> None:
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 7
    assert all(f"({path.name})" in listed for path in NOTEBOOKS)


def test_what_was_printed_piece_by_piece_is_one_output() -> None:
    def said(name: str, text: str) -> Any:
        return nbformat.v4.new_output("stream", name=name, text=text)

    pieces = [said("stdout", "a"), said("stdout", "b"), said("stderr", "c"), said("stdout", "d")]
    found = [(output.name, output.text) for output in RUN["joined"](pieces)]
    assert found == [("stdout", "ab"), ("stderr", "c"), ("stdout", "d")]
