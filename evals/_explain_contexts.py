"""Contexts to explain a latent by, and others, of documents kept apart, to score the explanation.

From the feature store come contexts in which a latent fires, and some in which near latents do and
it does not. From the cache come windows drawn at random, where it is known of every latent whether
it fires: without them nothing would say how often an explanation is wrong on plain text.

Axes: context, pos (tokens of a context), active (places where any latent fires).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy import ndarray

from saekit.activations_cache.store import ActivationCache, Window
from saekit.documents import held_out
from saekit.errors import SaekitError
from saekit.features import FeatureStore, Latent
from saekit.sae import SAE

NOTHING = -1
"""A place without a token, at the end of a short context."""

HALF = 0.5


@dataclass(frozen=True, eq=False)
class Contexts:
    """Pieces of text, and where in them one latent fires."""

    tokens: Int[ndarray, "context pos"]
    fires: Bool[ndarray, "context pos"]
    acts: ndarray
    """Its values; 0 where it is silent, and 1 where it fires in a window drawn at random."""

    @property
    def positive(self) -> Bool[ndarray, " context"]:
        """Those in which it fires."""
        return np.asarray(self.fires.any(axis=1))

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class Half:
    """Windows drawn at random from one half of the documents, and all that fires in them."""

    tokens: Int[ndarray, "context pos"]
    latent: Int[ndarray, " active"]
    """In rising order."""
    place: Int[ndarray, " active"]
    """Of `tokens`, flat."""

    def fires(self, latent: int) -> Bool[ndarray, "context pos"]:
        first, last = np.searchsorted(self.latent, [latent, latent + 1])
        fires = np.zeros(self.tokens.size, dtype=bool)
        fires[self.place[first:last]] = True
        return fires.reshape(self.tokens.shape)


def for_scoring(document: str) -> bool:
    """Whether a document serves to score explanations, and not to make them. Its name decides."""
    return held_out(document, HALF)


def draw(
    sae: SAE, cache: ActivationCache, hook: str, store: FeatureStore, n: int, seed: int
) -> tuple[Half, Half]:
    """At most `n` windows of each half of the documents: to explain by, and to score by.

    Raises SaekitError where the cache has no document in one of the halves.
    """
    width = store.header.window
    rng = np.random.default_rng(seed)
    halves: tuple[list[Window], list[Window]] = ([], [])
    seen = [0, 0]
    for window in cache.windows("all", store.header.exclude):
        at = int(for_scoring(cache.documents[window.document]))
        seen[at] += 1
        # Each window seen so far is among those kept with the same probability.
        if len(halves[at]) < n:
            halves[at].append(window)
        elif (place := int(rng.integers(seen[at]))) < n:
            halves[at][place] = window
    for windows, what in zip(halves, ("make", "score"), strict=True):
        if not windows:
            raise SaekitError(
                f"{cache.url} has no document to {what} explanations by, of {len(cache.documents)}:"
                " documents are split in two halves by their names. Give a cache of more documents"
            )
    made, score = (_encoded(sae, cache, hook, windows, width, rng) for windows in halves)
    return made, score


@torch.no_grad()
def _encoded(
    sae: SAE,
    cache: ActivationCache,
    hook: str,
    windows: list[Window],
    width: int,
    rng: np.random.Generator,
) -> Half:
    tokens = np.full((len(windows), width), NOTHING, dtype=np.int64)
    latents, places = [], []
    for at, window in enumerate(windows):
        first = int(rng.integers(max(1, len(window.tokens) - width + 1)))
        some = window.tokens[first : first + width].numpy()
        tokens[at, : len(some)] = some
        keep = window.keep[first : first + width]
        row = window.start + first
        code = sae.encode_sparse(cache.row_slice(hook, row, row + len(some))[keep])
        fires = code.values > 0
        where = torch.from_numpy(at * width + np.flatnonzero(keep.numpy()))
        places.append(where[:, None].expand_as(fires)[fires].numpy())
        latents.append(code.indices[fires].numpy())
    latent, place = np.concatenate(latents), np.concatenate(places)
    order = np.argsort(latent, kind="stable")
    return Half(tokens, latent[order], place[order])


def of_latent(store: FeatureStore, latent: Latent, halves: tuple[Half, Half]) -> list[Contexts]:
    """A latent's contexts to explain it by, and those to score by."""
    return [_gathered(store, latent, half, bool(at)) for at, half in enumerate(halves)]


def _gathered(store: FeatureStore, latent: Latent, half: Half, scoring: bool) -> Contexts:
    passages = {
        passage.row: passage
        for passage in latent.passages
        if for_scoring(store.documents[passage.document]) == scoring
    }
    width = half.tokens.shape[1]
    tokens = _padded((p.tokens for p in passages.values()), len(passages), width, float(NOTHING))
    acts = _padded((p.acts for p in passages.values()), len(passages), width, 0.0)
    drawn = half.fires(latent.index)
    return Contexts(
        np.concatenate([tokens.astype(np.int64), half.tokens]),
        np.concatenate([acts > 0, drawn]),
        np.concatenate([acts, drawn]),
    )


def _padded(rows: Iterable[ndarray], n: int, width: int, empty: float) -> ndarray:
    table = np.full((n, width), empty, dtype=np.float64)
    for at, row in enumerate(rows):
        table[at, : len(row)] = row
    return table


def balanced_accuracy(
    said: Bool[ndarray, " item"], true: Bool[ndarray, " item"]
) -> tuple[float, int] | None:
    """(share of the true ones that are said + share of the others that are not) / 2, and of how
    many: 1 is right throughout, 0.5 what a coin or a constant has. None where all are of a kind."""
    if true.all() or not true.any():
        return None
    return float((said[true].mean() + (~said[~true]).mean()) / 2), len(true)
