"""A text read by a model with an SAE: its tokens, what fires on each, and the next-token loss with
the reconstruction in place of the activation.

The positions replaced are those of text; special tokens pass through. Axes: pos (tokens of the
text, what the model puts before it first), k (latents of a token, strongest first).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from saekit.activations_cache.model import LanguageModel
from saekit.activations_cache.splice import only_at, recording, text_positions
from saekit.dashboard.data import show_token
from saekit.errors import SaekitError
from saekit.sae import SAE


@dataclass(frozen=True, eq=False)
class Reading:
    """What there is to say of each token."""

    ids: Int[ndarray, " pos"]
    tokens: list[str]
    """As shown: see `show_token`."""
    text: Bool[ndarray, " pos"]
    """False for special tokens, which the SAE does not read."""
    latents: Int[ndarray, "pos k"]
    values: Float[ndarray, "pos k"]
    """0 where a token has fewer latents."""
    ce: Float[ndarray, " pos"]
    """-log p of this token given those before, in nats; NaN for the first."""
    ce_sae: Float[ndarray, " pos"]
    """The same with the SAE in place."""
    error: Float[ndarray, " pos"]
    """|x - x_hat| / |x|: 0 is perfect, 1 is what zero would score; NaN for special tokens."""
    n_cut: int
    """Tokens of the text beyond the model's context, which were not read."""

    @property
    def scored(self) -> Bool[ndarray, " pos"]:
        """Tokens that are predicted from a position that the SAE reads: what `core` counts."""
        return np.concatenate([[False], self.text[:-1]])

    @property
    def l0(self) -> Int[ndarray, " pos"]:
        return np.asarray((self.values != 0).sum(1))

    def mean(self, values: Float[ndarray, " pos"]) -> float | None:
        """Over the tokens that count; None where there are none."""
        return float(values[self.scored].mean()) if self.scored.any() else None

    def activation(self, latent: int) -> Float[ndarray, " pos"]:
        """Of one latent."""
        return np.asarray(np.where(self.latents == latent, self.values, 0).sum(1))


@torch.no_grad()
def read(model: LanguageModel, sae: SAE, hook: str, text: str) -> Reading:
    """Raises SaekitError for a text without a token, and what the model raises."""
    ids, n_cut = tokenize(model, text)
    if len(ids) == len(model.prefix):
        raise SaekitError("the text has no tokens: type some")
    batch = torch.tensor([ids])
    edited = text_positions(model, batch)
    seen: list[Tensor] = []
    clean = model.logits(batch, {hook: recording(seen)})[0]
    x = seen[0][edited.to(seen[0].device)].float()
    code, x_hat = sae.encode_sparse(x), sae(x)
    spliced = model.logits(batch, {hook: only_at(edited, sae)})[0]
    values, order = code.values.sort(dim=1, descending=True)
    shape = len(ids), values.shape[1]
    all_values, all_latents = torch.zeros(shape), torch.zeros(shape, dtype=torch.long)
    all_values[edited[0]], all_latents[edited[0]] = values, code.indices.gather(1, order)
    error = torch.full((len(ids),), torch.nan)
    error[edited[0]] = (x - x_hat).norm(dim=1) / x.norm(dim=1).clamp(min=1e-12)
    return Reading(
        ids=batch[0].numpy(),
        tokens=[show_token(model.vocab[token]) for token in ids],
        text=edited[0].numpy(),
        latents=all_latents.numpy(),
        values=all_values.numpy(),
        ce=_losses(clean, batch[0]),
        ce_sae=_losses(spliced, batch[0]),
        error=error.numpy(),
        n_cut=n_cut,
    )


def tokenize(model: LanguageModel, text: str) -> tuple[list[int], int]:
    """The ids of a text behind the model's prefix, and how many did not fit into its context."""
    ids = [*model.prefix, *model.tokenize([text])[0]]
    return ids[: model.context], max(0, len(ids) - model.context)


def _losses(logits: Float[Tensor, "pos vocab"], ids: Int[Tensor, " pos"]) -> Float[ndarray, " pos"]:
    log_p = logits[:-1].float().log_softmax(1)
    losses = -log_p.gather(1, ids[1:, None])[:, 0]
    return torch.cat([losses.new_full((1,), torch.nan), losses]).numpy()
