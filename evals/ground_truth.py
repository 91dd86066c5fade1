"""How much of a planted dictionary an SAE has found: for caches that `saekit plant` makes, whose
true features are known.

Three questions, after the metrics of SynthSAEBench as SAELens 6.54 has them:

- Are the directions there? `mcc` is the mean cosine over the one-to-one matching of features and
  decoder rows whose cosines add up to most. Where there are more features than latents, or fewer,
  those left over do not count in it: `mcc_..._of_features` and `mcc_..._of_latents` count them 0.
  Every number by cosine is of all latents, dead ones too, as in SAELens (`mcc_alive` is of the
  others alone), by signed and by absolute cosine, and beside random directions in the latents'
  place (`_null`): a maximum over many is large by chance.
- Do latents fire where their features are there? Each latent is to tell the feature that its
  decoder row is nearest to by |cos|, and precision, recall and F1 are plain means over all latents:
  a dead one counts 0, and every latent as much as another, however rare its feature. The names in
  `_matched` are of the one-to-one pairs alone, each latent with its own feature.
- What is the SAE's size? L0 beside the true one, |x_hat| / |x| (`l2_ratio`, which SAELens calls
  shrinkage, and which the rows' constant bias holds near 1), explained variance.

Intervals of 95 % come from resampling documents, for means over rows. The others are of these
features and latents, on these rows. Arrays say which features are missed: `feature_density` beside
`feature_cosine_abs` and `feature_f1`. Cosines are in fp32. The matching takes up to latents^3
steps: beyond `max_matching` there is none, and `near_share` is what is left.

Axes: row, feature, latent, d.
"""

import logging
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.activations_cache.planted import synthetic_of
from saekit.activations_cache.store import ActivationCache
from saekit.errors import ConfigError
from saekit.evals._base import Eval, EvalConfig, Findings, ResampledConfig
from saekit.evals._core_rows import CoreRows
from saekit.evals._ground_matching import Found, arrays, beside_random, find
from saekit.evals._ground_rows import Told, Truth
from saekit.evals._resample import Estimate, Resamples, few
from saekit.matching import SIGNS, Sign
from saekit.results import Metric

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GroundTruthConfig(ResampledConfig):
    over: tuple[float, ...] = (0.9,)
    """Cosines above which a feature counts as found."""

    null_draws: int = 1
    """Random dictionaries to compare with; their mean is given. 0 leaves them out."""

    max_matching: int = 8192
    """Features and latents that are matched one to one at most; it takes a minute on a CPU for
    8192, for each sign and each random dictionary."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("null_draws", "max_matching"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"{name}={getattr(self, name)} must not be negative; 0 leaves it out"
                )
        if any(not -1 <= over < 1 for over in self.over):
            raise ConfigError(f"over={self.over} are cosines: from -1 to below 1")


@dataclass(frozen=True, eq=False)
class _Sums:
    """What is added up over the rows."""

    told: Told
    rows: CoreRows
    true: Float[Tensor, "sample 1"]
    """Features of a row."""

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(self.told + other.told, self.rows + other.rows, self.true + other.true)


class GroundTruth(Eval):
    Config: ClassVar[type[EvalConfig]] = GroundTruthConfig
    cfg: GroundTruthConfig

    @classmethod
    def misfit(cls, cache: ActivationCache, hook: str) -> str | None:
        # One that was planted before its dictionary was kept has the model's name as fingerprint.
        if cache.model == "planted" and cache.model_fingerprint != "planted":
            return None
        return f"{cache.url} holds no planted dictionary, and nobody knows the features of a model"

    def run(self) -> Findings:
        cfg = self.cfg
        self.synthetic = synthetic_of(self.cache)
        most = max(self.sae.d_sae, self.synthetic.n_features)
        self.match = most <= cfg.max_matching
        if not self.match:
            log.warning(
                "nothing is matched one to one: there are %d features and %d latents, more than "
                "max_matching=%d. near_share and mmcs take the nearest of each, shared or not",
                *(self.synthetic.n_features, self.sae.d_sae, cfg.max_matching),
            )
        self.W_dec = self.sae.W_dec.cpu()
        found = find(self.synthetic.directions, self.W_dec, match=self.match)
        by = found["abs"]
        feature = torch.stack([by.feature, by.partner])
        sums = self._pass(feature)
        density = sums.told.there.double() / sums.told.n
        told = self._told(sums.told, feature, by)
        return Findings(
            metrics={
                **self._directions(found, density, sums.told),
                **told.metrics,
                **self._size(sums),
            },
            arrays={
                "feature_density": density.numpy(),
                "latent_density": (sums.told.fired.double() / sums.told.n).numpy(),
                **arrays(found),
                **told.arrays,
            },
        )

    def _pass(self, feature: Int[Tensor, "match latent"]) -> _Sums:
        """Over the rows; `feature` is what each latent is to tell, by nearness and by matching."""
        cfg, index, documents = self.cfg, self.rows(), self.documents()
        resamples = Resamples.of(documents, cfg.n_bootstrap, cfg.seed)
        stats = self.cache.stats(self.hook)
        centre = torch.tensor(stats.sum, dtype=torch.float64, device=self.device) / stats.n
        norm = self.sae.W_dec.norm(dim=1)
        feature = feature.to(self.device)
        truth = Truth(self.synthetic, stats.mean_norm, self.cache.url)

        def look(x: Tensor, index: Tensor, document: Tensor) -> _Sums:
            there = truth.present(index, x).to(self.device)
            code = self.sae.encode_sparse(x)
            x_hat = self.sae.decode(code, x)
            return _Sums(
                Told.of(code, there, feature),
                CoreRows.of(resamples, x, x_hat, code, norm, document, centre),
                resamples.sums(there.sum(1, keepdim=True).double(), document),
            )

        size = cfg.batch_size
        return reduce(add, map(look, self.batches(), index.split(size), documents.split(size)))

    def _directions(
        self, found: dict[Sign, Found], density: Float[Tensor, " feature"], told: Told
    ) -> dict[str, Metric]:
        """What cosines say, of all latents and of those that fire."""
        cfg, directions = self.cfg, self.synthetic.directions

        def numbers(W_dec: Tensor, found: dict[Sign, Found]) -> dict[str, Metric]:
            return beside_random(
                *(directions, W_dec, found, density.float(), cfg.over),
                match=self.match,
                draws=cfg.null_draws,
                seed=cfg.seed,
            )

        metrics = numbers(self.W_dec, found)
        fires = told.fired > 0
        if not bool(fires.any()) or not self.match:
            log.warning("mcc_alive is left out: no latent fires, or nothing is matched")
            return metrics
        alive = metrics
        if not bool(fires.all()):
            some = self.W_dec[fires]
            alive = numbers(some, find(directions, some, match=True))
        for sign in SIGNS:
            for end in ("", "_null"):
                if (of := alive.get(f"mcc_{sign}{end}")) is not None:
                    metrics[f"mcc_alive_{sign}{end}"] = replace(
                        of,
                        definition=f"{of.definition}; of the {int(fires.sum())} latents that fire",
                    )
        return metrics

    def _told(self, told: Told, feature: Int[Tensor, "match latent"], by: Found) -> Findings:
        """Precision, recall and F1, by nearness and by matching."""
        n, nearest, matched = told.n, told.scores(0, feature[0]), told.scores(1, feature[1])
        what = {
            "precision": "rows on which both are there / rows on which the latent fires",
            "recall": "rows on which both are there / rows that have the feature",
            "f1": "2 * rows on which both are there / (rows on which the latent fires + rows that "
            "have the feature)",
        }
        metrics = {
            name: Metric(
                value=float(nearest[name].mean()),
                definition=f"mean over all {len(by.feature)} latents, dead ones counting 0, of "
                f"{equation}; the feature is the one that the latent is nearest to by |cos|",
                n=n,
            )
            for name, equation in what.items()
        }
        held = {f"latent_{name}": values for name, values in nearest.items()}
        if self.match:
            has = by.latent >= 0
            for name, equation in what.items():
                metrics[f"{name}_matched"] = Metric(
                    value=float(matched[name][by.latent[has]].mean()),
                    definition=f"mean over the {int(has.sum())} pairs of the one-to-one matching "
                    f"by |cos|, dead latents counting 0, of {equation}",
                    n=n,
                )
                own = matched[name][by.latent.clamp_min(0)]
                held[f"feature_{name}"] = own.where(has, 0.0)
            metrics["f1_matched_of_features"] = Metric(
                value=float(held["feature_f1"].mean()),
                definition=f"mean over all {len(has)} features of the F1 of the latent matched to "
                "each; one without counts 0",
                n=n,
            )
        return Findings(metrics=metrics, arrays={k: v.numpy() for k, v in held.items()})

    def _size(self, sums: _Sums) -> dict[str, Metric]:
        """How the SAE's codes and reconstructions measure up."""
        told, samples = sums.told, sums.rows.found()
        rows = sums.rows["rows"]
        of = {
            "true_l0": (sums.true[:, 0] / rows, "mean over rows of the features that are there"),
            "l0_mean": (samples["l0_mean"], "mean over rows of the number of latents != 0"),
            "ev": (
                samples["ev"],
                "explained variance about the mean, over all rows and dimensions at once: 1 - "
                "sum|x - x_hat|^2 / sum|x - mu|^2",
            ),
            "l2_ratio": (
                samples["l2_ratio"],
                "mean over rows with x != 0 of |x_hat| / |x|; below 1 is shrinkage",
            ),
        }
        metrics, documents = {}, len(self.documents().unique())
        for name, (values, definition) in of.items():
            estimate = Estimate.of(values, documents)
            if estimate is None:
                log.warning("%s is left out: the rows do not differ, or are all 0", name)
                continue
            metrics[name] = Metric(
                value=estimate.value,
                definition=definition + (few(documents) if estimate.interval else ""),
                n=int(sums.rows["nonzero" if name == "l2_ratio" else "rows"][0]),
                interval=estimate.interval,
            )
        dead = int((told.fired == 0).sum())
        metrics["dead_share"] = Metric(
            value=dead / len(told.fired),
            definition=f"share of latents that fire on none of these {told.n} rows ({dead})",
            n=told.n,
        )
        return metrics


EVAL = GroundTruth
