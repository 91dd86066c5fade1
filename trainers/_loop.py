"""The loop that fits every kind of SAE: batches in, losses summed, a step, a line in the log, a
checkpoint.

It knows no kind. A run's folder holds `config.toml` from the start, `metrics.jsonl` and
`train_state/` while it runs, and `sae.safetensors` with `config.json` once it is done.
"""

import logging
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import tomli_w
import torch
from jaxtyping import Float
from torch import Tensor

from saekit import checkpoint
from saekit.activations_cache.reader import Reader
from saekit.activations_cache.store import ActivationCache
from saekit.config import TrainConfig, differences, read_toml
from saekit.errors import ConfigError, SaekitError
from saekit.files import remove_partial, write_text
from saekit.progress import bar
from saekit.results import Provenance, commit, versions
from saekit.sae import SAE
from saekit.trainers import _state
from saekit.trainers._base import Trainer, fold_input_scale
from saekit.trainers._kinds import kind, name_of, names
from saekit.trainers._log import MetricsLog
from saekit.trainers._schedules import warm_then_decay
from saekit.trainers._state import Position

log = logging.getLogger(__name__)

CONFIG = "config.toml"
SAMPLE_ROWS = 32_768
"""Rows that data-dependent initial values are taken from (Gao et al. 2024 use as many)."""


def train(
    cfg: TrainConfig,
    cache: ActivationCache,
    *,
    hook: str | None = None,
    out: Path | str | None = None,
    device: str = "cpu",
    progress: bool = False,
) -> SAE:
    """Fit the kind of SAE that `cfg` is the config of, to the training split of a cache.

    With `out`, the run is written there, can be stopped at any moment, and goes on with the same
    call. `hook` may be left out where the cache holds one. Raises ConfigError where `out` holds
    another run, and SaekitError where the loss is no longer a number.
    """
    hook = hook or _only_hook(cache)
    run = _Run(cfg, cache, hook, Path(out) if out is not None else None, device)
    done = run.finished()
    return done if done is not None else run.fit(progress)


class _Run:
    def __init__(
        self, cfg: TrainConfig, cache: ActivationCache, hook: str, out: Path | None, device: str
    ) -> None:
        self.cfg, self.cache, self.hook, self.out, self.device = cfg, cache, hook, out, device
        kinds = {kind(name).Config: kind(name) for name in names()}
        self.kind = kinds[type(cfg)]
        self.d_in = cache.width(hook)
        self.settings: dict[str, Any] = {
            "kind": name_of(self.kind),
            "hook": hook,
            "cache": cache.location,
            "cache_fingerprint": cache.fingerprint,
            **cfg.to_dict(),
        }

    def finished(self) -> SAE | None:
        """The run's SAE where an earlier call finished it; makes the folder where there is none
        yet."""
        if self.out is None:
            return None
        if not (self.out / CONFIG).exists():
            if self.out.is_dir():
                remove_partial(self.out)
            if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
                raise ConfigError(f"{self.out} exists and is no run of saekit: give another --out")
            write_text(self.out / CONFIG, tomli_w.dumps(self.settings))
            return None
        there = read_toml(self.out / CONFIG)
        # The cache may have been moved; its fingerprint says whether it is the same.
        ours = {**self.settings, "cache": there.get("cache")}
        if there != ours:
            raise ConfigError(
                f"{self.out} holds a run of another config ({differences(ours, there)}): give "
                "another --out, or the config that it was begun with"
            )
        if (self.out / checkpoint.CONFIG).exists():
            log.info("%s is complete", self.out)
            return checkpoint.load(self.out)
        remove_partial(self.out)
        return None

    def fit(self, progress: bool) -> SAE:
        with torch.random.fork_rng():
            torch.manual_seed(self.cfg.seed)
            trainer = self.kind(self.cfg, self.d_in).to(self.device)
        optimiser = torch.optim.Adam(
            trainer.parameters(), lr=self.cfg.lr, betas=self.cfg.adam_betas, fused=True
        )
        at = _state.load(self.out, trainer, optimiser) if self.out else None
        if at is None:
            at = Position(step=0, scale=self._initialise(trainer), log_bytes=0)
        if self.out is None:
            self._steps(trainer, optimiser, at, None, progress)
        else:
            with MetricsLog(self.out, at.log_bytes) as metrics:
                self._steps(trainer, optimiser, at, metrics, progress)
        sae = self._export(trainer, at.scale)
        if self.out is not None:
            checkpoint.save(sae, self.out)
            shutil.rmtree((self.out / _state.FILE).parent, ignore_errors=True)
        return sae

    def _initialise(self, trainer: Trainer) -> float:
        """Data-dependent initial values, from a sample of the very batches that training begins
        with."""
        size = self.cfg.batch_size
        sample = torch.cat(list(islice(self._batches(0), math.ceil(SAMPLE_ROWS / size))))
        scale = 1.0
        if self.cfg.input_scaling == "sqrt_d":
            norm = float(sample.norm(dim=1).mean())
            if norm == 0:
                raise SaekitError(
                    f"the activations at '{self.hook}' are all zero: there is nothing to learn. "
                    "Harvest another hook point"
                )
            scale = math.sqrt(self.d_in) / norm
        trainer.initialise(sample * scale)
        return scale

    def _batches(self, start: int) -> Iterator[Float[Tensor, "batch d_in"]]:
        reader = Reader(
            self.cache,
            (self.hook,),
            self.cfg.batch_size,
            seed=self.cfg.seed,
            exclude=self.cfg.exclude,
            epochs=None,
            drop_last=True,
            start=start,
            device=self.device,
        )
        return (batch[self.hook] for batch in reader)

    def _steps(
        self,
        trainer: Trainer,
        optimiser: torch.optim.Optimizer,
        at: Position,
        metrics: MetricsLog | None,
        progress: bool,
    ) -> None:
        cfg, scale = self.cfg, at.scale
        batches = self._batches(at.step)
        done, total = at.step * cfg.batch_size, cfg.n_steps * cfg.batch_size
        since = time.perf_counter(), at.step
        with bar(f"train {self.settings['kind']}", total, done=done, shown=progress) as shown:
            for step in range(at.step, cfg.n_steps):
                x = next(batches) * scale
                lr = cfg.lr * warm_then_decay(step, cfg.n_steps, cfg.lr_warmup, cfg.lr_decay)
                losses = _step(trainer, optimiser, x, lr)
                note = ""
                if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.n_steps:
                    line = _figures(trainer, losses, x, step)
                    line |= {"step": step + 1, "tokens": (step + 1) * cfg.batch_size, "lr": lr}
                    now, logged = time.perf_counter(), step + 1
                    line["tokens_per_s"] = (logged - since[1]) * cfg.batch_size / (now - since[0])
                    since = now, logged
                    note = f"ev {line['ev']:.3f}"
                    if metrics is not None:
                        metrics.write(line)
                shown.advance(cfg.batch_size, note)
                if metrics is not None and (step + 1) % cfg.checkpoint_every == 0:
                    assert self.out is not None
                    here = replace(at, step=step + 1, log_bytes=metrics.size())
                    _state.save(self.out, here, trainer, optimiser)

    @torch.no_grad()
    def _export(self, trainer: Trainer, scale: float) -> SAE:
        sae = fold_input_scale(trainer.export(), scale).to("cpu")
        provenance = Provenance(
            kind=self.settings["kind"],
            hook=self.hook,
            model=self.cache.model,
            model_fingerprint=self.cache.model_fingerprint,
            cache_fingerprint=self.cache.fingerprint,
            config=self.cfg.to_dict(),
            rows_seen=self.cfg.n_steps * self.cfg.batch_size,
            versions=versions(),
            commit=commit(),
        )
        return replace(sae, provenance=provenance)


def _step(
    trainer: Trainer, optimiser: torch.optim.Optimizer, x: Float[Tensor, "batch d_in"], lr: float
) -> dict[str, Tensor]:
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.zero_grad(set_to_none=True)
    losses = trainer.losses(x)
    torch.stack(list(losses.values())).sum().backward()
    trainer.before_step()
    optimiser.step()
    trainer.after_step()
    return {name: loss.detach() for name, loss in losses.items()}


def _figures(
    trainer: Trainer, losses: dict[str, Tensor], x: Float[Tensor, "batch d_in"], step: int
) -> dict[str, float]:
    """What the log says of a step. Raises SaekitError where a loss is no longer a number."""
    named = {name: float(loss) for name, loss in losses.items()}
    for name, value in named.items():
        if not math.isfinite(value):
            raise SaekitError(
                f"loss '{name}' is {value} at step {step + 1}: training diverged. The last "
                "checkpoint is kept; start a new run with a lower --lr"
            )
    variance = float((x - x.mean(0)).square().sum(1).mean())
    ev = {"ev": 1 - named["mse"] / variance} if variance > 0 else {}
    return {"loss": sum(named.values()), **named, **ev, **trainer.metrics()}


def _only_hook(cache: ActivationCache) -> str:
    if len(cache.hooks) == 1:
        return next(iter(cache.hooks))
    raise ConfigError(
        f"{cache.url} holds several hook points ({', '.join(cache.hooks)}): say which with --hook"
    )
