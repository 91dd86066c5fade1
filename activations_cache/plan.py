"""What a harvest will take, before it is begun: room on disk, memory, time.

Rows are counted as `n_tokens`, which the corpus may end before: everything here is an upper bound
but the speed, which is measured on the first windows of the corpus itself.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from saekit.activations_cache.config import HarvestConfig
from saekit.activations_cache.job import Job, load_model
from saekit.activations_cache.storage import storage
from saekit.activations_cache.tokens import Cursor
from saekit.errors import CorpusError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a harvest will take. Sizes are in bytes."""

    rows: int
    disk: dict[str, int]
    """By column of the cache; "token" is what is kept of a token itself."""
    free: int | None
    """On the disk that the cache will lie on; None where it cannot be known."""
    host: int
    """Memory for rows on their way to the disk, at most."""
    device: int
    """Memory of the GPU at its fullest; on a CPU that of the model's weights."""
    tokens_per_s: float
    """Through the model and into memory, after a warm-up."""

    @property
    def seconds(self) -> float:
        return self.rows / self.tokens_per_s

    @property
    def fits(self) -> bool:
        return self.free is None or sum(self.disk.values()) <= self.free


def plan(cfg: HarvestConfig, out: Path | str, *, seconds: float = 10.0) -> Plan:
    """Plan a harvest into `out`, measuring its speed for some seconds. Nothing is written.

    Raises what `harvest` would raise for the model, the hook points and the corpus.
    """
    job = Job(cfg, load_model(cfg))
    speed = _speed(job, seconds)
    on_gpu = job.model.device.type == "cuda"
    weights = sum(p.numel() * p.element_size() for p in job.model.model.parameters())
    return Plan(
        rows=cfg.n_tokens,
        disk={name: cfg.n_tokens * size for name, size in job.schema.row_bytes().items()},
        free=storage(out).free_bytes(),
        host=job.n_buffers * job.shard_bytes,
        device=torch.cuda.max_memory_allocated(job.model.device) if on_gpu else weights,
        tokens_per_s=speed,
    )


def _speed(job: Job, seconds: float) -> float:
    rows = job.buffer()
    begun, tokens = time.perf_counter(), 0
    for number, batch in enumerate(job.batches(Cursor())):
        if number == 1:
            # The first batch pays for what happens once.
            begun, tokens = time.perf_counter(), 0
        if number % job.batches_per_shard == 0:
            rows.clear(Cursor(), 0)
        rows.add(job.model, batch)
        tokens += batch.n_rows
        if number > 0 and time.perf_counter() - begun >= seconds:
            break
    if tokens == 0:
        raise CorpusError(f"dataset '{job.cfg.dataset}' gave no token: it is empty")
    rows.seal()
    return tokens / (time.perf_counter() - begun)
