"""The core row: how well an SAE reconstructs, how sparsely, and what the model loses by it.

Reconstruction and sparsity are measured on the cache's rows; cross-entropy on the model itself,
with the activation at the hook replaced by the SAE's reconstruction, by zero, and by the mean
activation. All numbers share one token mask, and every ratio is a ratio of sums over all tokens.

Intervals are of 95 %, by bootstrap over documents (`_resample`). `ev` is the number to quote; the
other `ev_...` are what goes by the same name elsewhere, to compare with.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.errors import CacheError, ConfigError, Undefined
from saekit.evals._base import Eval, EvalConfig, Findings, ResampledConfig
from saekit.evals._core_rows import CoreRows, Samples
from saekit.evals._metrics import DENSE, MIN_CE_RISE, Firing, Reconstruction, ce_recovered
from saekit.evals._ranks import joined, joined_losses
from saekit.evals._resample import Estimate, Resamples, few
from saekit.evals._splice import Losses, spliced_losses
from saekit.progress import bar
from saekit.results import Metric

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CoreConfig(ResampledConfig):
    ce_tokens: int = 50_000
    """Tokens whose loss is measured, at most: the first of the split. 0 leaves the model out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ce_tokens < 0:
            raise ConfigError(f"ce_tokens={self.ce_tokens} must not be negative; 0 skips the model")


class Core(Eval):
    Config: ClassVar[type[EvalConfig]] = CoreConfig
    NORMALISED = True
    SHARES_ROWS = True
    cfg: CoreConfig

    def run(self) -> Findings:
        documents = self.documents()
        resamples = self._resamples(documents)
        stats = self.cache.stats(self.hook)
        centre = torch.tensor(stats.sum, dtype=torch.float64, device=self.device) / stats.n
        measured = (
            self._measure(x, document, resamples, centre)
            for x, document in zip(self.batches(), self.ours(documents), strict=True)
        )
        firing, rows = reduce(lambda a, b: (a[0] + b[0], a[1] + b[1]), measured)
        firing, rows = joined(firing, self.mesh), joined(rows, self.mesh)
        quality, samples = rows.quality, rows.found()
        metrics = {**_reconstruction(quality), **_others(samples, quality.n), **_sparsity(firing)}
        metrics = _with_intervals(metrics, samples, len(resamples.documents))
        if self.cfg.ce_tokens:
            metrics |= self._loss()
        return Findings(metrics=metrics, arrays={"density": firing.density.float().numpy()})

    def _resamples(self, documents: Int[Tensor, " row"]) -> Resamples:
        return Resamples.of(documents, self.cfg.n_bootstrap, self.cfg.seed)

    def _measure(
        self,
        x: Float[Tensor, "row d"],
        document: Int[Tensor, " row"],
        resamples: Resamples,
        centre: Float[Tensor, " d"],
    ) -> tuple[Firing, CoreRows]:
        code = self.sae.encode_sparse(x)
        x_hat = self.sae.decode(code, x)
        return (
            Firing.of(code, self.sae.d_sae),
            CoreRows.of(resamples, x, x_hat, code, self.sae.W_dec.norm(dim=1), document, centre),
        )

    def _loss(self) -> dict[str, Metric]:
        cfg = self.cfg
        mean = self._train_mean()
        with bar("cross-entropy", cfg.ce_tokens, shown=self.progress) as shown:
            losses = spliced_losses(
                self.load_model(),
                self.cache,
                self.hook,
                {
                    "sae": self.sae,
                    "zero": torch.zeros_like,
                    "mean": lambda x: mean.expand_as(x),
                },
                self.cache.windows(cfg.split, cfg.exclude),
                cfg.ce_tokens,
                shown.advance,
                kl=("sae",),
                part=(self.mesh.data_rank, self.mesh.data),
            )
        losses = joined_losses(losses, self.mesh)
        n = losses["clean"].ce.n
        if n == 0:
            raise CacheError(
                f"no token of split '{cfg.split}' of {self.cache.url} has a next token to "
                "predict: choose another split, or ce_tokens=0 to leave the model out"
            )
        metrics = _cross_entropy({name: loss.ce.value for name, loss in losses.items()}, n) | {
            "kl_sae": Metric(
                value=losses["sae"].kl.value,
                definition="mean over tokens of KL(p_clean || p_sae) of the next-token "
                "distributions, nats; 0 is the untouched model",
                n=n,
            )
        }
        return _with_intervals(metrics, self._loss_samples(losses), len(losses["clean"].documents))

    def _loss_samples(self, losses: dict[str, Losses]) -> dict[str, Samples]:
        """What the losses are in each resample of their documents."""
        documents = torch.tensor(list(losses["clean"].documents))
        resamples = self._resamples(documents)

        def means(name: str, which: int) -> Samples:
            each = [losses[name].documents[int(d)][which] for d in documents]
            totals = torch.tensor([[m.total, m.n] for m in each], dtype=torch.float64)
            sums = resamples.sums(totals, documents)
            return sums[:, 0] / sums[:, 1]

        ce = {name: means(name, 0) for name in losses}
        found = {f"ce_{name}": values for name, values in ce.items()}
        found |= {"kl_sae": means("sae", 1), "ce_delta": ce["sae"] - ce["clean"]}
        for name in ("zero", "mean"):
            rise = ce[name] - ce["clean"]
            share = (ce[name] - ce["sae"]) / rise
            found[f"ce_recovered_{name}"] = share.where(rise > MIN_CE_RISE, torch.nan)
        return found

    def _train_mean(self) -> Float[Tensor, " d"]:
        """The mean activation over training documents: with split "test", a separate sample."""
        index = self.cache.indices("train", self.cfg.exclude)[: self.cfg.max_rows]
        if len(index) == 0:
            raise CacheError(
                f"{self.cache.url} has no rows in its train split, and mean ablation takes its "
                "mean from there; harvest more documents, or ce_tokens=0 to leave the model out"
            )
        parts = (self.cache.rows(self.hook, some) for some in self.ours(index))
        total = sum((x.double().sum(0) for x in parts), torch.zeros(self.sae.d_in).double())
        total = self.mesh.reduce(total, "data")
        return (total / len(index)).float().to(self.device)


EVAL = Core


def _reconstruction(quality: Reconstruction) -> dict[str, Metric]:
    n, directed = quality.n, quality.n_nonzero
    metrics = {
        "ev": Metric(
            value=quality.ev,
            definition="explained variance about the mean, over all rows and dimensions at once: "
            "1 - sum|x - x_hat|^2 / sum|x - mu|^2; 1 is perfect, 0 is what the mean mu would score",
            n=n,
        ),
        "fvu": Metric(
            value=quality.fvu,
            definition="fraction of variance unexplained, sum|x - x_hat|^2 / sum|x - mu|^2, "
            "which is 1 - ev",
            n=n,
        ),
        "mse": Metric(
            value=quality.mse,
            definition="mean over rows of |x - x_hat|^2, summed over dimensions",
            n=n,
        ),
        "cosine": Metric(
            value=quality.cosine,
            definition="mean over rows with x != 0 of x . x_hat / (|x| |x_hat|), not centred",
            n=directed,
        ),
        "l2_ratio": Metric(
            value=quality.l2_ratio,
            definition="mean over rows with x != 0 of |x_hat| / |x|; below 1 is shrinkage",
            n=directed,
        ),
    }
    _add_where_defined(
        metrics,
        "relative_reconstruction_bias",
        lambda: quality.relative_reconstruction_bias,
        "sum|x_hat|^2 / sum(x . x_hat); below 1 is shrinkage, 1 is none",
        near="mse",
    )
    return metrics


_OTHER = {
    "ev_dimension_mean": "mean over dimensions j of 1 - sum e_j^2 / sum (x_j - mu_j)^2; those that "
    "do not vary are left out",
    "ev_token_mean": "mean over rows of 1 - |e|^2 / |x - mu|^2, mu the mean over the whole cache: "
    "rows count alike, and those near the mean decide",
    "ev_uncentred": "1 - sum|e|^2 / sum|x|^2: the mean of x counts as explained",
    "ev_centred_error": "1 - sum|e - mean e|^2 / sum|x - mu|^2: a constant error counts as none",
    "ev_scalar_mean": "1 - sum|e|^2 / sum_ij (x_ij - m)^2, m one mean over all entries",
    "gain": "sum(x . x_hat) / sum|x_hat|^2, the factor on x_hat that leaves the least error; above "
    "1 is shrinkage",
    "l1_mean": "mean over rows of sum_i |z_i| |d_i|, d_i the decoder row: what it is does not hang "
    "on how latents are scaled",
}


def _others(samples: dict[str, Samples], n: int) -> dict[str, Metric]:
    """What other tools report, and numbers that are read beside the rest; e = x - x_hat."""
    return {
        name: Metric(value=float(samples[name][0]), definition=definition, n=n)
        for name, definition in _OTHER.items()
        if samples[name][0].isfinite()
    }


def _with_intervals(
    metrics: dict[str, Metric], samples: dict[str, Samples], documents: int
) -> dict[str, Metric]:
    """Those that have one; where documents are few, the definition says that it is widened."""
    found = {
        name: Estimate.of(samples[name], documents) for name in metrics.keys() & samples.keys()
    }
    return {
        name: replace(
            metric, interval=estimate.interval, definition=metric.definition + few(documents)
        )
        if (estimate := found.get(name)) is not None and estimate.interval is not None
        else metric
        for name, metric in metrics.items()
    }


def _sparsity(firing: Firing) -> dict[str, Metric]:
    n = firing.n
    metrics = {
        "l0_mean": Metric(
            value=firing.l0_mean, definition="mean over rows of the number of latents != 0", n=n
        )
    }
    for percent in (5, 50, 95):
        metrics[f"l0_p{percent}"] = Metric(
            value=firing.l0_quantile(percent / 100),
            definition=f"the smallest number of latents != 0 that {percent} % of rows do not "
            "exceed",
            n=n,
        )
    return metrics | {
        "dead_share": Metric(
            value=firing.dead_share,
            definition=f"share of latents that fire on none of these {n} rows, which falls as rows "
            f"are added: such a latent's density is below 3/n = {3 / n:.2g} (95 % bound)",
            n=n,
        ),
        "dense_share": Metric(
            value=firing.dense_share,
            definition=f"share of latents that fire on more than {DENSE:.0%} of the rows",
            n=n,
        ),
        "density_median": Metric(
            value=float(np.median(firing.density.numpy())),
            definition="median over all latents, dead ones too, of the share of rows on which a "
            "latent fires",
            n=n,
        ),
    }


def _cross_entropy(ce: dict[str, float], n: int) -> dict[str, Metric]:
    replaced = {
        "clean": "with nothing replaced",
        "sae": "with the activation replaced by the SAE's reconstruction",
        "zero": "with the activation replaced by zero",
        "mean": "with the activation replaced by the mean over rows of the train split",
    }
    metrics = {
        f"ce_{name}": Metric(
            value=ce[name],
            definition=f"mean over tokens of -log p(next token), nats, {how}; only positions that "
            "the token mask keeps are replaced, and only they are scored",
            n=n,
        )
        for name, how in replaced.items()
    }
    metrics["ce_delta"] = Metric(
        value=ce["sae"] - ce["clean"], definition="ce_sae - ce_clean, nats; 0 is no loss", n=n
    )
    for name in ("zero", "mean"):
        _add_where_defined(
            metrics,
            f"ce_recovered_{name}",
            partial(ce_recovered, ce["clean"], ce["sae"], ce[name]),
            f"(ce_{name} - ce_sae) / (ce_{name} - ce_clean); 1 is the untouched model, 0 the "
            "ablated one",
            near=f"ce_{name}",
        )
    return metrics


def _add_where_defined(
    metrics: dict[str, Metric], name: str, value: Callable[[], float], definition: str, near: str
) -> None:
    """Add a ratio; where its denominator says nothing, say so at the metric `near` instead."""
    beside = metrics[near]
    try:
        metrics[name] = Metric(value=value(), definition=definition, n=beside.n)
    except Undefined as reason:
        log.warning("%s is left out: %s", name, reason)
        metrics[near] = replace(beside, definition=f"{beside.definition}. No {name}: {reason}")
