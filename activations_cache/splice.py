"""A model with the activation at a hook point replaced: what edits are made of, and how a text goes
on under one.

Axes: batch (windows), pos, row (edited positions), d, vocab.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.activations_cache.model_language import LanguageModel
from saekit.errors import ConfigError

Edit = Callable[[Float[Tensor, "row d"]], Float[Tensor, "row d"]]
"""From the activations of the edited positions to what takes their place."""


def recording(seen: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Puts the activation into `seen`, and leaves it as it is."""

    def record(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    return record


def only_at(edited: Bool[Tensor, "batch pos"], edit: Edit) -> Callable[[Tensor], Tensor]:
    """The edit as a function of the whole activation. It works in fp32, whatever the model does."""

    def replace(x: Tensor) -> Tensor:
        x = x.clone()
        x[edited] = edit(x[edited].float()).to(x.dtype)
        return x

    return replace


def text_positions(
    model: LanguageModel, ids: Int[Tensor, "batch pos"], first: int = 0
) -> Bool[Tensor, "batch pos"]:
    """The positions, from `first` on, that hold no special token: those that evaluations edit."""
    special = torch.tensor(sorted(model.special), dtype=torch.long)
    text = ~torch.isin(ids, special)
    text[:, :first] = False
    return text


def continuation(
    model: LanguageModel,
    ids: list[int],
    n_tokens: int,
    *,
    hook: str = "",
    edit: Edit | None = None,
    first: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[int]:
    """The tokens that the model goes on with, `n_tokens` at most: fewer where its context is full
    or it ends the text with a special token.

    `edit` acts at `hook`, at the positions from `first` on that hold no special token, those of new
    tokens among them. A token is arg max(logits / temperature + g), with g Gumbel noise that
    depends on the seed and the step alone: it is distributed as softmax(logits / temperature), and
    two continuations from one seed differ by their logits, not by luck. At temperature 0 it is the
    likeliest. Raises ConfigError for a negative temperature.
    """
    if temperature < 0:
        raise ConfigError(f"temperature={temperature} must not be negative; 0 is the likeliest")
    generator = torch.Generator().manual_seed(seed)
    given = len(ids)
    ids = list(ids)
    while len(ids) - given < n_tokens and len(ids) < model.context:
        batch = torch.tensor([ids])
        edits = {}
        if edit is not None:
            edits = {hook: only_at(text_positions(model, batch, first).to(model.device), edit)}
        logits = model.logits(batch, edits)[0, -1].float().cpu()
        uniform = torch.rand(len(logits), generator=generator, dtype=torch.float64)
        if temperature > 0:
            gumbel = -(-uniform.clamp(min=1e-300).log()).log()
            logits = logits.double() / temperature + gumbel
        ids.append(int(logits.argmax()))
        if ids[-1] in model.special:
            break
    return ids[given:]
