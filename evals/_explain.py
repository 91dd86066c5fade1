"""Explanations of latents and their scores, as `saekit.explanations` keeps them.

A score is taken on documents that the explanation was not made from: see `balanced_accuracy`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from saekit.errors import SaekitError
from saekit.evals import _explain_prompts as prompts
from saekit.evals._explain_contexts import Contexts, Half, balanced_accuracy, of_latent
from saekit.evals._explain_endpoint import Answers, Cost
from saekit.evals._explain_rules import Rules
from saekit.explanations import Explanation
from saekit.features import FeatureStore

Told = Callable[[int], object]


def by_rules(
    store: FeatureStore,
    latents: Iterable[int],
    halves: tuple[Half, Half],
    told: Told = lambda _: None,
) -> dict[int, Explanation]:
    """The best rule of each latent. `detection` is that of the rule for held-out contexts: it says
    that the latent fires in a context where it says so of any token."""
    rules = Rules(store.vocab)
    found = {}
    for latent in store.scan(latents):
        made, scoring = of_latent(store, latent, halves)
        told(1)
        rule = rules.best(made)
        if rule is not None:
            said = np.logical_or.reduce(rule.fires(scoring.tokens), axis=1)
            score, n = balanced_accuracy(said, scoring.positive) or (None, 0)
            found[latent.index] = Explanation(rule.text, by="rules", detection=score, n=n)
    return found


_Scored = tuple[str, list[prompts.Message], Bool[ndarray, " item"]]
"""What is measured, the question, and the right answer."""


@dataclass(frozen=True, eq=False)
class _Asked:
    """A latent that a language model is asked about."""

    index: int
    question: list[prompts.Message]
    scoring: Contexts


class ByModel:
    """Explanations and scores by a language model."""

    def __init__(
        self,
        store: FeatureStore,
        latents: Sequence[int],
        halves: tuple[Half, Half],
        answers: Answers,
        seed: int = 0,
    ) -> None:
        self.store, self.answers, self.seed = store, answers, seed
        self.asked = []
        for latent in store.scan(latents):
            made, scoring = of_latent(store, latent, halves)
            question = prompts.to_explain(made, store.vocab)
            if question is not None:
                self.asked.append(_Asked(latent.index, question, scoring))

    def cost(self) -> Cost:
        """Of what is not answered yet. Where an explanation is not there yet, its scoring is
        reckoned with the longest that there can be."""
        total = self.answers.cost([each.question for each in self.asked])
        for each in self.asked:
            answer = self.answers.to(each.question)
            text = "x" * prompts.LONGEST if answer is None else prompts.explanation(answer)
            total += self.answers.cost([question for _, question, _ in self._scoring(each, text)])
        return total

    def run(self, told: Told = lambda _: None) -> dict[int, Explanation]:
        """Ask, and score: two questions a latent more, after its explanation."""
        texts = self.answers.ask([each.question for each in self.asked], told)
        explained = [prompts.explanation(text) for text in texts]
        questions = [
            self._scoring(each, text) for each, text in zip(self.asked, explained, strict=True)
        ]
        self.answers.ask([question for some in questions for _, question, _ in some], told)
        return {
            each.index: self._scored(text, some)
            for each, text, some in zip(self.asked, explained, questions, strict=True)
            if text
        }

    def _scoring(self, asked: _Asked, text: str) -> list[_Scored]:
        rng = np.random.default_rng([self.seed, asked.index])
        detect = prompts.to_detect(text, asked.scoring, self.store.vocab, rng)
        fuzz = prompts.to_fuzz(text, asked.scoring, self.store.vocab, rng)
        both = (("detection", detect), ("fuzzing", fuzz))
        return [(name, *asked) for name, asked in both if asked is not None]

    def _scored(self, text: str, questions: list[_Scored]) -> Explanation:
        scores: dict[str, Any] = {}
        for kind, question, true in questions:
            answer = prompts.answers(self.answers.to(question) or "", len(true))
            found = None if answer is None else balanced_accuracy(answer, true)
            if found is not None:
                scores |= {kind: found[0]} | ({"n": found[1]} if kind == "detection" else {})
        return Explanation(text, by=self.answers.endpoint.model, **scores)


def check_store(store: FeatureStore, fingerprint: str, folder: Path) -> None:
    """Raises SaekitError where the store is of other weights."""
    if store.header.sae_fingerprint not in (None, fingerprint):
        raise SaekitError(
            f"the feature store of {folder} is of other weights than those beside it: build it "
            f"again with `saekit features build {folder}`"
        )
