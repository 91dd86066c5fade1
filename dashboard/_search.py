"""A text in contexts that are stored as tokens, in which it may begin, run and end anywhere.

Only the vocabulary is compared as text. Of each token is known whether the text lies in it, how
much of the text's beginning it may end with, and what it may continue; the contexts are then gone
through as numbers.

Axes: vocab, place (tokens of all contexts, end to end; empty places between contexts).
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, UInt
from numpy import ndarray

from saekit.features import FeatureStore

_AT_ONCE = 1 << 22


def in_contexts(store: FeatureStore, wanted: str) -> Bool[ndarray, " d_sae"]:
    """Latents in whose strongest contexts the text lies; it is given in lower case (casefold)."""
    tokens = store.top_tokens
    flat, width = tokens.reshape(-1), tokens.shape[1]
    search = _Search([text.casefold() for text in store.vocab], flat, wanted)
    found = np.zeros(store.d_sae, dtype=bool)
    # Of a short text there may be millions of places: only the latents are asked for.
    mask, some = search.whole(), max(1, _AT_ONCE // width)
    if mask.any():
        for at in range(0, store.d_sae, some):
            found[at : at + some] = mask[tokens[at : at + some]].any(axis=1)
    found[search.across() // width] = True
    return found


def places(
    vocab: Sequence[str], flat: UInt[ndarray, " place"], wanted: str
) -> Int[ndarray, " hit"]:
    """Places of the tokens in which the text begins. `flat` has len(vocab) at empty places."""
    search = _Search(vocab, flat, wanted)
    return np.unique(np.concatenate([search.where(search.whole()), search.across()]))


class _Search:
    def __init__(self, vocab: Sequence[str], flat: UInt[ndarray, " place"], wanted: str) -> None:
        self.vocab, self.flat, self.wanted = vocab, flat, wanted
        self.by_first: dict[str, list[int]] = defaultdict(list)
        for token, text in enumerate(vocab):
            self.by_first[text[:1]].append(token)

    def whole(self) -> Bool[ndarray, " vocab_1"]:
        """Tokens in which all of the text lies."""
        return self._mask([token for token, text in enumerate(self.vocab) if self.wanted in text])

    def across(self) -> Int[ndarray, " hit"]:
        """Places of tokens that the text begins in and runs out of."""
        hits = [np.zeros(0, dtype=np.int64)]
        if begins := self._begins():
            every = [token for some in begins.values() for token in some]
            start = self.where(self._mask(every))
            of = self.flat[start]
            for length, some in begins.items():
                first = start[self._mask(some)[of]]
                hits.append(self._going_on(length, first, first))
        return np.concatenate(hits)

    def _begins(self) -> dict[int, list[int]]:
        """Tokens that end with a beginning of the text, by its length."""
        ending = defaultdict(list)
        for length in range(1, len(self.wanted)):
            ending[self.wanted[length - 1]].append(length)
        begins = defaultdict(list)
        for token, text in enumerate(self.vocab):
            for length in ending.get(text[-1:], ()):
                if text.endswith(self.wanted[:length]):
                    begins[length].append(token)
        return begins

    def _going_on(
        self, matched: int, first: Int[ndarray, " some"], last: Int[ndarray, " some"]
    ) -> Int[ndarray, " hit"]:
        """Of the places `first`, where the text begins, those from which it goes on to its end; so
        far `matched` characters of it lie in the tokens up to `last`."""
        inside = last + 1 < len(self.flat)
        first, last = first[inside], last[inside] + 1
        if not len(first):
            return first
        rest, here = self.wanted[matched:], self.flat[last]
        next_ = [(token, self.vocab[token]) for token in self.by_first[rest[0]]]
        hits = [first[self._mask([t for t, text in next_ if text.startswith(rest)])[here]]]
        by_length = defaultdict(list)
        for token, text in next_:
            if len(text) < len(rest) and rest.startswith(text):
                by_length[len(text)].append(token)
        for length, some in by_length.items():
            on = self._mask(some)[here]
            hits.append(self._going_on(matched + length, first[on], last[on]))
        return np.concatenate(hits)

    def _mask(self, tokens: list[int]) -> Bool[ndarray, " vocab_1"]:
        """Which tokens are among these; the empty place is not."""
        mask = np.zeros(len(self.vocab) + 1, dtype=bool)
        mask[tokens] = True
        return mask

    def where(self, mask: Bool[ndarray, " vocab_1"]) -> Int[ndarray, " hit"]:
        """Places of the tokens of a mask, some at a time to spare memory."""
        if not mask.any():
            return np.zeros(0, dtype=np.int64)
        parts = range(0, len(self.flat), _AT_ONCE)
        return np.concatenate(
            [np.flatnonzero(mask[self.flat[at : at + _AT_ONCE]]) + at for at in parts]
        )
