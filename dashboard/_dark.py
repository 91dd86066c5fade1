"""Where an SAE's error lies: token by token over the held-out text of a cache.

A token's share is |x - x_hat|^2 over the mean of |x - mu|^2, with mu and the mean taken over the
tokens looked at: so the mean of the shares is the fraction of variance unexplained on them. Axes:
row (tokens looked at, in stored order), window.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from saekit.activations_cache.store import ActivationCache, Window
from saekit.dashboard.data import Context, Span, name_token, show_token
from saekit.errors import SaekitError
from saekit.sae import SAE

MAX_ROWS = 12_000
"""Tokens looked at, at most."""

_SPAN = 28
"""Tokens of a context."""


@dataclass(frozen=True, eq=False)
class Place:
    """A window of the text, with the share of each of its tokens; NaN for those not counted."""

    tokens: Int[ndarray, " pos"]
    share: Float[ndarray, " pos"]
    document: str


@dataclass(frozen=True, eq=False)
class Errors:
    """The error of every token looked at."""

    places: list[Place]
    n: int

    @property
    def shares(self) -> Float[ndarray, " row"]:
        every: ndarray = np.concatenate([place.share for place in self.places])
        return np.asarray(every[np.isfinite(every)])

    @property
    def fvu(self) -> float:
        return float(self.shares.mean())

    @property
    def scale(self) -> float:
        """The share at which the colour of a token is full: one in a hundred is above."""
        return float(np.quantile(self.shares, 0.99))

    @property
    def documents(self) -> list[str]:
        return list(dict.fromkeys(place.document for place in self.places))


@torch.no_grad()
def look(sae: SAE, cache: ActivationCache, hook: str, max_rows: int = MAX_ROWS) -> Errors:
    """The first windows of the documents held out. Raises SaekitError where there are none."""
    windows: list[Window] = []
    n = 0
    for window in cache.windows("test"):
        if n >= max_rows:
            break
        windows.append(window)
        n += int(window.keep.sum())
    if n < 2:
        raise SaekitError(
            f"{cache.url} has no text that training was held out from: harvest more documents"
        )
    squares, rows = [], []
    for window in windows:
        x = cache.row_slice(hook, window.start, window.start + len(window.tokens))[window.keep]
        squares.append((x - sae(x)).double().square().sum(1))
        rows.append(x)
    x = torch.cat(rows).double()
    variance = float((x - x.mean(0)).square().sum(1).mean())
    places = []
    for window, square in zip(windows, squares, strict=True):
        share = torch.full((len(window.tokens),), torch.nan, dtype=torch.float64)
        share[window.keep] = square / max(variance, 1e-30)
        name = cache.documents[window.document]
        places.append(Place(window.tokens.numpy(), share.numpy(), name))
    return Errors(places, n)


def worst(errors: Errors, vocab: list[str], n: int = 15) -> list[Context]:
    """The contexts around the tokens with the largest shares, one of a window at most."""
    peaks = [float(np.nanmax(place.share, initial=-1)) for place in errors.places]
    order = np.argsort(np.negative(peaks), kind="stable")[:n]
    found = []
    for place in (errors.places[at] for at in order.tolist()):
        at = int(np.nanargmax(place.share))
        begin = max(0, min(at - _SPAN // 2, len(place.tokens) - _SPAN))
        spans = [
            Span(show_token(vocab[token]), _known(share), begin + i == at)
            for i, (token, share) in enumerate(
                zip(
                    place.tokens[begin : begin + _SPAN].tolist(),
                    place.share[begin : begin + _SPAN].tolist(),
                    strict=True,
                )
            )
        ]
        found.append(Context(show_token(place.document), float(place.share[at]), spans))
    return found


def hardest(errors: Errors, vocab: list[str], n: int = 25) -> dict[str, list[object]]:
    """The tokens that hold most of the error: how often they stand there, their mean share, and
    how much of the whole error they hold."""
    tokens = np.concatenate([place.tokens for place in errors.places])
    shares = np.concatenate([place.share for place in errors.places])
    counted = np.isfinite(shares)
    count = np.bincount(tokens[counted])
    total = np.bincount(tokens[counted], weights=shares[counted])
    order = np.argsort(-total, kind="stable")[:n]
    order = order[count[order] > 0]
    return {
        "token": [name_token(vocab[token]) for token in order.tolist()],
        "tokens": [int(c) for c in count[order]],
        "mean share": [float(v) for v in total[order] / count[order]],
        "of the error": [float(v) for v in total[order] / max(total.sum(), 1e-30)],
    }


def text_of(errors: Errors, document: str, vocab: list[str], most: int = 600) -> list[Span]:
    """The tokens of a document, each with its share (0 for those not counted)."""
    spans = [
        Span(show_token(vocab[token]), _known(share), False)
        for place in errors.places
        if place.document == document
        for token, share in zip(place.tokens.tolist(), place.share.tolist(), strict=True)
    ]
    return spans[:most]


def _known(share: float) -> float:
    return share if np.isfinite(share) else 0.0
