"""Kinds of token, as bits of one column, so that everybody who leaves tokens out leaves out the
same ones."""

from collections.abc import Collection

from saekit.errors import ConfigError

KINDS = {"special": 1, "last": 2}
"""Bit of each kind. `special`: the tokenizer's special tokens, the beginning-of-sequence token
among them. `last`: the last token of a window, which has no next token there to predict."""


def bits(exclude: Collection[str]) -> int:
    """The bits of several kinds together. Raises ConfigError for a kind that is not known."""
    total = 0
    for kind in exclude:
        if kind not in KINDS:
            raise ConfigError(f"token kind '{kind}' is unknown; a cache marks: {', '.join(KINDS)}")
        total |= KINDS[kind]
    return total
