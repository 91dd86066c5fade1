"""Explanations without a language model: the rule about tokens that says best where a latent fires.

A rule is a set of tokens to fire on, before, or after; or a pair. Rules are compared, on contexts
to explain by, by how well they say of each token whether the latent fires there: F1, the harmonic
mean of precision and recall. What a rule is worth is then measured on other documents.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from saekit.evals._explain_contexts import NOTHING, Contexts

MOST = 5
"""Tokens that a rule names."""

GAIN = 0.02
"""By so much a longer or a later rule must be better to be taken."""

CLASSES: dict[str, Callable[[str], bool]] = {
    "digits": lambda text: text.strip().isdigit(),
    "punctuation and signs": lambda text: (
        bool(text.strip()) and not any(map(str.isalnum, text)) and text.isprintable()
    ),
    "line breaks": lambda text: "\n" in text,
    "blank space": lambda text: bool(text) and not text.strip(),
    "capitalised words": lambda text: text.strip()[:1].isupper() and text.strip()[1:].islower(),
    "words in capitals": lambda text: len(text.strip()) > 1 and text.strip().isupper(),
    "beginnings of words": lambda text: text[:1] == " " and text[1:2].isalpha(),
    "pieces inside of words": lambda text: text[:1].isalpha(),
    "letters that are not Latin": lambda text: any(
        char.isalpha() and ord(char) > 0x24F for char in text
    ),
}


@dataclass(frozen=True, eq=False)
class Rule:
    """Fires where the token is `on`, that before it `after`, that behind it `before`; a set that is
    not given holds everything. Sets are masks over the vocabulary."""

    text: str
    on: Bool[ndarray, " vocab_1"] | None = None
    after: Bool[ndarray, " vocab_1"] | None = None
    before: Bool[ndarray, " vocab_1"] | None = None

    def fires(self, tokens: Int[ndarray, "context pos"]) -> Bool[ndarray, "context pos"]:
        fires: Bool[ndarray, "context pos"] = tokens != NOTHING
        if self.on is not None:
            fires &= self.on[tokens]
        if self.after is not None:
            fires[:, 1:] &= self.after[tokens[:, :-1]]
            fires[:, 0] = False
        if self.before is not None:
            fires[:, :-1] &= self.before[tokens[:, 1:]]
            fires[:, -1] = False
        return fires


class Rules:
    """All rules over a vocabulary."""

    def __init__(self, vocab: Sequence[str]) -> None:
        self.vocab = vocab
        words: dict[str, int] = {}
        names = [text.strip().casefold() or text for text in vocab]
        self.word = np.array([words.setdefault(name, len(words)) for name in names], np.int64)
        self.names = list(words)
        self.classes = {
            name: np.array([*map(holds, vocab), False]) for name, holds in CLASSES.items()
        }

    def best(self, contexts: Contexts) -> Rule | None:
        """The rule that says best where the latent fires; None where it never does, and where no
        rule says anything."""
        weight = contexts.acts * contexts.fires
        if not weight.any():
            return None
        best, score = None, GAIN
        for rule in self._candidates(contexts, weight):
            found = f1(rule.fires(contexts.tokens), contexts.fires)
            if found >= score + (GAIN if best else 0):
                best, score = rule, found
        return best

    def _candidates(self, contexts: Contexts, weight: ndarray) -> Iterator[Rule]:
        tokens = contexts.tokens
        before, behind = np.full_like(tokens, NOTHING), np.full_like(tokens, NOTHING)
        before[:, 1:], behind[:, :-1] = tokens[:, :-1], tokens[:, 1:]
        yield from self._grown(contexts, tokens, weight, "on {}", lambda m: {"on": m})
        yield from self._grown(
            contexts, tokens, weight, "on {}, in any case or spacing", lambda m: {"on": m}, True
        )
        for name, mask in self.classes.items():
            yield Rule(f"on {name}", on=mask)
        yield from self._grown(contexts, before, weight, "after {}", lambda m: {"after": m})
        yield from self._grown(contexts, behind, weight, "before {}", lambda m: {"before": m})
        for name, mask in self.classes.items():
            yield Rule(f"after {name}", after=mask)
        for first in _heaviest(before, weight, 3):
            for then in _heaviest(tokens, weight * (before == first), 3):
                text = f"on {self._quoted([then])} after {self._quoted([first])}"
                yield Rule(text, on=self._mask([then]), after=self._mask([first]))

    def _grown(
        self,
        contexts: Contexts,
        tokens: Int[ndarray, "context pos"],
        weight: ndarray,
        text: str,
        where: Callable[[ndarray], dict[str, ndarray]],
        by_word: bool = False,
    ) -> Iterator[Rule]:
        """Rules of one token, of two, and on, the heaviest first, as long as each is better than
        the one before."""
        by = np.where(tokens == NOTHING, NOTHING, self.word[tokens]) if by_word else tokens
        chosen: list[int] = []
        score = 0.0
        for token in _heaviest(by, weight, 2 * MOST):
            if len(chosen) == MOST:
                return
            some = [*chosen, token]
            mask = self._of_words(some) if by_word else self._mask(some)
            quoted = _quoted([self.names[at] for at in some]) if by_word else self._quoted(some)
            rule = Rule(text.format(quoted), **where(mask))
            found = f1(rule.fires(contexts.tokens), contexts.fires)
            if found >= score + GAIN:
                chosen, score = some, found
                yield rule

    def _mask(self, tokens: list[int]) -> Bool[ndarray, " vocab_1"]:
        mask = np.zeros(len(self.vocab) + 1, dtype=bool)
        mask[tokens] = True
        return mask

    def _of_words(self, words: list[int]) -> Bool[ndarray, " vocab_1"]:
        return np.append(np.isin(self.word, words), False)

    def _quoted(self, tokens: list[int]) -> str:
        return _quoted([self.vocab[token] for token in tokens])


def f1(said: Bool[ndarray, "context pos"], true: Bool[ndarray, "context pos"]) -> float:
    """2 |said and true| / (|said| + |true|): 1 where both are the same, 0 where they never meet."""
    return float(2 * (said & true).sum() / max(said.sum() + true.sum(), 1))


def _heaviest(tokens: Int[ndarray, "context pos"], weight: ndarray, n: int) -> list[int]:
    """The tokens on which most of the weight lies."""
    some = (weight > 0) & (tokens != NOTHING)
    kinds, of = np.unique(tokens[some], return_inverse=True)
    total = np.bincount(of, weight[some], minlength=len(kinds))
    return [int(kind) for kind in kinds[np.argsort(-total, kind="stable")[:n]]]


def _quoted(texts: Sequence[str]) -> str:
    return ", ".join(json.dumps(text, ensure_ascii=False) for text in texts)
