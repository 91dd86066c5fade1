from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from saekit.activations_cache.chats import chat_tokens
from saekit.activations_cache.masks import KINDS
from saekit.activations_cache.tokens import TokenWindow, windows
from saekit.documents import Document
from saekit.errors import ConfigError, CorpusError

PLAIN = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
STRIPPED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "[INST] {{ m['content'] | trim }} [/INST]{% else %} {{ m['content'] | trim }} "
    "{% endif %}{% endfor %}"
)


def chat(*contents: str, name: str = "chats/0") -> Document:
    roles = ("user", "assistant")
    return Document(
        name,
        messages=tuple({"role": roles[i % 2], "content": c} for i, c in enumerate(contents)),
    )


@pytest.fixture(params=["spans", "trimmed spans"])
def tokenizer(request: pytest.FixtureRequest, tiny_lm: Path) -> Any:
    """Byte-level, with or without the spaces in the spans of its tokens."""
    loaded = AutoTokenizer.from_pretrained(tiny_lm)
    loaded.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    if request.param == "trimmed spans":
        loaded.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    loaded.chat_template = PLAIN
    return loaded


def split(document: Document, tokenizer: Any) -> tuple[str, str]:
    """The text of the tokens of contents, and that of the template's."""
    ids, bits = chat_tokens(document, tokenizer)
    own = [i for i, bit in zip(ids, bits, strict=True) if bit]
    theirs = [i for i, bit in zip(ids, bits, strict=True) if not bit]
    return tokenizer.decode(theirs), tokenizer.decode(own)


def test_a_chat_is_the_template_and_nothing_more(tokenizer: Any) -> None:
    ids, _ = chat_tokens(chat("the cat", "a dog"), tokenizer)
    assert tokenizer.decode(ids) == (
        "<|start|>user\nthe cat<|end|>\n<|start|>assistant\na dog<|end|>\n"
    )
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|start|>")


@pytest.mark.parametrize(
    "contents",
    [
        ("the cat", "a dog"),
        ("user", "assistant", "s", "\n"),
        ("  spaces  ", "\n\nlines\n\n", "   "),
        ("", "empty before"),
        ("três 日本 🙂", "é"),
        ("<|end", "same", "same"),
    ],
)
def test_tokens_of_contents_are_told_from_the_templates(
    contents: tuple[str, ...], tokenizer: Any
) -> None:
    """Contents that stand in the headers too, that are spaces only, that are empty, of several
    bytes."""
    document = chat(*contents)
    headers = "".join(f"<|start|>{m['role']}\n<|end|>\n" for m in document.messages)
    assert split(document, tokenizer) == ("".join(contents), headers)


def test_a_token_across_the_border_is_of_the_content(tokenizer: Any) -> None:
    tokenizer.chat_template = STRIPPED
    theirs, own = split(chat(" the cat\n", "  a dog"), tokenizer)
    assert theirs == " the cat a dog"
    assert own == "<bos>[INST] [/INST] "


def test_contents_that_the_template_writes_otherwise_are_searched_for(tokenizer: Any) -> None:
    """As templates do that take reasoning out and put it back in their own way."""
    tokenizer.chat_template = PLAIN.replace(
        "{{ m['content'] }}", "{% if 'dog' in m['content'] %}! {% endif %}{{ m['content'] }}"
    )
    theirs, own = split(chat("the cat", "a dog"), tokenizer)
    assert theirs == "the cat a dog"
    assert own == "<|start|>user\n<|end|>\n<|start|>assistant\n!<|end|>\n"


def test_contents_that_the_template_alters_are_refused_by_name(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN.replace("m['content']", "m['content'] | upper")
    with pytest.raises(CorpusError, match="leaves out or alters message 1 of 'chats/0'"):
        chat_tokens(chat("CAT", "dog"), tokenizer)


def test_a_special_token_in_a_content_is_that_token(tokenizer: Any) -> None:
    ids, bits = chat_tokens(chat("a <|end|> b"), tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert [bit for i, bit in zip(ids, bits, strict=True) if i == end] == [0, KINDS["template"]]


def test_a_chat_that_the_template_refuses_is_refused_by_name(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CorpusError, match="refuses 'chats/0': roles must alternate. Leave it out"):
        chat_tokens(chat("x"), tokenizer)


def test_a_tokenizer_without_a_chat_template_is_refused_with_the_remedy(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template.* name the chat model"):
        chat_tokens(chat("x"), tokenizer)


@pytest.mark.parametrize("written", ["%d %b %Y", "%Y-%m-%d"])
def test_templates_that_print_the_date_print_a_fixed_one(tokenizer: Any, written: str) -> None:
    """Else a harvest that is taken up again tomorrow would meet other tokens."""
    tokenizer.chat_template = "{{ strftime_now('" + written + "') }}\n" + PLAIN
    _, own = split(chat("x"), tokenizer)
    assert own.split("\n")[0] == datetime(2024, 7, 26, tzinfo=UTC).strftime(written)


@dataclass(frozen=True)
class Chatty:
    """A decoder whose prefix is the tokenizer's <bos>."""

    tokenizer: Any
    prefix: list[int] = field(default_factory=lambda: [0])
    suffix: list[int] = field(default_factory=list)
    causal: bool = True

    @property
    def special(self) -> frozenset[int]:
        return frozenset(self.tokenizer.all_special_ids)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(list(texts), split_special_tokens=True)["input_ids"]
        return ids


def cut(documents: list[Document], tokenizer: Any, **options: Any) -> list[TokenWindow]:
    given: dict[str, Any] = {"context": 64, "n_tokens": 10**9} | options
    return list(windows(documents, Chatty(tokenizer), **given))


@pytest.mark.parametrize("template", [PLAIN, STRIPPED], ids=["without bos", "with bos"])
def test_a_window_of_a_chat_begins_with_one_bos(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    (window,) = cut([chat("the cat", "a dog")], tokenizer)
    assert window.ids.count(0) == 1
    assert window.mask[0] == sum(KINDS[k] for k in ("special", "bos", "template", "first"))


def test_texts_and_chats_go_together_and_only_chats_have_a_template(tokenizer: Any) -> None:
    given = cut([Document("t", "a <|end|>"), chat("the cat"), Document("u", "a dog")], tokenizer)
    assert [w.document for w in given] == ["t", "chats/0", "u"]
    bits = [{bit & KINDS["template"] > 0 for bit in w.mask} for w in given]
    assert bits == [{False}, {True, False}, {False}]
    special = [sum(bit & KINDS["special"] > 0 for bit in w.mask) for w in given]
    assert special == [1, 3, 1]


@pytest.mark.parametrize("template", [PLAIN, STRIPPED], ids=["without bos", "with bos"])
@pytest.mark.parametrize("layout", ["windows", "truncate", "pack"])
def test_a_stream_of_chats_can_be_taken_up_at_any_window(
    tokenizer: Any, layout: Any, template: str
) -> None:
    tokenizer.chat_template = template
    some = [chat("the cat sees " * n, "a dog", name=f"chats/{n}") for n in range(1, 5)]
    whole = cut(some, tokenizer, context=12, layout=layout)
    for number, window in enumerate(whole):
        rest = some[window.end.document :]
        resumed = cut(rest, tokenizer, context=12, layout=layout, start=window.end)
        assert resumed == whole[number + 1 :]
    assert len(whole) == 4 if layout == "truncate" else len(whole) > 4
