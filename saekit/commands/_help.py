"""Help as prose, whatever the width of the terminal.

tyro keeps a docstring's line ends where the lines behind them are indented or begin with a sign,
and prints a command's own description as it is given.
"""

import re
import shutil
import textwrap
from dataclasses import is_dataclass, replace
from inspect import cleandoc

from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

_LINE_END = re.compile(r"(?<!\n)\n[ \t]*(?!\s|[-*] |\d+\. )")


def prose(text: str) -> str:
    """A docstring with its paragraphs and the items of its lists in a line each."""
    return _LINE_END.sub(" ", cleandoc(text))


def described(doc: str) -> str:
    """The description of a command, in lines that fit the terminal."""
    width = shutil.get_terminal_size().columns
    # tyro joins lines that begin with a letter: a margin keeps them apart.
    return "\n".join(
        textwrap.fill(line, width, initial_indent=" ", subsequent_indent=" ")
        for line in prose(doc).splitlines()
    )


def registry() -> ConstructorRegistry:
    """What tyro.cli needs to show the help of a dataclass's fields as prose."""
    made = ConstructorRegistry()
    asking = False

    @made.struct_rule
    def in_prose(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal asking
        if asking or not is_dataclass(info.type):
            return None
        # Asked again, this rule says nothing, and so tyro's own one answers.
        asking = True
        spec = ConstructorRegistry.get_struct_spec(info)
        asking = False
        assert isinstance(spec, StructConstructorSpec)
        return replace(spec, fields=tuple(map(_in_prose, spec.fields)))

    return made


def _in_prose(field: StructFieldSpec) -> StructFieldSpec:
    help = field.helptext

    def helptext() -> str | None:
        text = help() if callable(help) else help
        return None if text is None else prose(text)

    return replace(field, helptext=helptext)
