"""One SAE in training: its folder, its trainer and optimiser, its log, a step.

A run's folder holds `config.toml` from the start, `metrics.jsonl` and `train_state/` while it runs,
and `sae.safetensors` with `config.json` once it is done.
"""

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from saekit import checkpoint
from saekit.activations_cache.store import ActivationCache
from saekit.config import TrainConfig, differences, read_toml
from saekit.distributed import ALONE, Mesh, shared_over
from saekit.errors import ConfigError, SaekitError
from saekit.files import remove_partial, write_atomic, write_text
from saekit.results import Provenance, commit, versions
from saekit.sae import SAE, JumpReLU
from saekit.trainers import _state
from saekit.trainers._base import Batch, Step, Trainer, fold_input_scale, input_scale
from saekit.trainers._kinds import kind as kind_of
from saekit.trainers._kinds import name_of, names
from saekit.trainers._life import LifeHistory
from saekit.trainers._log import Line, MetricsLog
from saekit.trainers._schedules import warm_then_decay
from saekit.trainers._state import Position
from saekit.trainers._step import EagerStep

log = logging.getLogger(__name__)

CONFIG = "config.toml"
EXTRAS = "extras.safetensors"
DIVERGED = "diverged.safetensors"

Columns = dict[str, Tensor]
"""A batch as the cache's reader gives it."""


@dataclass(frozen=True, kw_only=True)
class Callback:
    """Something to find out while training goes on: every so many steps, `call` is given the SAE
    as it would be exported then, and what it answers goes to the log."""

    every: int
    call: Callable[[SAE], dict[str, float]]


class Diverged(SaekitError):
    """A loss that is no longer a number."""


class Run:
    """See the module. `advance` takes one step; the loop says with which batch."""

    def __init__(
        self,
        cfg: TrainConfig,
        cache: ActivationCache,
        hook: str | None,
        out: Path | str | None,
        device: str,
        callbacks: tuple[Callback, ...] = (),
        mesh: Mesh = ALONE,
    ) -> None:
        self.mesh = mesh
        self.cfg, self.cache, self.device = cfg, cache, device
        self.hook = hook or _only_hook(cache)
        self.out = Path(out) if out is not None else None
        self.callbacks = callbacks
        self.kind = {kind_of(name).Config: kind_of(name) for name in names()}[type(cfg)]
        if mesh.size > 1:
            check_mesh(self.kind, cfg, mesh)
        self.name = self.out.name if self.out is not None else name_of(self.kind)
        self.d_in = cache.width(self.hook)
        self.columns = [self.hook]
        if "grad" in self.kind.NEEDS:
            self.columns.append(f"{self.hook}.grad")
            if not cache.manifest.config["gradients"]:
                raise ConfigError(
                    f"{name_of(self.kind)} chooses latents by gradients, and {cache.url} holds "
                    "none: harvest with --gradients"
                )
        if "label" in self.kind.NEEDS:
            self.columns += ["document", "position", "token"]
        self.settings: dict[str, Any] = {
            "kind": name_of(self.kind),
            "hook": self.hook,
            "cache": cache.location,
            "cache_fingerprint": cache.fingerprint,
            **cfg.to_dict(),
        }

    def finished(self) -> SAE | None:
        """The run's SAE where an earlier call finished it; makes the folder where there is none
        yet."""
        if self.mesh.size == 1:
            return self._finished()
        # The first makes the folder, and what the others find is the same for all.
        found = self._finished() if self.mesh.rank == 0 else None
        self.mesh.barrier()
        return found if self.mesh.rank == 0 else self._finished()

    def _finished(self) -> SAE | None:
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
        if self.mesh.rank == 0:
            remove_partial(self.out)
        return None

    def begin(self, sample: Callable[[], Float[Tensor, "row d_in"]]) -> None:
        """Make the trainer: as the last checkpoint left it, or with initial values from `sample`,
        the rows that training begins with."""
        with torch.random.fork_rng(), shared_over(self.mesh):
            torch.manual_seed(self.cfg.seed)
            self.trainer: Trainer = self.kind(self.cfg, self.d_in)
        self.trainer.to_device(self.device)
        for name in self.trainer.frozen():
            self.trainer.get_parameter(name).requires_grad_(False)
        learning = [p for p in self.trainer.parameters() if p.requires_grad]
        self.optimiser = _optimiser(self.cfg, learning)
        self.life = LifeHistory(self.cfg.n_tokens // max(1, self.cfg.life_windows))
        at = None
        if self.out is not None:
            at = _state.load(self.out, self.trainer, self.optimiser, self.life)
        self.at = at or Position(step=0, scale=self._initialise(sample()))
        for name, tensor in self.trainer.state_dict().items():
            if name not in self.trainer.LATENTS:
                self.mesh.same(tensor)
        self.log = MetricsLog(self.out if self.mesh.rank == 0 else None, self.at.log_bytes)
        self._since = time.perf_counter(), self.at.step
        nowhere = torch.tensor(-1, device=self.device)
        self._bad_step = nowhere
        self._take_step: Step = EagerStep(self.cfg, self.trainer, self.optimiser, self.device)
        if self.optimiser is not None:
            self._take_step = (
                self.trainer.fused_step(self.optimiser, self.device) or self._take_step
            )
        if self.cfg.economy and isinstance(self._take_step, EagerStep):
            raise ConfigError(
                f"{self.name}: economy=True is for fused steps, which {self.settings['kind']} on "
                f"{self.device} does not take with these options (the log says why): leave it "
                "out, or train topk, batch_topk or mutual_choice on a GPU"
            )
        self._take_step.clipped.fill_(self.at.clipped)

    def _initialise(self, sample: Float[Tensor, "row d_in"]) -> float:
        norm = float(sample.norm(dim=1).mean())
        if norm == 0:
            raise SaekitError(
                f"the activations at '{self.hook}' are all zero: there is nothing to learn. "
                "Harvest another hook point"
            )
        scale = input_scale(self.cfg, norm, self.d_in)
        x = sample * scale
        self.trainer.initialise(x)
        if self._windows:
            self.life.end_window(0, 0, self.trainer.export(), self.trainer.dead, x)
        return scale

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.at.step

    @property
    def done(self) -> bool:
        return self.at.step >= self.cfg.n_steps

    def advance(self, columns: Columns) -> Line:
        """Take one step; returns the line that went to the log, empty where none did.

        Raises Diverged where the loss is no longer a number: what is on disk then is the last
        checkpoint from before that.
        """
        cfg, trainer, step = self.cfg, self.trainer, self.at.step
        batch = self._batch(columns)
        trainer.step = step
        losses = self._learn(batch)
        self.at = replace(self.at, step=step + 1)
        trainer.step = step + 1
        replanted = trainer.replant(batch, self.optimiser) if self.optimiser else None
        if replanted is not None:
            self.life.replanted(replanted, cfg.d_sae)
            self._take_step.take_over()
        line: Line = {}
        last = step + 1 == cfg.n_steps
        if (step + 1) % cfg.log_every == 0 or last:
            line = self._figures(losses, batch.x)
            self.log.write(line)
        for callback in self.callbacks:
            if (step + 1) % callback.every == 0 or last:
                self._stop_if_diverged()
                sae = self.export()
                if self.mesh.rank == 0:
                    self.log.write({"step": step + 1, **callback.call(sae)})
        window = self._window(step)
        if self._window(step + 1) > window:
            self._stop_if_diverged()
            rows = (step + 1 - self._first_step(window)) * cfg.batch_size
            self._take_step.settle()
            x = self.mesh.rows(batch.x)
            self.life.end_window(step + 1, rows, trainer.export(), trainer.dead, x)
        if (step + 1) % cfg.checkpoint_every == 0 and not last and self.out is not None:
            self._stop_if_diverged()
            clipped = int(self._take_step.clipped)
            self.at = replace(self.at, clipped=clipped, log_bytes=self.log.size())
            self._take_step.settle()
            _state.save(self.out, self.at, trainer, self.optimiser, self.life)
            # What goes on from here and what is resumed from here shall be the same.
            self._take_step.take_over()
        return line

    @property
    def _windows(self) -> int:
        """Of the life history; a run that leaves nothing behind has none."""
        return self.cfg.life_windows if self.out is not None else 0

    def _window(self, step: int) -> int:
        """Which window of the life history the step of this number falls into."""
        return step * self._windows // self.cfg.n_steps

    def _first_step(self, window: int) -> int:
        """Of a window."""
        return -(-window * self.cfg.n_steps // max(1, self._windows))

    def _batch(self, columns: Columns) -> Batch:
        scale = self.at.scale
        needs = self.kind.NEEDS
        label = grad = None
        if "grad" in needs:
            # By x' = s x, d loss / d x' is a part 1 / s of that by x.
            grad = columns[f"{self.hook}.grad"] / scale
        if "label" in needs:
            parts = [columns[name].long() for name in ("document", "position", "token")]
            label = torch.stack(parts, dim=1)
        return Batch(columns[self.hook] * scale, grad, label)

    def _learn(self, batch: Batch) -> dict[str, Tensor]:
        cfg = self.cfg
        lr = cfg.lr * warm_then_decay(
            self.at.step, cfg.n_steps, cfg.lr_warmup, cfg.lr_decay, cfg.lr_shape
        )
        losses = self._take_step(batch, lr)
        total = torch.stack(list(losses.values())).sum()
        bad = ~total.isfinite() & (self._bad_step < 0)
        self._bad_step = torch.where(bad, self.at.step, self._bad_step)
        return losses

    def _figures(self, losses: dict[str, Tensor], x: Float[Tensor, "batch d_in"]) -> Line:
        """What the log says of the last step."""
        self._stop_if_diverged()
        cfg, step = self.cfg, self.at.step
        named = {name: float(loss) for name, loss in losses.items()}
        about = x - self.mesh.mean(x.mean(0))
        variance = float(self.mesh.mean(about.square().sum(1).mean()))
        line: Line = {"loss": sum(named.values()), **named}
        if variance > 0:
            line["ev"] = 1 - named["mse"] / variance
        line |= self.trainer.metrics()
        line |= {"step": step, "tokens": step * cfg.batch_size}
        if self.optimiser is not None:
            line["lr"] = self.optimiser.param_groups[0]["lr"]
        if cfg.clip_norm is not None:
            steps = step - (step - 1) // cfg.log_every * cfg.log_every
            line["clipped"] = int(self._take_step.clipped) / steps
            self._take_step.clipped.zero_()
        now = time.perf_counter()
        line["tokens_per_s"] = (step - self._since[1]) * cfg.batch_size / (now - self._since[0])
        self._since = now, step
        return line

    def _stop_if_diverged(self) -> None:
        bad = int(self._bad_step)
        if bad >= 0:
            kept = "no checkpoint was written yet"
            if self.out is not None and (self.out / _state.FILE).exists():
                kept = f"the last checkpoint in {self.out} is from before that"
            raise Diverged(
                f"{self.name}: the loss is no number from step {bad + 1} on: training diverged "
                f"({kept}). Start a new run with a lower --lr (it was {self.cfg.lr:g}), a longer "
                "--lr-warmup, or --clip-norm"
            )

    @property
    def bad_step(self) -> int:
        """The step, counted from 0, whose loss was no number."""
        return int(self._bad_step)

    def keep_batch(self, columns: Columns) -> None:
        """Keep the batch on which training diverged, for inspection."""
        if self.out is not None and self.mesh.rank == 0:
            held = {name: t.cpu().contiguous() for name, t in columns.items()}
            write_atomic(self.out / DIVERGED, lambda path: save_file(held, path))

    def finish(self) -> SAE:
        """The trained SAE, written to the run's folder."""
        self._stop_if_diverged()
        sae = self.export(for_all=self.out is None)
        if self.out is not None:
            extras = {n: t.detach().cpu().contiguous() for n, t in self.trainer.extras().items()}
            self.life.save(self.out, self.mesh)
            if self.mesh.rank == 0:
                if extras:
                    write_atomic(self.out / EXTRAS, lambda path: save_file(extras, path))
                checkpoint.save(sae, self.out)
                shutil.rmtree((self.out / _state.FILE).parent, ignore_errors=True)
            self.mesh.barrier()
            if self.mesh.rank > 0:
                return checkpoint.load(self.out)
        return sae

    @torch.no_grad()
    def export(self, for_all: bool = False) -> SAE:
        """The SAE as it stands, in the units of the cache; what it holds is its own, and no longer
        learns. Of a mesh rank 0 gets it or all do, and else the others get what they hold."""
        self._take_step.settle()
        sae = fold_input_scale(self.trainer.export(), self.at.scale)
        if self.mesh.latent == 1:
            sae = sae.to("cpu", copy=True)
        else:
            join = self.mesh.whole if for_all else self.mesh.collect
            sliced = {n: t.cpu() for n, t in sae.tensors().items() if n in _ALONG}
            sae = _with(sae, {name: join(t, _ALONG[name]) for name, t in sliced.items()})
        provenance = Provenance(
            kind=self.settings["kind"],
            hook=self.hook,
            model=self.cache.model,
            model_fingerprint=self.cache.model_fingerprint,
            cache_fingerprint=self.cache.fingerprint,
            config=self.cfg.to_dict(),
            rows_seen=self.at.step * self.cfg.batch_size,
            versions=versions(),
            commit=commit(),
        )
        return replace(sae, provenance=provenance)


def check_mesh(kind: type[Trainer], cfg: TrainConfig, mesh: Mesh) -> None:
    """Raises ConfigError where a mesh of several processes cannot train this."""
    name = name_of(kind)
    alone = "start it without torchrun, or name it in a sweep, whose runs take a process each"
    if "LATENTS" not in vars(kind):
        able = ", ".join(one for one in names() if "LATENTS" in vars(kind_of(one)))
        raise ConfigError(
            f"{name} cannot be trained by several processes together (mesh {mesh}), as {able} can: "
            f"{alone}"
        )
    revive = getattr(cfg, "revive", "none")
    if revive in ("resample", "ghost"):
        raise ConfigError(
            f"revive='{revive}' looks at the whole SAE, and mesh {mesh} shares it out: take auxk "
            f"or none, or {alone}"
        )
    for what, size, axis, n in (
        ("d_sae", cfg.d_sae, "latent", mesh.latent),
        ("batch_size", cfg.batch_size, "data", mesh.data),
    ):
        if size % n:
            raise ConfigError(
                f"{what}={size} is no multiple of the mesh's {axis}={n}, over which it is shared "
                f"out: change one of them, to {what}={-(-size // n) * n} for instance"
            )


_ALONG = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "threshold": 0}
"""The axis of the latents in each tensor of an SAE that has them."""


def _with(sae: SAE, tensors: dict[str, Tensor]) -> SAE:
    """The SAE with other latents, and all else copied to the CPU."""
    common = {n: t.to("cpu", copy=True) for n, t in sae.tensors().items() if n not in _ALONG}
    new: dict[str, Any] = {**common, **tensors}
    threshold = new.pop("threshold", None)
    activation = sae.activation if threshold is None else JumpReLU(threshold)
    return replace(sae, **new, activation=activation)


def _optimiser(
    cfg: TrainConfig, parameters: list[torch.nn.Parameter]
) -> torch.optim.Optimizer | None:
    """None where there is nothing to learn by gradients."""
    if not parameters:
        return None
    if cfg.optimiser == "adamw":
        return torch.optim.AdamW(
            parameters, cfg.lr, betas=cfg.adam_betas, weight_decay=cfg.weight_decay, fused=True
        )
    return torch.optim.Adam(parameters, lr=cfg.lr, betas=cfg.adam_betas, fused=True)


def _only_hook(cache: ActivationCache) -> str:
    if len(cache.hooks) == 1:
        return next(iter(cache.hooks))
    raise ConfigError(
        f"{cache.url} holds several hook points ({', '.join(cache.hooks)}): say which with --hook"
    )
