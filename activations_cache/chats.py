"""Chats to tokens, by the tokenizer's chat template, and which of the tokens are the template's."""

from typing import Any

from jinja2 import TemplateError

from saekit.activations_cache.masks import KINDS
from saekit.documents import Document
from saekit.errors import ConfigError, CorpusError, first_line

# Templates that print today's date would give other tokens tomorrow: they all get this one.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}"
    "{{ '2024-07-26' if '-' in format else '26 Jul 2024' }}"
    "{%- endmacro -%}"
)


def chat_tokens(document: Document, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of a chat, and for each of them the bit `template` or 0.

    The chat is rendered and then tokenized in one piece, special tokens recognised and none added:
    what the model was trained on and is served with. Tokenizing contents apart from the template
    would keep "<|end|>" in a content as text, but would also break the tokens that cross from the
    one into the other (" Hello" after "[INST]"); so such text does become the special token, and
    `special` marks it. Templates that print today's date get a fixed one.

    Raises ConfigError for a tokenizer without a chat template or without offsets, CorpusError for a
    chat that the template refuses or whose contents cannot be found in what it makes.
    """
    rendered = _render(document, [m["content"] for m in document.messages], tokenizer)
    content = bytearray(len(rendered))
    for begin, end in _spans(document, rendered, tokenizer):
        content[begin:end] = b"\1" * (end - begin)
    encoded = tokenizer(
        rendered,
        add_special_tokens=False,
        split_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    ids: list[int] = encoded["input_ids"]
    # Byte-level tokenizers trim spaces off a token's span, and so all of a token of spaces: its
    # span is empty and stands at its end.
    template = [
        0 if 1 in content[max(0, min(begin, end - 1)) : end] else KINDS["template"]
        for begin, end in encoded["offset_mapping"]
    ]
    return ids, template


def _render(document: Document, contents: list[str], tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        raise ConfigError(
            "the tokenizer has no chat template, so chats cannot be rendered: name the chat model "
            "rather than its base model, set chat_template in its tokenizer_config.json, or give a "
            "dataset of texts"
        )
    if not tokenizer.is_fast:
        raise ConfigError(
            "chats need a fast tokenizer (tokenizer.json), which tells where each token stands in "
            "the text; this one is slow"
        )
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _FIXED_DATE + template
    chat = [m | {"content": c} for m, c in zip(document.messages, contents, strict=True)]
    try:
        rendered: str = tokenizer.apply_chat_template(
            chat, chat_template=template, tokenize=False, date_string="26 Jul 2024"
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise CorpusError(
            f"the chat template refuses '{document.id}': {first_line(error)}. Leave it out, or "
            "bring its roles into the order that the template asks for"
        ) from error
    return rendered


def _spans(document: Document, rendered: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Where the messages' contents stand in the rendered chat, as templates strip them.

    A search alone would find a short content in the template ("user" in a header). So the chat is
    rendered once more with other contents, which shows what the template writes between them; only
    where it writes something else for these contents are they searched for, in order.
    """
    # Private-use characters: no template writes them, and no text means anything by them.
    stand_ins = [f"\ue000{number}\ue001" for number in range(len(document.messages))]
    pieces, rest = [], _render(document, stand_ins, tokenizer)
    for stand_in in stand_ins:
        piece, _, rest = rest.partition(stand_in)
        pieces.append(piece)
    spans = _between([*pieces, rest], document, rendered)
    return _search(document, rendered) if spans is None else spans


def _between(pieces: list[str], document: Document, rendered: str) -> list[tuple[int, int]] | None:
    """The contents between the template's pieces, or None where they do not make the chat."""
    if not rendered.startswith(pieces[0]):
        return None
    spans, at = [], len(pieces[0])
    for message, after in zip(document.messages, pieces[1:], strict=True):
        raw = message["content"]
        for form in (raw, raw.strip(), raw.lstrip(), raw.rstrip()):
            if rendered.startswith(form + after, at):
                break
        else:
            return None
        spans.append((at, at + len(form)))
        at += len(form) + len(after)
    return spans if at == len(rendered) else None


def _search(document: Document, rendered: str) -> list[tuple[int, int]]:
    spans, at = [], 0
    for number, message in enumerate(document.messages):
        content = message["content"].strip()
        begin = rendered.find(content, at)
        if begin < 0:
            raise CorpusError(
                f"the chat template leaves out or alters message {number} of '{document.id}', so "
                "its tokens cannot be told from the template's: leave the chat out, or bring its "
                "contents into the form that the template writes"
            )
        at = begin + len(content)
        spans.append((begin, at))
    return spans
