"""What a model answers to task prompts when its activations at a hook are replaced, at some
positions of each prompt.

Prompts run by rising length, about `tokens` of them with padding at a time; attention is causal, so
no prompt sees its padding and no answer depends on which prompts run together.

Axes: row (prompts), pos, place (positions of a prompt that are read or replaced), d.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.activations_cache.model import LanguageModel
from saekit.errors import SaekitError
from saekit.evals._indirect_object_prompts import Prompts


@dataclass(frozen=True, eq=False)
class Answers:
    """What the model says after the last token of each prompt."""

    difference: Float[Tensor, " row"]
    """logit(IO) - logit(S), of the prompt's own names."""
    top: Int[Tensor, " row"]
    """The token with the largest logit, of the whole vocabulary."""


@dataclass(frozen=True)
class Patcher:
    """A model, one of its hooks, and the positions of a prompt that are looked at there."""

    model: LanguageModel
    hook: str
    places: tuple[int, ...]
    """Columns of `Prompts.at`."""
    tokens: int
    """Tokens of a pass, about."""
    advance: Callable[[int], None] = lambda n: None
    """Told of prompts that have run."""

    def read(self, prompts: Prompts) -> Float[Tensor, "row place d"]:
        """The activations at the places, in fp32 on the CPU."""
        parts = []
        for rows in self._batches(prompts):
            some, number = _cut(prompts, rows)
            seen = self.model.capture(self.model.inputs(some.ids), [self.hook])[self.hook]
            parts.append((rows, seen[number, self._at(some)].float().cpu()))
            self.advance(len(rows))
        return _in_place(parts)

    def answer(
        self, prompts: Prompts, replacement: Float[Tensor, "row place d"] | None = None
    ) -> Answers:
        """Answers with the activations at the places replaced, or left alone where None."""
        differences, tops = [], []
        for rows in self._batches(prompts):
            some, number = _cut(prompts, rows)

            def edit(x: Tensor, rows: Tensor = rows, some: Prompts = some) -> Tensor:
                assert replacement is not None
                x = x.clone()
                new = replacement[rows].to(x.device, x.dtype)
                x[torch.arange(len(rows))[:, None], self._at(some)] = new
                return x

            edits = None if replacement is None else {self.hook: edit}
            logits = self.model.logits(some.ids.to(self.model.device), edits)
            last = logits[number[:, 0], some.length - 1].float()
            if not last.isfinite().all():
                raise SaekitError(
                    "the model's logits contain NaN or infinity, with the activation at "
                    f"'{self.hook}' replaced: check the SAE's weights, or use a wider dtype"
                )
            io, subject = some.token[some.io], some.token[some.subject]
            picked = last.cpu().double().gather(1, torch.stack([io, subject], 1))
            differences.append((rows, picked[:, 0] - picked[:, 1]))
            tops.append((rows, last.argmax(1).cpu()))
            self.advance(len(rows))
        return Answers(_in_place(differences), _in_place(tops))

    def _at(self, prompts: Prompts) -> Int[Tensor, "row place"]:
        return prompts.at[:, list(self.places)]

    def _batches(self, prompts: Prompts) -> Iterator[Int[Tensor, " some"]]:
        order = prompts.length.argsort(stable=True)
        first = 0
        while first < len(order):
            # Lengths rise, so the last prompt of a batch says how wide it is.
            length = prompts.length[order[first:]]
            fits = length * torch.arange(1, len(length) + 1) <= self.tokens
            size = max(1, int(fits.sum()))
            yield order[first : first + size]
            first += size


def _cut(prompts: Prompts, rows: Tensor) -> tuple[Prompts, Int[Tensor, "row 1"]]:
    """Some prompts, padded only as far as they need, and their numbers as a column."""
    some = prompts[rows]
    length = int(some.length.max())
    return replace(some, ids=some.ids[:, :length]), torch.arange(len(rows))[:, None]


def _in_place(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Results of batches, in the order of the prompts."""
    order = torch.cat([rows for rows, _ in parts])
    return torch.cat([values for _, values in parts])[order.argsort()]
