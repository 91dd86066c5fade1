"""Which latents fire, how often and with how many others: dead, dying and dense latents, the
histogram and the law of their densities, and whether their values vary at all.

A latent fires on a row where its value is not 0. "Dead" means nothing without a count of rows and a
rule, so both stand in the name: `dead_share_lt1_in_10000` is the share of latents that fire on
fewer than 1 of 10000 rows, on the mean over the complete windows of that many rows. Beside the
codes stands the model's own activation x, measured alike (after Li et al. 2022, "The Lazy Neuron
Phenomenon", of which only the abstract was read). Of an SAE that was trained as a variational one
the posterior is looked at, as far as export kept it: the mean, not a learned variance.

Intervals of 95 % come from resampling documents, for means over rows. Shares of latents have none:
they are of these latents on these rows.

Axes: row, latent, d.
"""

import logging
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.errors import ConfigError
from saekit.evals._base import Eval, EvalConfig, Findings, ResampledConfig
from saekit.evals._firing_findings import densities, lives, means, sparsities, units, windows
from saekit.evals._firing_life import Life
from saekit.evals._firing_rows import RowMeans, measure, measures
from saekit.evals._firing_units import Posterior, Spread, training_scale, variance_kind
from saekit.evals._firing_windows import Windows
from saekit.evals._metrics import Firing
from saekit.evals._ranks import joined
from saekit.evals._resample import Resamples

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FiringConfig(ResampledConfig):
    windows: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000)
    """Rows in which a latent must fire not to be dead. Those longer than what is looked at are
    left out; all rows looked at are a window always."""

    rules: tuple[int, ...] = (1, 16)
    """A latent is dead in a window where it fires on fewer rows than this."""

    dense: tuple[float, ...] = (0.01, 0.1)
    """Shares of the rows above which a latent counts as dense."""

    near_zero: tuple[float, ...] = (0.01, 0.1)
    """Shares of a row's root mean square up to which a coordinate of x counts as near 0."""

    bins: int = 40
    """Bins of the histogram of log10 densities."""

    zipf_least: int = 1
    """Rows on which a latent must fire to enter the fits of Zipf's law."""

    epsilon: float = 0.01
    """Of a variational SAE: nats of KL below which a posterior counts as the prior on a row."""

    delta: float = 0.01
    """Of a variational SAE: share of the rows on which a collapsed latent may differ from it."""

    run_folder: Path | None = None
    """Folder of the run that made the SAE, for the lives of its latents in training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("windows", "rules"):
            if any(value < 1 for value in getattr(self, name)):
                raise ConfigError(f"{name}={getattr(self, name)} are counts of rows: at least 1")
        if not self.rules:
            raise ConfigError("rules=() leaves nothing that 'dead' could mean: give (1,)")
        for name in ("dense", "near_zero"):
            if any(not 0 <= value < 1 for value in getattr(self, name)):
                raise ConfigError(f"{name}={getattr(self, name)} are shares: from 0 to below 1")
        for name in ("bins", "zipf_least"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not (self.epsilon > 0 and 0 <= self.delta < 1):
            raise ConfigError(
                f"epsilon={self.epsilon} must be above 0, and delta={self.delta} a share below 1"
            )


@dataclass(frozen=True, eq=False)
class _Sums:
    """What is added up over the rows."""

    means: RowMeans
    firing: Firing
    spread: Spread
    posterior: Posterior | None

    def __add__(self, other: "_Sums") -> "_Sums":
        both = None
        if self.posterior is not None and other.posterior is not None:
            both = self.posterior + other.posterior
        return _Sums(
            self.means + other.means, self.firing + other.firing, self.spread + other.spread, both
        )


class Firings(Eval):
    Config: ClassVar[type[EvalConfig]] = FiringConfig
    SHARES_ROWS = True
    cfg: FiringConfig

    def run(self) -> Findings:
        cfg, sae = self.cfg, self.sae
        # Before the pass over the rows, so that a wrong folder is found out at once.
        life = None if cfg.run_folder is None else Life.read(cfg.run_folder, sae)
        self.kind = variance_kind(sae.provenance)
        mean_norm = self.cache.stats(self.hook).mean_norm
        self.scale = training_scale(sae.provenance, mean_norm, sae.d_in)
        documents = self.documents().cpu()
        sizes = self._sizes(len(documents))
        start = self.before(len(documents))
        self.windows = [Windows(size, sae.d_sae, cfg.rules, start) for size in sizes]
        self.resamples = Resamples.of(documents, cfg.n_bootstrap, cfg.seed)
        sums = joined(reduce(add, map(self._look, self.batches(), self.ours(documents))), self.mesh)
        self.windows = [window.joined(self.mesh) for window in self.windows]
        found = [
            means(sums.means, measures(sae.d_sae, cfg.near_zero, self.kind)),
            sparsities(sums.firing),
            windows(self.windows, cfg.rules),
            densities(sums.firing, cfg.dense, cfg.zipf_least, cfg.bins),
            units(
                sums.spread, sae.W_dec.norm(dim=1), self.scale, sums.posterior, self.kind, cfg.delta
            ),
            *([] if life is None else [lives(life)]),
        ]
        return Findings(
            metrics={name: metric for one in found for name, metric in one.metrics.items()},
            arrays={name: array for one in found for name, array in one.arrays.items()},
        )

    def _sizes(self, n: int) -> list[int]:
        """Of the windows that `n` rows fill, all rows as the last."""
        long = [size for size in self.cfg.windows if size > n]
        if long:
            log.info("windows of %s rows are left out: %d rows are looked at", long, n)
        return sorted({*self.cfg.windows, n} - {*long, 0})

    def _look(self, x: Float[Tensor, "row d"], document: Int[Tensor, " row"]) -> _Sums:
        """At some rows, in order."""
        code = self.sae.encode_sparse(x)
        firing = Firing.of(code, self.sae.d_sae)
        for window in self.windows:
            window.add(code)
        values, there = measure(x, code, self.sae.d_sae, self.cfg.near_zero)
        posterior = None
        if self.kind is not None:
            posterior, kl = Posterior.of(self.sae, x, self.scale, self.cfg.epsilon)
            values = torch.cat([values, kl[:, None]], 1)
            there = torch.cat([there, torch.ones_like(there[:, :1])], 1)
        return _Sums(
            RowMeans.of(values, there, document, self.resamples),
            firing,
            Spread.of(code, self.sae.d_sae),
            posterior,
        )


EVAL = Firings
