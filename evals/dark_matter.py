"""Dark matter: how much of an SAE's error is linear in the activations, and what each part of it
costs the model (Engels et al. 2024, "Decomposing the Dark Matter of Sparse Autoencoders", arXiv
2410.14670).

    e = x - x_hat,    LinErr = x W + b,    NonlinErr = e - LinErr

with W, b fitted by least squares on documents of the train split, and every number measured on
documents held out. "No intercept" is the paper's way; the intercept is the default, as a bias that
the decoder missed is no dark matter. A reconstruction that merely falls short, x_hat = (1 - s) x,
has an error that is linear in x altogether, so each number is given again after x_hat is multiplied
by the gain that leaves the least error.

It departs from the paper in what rows it takes (the cache's token mask, not positions from 200 on;
held out by document, not by shuffled token) and in that the parts are fitted on training rows only.
Intervals are over documents (see `_resample.py`) with the fit held fixed: they leave out what
another fit would have changed. They take some 250 bytes of memory for each resample and dimension.

Axes: row, d (width of the activations), sample (resamples of documents).
"""

from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saekit import checkpoint
from saekit.errors import CacheError, ConfigError, SaekitError
from saekit.evals import _dark_cache
from saekit.evals._base import Eval, EvalConfig, Findings, ResampledConfig, matching_hook
from saekit.evals._dark_findings import SUFFIXES, add_compared, add_losses, add_measured
from saekit.evals._dark_loss import add_loss_baseline
from saekit.evals._dark_norms import Judge, Measured, NormMoments
from saekit.evals._dark_others import compare
from saekit.evals._dark_parts import Rows, Split, Subject, reconstruction_moments
from saekit.evals._dark_pursuit import pursue
from saekit.evals._dark_table import Table
from saekit.evals._resample import Resamples
from saekit.evals._splice import Losses, spliced_losses
from saekit.progress import bar


@dataclass(frozen=True, kw_only=True)
class DarkMatterConfig(ResampledConfig):
    fit_rows: int = 200_000
    """Activations of the train split that maps are fitted on, at most, in runs that lie evenly over
    it."""

    ridge: float = 0.0
    """Added to the normal equations: that share of each dimension's own summed square. 0 is plain
    least squares."""

    ce_tokens: int = 50_000
    """Tokens whose loss is measured, at most: the first of the split. 0 leaves the model out."""

    others: tuple[str, ...] = ()
    """Folders of other SAEs of this cache, of any hook: do their reconstructions predict this SAE's
    error, and the lengths of their errors that of its?"""

    parts_out: str | None = None
    """Folder or URL for a cache of the error and of its two parts, at every row, that SAEs can be
    trained on: `saekit train topk --cache FOLDER --hook HOOK:nonlinear_error`."""

    pursuit: bool = False
    """Whether to look for codes by gradient pursuit too: would a better encoder leave less?"""

    pursuit_rows: int = 20_000
    """Activations that the pursuit looks at, at most, to fit on and again to measure on. Each costs
    as much as encoding it L0 times."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split != "test":
            raise ConfigError(
                f"split='{self.split}' would measure on rows that the maps are fitted on, those of "
                "the train split: leave it at 'test'"
            )
        for name in ("fit_rows", "pursuit_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.ce_tokens < 0:
            raise ConfigError(f"ce_tokens={self.ce_tokens} must not be negative; 0 skips the model")
        if not self.ridge >= 0:
            raise ConfigError(f"ridge={self.ridge} may not be negative; 0 is plain least squares")


INTERCEPTS = tuple(SUFFIXES)


class DarkMatter(Eval):
    Config: ClassVar[type[EvalConfig]] = DarkMatterConfig
    cfg: DarkMatterConfig

    def run(self) -> Findings:
        cfg = self.cfg
        if cfg.parts_out is not None:
            _dark_cache.refuse(cfg.parts_out, self.cache)
        subjects = self._subjects()
        fit = self._rows("train").spread(cfg.fit_rows)
        held_out = self._rows("test").first(cfg.max_rows)
        resamples = Resamples.of(held_out.documents(), cfg.n_bootstrap, cfg.seed)
        splits = self._fit(fit, subjects[0])
        measured = self._measure(fit, held_out, subjects[0], splits, resamples)
        table = Table(len(held_out.index), len(fit.index), len(resamples.documents))
        add_measured(table, measured, splits[0])
        if cfg.ce_tokens:
            self._loss(table, measured, splits[0], subjects[0], held_out)
        if cfg.parts_out is not None:
            _dark_cache.write_parts(
                cfg.parts_out,
                self.cache,
                subjects[0],
                splits[0],
                cfg.batch_size,
                progress=self.progress,
            )
        if cfg.pursuit:
            few = fit.spread(cfg.pursuit_rows), held_out.first(cfg.pursuit_rows)
            pursue(table, subjects[0], *few, cfg.ridge)
        if len(subjects) > 1:
            compared = compare(subjects, splits, INTERCEPTS, fit, held_out, resamples, cfg.ridge)
            add_compared(table, compared, subjects)
        return Findings(metrics=table.finished(), arrays=table.arrays)

    def _rows(self, split: Literal["train", "test"]) -> Rows:
        """All rows of a split that the mask keeps. Raises CacheError where there are none."""
        cfg = self.cfg
        index = self.cache.indices(split, cfg.exclude)
        if len(index) == 0:
            raise CacheError(
                f"split '{split}' of {self.cache.url} has no rows outside {list(cfg.exclude)}: "
                "maps are fitted on the train split and measured on the test split, so harvest "
                "more documents, with a holdout above 0"
            )
        return Rows(self.cache, index, cfg.batch_size, self.device, self.progress)

    def _subjects(self) -> tuple[Subject, ...]:
        """The SAE itself, then the others, each under a name of its own."""
        subjects = {"sae": Subject("sae", self.sae, self.hook)}
        for path in self.cfg.others:
            name = Path(path).resolve().name
            if name in subjects:
                raise ConfigError(
                    f"others={list(self.cfg.others)}: '{path}' is not the first of the name "
                    f"'{name}', by which results are told apart; give folders with names of their "
                    "own, and none called 'sae'"
                )
            sae = checkpoint.load(path)
            try:
                hook = matching_hook(sae, self.cache, None)
            except SaekitError as error:
                raise type(error)(f"others: {path}: {error}") from error
            subjects[name] = Subject(name, sae.to(self.device, torch.float32), hook)
        return tuple(subjects.values())

    def _fit(self, rows: Rows, subject: Subject) -> tuple[Split, ...]:
        """The splits with an intercept and without."""
        batches = rows.seen("fit of errors", subject)
        moments = reduce(add, (reconstruction_moments(seen) for _, (seen,) in batches))
        return tuple(
            Split.fit(moments, intercept=intercept, ridge=self.cfg.ridge)
            for intercept in INTERCEPTS
        )

    def _measure(
        self,
        fit: Rows,
        held_out: Rows,
        subject: Subject,
        splits: tuple[Split, ...],
        resamples: Resamples,
    ) -> Measured:
        vocab = 1 + max(int(rows.tokens().max()) for rows in (fit, held_out))
        moments = reduce(
            add,
            (
                NormMoments.of(seen, splits, fit.tokens(index), vocab)
                for index, (seen,) in fit.seen("fit of norms", subject)
            ),
        )
        norms = moments.fit(INTERCEPTS, self.cfg.ridge)
        judge = Judge(splits, norms, resamples, moments.by_x.x_mean)
        return reduce(
            add,
            (
                judge.of(seen, held_out.tokens(index), held_out.documents(index))
                for index, (seen,) in held_out.seen("held-out rows", subject)
            ),
        )

    def _loss(
        self, table: Table, measured: Measured, split: Split, subject: Subject, held_out: Rows
    ) -> None:
        cfg = self.cfg
        model = self.load_model()

        def linear(x: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
            return split.error(x).float()

        with bar("cross-entropy", cfg.ce_tokens, shown=self.progress) as shown:
            losses = spliced_losses(
                model,
                self.cache,
                self.hook,
                {
                    "sae": self.sae,
                    "sae_plus_linear": lambda x: self.sae(x) + linear(x),
                    # x_hat + NonlinErr = x_hat + (x - x_hat - LinErr).
                    "sae_plus_nonlinear": lambda x: x - linear(x),
                },
                self.cache.windows(cfg.split, cfg.exclude),
                cfg.ce_tokens,
                shown.advance,
            )
        n = losses["clean"].ce.n
        if n == 0:
            raise CacheError(
                f"no token of split '{cfg.split}' of {self.cache.url} has a next token to "
                "predict: harvest longer texts, or ce_tokens=0 to leave the model out"
            )
        documents = torch.tensor(list(losses["clean"].documents))
        resamples = Resamples.of(documents, cfg.n_bootstrap, cfg.seed)

        def resampled(loss: Losses) -> Float[Tensor, " sample"]:
            means = [loss.documents[number][0] for number in documents.tolist()]
            each = torch.tensor([[mean.total, mean.n] for mean in means], dtype=torch.float64)
            sums = resamples.sums(each, documents)
            return sums[:, 0] / sums[:, 1]

        add_losses(
            table,
            measured,
            {name: resampled(loss) for name, loss in losses.items()},
            n,
            len(documents),
        )
        with bar("losses, token by token", 2 * cfg.ce_tokens, shown=self.progress) as shown:
            add_loss_baseline(
                table,
                model,
                subject,
                held_out,
                cfg.exclude,
                cfg.ce_tokens,
                cfg.n_bootstrap,
                cfg.seed,
                shown.advance,
            )


EVAL = DarkMatter
