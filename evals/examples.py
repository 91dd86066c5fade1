"""For every latent: where it fires most, how often, how strongly, and which tokens it promotes.

Writes `LatentExamples`, which the dashboard reads. The rows are encoded once, in stored order; the
active latents wait in a temporary file (12 bytes each) for a second pass, which knows the strongest
windows and every latent's maximum and so can cut the examples out and fill the histograms. A value
below 0, which a signed matching pursuit gives, counts as firing and shows among an example's
values, but makes no example and falls in no bin.

Promoted tokens are by direct logit attribution: `(W_dec[i] @ M * g) @ W_U`, less its mean over the
vocabulary, with M the map from the hook to the residual stream and g the final norm's gain. That is
the straight path alone. It leaves out what later layers make of the direction, the final norm's
division by the length of the residual stream (so logits compare within a latent, not between tokens
of a text) and, in a LayerNorm, its centring.

Axes: place (tokens of a batch of windows, laid end to end), active (a latent at a place where it
fires), entry (an example of a latent), window (tokens of an example), d, d_sae, vocab, top, bin.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Int
from torch import Tensor

from saekit.activations_cache.model import LanguageModel
from saekit.activations_cache.store import Window
from saekit.errors import CacheError, ConfigError
from saekit.evals._base import Eval, EvalConfig, Findings
from saekit.evals._metrics import Firing
from saekit.progress import bar
from saekit.results import LatentExamples, Metric
from saekit.sae import SparseCode

_LOGITS_AT_ONCE = 2**24
"""Elements of one `[latents, vocab]` tensor."""


@dataclass(frozen=True, kw_only=True)
class ExamplesConfig(EvalConfig):
    split: Literal["train", "test", "all"] = "all"
    """Documents to look at. Examples are to be read, not scored, so all of them serve."""

    n_contexts: int = 12
    """Examples kept for each latent, at most one from each window that the model saw."""

    window: int = 24
    """Tokens of an example, the strongest in the middle where the text allows."""

    bins: int = 24
    """Bins of a latent's histogram, from 0 to its maximum."""

    top: int = 10
    """Promoted and suppressed tokens of a latent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_contexts", "window", "bins", "top"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")


class Examples(Eval):
    Config: ClassVar[type[EvalConfig]] = ExamplesConfig
    cfg: ExamplesConfig

    def run(self) -> Findings:
        examples = self.collect()
        n = examples.n_rows
        where = f"the first {n} rows of split '{self.cfg.split}'"
        return Findings(
            metrics={
                "latents_with_examples": Metric(
                    value=float((examples.peak[:, 0] > 0).sum()),
                    definition=f"latents with a value above 0 on {where}",
                    n=n,
                ),
                "examples": Metric(
                    value=float((examples.peak > 0).sum()),
                    definition=f"windows kept, at most {self.cfg.n_contexts} a latent, of {where}",
                    n=n,
                ),
            },
            product=examples,
        )

    def collect(self) -> LatentExamples:
        """Everything that the dashboard shows of a latent."""
        cfg, d_sae = self.cfg, self.sae.d_sae
        model = self.load_model()
        slots = _Slots.empty(d_sae, cfg.n_contexts, cfg.window)
        histogram = torch.zeros(d_sae * cfg.bins, dtype=torch.long)
        with tempfile.TemporaryFile() as file:
            firing, entries = self._strongest(file)
            slots.place(entries)
            file.seek(0)
            for text in self._texts():
                active = _Active.read(file)
                histogram += _histogram(active, slots.maximum, cfg.bins)
                slots.fill(text, active, entries.between(int(text.row[0]), int(text.row[-1])))
        used = slots.peak.numpy() > 0
        document = slots.document.numpy()
        numbers, document[used] = np.unique(document[used], return_inverse=True)
        promoted, promoted_logit, suppressed, suppressed_logit = self._promoted(model)
        return LatentExamples(
            peak=slots.peak.numpy(),
            peak_at=slots.peak_at.numpy(),
            tokens=slots.tokens.numpy(),
            acts=slots.acts.numpy(),
            document=document,
            density=firing.density.float().numpy(),
            histogram=histogram.view(d_sae, cfg.bins).numpy(),
            maximum=slots.maximum.numpy(),
            promoted=promoted.numpy(),
            promoted_logit=promoted_logit.numpy(),
            suppressed=suppressed.numpy(),
            suppressed_logit=suppressed_logit.numpy(),
            vocab=model.vocab,
            documents=[self.cache.documents[number] for number in numbers],
            n_rows=firing.n,
            split=cfg.split,
            exclude=cfg.exclude,
        )

    def _strongest(self, file: IO[bytes]) -> tuple[Firing, "_Entries"]:
        """The first pass: every latent's strongest windows; the codes go into `file`."""
        cfg, d_sae = self.cfg, self.sae.d_sae
        firing: Firing | None = None
        entries = _Entries.empty()
        total = min(cfg.max_rows, len(self.cache.indices(cfg.split, cfg.exclude)))
        with bar("examples", total, shown=self.progress) as shown:
            for text in self._texts():
                x = self.cache.rows(self.hook, text.row[text.keep]).to(self.device)
                code = self.sae.encode_sparse(x)
                here = Firing.of(code, d_sae)
                firing = here if firing is None else firing + here
                active = _Active.of(SparseCode(code.values.cpu(), code.indices.cpu()), text)
                active.write(file)
                floor = entries.floor(d_sae, cfg.n_contexts)
                entries = entries.joined(active.peaks(text, floor), cfg.n_contexts)
                shown.advance(len(x))
        if firing is None:
            raise CacheError(
                f"split '{cfg.split}' of {self.cache.url} has no window of at most "
                f"max_rows={cfg.max_rows} rows; choose another split, or raise max_rows"
            )
        return firing, entries.in_stored_order()

    def _texts(self) -> Iterator["_Text"]:
        """The first windows that together hold at most `max_rows` kept rows, some at a time."""
        some: list[Window] = []
        places = rows = 0
        for window in self.cache.windows(self.cfg.split, self.cfg.exclude):
            rows += int(window.keep.sum())
            if rows > self.cfg.max_rows:
                break
            if some and places + len(window.tokens) > self.cfg.batch_size:
                yield _Text.of(some)
                some, places = [], 0
            some.append(window)
            places += len(window.tokens)
        if some:
            yield _Text.of(some)

    def _promoted(self, model: LanguageModel) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens that each decoder row raises and lowers most, and by how much."""
        to_residual = model.residual_map(self.hook)
        top = min(self.cfg.top, len(model.vocab))
        if to_residual is None:
            none = torch.full((self.sae.d_sae, top), -1), torch.zeros(self.sae.d_sae, top)
            return *none, *none
        gain, W_U = model.unembed()
        parts = []
        for W_dec in torch.split(self.sae.W_dec, max(1, _LOGITS_AT_ONCE // W_U.shape[1])):
            logits = (W_dec @ to_residual * gain) @ W_U
            logits -= logits.mean(1, keepdim=True)
            up, down = logits.topk(top), logits.topk(top, largest=False)
            parts.append((up.indices, up.values, down.indices, down.values))
        first, second, third, fourth = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        return first, second, third, fourth


EVAL = Examples


@dataclass(frozen=True, eq=False)
class _Text:
    """Whole windows, laid end to end."""

    token: Int[Tensor, " place"]
    row: Int[Tensor, " place"]
    """Row of the cache; it rises from place to place."""
    keep: Bool[Tensor, " place"]
    window: Int[Tensor, " place"]
    begin: Int[Tensor, " windows"]
    end: Int[Tensor, " windows"]
    document: Int[Tensor, " windows"]

    @classmethod
    def of(cls, windows: list[Window]) -> "_Text":
        lengths = torch.tensor([len(w.tokens) for w in windows])
        return cls(
            token=torch.cat([w.tokens for w in windows]),
            row=torch.cat([w.start + torch.arange(len(w.tokens)) for w in windows]),
            keep=torch.cat([w.keep for w in windows]),
            window=torch.arange(len(windows)).repeat_interleave(lengths),
            begin=lengths.cumsum(0) - lengths,
            end=lengths.cumsum(0),
            document=torch.tensor([w.document for w in windows]),
        )


@dataclass(frozen=True, eq=False)
class _Entries:
    """Examples of latents, each by the row of its peak."""

    latent: Int[Tensor, " entry"]
    rank: Int[Tensor, " entry"]
    """0 for a latent's strongest."""
    peak: Float[Tensor, " entry"]
    row: Int[Tensor, " entry"]

    @classmethod
    def empty(cls) -> "_Entries":
        none = torch.zeros(0, dtype=torch.long)
        return cls(none, none, torch.zeros(0), none)

    def joined(self, later: "_Entries", n: int) -> "_Entries":
        """The n strongest of each latent; of equals, those that come first in the text."""
        latent, peak, row = (
            torch.cat([getattr(self, name), getattr(later, name)])
            for name in ("latent", "peak", "row")
        )
        order, rank = _ranked(latent, peak)
        order, rank = order[rank < n], rank[rank < n]
        return _Entries(latent[order], rank, peak[order], row[order])

    def floor(self, d_sae: int, n: int) -> Float[Tensor, " {d_sae}"]:
        """What a new example of each latent must exceed to be among its n strongest."""
        floor = torch.zeros(d_sae)
        weakest = self.rank == n - 1
        floor[self.latent[weakest]] = self.peak[weakest]
        return floor

    def in_stored_order(self) -> "_Entries":
        return self._at(self.row.argsort())

    def between(self, first: int, last: int) -> "_Entries":
        """Those whose peak lies in rows first..last; asks for stored order."""
        bounds = torch.searchsorted(self.row, torch.tensor([first, last + 1]))
        return self._at(torch.arange(*bounds.tolist()))

    def _at(self, index: Int[Tensor, " some"]) -> "_Entries":
        return _Entries(self.latent[index], self.rank[index], self.peak[index], self.row[index])


@dataclass(frozen=True, eq=False)
class _Active:
    """The active latents of a text, in the order of its places."""

    place: Int[Tensor, " active"]
    latent: Int[Tensor, " active"]
    value: Float[Tensor, " active"]

    @classmethod
    def of(cls, code: SparseCode, text: _Text) -> "_Active":
        active = code.values != 0
        place = text.keep.nonzero().flatten().repeat_interleave(active.sum(1))
        return cls(place, code.indices[active], code.values[active])

    def write(self, file: IO[bytes]) -> None:
        for column in (self.place.int(), self.latent.int(), self.value):
            np.save(file, column.numpy(), allow_pickle=False)

    @classmethod
    def read(cls, file: IO[bytes]) -> "_Active":
        """What `write` wrote next."""
        place, latent, value = (torch.from_numpy(np.load(file)) for _ in range(3))
        return cls(place.long(), latent.long(), value)

    def peaks(self, text: _Text, floor: Float[Tensor, " d_sae"]) -> _Entries:
        """Where each latent peaks in each window, if above its floor; of equals, the first."""
        high = (self.value > floor[self.latent]).nonzero().flatten()
        window = text.window[self.place[high]]
        order, rank = _ranked(window * len(floor) + self.latent[high], self.value[high])
        best = high[order[rank == 0]]
        row = text.row[self.place[best]]
        return _Entries(self.latent[best], torch.zeros_like(best), self.value[best], row)

    def at(
        self, place: Int[Tensor, "entry window"], latent: Int[Tensor, "entry 1"], d_sae: int
    ) -> Float[Tensor, "entry window"]:
        """The latents' values at those places, 0 where they do not fire."""
        key, order = (self.place * d_sae + self.latent).sort()
        want = place * d_sae + latent
        found = torch.searchsorted(key, want).clamp(max=len(key) - 1)
        return self.value[order[found]] * (key[found] == want)


@dataclass(frozen=True, eq=False)
class _Slots:
    """The arrays of `LatentExamples` while they are filled; an empty slot has tokens -1."""

    peak: Float[Tensor, "d_sae context"]
    peak_at: Int[Tensor, "d_sae context"]
    tokens: Int[Tensor, "d_sae context window"]
    acts: Float16[Tensor, "d_sae context window"]
    document: Int[Tensor, "d_sae context"]
    """Number of the document in the cache."""

    @classmethod
    def empty(cls, d_sae: int, contexts: int, window: int) -> "_Slots":
        return cls(
            peak=torch.zeros(d_sae, contexts),
            peak_at=torch.zeros(d_sae, contexts, dtype=torch.int32),
            tokens=torch.full((d_sae, contexts, window), -1, dtype=torch.int32),
            acts=torch.zeros(d_sae, contexts, window, dtype=torch.float16),
            document=torch.full((d_sae, contexts), -1),
        )

    @property
    def maximum(self) -> Float[Tensor, " d_sae"]:
        return self.peak[:, 0]

    def place(self, entries: _Entries) -> None:
        self.peak[entries.latent, entries.rank] = entries.peak

    def fill(self, text: _Text, active: _Active, entries: _Entries) -> None:
        """Cut the examples that lie in this text out of it."""
        if len(entries.row) == 0:
            return
        d_sae, _, width = self.tokens.shape
        peak = torch.searchsorted(text.row, entries.row)
        window = text.window[peak]
        begin, end = text.begin[window], text.end[window]
        first = torch.minimum(peak - width // 2, end - width).maximum(begin)
        place = first[:, None] + torch.arange(width)
        inside = place < end[:, None]
        place = place.where(inside, begin[:, None])
        acts = active.at(place, entries.latent[:, None], d_sae) * inside
        slot = entries.latent, entries.rank
        self.peak_at[slot] = (peak - first).int()
        self.tokens[slot] = text.token[place].where(inside, -1).int()
        # Past fp16's range the exact value still stands in `peak`.
        half = torch.finfo(torch.float16)
        self.acts[slot] = acts.clamp(half.min, half.max).half()
        self.document[slot] = text.document[window]


def _ranked(
    group: Int[Tensor, " n"], value: Float[Tensor, " n"]
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """The order by group and, within it, from the largest value down (equals as they came), and
    each one's rank in its group."""
    order = value.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    ordered = group[order]
    return order, torch.arange(len(order)) - torch.searchsorted(ordered, ordered)


def _histogram(
    active: _Active, maximum: Float[Tensor, " d_sae"], bins: int
) -> Int[Tensor, " d_sae_times_bins"]:
    """Counts of `floor(bins * value / maximum)` of the values above 0; the maximum itself falls in
    the last bin."""
    latent, value = active.latent[active.value > 0], active.value[active.value > 0]
    share = value.double() / maximum.double()[latent]
    bin_ = (share * bins).long().clamp(max=bins - 1)
    return (latent * bins + bin_).bincount(minlength=len(maximum) * bins)
