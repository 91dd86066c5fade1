"""Prompts of the indirect-object task as tokens, and the same with one attribute changed.

A prompt names two people and then one of them again: "When Mary and John went to the store, John
gave a drink to" wants " Mary". Its attributes are the indirect object IO (Mary), the subject S
(John) and Pos, the order of their first mention: ABB with the IO first, BAB with the S first. The
sentences are those of `saekit.demo.tasks`; each name is one token, so that exchanging a name moves
no other token, and positions go by role: where the IO stands, the S first (s1) and again (s2), and
the last token.

Axes: row (prompts), pos (tokens, padded on the right), role, name.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from saekit import seeds
from saekit.activations_cache.model import LanguageModel
from saekit.demo.tasks import NAMES, Split, TaskSentence, stream
from saekit.errors import ConfigError

log = logging.getLogger(__name__)

Attribute = Literal["IO", "S", "Pos"]
Role = Literal["io", "s1", "s2", "last"]
ATTRIBUTES: tuple[Attribute, ...] = get_args(Attribute)
ROLES: tuple[Role, ...] = get_args(Role)
ORDERS = ("ABB", "BAB")

_FEWEST_NAMES = 4
_TRIES = 20
"""Sentences looked at for each one asked for, at most."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts in a batch, with what they are made of."""

    ids: Int[Tensor, "row pos"]
    length: Int[Tensor, " row"]
    io: Int[Tensor, " row"]
    """The indirect object, as a number in `names`."""
    subject: Int[Tensor, " row"]
    order: Int[Tensor, " row"]
    """0 is ABB, 1 is BAB."""
    at: Int[Tensor, "row role"]
    """Positions in the order of `ROLES`."""
    names: tuple[str, ...]
    token: Int[Tensor, " name"]
    """Each name's token, with its leading space."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | Tensor) -> "Prompts":
        return replace(
            self,
            ids=self.ids[rows],
            length=self.length[rows],
            io=self.io[rows],
            subject=self.subject[rows],
            order=self.order[rows],
            at=self.at[rows],
        )

    @property
    def values(self) -> Int[Tensor, "row 3"]:
        """The attributes in the order of `ATTRIBUTES`, each counted from 0."""
        return torch.stack([self.io, self.subject, self.order], 1)

    @property
    def sizes(self) -> dict[str, int]:
        """How many values each attribute has."""
        return {"IO": len(self.names), "S": len(self.names), "Pos": len(ORDERS)}


def make(
    model: LanguageModel, n: int, seed: int, split: Split, names: Sequence[str] = ()
) -> Prompts:
    """The first `n` prompts of the task's stream. `names` stand in for those of the split.

    Names that the tokenizer splits are left out. Raises ConfigError where fewer than four are left,
    and where the sentences do not suit the model.
    """
    known = _single_tokens(model, names or NAMES[split])
    token_of = {name: token for name, token in known}
    kept: list[tuple[list[int], TaskSentence]] = []
    for tried, sentence in enumerate(stream("ioi", seed, split, list(token_of))):
        if tried == _TRIES * n:
            raise ConfigError(
                f"of {tried} sentences only {len(kept)} have the indirect object once and the "
                f"subject twice as tokens of '{model.name}', and fit into its context of "
                f"{model.context}: ask for fewer than {n} prompts, or for other names"
            )
        ids = _ids(model, sentence)
        io, subject = (token_of[sentence.labels[key]] for key in ("io", "subject"))
        if len(ids) <= model.context and (ids.count(io), ids.count(subject)) == (1, 2):
            kept.append((ids, sentence))
        if len(kept) == n:
            break
    return _batch(kept, known)


def changed(prompts: Prompts, attribute: Attribute, seed: int) -> Prompts:
    """The same prompts with another IO, another S (neither of the two that are there), or with the
    two first mentions in the other order."""
    rows = torch.arange(len(prompts))
    ids, io, subject = prompts.ids.clone(), prompts.io.clone(), prompts.subject.clone()
    order, at = prompts.order, prompts.at.clone()
    if attribute == "Pos":
        order = 1 - order
        at[:, :2] = at[:, :2].flip(1)
    else:
        generator = seeds.stream("indirect object", seed, ATTRIBUTES.index(attribute))
        drawn = torch.randint(len(prompts.names) - 2, (len(prompts),), generator=generator)
        # Skip the two names that are there.
        low, high = torch.minimum(io, subject), torch.maximum(io, subject)
        drawn += drawn >= low
        drawn += drawn >= high
        io, subject = (drawn, subject) if attribute == "IO" else (io, drawn)
    for role, name in (("io", io), ("s1", subject), ("s2", subject)):
        ids[rows, at[:, ROLES.index(role)]] = prompts.token[name]
    return replace(prompts, ids=ids, io=io, subject=subject, order=order, at=at)


def _single_tokens(model: LanguageModel, names: Sequence[str]) -> list[tuple[str, int]]:
    tokens = model.tokenize([f" {name}" for name in names])
    known = [(name, ids[0]) for name, ids in zip(names, tokens, strict=True) if len(ids) == 1]
    if len({token for _, token in known}) < max(_FEWEST_NAMES, len(known)):
        raise ConfigError(
            f"only {len(known)} of {len(names)} names are tokens of their own for '{model.name}', "
            f"and the task needs {_FEWEST_NAMES}, all different: give others with names=..., or "
            "evaluate on a model that knows more words"
        )
    if len(known) < len(names):
        left_out = sorted(set(names) - {name for name, _ in known})
        log.info("left out, as they are more than one token: %s", ", ".join(left_out))
    return known


def _ids(model: LanguageModel, sentence: TaskSentence) -> list[int]:
    return [*model.prefix, *model.tokenize([sentence.prompt])[0]]


def _batch(
    kept: Sequence[tuple[list[int], TaskSentence]], known: Sequence[tuple[str, int]]
) -> Prompts:
    number = {name: i for i, (name, _) in enumerate(known)}
    token = torch.tensor([token for _, token in known])
    length = torch.tensor([len(ids) for ids, _ in kept])
    ids = torch.zeros(len(kept), int(length.max()), dtype=torch.long)
    for row, (some, _) in enumerate(kept):
        ids[row, : len(some)] = torch.tensor(some)
    labels = [sentence.labels for _, sentence in kept]
    io = torch.tensor([number[label["io"]] for label in labels])
    subject = torch.tensor([number[label["subject"]] for label in labels])
    inside = torch.arange(ids.shape[1]) < length[:, None]
    at_io = ((ids == token[io, None]) & inside).int().argmax(1)
    is_subject = (ids == token[subject, None]) & inside
    s1 = is_subject.int().argmax(1)
    s2 = ids.shape[1] - 1 - is_subject.flip(1).int().argmax(1)
    return Prompts(
        ids=ids,
        length=length,
        io=io,
        subject=subject,
        order=torch.tensor([ORDERS.index(label["order"]) for label in labels]),
        at=torch.stack([at_io, s1, s2, length - 1], 1),
        names=tuple(number),
        token=token,
    )
