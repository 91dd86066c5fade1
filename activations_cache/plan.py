"""What a harvest will take, before it is begun: room on disk, memory, time.

Rows are counted as `n_tokens`, which the corpus may end before: everything here is an upper bound
but the speed, which is measured on the first windows of the corpus itself.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from saekit.activations_cache.harvest import (
    DocumentNumbers,
    HarvestConfig,
    activations,
    batches,
    context_of,
    free_bytes,
    load_model,
    row_bytes,
)
from saekit.activations_cache.model import LanguageModel
from saekit.errors import CorpusError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a harvest will take. Sizes are in bytes."""

    rows: int
    disk: dict[str, int]
    """By column of the cache."""
    free: int
    """On the disk that the cache will lie on."""
    shard: int
    """Of one shard: it is gathered in memory, twice over for a moment, before it is written."""
    model: int
    """Of the model's weights, as they are loaded."""
    tokens_per_s: float
    """Through the model and into memory, after a warm-up."""

    @property
    def seconds(self) -> float:
        return self.rows / self.tokens_per_s

    @property
    def fits(self) -> bool:
        return sum(self.disk.values()) <= self.free


def plan(cfg: HarvestConfig, out: Path, *, seconds: float = 10.0) -> Plan:
    """Plan a harvest into `out`, measuring its speed for some seconds. Nothing is written.

    Raises what `harvest` would raise for the model, the hook points and the corpus.
    """
    model = load_model(cfg)
    columns = row_bytes(cfg, model.widths(cfg.hooks))
    per_batch = cfg.batch_size * context_of(cfg, model)
    rows_in_shard = max(1, cfg.shard_rows // per_batch) * per_batch
    return Plan(
        rows=cfg.n_tokens,
        disk={name: cfg.n_tokens * size for name, size in columns.items()},
        free=free_bytes(out),
        shard=min(rows_in_shard, cfg.n_tokens) * sum(columns.values()),
        model=sum(p.numel() * p.element_size() for p in model.model.parameters()),
        tokens_per_s=_speed(cfg, model, seconds),
    )


def _speed(cfg: HarvestConfig, model: LanguageModel, seconds: float) -> float:
    names = DocumentNumbers()
    begun, tokens = time.perf_counter(), 0
    for number, batch in enumerate(batches(cfg, model)):
        if number == 1:
            # The first batch pays for what happens once.
            begun, tokens = time.perf_counter(), 0
        activations(cfg, model, batch, names)
        tokens += sum(len(window.ids) for window in batch)
        if number > 0 and time.perf_counter() - begun >= seconds:
            break
    if tokens == 0:
        raise CorpusError(f"dataset '{cfg.dataset}' gave no token: it is empty")
    return tokens / (time.perf_counter() - begun)
