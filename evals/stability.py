"""Whether other SAEs found the same latents: of other seeds, sizes, kinds or layers.

    mmcs     mean over i of max_j cos(d_i, d'_j)                     both ways: it is not symmetric
    pw_mcc   mean of cos over the one-to-one matching of the rows whose cosines add up to most

with d the decoder rows of the SAE evaluated and d' those of another (`against`), alive latents
alone: dead ones keep what they were drawn as, and match where two runs began alike. Each number is
given with signed and with absolute cosines, for published figures come of either, and beside that
of random unit rows, as many and as wide (`_null`), and of random rows with the covariance of each
SAE's activations (`_null_cov`). Names begin with `vs1_`, `vs2_`, ... in the order of `against`;
`forward` goes from the SAE evaluated to the other.

The matching takes a matrix of all pairs and up to latents^3 steps: beyond `max_matching` latents
there is no `pw_mcc`, the log says so, and `mutual` (pairs that are each other's nearest, always
given under that name) is what is left. MMCS is as Sharkey et al. 2022 are remembered; PW-MCC is
that of arXiv 2505.20254, whose code takes signed cosines, where SAELens takes absolute ones.

All numbers are of latents, not means over rows, so they have no interval over documents; their `n`
counts the latents of the smaller dictionary.

Axes: latent (alive ones), d.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit import checkpoint
from saekit.errors import ConfigError, Undefined
from saekit.evals._base import Eval, EvalConfig, Findings, matching_hook
from saekit.evals._geometry_nulls import Null, beside_nulls, nulls
from saekit.evals._geometry_pass import alive, look
from saekit.evals._linear import Moments
from saekit.evals._matching import Compared, compare, definitions, subspace_overlap
from saekit.matching import SIGNS, Sign, unit_rows
from saekit.results import Metric, Provenance
from saekit.sae import SAE

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StabilityConfig(EvalConfig):
    against: tuple[Path, ...] = ()
    """Folders of the SAEs to compare with: runs, on activations of the same model and width. One of
    another layer needs a cache that holds its hook, too."""

    signs: Literal["both", "signed", "abs"] = "both"
    """Which cosines: with "abs" a latent that points the other way counts as found."""

    least: int = 1
    """Rows on which a latent must fire to count as alive."""

    over: tuple[float, ...] = (0.7,)
    """Cosines above which a latent counts as found in the other SAE."""

    max_matching: int = 8192
    """Latents that are matched one to one at most; it takes a minute on a CPU for 8192. Where an
    SAE has more, pairs that are each other's nearest are all there is."""

    subspace_rank: int = 16
    """Dimensions of the subspaces in which the latents are compared that are not found (by the
    first of `over`, in absolute cosine); 0 leaves that out."""

    null_draws: int = 1
    """Random dictionaries of each kind to compare with; their mean is given."""

    covariance_rows: int = 32_768
    """Rows behind the covariance of the second null, at most: the first. 0 leaves that null out."""

    seed: int = 0
    """Of the nulls."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("least", "null_draws"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("max_matching", "subspace_rank", "covariance_rows"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"{name}={getattr(self, name)} must not be negative; 0 leaves it out"
                )
        if not self.over or any(not -1 <= over < 1 for over in self.over):
            raise ConfigError(f"over={self.over} are cosines, at least one: from -1 to below 1")


@dataclass(frozen=True, eq=False)
class _Dictionary:
    """The alive latents of one SAE."""

    rows: Float[Tensor, "latent d"]
    latents: Int[Tensor, " latent"]
    """Their numbers in the SAE."""
    moments: Moments | None
    """Of its activations."""
    n: int
    """Rows looked at."""


class Stability(Eval):
    Config: ClassVar[type[EvalConfig]] = StabilityConfig
    NORMALISED = True
    cfg: StabilityConfig

    def run(self) -> Findings:
        cfg = self.cfg
        # All are read first, so that a wrong path is found out before the long part.
        others = [(path, *self._read(path)) for path in cfg.against]
        if not others:
            log.warning("against=() names no SAE to compare with: nothing but alive_share is given")
        own = self._alive()
        share = Metric(
            value=len(own.latents) / self.sae.d_sae,
            definition=f"share of latents that fire on at least {cfg.least} of {own.n} rows and "
            "have a decoder row other than 0: all other numbers are of those",
            n=own.n,
        )
        metrics = {"alive_share": share}
        arrays = {"latent": own.latents.numpy()}
        for number, (path, sae, hook) in enumerate(others, 1):
            there = Stability(cfg, sae, self.cache, hook, progress=self.progress)._alive()
            try:
                found = self._compared(f"vs{number}", own, there, f"{path} at {hook}")
            except Undefined as reason:
                log.warning("vs%d is left out: %s", number, reason)
                continue
            metrics |= found.metrics
            arrays |= found.arrays
        return Findings(metrics=metrics, arrays=arrays)

    def _read(self, path: Path) -> tuple[SAE, str]:
        """Another SAE, and the hook that it is of."""
        other = checkpoint.load(path)
        own, origin = self.sae.provenance, other.provenance
        hook = matching_hook(other, self.cache, self.hook if origin is None else None)
        if other.d_in != self.sae.d_in:
            raise ConfigError(
                f"{path} is of width {other.d_in}, and the SAE evaluated of {self.sae.d_in}: rows "
                "of two widths have no cosine; give SAEs of one width"
            )
        if checkpoint.fingerprint(other.to(torch.float32)) == checkpoint.fingerprint(self.sae):
            log.warning("%s is the very SAE that is evaluated: all cosines will be 1", path)
        elif own is not None and origin is not None and _same_start(own, origin):
            log.warning(
                "%s was trained from the seed of the SAE evaluated, in the same size: their rows "
                "began alike, which makes them agree more than two seeds would",
                path,
            )
        return other, hook

    def _alive(self) -> _Dictionary:
        """One pass over the rows."""
        firing, moments = look(self, self.cfg.covariance_rows)
        latents = alive(firing, self.cfg.least)
        rows, there = unit_rows(self.sae.W_dec[latents.to(self.sae.device)])
        return _Dictionary(rows, latents[there.cpu()], moments, firing.n)

    def _compared(self, name: str, own: _Dictionary, other: _Dictionary, whom: str) -> Findings:
        """All numbers of two SAEs, both ways, and where each latent is found."""
        cfg = self.cfg
        signs: tuple[Sign, ...] = SIGNS if cfg.signs == "both" else (cfg.signs,)
        most = max(len(own.rows), len(other.rows))
        if most > cfg.max_matching:
            log.warning(
                "%s has no pw_mcc: %d latents are alive, more than max_matching=%d. See "
                "%s_mutual_share and %s_mutual_cos, of pairs that are each other's nearest",
                *(name, most, cfg.max_matching, name, name),
            )

        def compared(a: Tensor, b: Tensor) -> Compared:
            return compare(a, b, signs=signs, over=cfg.over, max_matching=cfg.max_matching)

        found = compared(own.rows, other.rows)
        against = nulls([own.moments, other.moments])
        metrics = beside_nulls(
            found.values,
            lambda a, b: compared(a, b).values,
            [own.rows, other.rows],
            against,
            definitions(signs, cfg.over),
            draws=cfg.null_draws,
            seed=cfg.seed,
        )
        metrics |= self._subspaces(found, own, other, against)
        arrays = {f"{name}_latent": other.latents.numpy()}
        for sign in signs:
            nearest = found.forward[sign]
            arrays[f"{name}_nearest_{sign}_latent"] = other.latents[nearest.row].numpy()
            arrays[f"{name}_nearest_{sign}_cosine"] = nearest.cosine.numpy()
            if sign in found.pairs:
                pairs = found.pairs[sign]
                matched = np.full(len(own.latents), -1)
                matched[pairs.a.numpy()] = other.latents[pairs.b].numpy()
                arrays[f"{name}_matched_{sign}_latent"] = matched
        said = {
            f"{name}_{key}": replace(
                metric,
                definition=f"{metric.definition}. Against {whom}; n counts latents of the smaller "
                "SAE",
            )
            for key, metric in metrics.items()
        }
        said[f"{name}_alive"] = Metric(
            value=float(len(other.latents)),
            definition=f"latents of {whom} that fire on at least {cfg.least} of {other.n} rows",
            n=other.n,
        )
        return Findings(metrics=said, arrays=arrays)

    def _subspaces(
        self,
        found: Compared,
        own: _Dictionary,
        other: _Dictionary,
        against: Mapping[str, Null],
    ) -> dict[str, Metric]:
        """Whether what is not found latent by latent lies in the same subspace all the same."""
        rank, over = self.cfg.subspace_rank, self.cfg.over[0]
        if not rank:
            return {}
        key = f"unfound_subspace_{rank}"

        def overlap(a: Tensor, b: Tensor) -> dict[str, float]:
            return {key: subspace_overlap(a, b, rank)}

        unfound = [
            one.rows[(nearest["abs"].cosine <= over).to(one.rows.device)]
            for one, nearest in ((own, found.forward), (other, found.backward))
        ]
        try:
            value = overlap(*unfound)
        except Undefined as reason:
            log.warning("%s is left out: %s", key, reason)
            return {}
        said = (
            f"mean cos^2 of the principal angles between the leading {rank}-dimensional subspaces "
            f"of the latents of either SAE whose |cos| with the other's nearest is {over:g} at "
            "most; 1 is the same subspace, 0 an orthogonal one. A reconstruction"
        )
        return beside_nulls(
            value,
            overlap,
            unfound,
            against,
            {key: said},
            draws=self.cfg.null_draws,
            seed=self.cfg.seed,
        )


EVAL = Stability


def _same_start(a: Provenance, b: Provenance) -> bool:
    """Whether two runs drew the same initial weights."""
    return all(a.config.get(name) == b.config.get(name) for name in ("seed", "d_sae"))
