"""What a model loses when the activation at one hook point is replaced: cross-entropy and KL per
token.

The *edited* positions are exactly those that the token mask keeps; all others, the
beginning-of-sequence token among them, pass through untouched. A position is *scored* when it is
edited and has a next token in its window: its loss is that of predicting that token. Each edit sees
the same positions.

Axes: batch (windows), pos, row (edited positions), d, token (scored positions), vocab.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.activations_cache.config import DTYPES
from saekit.activations_cache.model import LanguageModel
from saekit.activations_cache.splice import Edit, only_at, recording
from saekit.activations_cache.store import ActivationCache, Window
from saekit.errors import CacheError
from saekit.evals._metrics import Mean, cross_entropy, kl_divergence

_LOGITS_AT_ONCE = 2**25
"""Elements of one `[batch, pos, vocab]` tensor, about: 128 MiB in fp32, and two are alive at a
time."""

_PROBABILITIES_AT_ONCE = 2**23
"""Elements of one fp32 `[token, vocab]` tensor."""


@dataclass(frozen=True)
class Losses:
    """Means over the scored positions."""

    ce: Mean = Mean()
    """-log p(next token)."""
    kl: Mean = Mean()
    """KL(clean || edited) of the next-token distributions, where it was asked for: it takes as long
    as the loss."""
    documents: Mapping[int, tuple[Mean, Mean]] = field(default_factory=dict)
    """Both, of each document's positions."""

    def __add__(self, other: "Losses") -> "Losses":
        both = dict(self.documents)
        for document, (ce, kl) in other.documents.items():
            before = both.get(document, (Mean(), Mean()))
            both[document] = before[0] + ce, before[1] + kl
        return Losses(self.ce + other.ce, self.kl + other.kl, both)


@dataclass(frozen=True, eq=False)
class _Batch:
    """Windows padded on the right; attention is causal, so nothing before the padding sees it."""

    ids: Int[Tensor, "batch pos"]
    edited: Bool[Tensor, "batch pos"]
    scored: Bool[Tensor, "batch pos"]
    document: Int[Tensor, " token"]
    """Of each scored position."""

    @classmethod
    def of(cls, windows: Sequence[Window], n_scored: int, device: str) -> "_Batch":
        """`n_scored` is how many positions to score at most: the first, in stored order."""
        shape = len(windows), max(len(window.tokens) for window in windows)
        ids = torch.zeros(shape, dtype=torch.long)
        edited = torch.zeros(shape, dtype=torch.bool)
        scored = torch.zeros(shape, dtype=torch.bool)
        for row, window in enumerate(windows):
            n = len(window.tokens)
            ids[row, :n] = window.tokens
            edited[row, :n] = window.keep
            scored[row, : n - 1] = window.keep[:-1]
        scored &= scored.flatten().cumsum(0).view(shape) <= n_scored
        of = torch.tensor([window.document for window in windows])
        document = of[scored.nonzero()[:, 0]]
        return cls(ids.to(device), edited.to(device), scored.to(device), document.to(device))


def spliced_losses(
    model: LanguageModel,
    cache: ActivationCache,
    hook: str,
    edits: Mapping[str, Edit],
    windows: Iterator[Window],
    n_tokens: int,
    advance: Callable[[int], None],
    kl: Collection[str] = (),
    part: tuple[int, int] = (0, 1),
) -> dict[str, Losses]:
    """Losses by the name of the edit, and those of the untouched model as "clean"; the divergence
    from it of the edits named in `kl`.

    The first `n_tokens` scored positions count. `part` is (which, of how many): of n processes, the
    i-th scores every n-th batch of them from the i-th on. Raises CacheError where the model's
    activations at the hook are not those of the cache.
    """
    losses = dict.fromkeys(("clean", *edits), Losses())
    left, (which, parts) = n_tokens, part
    for number, some in enumerate(_batched(_needed(windows, n_tokens), len(model.vocab))):
        batch = _Batch.of(some, left, str(model.device))
        left -= len(batch.document)
        if number % parts != which:
            continue
        target = batch.ids.roll(-1, dims=1)[batch.scored]
        seen: list[Tensor] = []
        clean = model.logits(batch.ids, {hook: recording(seen)})[batch.scored]
        _compare_with_cache(seen[0][batch.edited].float().cpu(), some, cache, hook)
        log_p = clean.float().log_softmax(1)
        del clean
        losses["clean"] += _summed(cross_entropy(log_p, target), None, batch.document)
        for name, edit in edits.items():
            logits = model.logits(batch.ids, {hook: only_at(batch.edited, edit)})[batch.scored]
            of = log_p if name in kl else None
            losses[name] += _losses(logits, of, target, batch.document)
        advance(len(target))
    return losses


def token_losses(
    model: LanguageModel,
    cache: ActivationCache,
    hook: str,
    windows: Iterator[Window],
    n_tokens: int,
    advance: Callable[[int], None],
) -> Iterator[tuple[Int[Tensor, " token"], Float[Tensor, " token"]]]:
    """The untouched model's loss at each of the first `n_tokens` scored positions, batch by batch:
    which row of the cache each is, and -log p(next token).

    Raises CacheError where the model's activations at the hook are not those of the cache.
    """
    left = n_tokens
    for some in _batched(_needed(windows, n_tokens), len(model.vocab)):
        batch = _Batch.of(some, left, str(model.device))
        seen: list[Tensor] = []
        logits = model.logits(batch.ids, {hook: recording(seen)})[batch.scored]
        _compare_with_cache(seen[0][batch.edited].float().cpu(), some, cache, hook)
        target = batch.ids.roll(-1, dims=1)[batch.scored]
        window, pos = batch.scored.cpu().nonzero(as_tuple=True)
        starts = torch.tensor([one.start for one in some])
        yield starts[window] + pos, cross_entropy(logits.float().log_softmax(1), target)
        left -= len(target)
        advance(len(target))
        if left <= 0:
            break


def _needed(windows: Iterator[Window], n_tokens: int) -> Iterator[Window]:
    """Up to the window of the last position to score."""
    for window in windows:
        if n_tokens <= 0:
            return
        yield window
        n_tokens -= int(window.keep[:-1].sum())


def _batched(windows: Iterator[Window], vocab: int) -> Iterator[list[Window]]:
    some: list[Window] = []
    longest = 0
    for window in windows:
        longest = max(longest, len(window.tokens))
        if some and (len(some) + 1) * longest * vocab > _LOGITS_AT_ONCE:
            yield some
            some, longest = [], len(window.tokens)
        some.append(window)
    if some:
        yield some


def _losses(
    logits: Float[Tensor, "token vocab"],
    log_p: Float[Tensor, "token vocab"] | None,
    target: Int[Tensor, " token"],
    document: Int[Tensor, " token"],
) -> Losses:
    """Of some tokens, a few at a time, so that a large vocabulary fits in fp32; `log_p` is what the
    divergence is from."""
    size = max(1, _PROBABILITIES_AT_ONCE // logits.shape[1])
    losses = Losses()
    for at in range(0, len(target), size):
        some = slice(at, at + size)
        log_q = logits[some].float().log_softmax(1)
        kl = None if log_p is None else kl_divergence(log_p[some], log_q)
        losses += _summed(cross_entropy(log_q, target[some]), kl, document[some])
    return losses


def _summed(
    ce: Float[Tensor, " token"],
    kl: Float[Tensor, " token"] | None,
    document: Int[Tensor, " token"],
) -> Losses:
    """Over all of the tokens, and over those of each document."""

    def means(some: Tensor | slice) -> tuple[Mean, Mean]:
        return Mean.of(ce[some]), Mean() if kl is None else Mean.of(kl[some])

    each = {int(d): means(document == d) for d in document.unique()}
    return Losses(*means(slice(None)), each)


def _compare_with_cache(
    live: Float[Tensor, "row d"], windows: Sequence[Window], cache: ActivationCache, hook: str
) -> None:
    """Refuse to mix numbers from the cache with those of a model that gives other activations.

    Rounding on disk and in the model explains `|live - cached| / |cached|` of about half an epsilon
    of the coarser dtype (int8: the error that the harvest measured); four are allowed, for other
    batch shapes and other devices.
    """
    stored = torch.cat(
        [cache.row_slice(hook, w.start, w.start + len(w.tokens))[w.keep] for w in windows]
    )
    config = cache.manifest.config
    epsilon = max(_storage_error(cache, hook), torch.finfo(DTYPES[config["model_dtype"]]).eps)
    allowed = 4 * epsilon + 1e-4
    apart, length = float((live - stored).norm()), float(stored.norm())
    if not apart <= allowed * length:
        raise CacheError(
            f"model '{cache.model}' now gives other activations at '{hook}' than {cache.url} "
            f"holds: they differ by {apart / max(length, 1e-30):.2g} of their length, where "
            f"storage as {config['dtype']} explains at most {allowed:.2g}. Harvest the cache again "
            "with the versions installed now"
        )


def _storage_error(cache: ActivationCache, hook: str) -> float:
    """How far a row is from what is stored of it, in units of its length."""
    dtype = DTYPES[cache.manifest.config["dtype"]]
    if dtype.is_floating_point:
        return torch.finfo(dtype).eps
    stats = cache.stats(hook)
    assert stats.sum_squared_error is not None
    return math.sqrt(stats.sum_squared_error / max(stats.sum_squares, 1e-30))
