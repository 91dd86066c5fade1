"""Documents to windows of tokens, and windows to batches: what the model sees at once.

A window is the model's prefix (BOS, CLS), tokens of one document and the model's suffix (SEP of
encoders), `context` tokens at most. Nothing crosses from one document into another, and every
activation has the same kind of left edge. Axes: batch (rows of a pass), pos (tokens of a row,
padded on the right).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saekit.activations_cache.chats import chat_tokens
from saekit.activations_cache.masks import KINDS
from saekit.documents import Document
from saekit.errors import ConfigError

Layout = Literal["windows", "truncate", "pack"]

FIRST_K = 4
"""Positions of a window that are marked `first`."""

_DOCUMENTS_AT_ONCE = 64


@runtime_checkable
class TextModel(Protocol):
    """What is asked of a model here."""

    @property
    def prefix(self) -> list[int]: ...
    @property
    def suffix(self) -> list[int]: ...
    @property
    def special(self) -> frozenset[int]: ...
    @property
    def causal(self) -> bool: ...
    @property
    def tokenizer(self) -> Any: ...
    def tokenize(self, texts: Sequence[str]) -> list[list[int]]: ...


@dataclass(frozen=True)
class Cursor:
    """Where in the corpus the next window begins."""

    document: int = 0
    """Documents of the corpus that are wholly used up, empty ones among them."""
    token: int = 0
    """Tokens of the next document that are used up, prefix and suffix not counted."""
    n_tokens: int = 0
    """Rows given so far, by all ranks together, prefix and suffix among them."""


START = Cursor()


@dataclass(frozen=True)
class TokenWindow:
    """Tokens that the model sees at once."""

    document: str
    ids: list[int]
    """With the prefix and the suffix."""
    mask: list[int]
    """Bits of `masks.KINDS`, as far as they follow from the text; one for each id."""
    end: Cursor
    """Where the corpus goes on after it."""


@dataclass(frozen=True)
class TokenBatch:
    """What goes through the model at once, on the CPU.

    The rows of an activation cache are the kept positions in row-major order, which is the order of
    the corpus.
    """

    inputs: dict[str, Tensor]
    """Arguments of the model's forward."""
    kept: Bool[Tensor, "batch pos"]
    """False for padding."""
    token: Int[Tensor, "batch pos"]
    position: Int[Tensor, "batch pos"]
    """Position in the window; 0 begins one."""
    mask: Int[Tensor, "batch pos"]
    """Bits of `masks.KINDS`."""
    document: Int[Tensor, "batch pos"]
    """Index into `names`."""
    names: tuple[str, ...]
    """Documents in order of appearance. One goes on from the batch before where the first of these
    is the last of those."""
    end: Cursor

    @property
    def n_rows(self) -> int:
        return int(self.kept.sum())

    @property
    def n_padding(self) -> int:
        return self.kept.numel() - self.n_rows

    @property
    def scored(self) -> Bool[Tensor, "batch pos"]:
        """Positions whose next token stands at the next position of the same window."""
        return self.kept & (self.mask & KINDS["last"] == 0)


def windows(
    documents: Iterable[Document],
    model: TextModel,
    *,
    context: int,
    n_tokens: int,
    layout: Layout = "windows",
    first_k: int = FIRST_K,
    start: Cursor = START,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[TokenWindow]:
    """Cut documents into windows until the corpus has given `n_tokens` tokens from its beginning,
    by all ranks together; the last window is cut to fit.

    `documents` begins with number `start.document` of the corpus: a stream that starts at a
    window's `end` is the rest of the stream that gave the window. With several ranks each walks all
    documents and gives the windows of every `ranks`-th one. The layout "truncate" gives the first
    window of each document only; "pack" cuts as "windows" does. Documents without a token are
    passed over. Raises ConfigError for a context without room for a token of text.
    """
    _check_packable(layout, model)
    around = len(model.prefix) + len(model.suffix)
    step = context - around
    if step < 1:
        raise ConfigError(
            f"context={context} must be at least {around + 1}: the model puts {around} tokens of "
            "its own around the text of a window"
        )
    given, begun = start.n_tokens, start.token
    if given >= n_tokens:
        return
    for number, document in enumerate(_tokenized(documents, model), start.document):
        for begin in range(begun, len(document.ids), step):
            text = document.ids[begin : begin + step]
            ids = [*model.prefix, *text, *model.suffix][: n_tokens - given]
            given += len(ids)
            used = begin + min(len(text), max(0, len(ids) - len(model.prefix)))
            whole = used == len(document.ids) or layout == "truncate"
            if number % ranks == rank:
                end = Cursor(number + 1, 0, given) if whole else Cursor(number, used, given)
                mask = _mask(document, begin, len(text), len(ids), model, first_k)
                yield TokenWindow(document.name, ids, mask, end)
            if given >= n_tokens:
                return
            if layout == "truncate":
                break
        begun = 0


@dataclass(frozen=True)
class _Tokenized:
    name: str
    ids: list[int]
    bits: list[int]
    around: int
    """Bits of the prefix and the suffix."""


def _tokenized(documents: Iterable[Document], model: TextModel) -> Iterator[_Tokenized]:
    """Tokens of each document without prefix and suffix, with the bits that do not depend on the
    window."""
    special = model.special.union(model.prefix, model.suffix)
    remaining = iter(documents)
    while some := list(islice(remaining, _DOCUMENTS_AT_ONCE)):
        texts = [document.text for document in some if not document.messages]
        tokenized = iter(model.tokenize(texts) if texts else [])
        for document in some:
            if document.messages:
                ids, bits = chat_tokens(document, model.tokenizer)
                around = KINDS["template"]
                if model.prefix and ids[: len(model.prefix)] == model.prefix:
                    ids, bits = ids[len(model.prefix) :], bits[len(model.prefix) :]
            else:
                ids = next(tokenized)
                bits, around = [0] * len(ids), 0
            marked = [b | KINDS["special"] * (i in special) for i, b in zip(ids, bits, strict=True)]
            yield _Tokenized(document.id, ids, marked, around | KINDS["special"])


def _mask(
    document: _Tokenized, begin: int, n_text: int, n_ids: int, model: TextModel, first_k: int
) -> list[int]:
    before, after = [document.around] * len(model.prefix), [document.around] * len(model.suffix)
    mask = [*before, *document.bits[begin : begin + n_text], *after][:n_ids]
    if model.prefix:
        mask[0] |= KINDS["bos"]
    for position in range(min(first_k, n_ids)):
        mask[position] |= KINDS["first"]
    mask[-1] |= KINDS["last"]
    return mask


def batches(
    windows: Iterable[TokenWindow],
    model: TextModel,
    batch_size: int,
    *,
    context: int,
    layout: Layout = "windows",
) -> Iterator[TokenBatch]:
    """Windows in passes of `batch_size` rows, in order.

    In the layout "pack" a row takes windows as long as they fit into `context`. No window sees
    another: `position_ids` begin again in each, and there is no attention mask, from which the
    decoders of transformers make a block-diagonal causal one, in the form that their attention
    takes and with their sliding windows kept (a mask of our own would replace both). That needs a
    forward pass without a key-value cache.

    Raises ConfigError for packing with a model that is not causal.
    """
    _check_packable(layout, model)
    room = context if layout == "pack" else 0
    rows = _rows(windows, room)
    while some := list(islice(rows, batch_size)):
        yield _batch(some, model, layout)


def _rows(windows: Iterable[TokenWindow], room: int) -> Iterator[list[TokenWindow]]:
    """Next fit: a window goes into the row of the one before, or begins another."""
    row: list[TokenWindow] = []
    filled = 0
    for window in windows:
        if row and filled + len(window.ids) > room:
            yield row
            row, filled = [], 0
        row.append(window)
        filled += len(window.ids)
    if row:
        yield row


def _batch(rows: list[list[TokenWindow]], model: TextModel, layout: Layout) -> TokenBatch:
    flat = list(chain.from_iterable(rows))
    lengths = torch.tensor([len(window.ids) for window in flat])
    filled = torch.tensor([sum(len(window.ids) for window in row) for row in rows])
    kept = torch.arange(int(filled.max())) < filled[:, None]
    names: list[str] = []
    numbers = []
    for window in flat:
        if not names or names[-1] != window.document:
            names.append(window.document)
        numbers.append(len(names) - 1)

    def spread(values: Tensor, padding: int = 0) -> Tensor:
        out = torch.full(kept.shape, padding)
        out[kept] = values
        return out

    # Any token will do: nothing kept attends to padding.
    filler = model.prefix[0] if model.prefix else 0
    token = spread(torch.tensor(list(chain.from_iterable(w.ids for w in flat))), filler)
    begins = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    position = spread(torch.arange(len(begins)) - begins)
    inputs = {"input_ids": token}
    if not model.causal:
        inputs["attention_mask"] = kept.long()
    elif layout == "pack":
        inputs["position_ids"] = position
    return TokenBatch(
        inputs=inputs,
        kept=kept,
        token=token,
        position=position,
        mask=spread(torch.tensor(list(chain.from_iterable(w.mask for w in flat)))),
        document=spread(torch.tensor(numbers).repeat_interleave(lengths)),
        names=tuple(names),
        end=flat[-1].end,
    )


def _check_packable(layout: Layout, model: TextModel) -> None:
    if layout == "pack" and not model.causal:
        raise ConfigError(
            "layout 'pack' needs a causal model: the attention of an encoder would cross from one "
            "window into another. Use 'windows' or 'truncate'"
        )
