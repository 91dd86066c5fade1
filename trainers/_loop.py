"""The loop that fits SAEs: batches from a cache, each to every SAE that wants it.

It knows no kind. What one SAE does with a batch is in `_run.py`.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.activations_cache.reader import Reader
from saekit.activations_cache.store import ActivationCache
from saekit.config import TrainConfig
from saekit.distributed import ALONE, Mesh
from saekit.errors import ConfigError, SaekitError
from saekit.progress import bar
from saekit.sae import SAE
from saekit.trainers._run import Callback, Columns, Diverged, Run

log = logging.getLogger(__name__)

SAMPLE_ROWS = 32_768
"""Rows that data-dependent initial values are taken from (Gao et al. 2024 use as many)."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One SAE of several to train."""

    config: TrainConfig
    hook: str | None = None
    """May be left out where the cache holds one."""
    out: Path | str | None = None
    callbacks: tuple[Callback, ...] = ()


def train(
    cfg: TrainConfig,
    cache: ActivationCache,
    *,
    hook: str | None = None,
    out: Path | str | None = None,
    device: str = "cpu",
    progress: bool = False,
    callbacks: Iterable[Callback] = (),
    mesh: Mesh = ALONE,
) -> SAE:
    """Fit the kind of SAE that `cfg` is the config of, to the training split of a cache.

    With `out`, the run is written there, can be stopped at any moment, and goes on with the same
    call. `hook` may be left out where the cache holds one. All processes of a `mesh`
    (`saekit.distributed`) make the call together, and train one SAE. Raises ConfigError where
    `out` holds another run or the kind cannot be trained on this cache or mesh, and SaekitError
    where the loss is no longer a number.
    """
    spec = RunSpec(config=cfg, hook=hook, out=out, callbacks=tuple(callbacks))
    (sae,) = train_many([spec], cache, device=device, progress=progress, mesh=mesh)
    return sae


def train_many(
    specs: Sequence[RunSpec],
    cache: ActivationCache,
    *,
    device: str = "cpu",
    progress: bool = False,
    mesh: Mesh = ALONE,
) -> list[SAE]:
    """Fit several SAEs to one cache; each comes out as it would alone, bit for bit.

    Those that want the same rows in the same order (`batch_size`, `shuffle_seed`, `exclude`) are
    fed by one reader. One that diverges is left where it stopped while the others go on; then
    SaekitError is raised, with what each said.
    """
    folders = [Path(spec.out).resolve() for spec in specs if spec.out is not None]
    if len(set(folders)) < len(folders):
        raise ConfigError("two of the runs would be written to the same folder: name each its own")
    runs = [Run(s.config, cache, s.hook, s.out, device, s.callbacks, mesh) for s in specs]
    saes = [run.finished() for run in runs]
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, run in enumerate(runs):
        if saes[i] is None:
            cfg = run.cfg
            groups.setdefault((cfg.batch_size, cfg.shuffle_seed, cfg.exclude), []).append(i)
    failed: list[Diverged] = []
    for group in groups.values():
        for i, result in zip(
            group, _Together([runs[i] for i in group], progress).fit(), strict=True
        ):
            if isinstance(result, Diverged):
                failed.append(result)
            else:
                saes[i] = result
    if len(failed) == 1:
        raise failed[0]
    if failed:
        raise SaekitError("; ".join(map(str, failed)))
    return [sae for sae in saes if sae is not None]


class _Together:
    """Runs that want the same rows in the same order."""

    def __init__(self, runs: Sequence[Run], progress: bool) -> None:
        self.runs, self.progress = runs, progress
        self.cfg = runs[0].cfg
        self._sample: dict[str, Tensor] = {}

    def fit(self) -> list[SAE | Diverged]:
        for run in self.runs:
            run.begin(self._sampler(run.hook))
        self._sample = {}
        results: dict[Run, SAE | Diverged] = {}
        mesh = self.runs[0].mesh
        try:
            names = ", ".join(str(run.out or run.name) for run in self.runs)
            with mesh.taking_steps(f"trained {names}"):
                self._steps(results)
        finally:
            for run in self.runs:
                run.log.close()
        return [results[run] for run in self.runs]

    def _steps(self, results: dict[Run, SAE | Diverged]) -> None:
        cfg, runs = self.cfg, self.runs
        columns = sorted({column for run in runs for column in run.columns})
        total = sum(run.cfg.n_steps for run in runs) * cfg.batch_size
        start = min(run.step for run in runs)
        done = sum(run.step for run in runs) * cfg.batch_size
        with bar(self._title(), total, done=done, shown=self.progress) as shown:
            mesh = runs[0].mesh
            part = mesh.data_rank, mesh.data
            for step, batch in enumerate(self._batches(columns, start, part), start):
                mesh.begin(step + 1)
                for run in runs:
                    if run in results or run.step != step:
                        continue
                    try:
                        line = run.advance(batch)
                        if run.done:
                            results[run] = run.finish()
                    except Diverged as error:
                        results[run] = error
                        (at_fault,) = islice(self._batches(run.columns, run.bad_step), 1)
                        run.keep_batch(at_fault)
                        log.error("%s", error)
                        continue
                    shown.advance(cfg.batch_size, f"ev {line['ev']:.3f}" if "ev" in line else "")
                if len(results) == len(runs):
                    return

    def _title(self) -> str:
        if len(self.runs) == 1:
            return f"train {self.runs[0].settings['kind']}"
        return f"train {len(self.runs)} SAEs"

    def _batches(
        self, columns: Sequence[str], start: int, part: tuple[int, int] = (0, 1)
    ) -> Iterator[Columns]:
        run = self.runs[0]
        return Reader(
            run.cache,
            columns,
            self.cfg.batch_size,
            seed=self.cfg.shuffle_seed,
            exclude=self.cfg.exclude,
            epochs=None,
            drop_last=True,
            start=start,
            part=part,
            device=run.device,
        )

    def _sampler(self, hook: str) -> Callable[[], Float[Tensor, "row d_in"]]:
        """What gives a sample of the very batches that training begins with; read once a hook."""

        def sample() -> Tensor:
            if hook not in self._sample:
                count = math.ceil(SAMPLE_ROWS / self.cfg.batch_size)
                batches = islice(self._batches([hook], 0), count)
                self._sample[hook] = torch.cat([batch[hook] for batch in batches])
            return self._sample[hook]

        return sample
