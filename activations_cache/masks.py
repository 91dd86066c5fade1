"""Kinds of token, as bits of one column, so that everybody who leaves tokens out leaves out the
same ones.

`special`: a special token of the tokenizer, in the text or around it; a CLS or register position of
a vision model.
`last`: the last token of its window, which has no next token there to predict.
`bos`: the model's own first token (BOS, CLS) at position 0.
`template`: in a chat, a token without a character of any message's content.
`first`: one of the first positions of its window (four, position 0 among them).
`sink`: a row whose norm at any harvested hook point is above `sink_factor` times the median norm of
its own window there.
`nonfinite`: a row that holds a value that is not finite at any harvested hook point; readers always
leave these out.

The first five follow from the text and are set with the tokens; the last two from the activations,
and are set when they are written.
"""

from collections.abc import Collection

from saekit.errors import ConfigError

KINDS = {
    "special": 1,
    "last": 2,
    "bos": 4,
    "template": 8,
    "first": 16,
    "sink": 32,
    "nonfinite": 64,
}
"""Bit of each kind."""


def bits(exclude: Collection[str]) -> int:
    """The bits of several kinds together. Raises ConfigError for a kind that is not known."""
    total = 0
    for kind in exclude:
        if kind not in KINDS:
            raise ConfigError(f"token kind '{kind}' is unknown; a cache marks: {', '.join(KINDS)}")
        total |= KINDS[kind]
    return total
