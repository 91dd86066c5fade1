"""What the feature store says, made ready for people: lists of latents found and sorted, contexts
as text, and the user's own notes.

No torch, no streamlit. Nothing here makes an object for each latent: columns are arrays, and only
what is shown becomes text. Axes: d_sae (latents), found (those that pass the filters, in order).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from numpy import ndarray

from saekit.dashboard._search import in_contexts
from saekit.dashboard.data import (
    Context,
    Run,
    Span,
    name_token,
    read_result,
    show_token,
)
from saekit.features import FeatureStore, Kind, Latent, Passage, TokenLogit
from saekit.results import RESULTS

Where = Literal["contexts", "fires on", "promotes", "label or note"]
Show = Literal["alive", "dense", "dead", "all", "starred"]
SortBy = Literal[
    "density",
    "maximum",
    "mean_active",
    "kurtosis",
    "logit_kurtosis",
    "nearest_cosine",
    "unexplained",
    "latent",
]


_NUMBERS = ("density", "maximum", "mean_active", "kurtosis", "nearest_cosine", "unexplained")
"""Those that the list of latents shows."""

DENSE = 0.1
"""Latents that fire on more than this share of the rows are called dense, as `core` does."""


@dataclass(frozen=True)
class Query:
    """Which latents to list, and in which order. Bounds are inclusive."""

    text: str = ""
    where: Where = "contexts"
    show: Show = "alive"
    density: tuple[float, float] = (0.0, 1.0)
    kurtosis: tuple[float, float] = (0.0, float("inf"))
    like: int | None = None
    """Only this latent and those near to it, by decoder rows or by where they fire."""
    sort_by: SortBy = "density"
    descending: bool = True


def select(
    store: FeatureStore,
    query: Query = Query(),
    texts: Mapping[int, str] | None = None,
    starred: Sequence[int] = (),
) -> Int[ndarray, " found"]:
    """The latents that pass every filter, in order; those without the number sorted by come last.

    `texts` are labels and notes by latent.
    """
    store.load(("active", *_NUMBERS))
    density, kurtosis = store.column("density"), store.column("kurtosis")
    dead = is_dead(store)
    stars = np.zeros_like(dead)
    stars[[latent for latent in starred if latent < store.d_sae]] = True
    shown = {
        "alive": ~dead,
        "dense": density > DENSE,
        "dead": dead,
        "all": np.ones_like(dead),
        "starred": stars,
    }
    # A dead latent has no kurtosis, and no density that a slider could reach.
    inside = _within(density, query.density) & _within(kurtosis, query.kurtosis)
    keep = shown[query.show] & (inside | dead)
    if query.like is not None:
        keep &= near_to(store, query.like)
    if query.text:
        keep &= search(store, query.text, query.where, texts or {})
    found = np.flatnonzero(keep)
    if query.sort_by == "latent":
        return found if not query.descending else found[::-1]
    values = store.column(query.sort_by)[found]
    return found[np.argsort(-values if query.descending else values, kind="stable")]


def search(
    store: FeatureStore, text: str, where: Where, texts: Mapping[int, str] | None = None
) -> Bool[ndarray, " d_sae"]:
    """Latents with `text` (any case) in a token they fire on or promote, in their strongest
    contexts, or in what is written about them.

    A text in contexts may run over several tokens; elsewhere it must lie within one.
    """
    wanted = text.casefold()
    if where == "contexts":
        return in_contexts(store, wanted)
    found = np.zeros(store.d_sae, dtype=bool)
    if where == "label or note":
        told = (texts or {}).items()
        found[[latent for latent, words in told if wanted in words.casefold()]] = True
        return found
    matches = np.array([wanted in token.casefold() for token in store.vocab])
    begin, tokens = store.lists("input_token" if where == "fires on" else "promoted")
    hits = np.flatnonzero(matches[tokens])
    found[np.searchsorted(begin, hits, side="right") - 1] = True
    return found


def near_to(store: FeatureStore, latent: int) -> Bool[ndarray, " d_sae"]:
    """A latent and its nearest ones, by decoder rows and by where they fire."""
    near = np.zeros(store.d_sae, dtype=bool)
    lists = store.latent(latent).lists
    near[np.concatenate([[latent], lists["near"], lists["coactive"]]).astype(np.int64)] = True
    return near


def is_dead(store: FeatureStore) -> Bool[ndarray, " d_sae"]:
    """Latents that fired on none of the rows looked at."""
    return np.asarray(store.column("active") == 0)


def sample_latents(store: FeatureStore, n: int, seed: int) -> list[int]:
    """A fair sample of the latents that fire: one drawn at random from each of `n` equal groups by
    density, the densest group first. All of them where there are no more than `n`.
    """
    alive = select(store)
    rng = np.random.default_rng(seed)
    groups = np.array_split(alive, min(n, len(alive))) if len(alive) and n > 0 else []
    return [int(rng.choice(group)) for group in groups]


def fires_on(store: FeatureStore, latent: int) -> str:
    """The tokens with the most of a latent's activation, in a line."""
    return _listed(store, "input_token", latent)


def table(store: FeatureStore, latents: Int[ndarray, " found"]) -> dict[str, Shaped[ndarray, " _"]]:
    """A row for each of the latents: its numbers, the tokens it fires on, those it promotes."""
    columns: dict[str, ndarray] = {"latent": latents}
    for name in _NUMBERS:
        columns[name] = store.column(name)[latents]
    for title, name in (("fires on", "input_token"), ("promotes", "promoted")):
        rows = [_listed(store, name, at) for at in latents.tolist()]
        columns[title] = np.array(rows, dtype=object)
    return columns


def contexts(
    store: FeatureStore,
    latent: Latent,
    kind: Kind = "top",
    group: int | None = None,
    limit: int | None = None,
) -> list[Context]:
    """Contexts of a latent as text, the strongest first."""
    return [context(store, passage) for passage in latent.of(kind, group)[:limit]]


def context(store: FeatureStore, passage: Passage) -> Context:
    """A context as text."""
    spans = [
        Span(show_token(store.vocab[token]), float(act), at == passage.at)
        for at, (token, act) in enumerate(zip(passage.tokens, passage.acts, strict=True))
    ]
    document = show_token(store.documents[passage.document])
    return Context(document, passage.act, spans, passage.unexplained)


def promoted(store: FeatureStore, latent: Latent) -> list[TokenLogit]:
    """Output tokens the latent raises most, first the most; empty where it writes to none."""
    return _token_logits(store, latent, "promoted")


def suppressed(store: FeatureStore, latent: Latent) -> list[TokenLogit]:
    """Output tokens the latent lowers most, first the most."""
    return _token_logits(store, latent, "suppressed")


@dataclass(frozen=True)
class InputToken:
    """A token that a latent fires on."""

    name: str
    share: float
    """Of the sum of its positive values."""
    count: int
    """Rows on which it does."""


def input_tokens(store: FeatureStore, latent: Latent) -> list[InputToken]:
    """Tokens that the latent fires on, first the one with the largest share."""
    columns = (
        latent.lists[name].tolist() for name in ("input_token", "input_share", "input_count")
    )
    return [
        InputToken(name_token(store.vocab[token]), share, count)
        for token, share, count in zip(*columns, strict=True)
    ]


@dataclass(frozen=True)
class Neighbour:
    """A latent near to another one."""

    latent: int
    near: float
    """Cosine of decoder rows, or Jaccard index of the rows where both fire."""
    density: float
    fires_on: str


def neighbours(
    store: FeatureStore, latent: Latent, by: Literal["near", "coactive"]
) -> list[Neighbour]:
    """By decoder rows ("near") or by where they fire ("coactive"), the nearest first."""
    alike = latent.lists["near_cosine" if by == "near" else "coactive_jaccard"].tolist()
    others = latent.lists[by].tolist()
    density = store.column("density")
    return [
        Neighbour(other, value, float(density[other]), fires_on(store, other))
        for other, value in zip(others, alike, strict=True)
    ]


def place_on_map(store: FeatureStore) -> Float[ndarray, "d_sae 2"]:
    return np.stack([store.column("x"), store.column("y")], axis=1)


def head_shares(run: Run) -> Float[ndarray, "d_sae head"] | None:
    """Share of each head in each latent's decoder row, for an SAE of attention outputs on which
    `attention` was run; None for others. Raises SaekitError for a result that cannot be read."""
    if not (run.path / RESULTS / "attention.json").is_file():
        return None
    result = read_result(run.path, "attention")
    heads = result.arrays.get("head_attribution") if result else None
    of_these = result is not None and result.sae_fingerprint in (None, run.fingerprint)
    return heads if of_these else None


def _within(values: ndarray, bounds: tuple[float, float]) -> Bool[ndarray, " d_sae"]:
    return (values >= bounds[0]) & (values <= bounds[1])


def _listed(store: FeatureStore, name: str, latent: int, limit: int = 5) -> str:
    begin, entries = store.lists(name)
    tokens = entries[begin[latent] : begin[latent + 1]]
    names = [name_token(store.vocab[token]) for token in tokens[:limit].tolist()]
    names = [re.sub("␣{4,}", lambda run: f"␣×{len(run[0])}", name) for name in names]
    return "  ".join(name if len(name) <= 16 else f"{name[:15]}…" for name in names)


def _token_logits(store: FeatureStore, latent: Latent, name: str) -> list[TokenLogit]:
    tokens, logits = latent.lists[name].tolist(), latent.lists[f"{name}_logit"].tolist()
    return [
        TokenLogit(name_token(store.vocab[token]), logit)
        for token, logit in zip(tokens, logits, strict=True)
    ]
