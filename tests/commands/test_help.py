import re
from itertools import pairwise

import pytest

from saekit.cli import main
from saekit.commands._help import prose


def shown(command: list[str], width: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    return lines


def paragraphs(lines: list[str]) -> list[list[str]]:
    """The lines of help of each flag, without its name. Here tyro draws no boxes around them."""
    found: list[list[str]] = []
    begin = next(line.index("show this help") for line in lines if "show this help" in line)
    for line in (line for line in lines if line.startswith("  ") and line.strip()):
        name, text = line[:begin], line[begin:].rstrip()
        if name.strip():  # A long name has the line for itself.
            found.append([" " * begin + text] if name.endswith("  ") and text else [])
        else:
            found[-1].append(" " * begin + text)
    return found


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("command", [["train", "topk"], ["eval", "core"], ["features", "build"]])
def test_no_line_of_help_ends_before_the_next_word_would_not_fit(
    command: list[str],
    width: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = shown(command, width, capsys)
    of_flags = paragraphs(lines)
    assert len(of_flags) > 10 and all(of_flags)
    above = "\n".join(lines[: next(i for i, line in enumerate(lines) if line.startswith("  "))])
    about = [part.split("\n") for part in re.split(r"\n{2,}", above)[1:-1]]
    assert about and all(about)
    for paragraph in [*of_flags, *about]:
        for line, after in pairwise(paragraph):
            assert len(f"{line} {after.split()[0]}") > width, f"{line!r} ends before {after!r}"


def test_paragraphs_and_lists_keep_their_lines() -> None:
    doc = """Of a line
    that is
    `broken`.

    - one
      more
    - two
    1. three

        Last
    """
    assert prose(doc) == "Of a line that is `broken`.\n\n- one more\n- two\n1. three\n\n    Last"
