"""Documents to windows of tokens: what the model sees at once.

A window is the beginning-of-sequence token and up to context - 1 tokens of one document. Nothing
crosses from one document into another, and every activation has the same kind of left edge.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Int
from torch import Tensor

from saekit.activations_cache.model import LanguageModel
from saekit.documents import Document

_DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True)
class TokenWindow:
    """Tokens that the model sees at once, the beginning-of-sequence token first."""

    document: str
    ids: list[int]


def windows(
    documents: Iterable[Document], model: LanguageModel, context: int, n_tokens: int
) -> Iterator[TokenWindow]:
    """Cut documents into windows until `n_tokens` tokens have been given, the last window cut to
    fit.

    Documents without a token are passed over.
    """
    left = n_tokens
    remaining = iter(documents)
    while left > 0 and (some := list(islice(remaining, _DOCUMENTS_AT_ONCE))):
        for document, ids in zip(some, model.tokenize([d.text for d in some]), strict=True):
            for start in range(0, len(ids), context - 1):
                window = [model.bos, *ids[start : start + context - 1]][:left]
                yield TokenWindow(document.id, window)
                left -= len(window)
                if left <= 0:
                    return


def pad(batch: list[TokenWindow], filler: int) -> Int[Tensor, "batch pos"]:
    """The windows as one matrix, padded on the right."""
    longest = max(len(window.ids) for window in batch)
    return torch.tensor([w.ids + [filler] * (longest - len(w.ids)) for w in batch])
