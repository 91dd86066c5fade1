"""Steering: latents of an SAE set, scaled or taken away while the model reads and writes.

At each edited position, with z the latents of the activation x and z' those wanted,

    keeping the error:   x' = x + sum_j (z'_j - z_j) d_j
    otherwise:           x' = x_hat + sum_j (z'_j - z_j) d_j

so that with the error kept and nothing changed the model is the untouched one. Axes: row, d, vocab.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.activations_cache.model import LanguageModel
from saekit.activations_cache.splice import Edit, continuation, only_at, text_positions
from saekit.dashboard._prompt import tokenize
from saekit.dashboard.data import name_token, show_token
from saekit.errors import SaekitError
from saekit.plot import Next
from saekit.sae import SAE

How = Literal["set", "scale", "ablate"]
HOWS: tuple[How, ...] = get_args(How)


@dataclass(frozen=True)
class Change:
    """What is done with one latent: z' is `amount` (set), `amount` z (scale), or 0 (ablate)."""

    latent: int
    how: How
    amount: float = 0.0


def write_changes(changes: tuple[Change, ...]) -> str:
    """For the address: `12:set:5,40:ablate`."""
    return ",".join(
        f"{c.latent}:{c.how}" + ("" if c.how == "ablate" else f":{c.amount:g}") for c in changes
    )


def read_changes(text: str) -> tuple[Change, ...]:
    """From the address. Raises ValueError for a text that says no such thing."""
    changes = []
    for part in text.split(",") if text else []:
        latent, how, *rest = part.split(":")
        found: How | None = next((known for known in HOWS if known == how), None)
        if found is None or not (latent.isascii() and latent.isdigit()) or len(rest) > 1:
            raise ValueError(part)
        amount = float(rest[0]) if rest else 0.0
        if not abs(amount) <= 1e6 or bool(rest) == (found == "ablate"):
            raise ValueError(part)
        changes.append(Change(int(latent), found, amount))
    return tuple(changes)


def steering(sae: SAE, changes: tuple[Change, ...], *, keep_error: bool) -> Edit:
    """The edit that does this. Of two changes of one latent the last counts.

    Raises SaekitError for a latent that the SAE lacks.
    """
    last = {change.latent: change for change in changes}
    for latent in last:
        if not latent < sae.d_sae:
            raise SaekitError(f"latent {latent} is not there: the SAE has 0 to {sae.d_sae - 1}")

    def edit(x: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
        code = sae.encode_sparse(x)
        out = x.clone() if keep_error else sae.decode(code, x)
        for latent, change in last.items():
            z = (code.values * (code.indices == latent)).sum(1)
            wanted = (
                torch.full_like(z, change.amount) if change.how == "set" else z * _factor(change)
            )
            out = out + (wanted - z)[:, None] * sae.W_dec[latent]
        return out

    return edit


def _factor(change: Change) -> float:
    return change.amount if change.how == "scale" else 0.0


@dataclass(frozen=True)
class Continued:
    """How a text goes on from one seed, as tokens to show."""

    seed: int
    clean: list[str]
    steered: list[str]


@dataclass(frozen=True)
class Steered:
    """The model untouched and steered, side by side."""

    prompt: list[str]
    next_tokens: list[Next]
    """Those that are likeliest either way, by how likely they are steered."""
    kl: float
    """KL(untouched || steered) of the next-token distributions, in nats."""
    continued: list[Continued]
    n_cut: int


@dataclass(frozen=True)
class Settings:
    """How a text is gone on with."""

    n_tokens: int = 24
    temperature: float = 0.8
    seed: int = 0
    n_samples: int = 2
    keep_error: bool = True
    new_only: bool = False
    """Whether only tokens that the model writes are edited (and the last of the prompt, from which
    it writes the first)."""


@torch.no_grad()
def steer(
    model: LanguageModel,
    sae: SAE,
    hook: str,
    text: str,
    changes: tuple[Change, ...],
    settings: Settings,
    n_next: int = 12,
) -> Steered:
    """Raises SaekitError for a latent that the SAE lacks, and what the model raises."""
    edit = steering(sae, changes, keep_error=settings.keep_error)
    ids, n_cut = tokenize(model, text)
    if not ids:
        raise SaekitError("the text has no tokens: type some")
    first = len(ids) - 1 if settings.new_only else 0
    batch = torch.tensor([ids])
    edits = {hook: only_at(text_positions(model, batch, first), edit)}
    clean = model.logits(batch)[0, -1].float().log_softmax(0)
    steered = model.logits(batch, edits)[0, -1].float().log_softmax(0)
    continued = []
    for seed in range(settings.seed, settings.seed + settings.n_samples):
        go_on = partial(
            continuation,
            model,
            ids,
            settings.n_tokens,
            temperature=settings.temperature,
            seed=seed,
        )
        as_it_is, changed = go_on(), go_on(hook=hook, edit=edit, first=first)
        continued.append(Continued(seed, _shown(model, as_it_is), _shown(model, changed)))
        if settings.temperature == 0:
            break  # no seed changes the likeliest
    return Steered(
        prompt=_shown(model, ids),
        next_tokens=_next(model, clean.exp(), steered.exp(), n_next),
        kl=float((clean.exp() * (clean - steered)).sum()),
        continued=continued,
        n_cut=n_cut,
    )


def _shown(model: LanguageModel, ids: list[int]) -> list[str]:
    return [show_token(model.vocab[token]) for token in ids]


def _next(
    model: LanguageModel, p: Float[Tensor, " vocab"], q: Float[Tensor, " vocab"], n: int
) -> list[Next]:
    half = min(n // 2, len(p))
    likely = torch.cat([p.topk(half).indices, q.topk(half).indices]).unique()
    order = likely[q[likely].argsort(descending=True, stable=True)].tolist()
    return [Next(name_token(model.vocab[i]), float(p[i]), float(q[i])) for i in order]
