"""The reference of the command line, from what the commands say with --help."""

import io
import os
from contextlib import redirect_stderr, redirect_stdout
from textwrap import fill
from unittest import mock

from saekit import cli
from saekit.commands import features
from saekit.evals import _kinds as evaluations
from saekit.trainers import _kinds as kinds

WIDTH = 100
"""Of the pages' text, in columns. Lines of use go beyond it by themselves."""


def variants() -> dict[str, list[str]]:
    """What comes after a command's name, where there is more than one thing that it does."""
    return {
        "train": kinds.names(),
        "eval": [*evaluations.names(), "all"],
        "features": list(features.PARTS),
        "plan": ["--gpus=8"],
    }


def uses() -> dict[str, list[list[str]]]:
    """Of each command the words to ask for help with, the command itself first."""
    more = variants()
    return {name: [[name], *([name, v] for v in more.get(name, []))] for name in cli.commands()}


def pages() -> dict[str, str]:
    """Markdown by page. Raises RuntimeError where a command takes one of several words that
    `variants` does not know."""
    # Brackets would be links.
    there = {name: line.replace("[", "\\[") for name, line in cli.commands().items()}
    lines = [f"| [`saekit {name}`]({name}.md) | {line} |\n" for name, line in there.items()]
    made = {
        "cli/index.md": "# Command line\n\n| command | what it does |\n|---|---|\n"
        + "".join(lines)
        + "\nExit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.\n"
    }
    for name, (first, *others) in uses().items():
        line = there[name]
        text = f"# saekit {name}\n\n{line[:1].upper()}{line[1:]}.\n\n{_fenced(first)}"
        if " is one of: " in text and not others:
            raise RuntimeError(f"saekit {name} takes one of several words: add it to variants()")
        for words in others:
            text += f"\n## saekit {' '.join(words)}\n\n{_fenced(words)}"
        made[f"cli/{name}.md"] = text
    return made


def _fenced(words: list[str]) -> str:
    return f"```text\n{help_of(words)}```\n"


def help_of(words: list[str]) -> str:
    """What `saekit WORDS --help` prints. Raises RuntimeError where it fails."""
    said, complained = io.StringIO(), io.StringIO()
    plain = {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb"}
    with (
        mock.patch.dict(os.environ, plain),
        redirect_stdout(said),
        redirect_stderr(complained),
    ):
        try:
            code = cli.main([*words, "--help"])
        except SystemExit as done:
            code = int(done.code or 0)
    if code or not said.getvalue().strip():
        what = " ".join(words)
        raise RuntimeError(f"saekit {what} --help ends with {code}: {complained.getvalue()}")
    lines = said.getvalue().strip().splitlines()
    wrapped = (
        fill(line, WIDTH, subsequent_indent="    ") if len(line) > WIDTH else line.rstrip()
        for line in lines
    )
    return "\n".join(wrapped) + "\n"
