"""How an SAE's latents lie to each other: nearest decoder rows, encoder against decoder, lengths.

    c_i = max over j != i of cos(d_i, d_j)        signed, and of |cos(d_i, d_j)|

over the rows d_i of the decoder whose latents are alive: those that fire on at least `least` of the
rows looked at. Dead ones keep what they were drawn as, and would hide what was learnt. A maximum
over many latents is large by chance, so each number has beside it that of random unit rows, as many
and as wide (`_null`), and for decoders that of random rows with the covariance of the activations
(`_null_cov`), which follow the data and have no other structure. A dictionary that spreads its rows
more evenly than the data lie scores below the latter.

All numbers are of these latents, not means over rows, so they have no interval over documents;
their `n` counts latents. Cosines are in fp32. It takes latents^2 d multiplications, in blocks, for
the dictionary and for each draw of each null.

Axes: latent (alive ones), d.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saekit.errors import ConfigError, Undefined
from saekit.evals._base import Eval, EvalConfig, Findings
from saekit.evals._geometry_nulls import beside_nulls, nulls
from saekit.evals._geometry_pass import alive, look
from saekit.evals._ranks import nearest_by_all
from saekit.matching import SIGNS, Nearest, Sign, unit_rows
from saekit.results import Metric
from saekit.seeds import stream

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GeometryConfig(EvalConfig):
    least: int = 1
    """Rows on which a latent must fire to count as alive."""

    over: tuple[float, ...] = (0.7,)
    """Cosines above which a latent counts as near to another."""

    null_draws: int = 3
    """Random dictionaries of each kind to compare with; their mean is given."""

    covariance_rows: int = 32_768
    """Rows behind the covariance of the second null, at most: the first. 0 leaves that null out."""

    max_latents: int = 32_768
    """Latents whose nearest neighbour is looked for, at most, drawn at random; it is looked for
    among all others, always."""

    seed: int = 0
    """Of the nulls, and of that draw."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("least", "null_draws", "max_latents"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.covariance_rows < 0:
            raise ConfigError(
                f"covariance_rows={self.covariance_rows} must not be negative; 0 leaves its null "
                "out"
            )
        if any(not -1 <= over < 1 for over in self.over):
            raise ConfigError(f"over={self.over} are cosines: from -1 to below 1")


class Geometry(Eval):
    Config: ClassVar[type[EvalConfig]] = GeometryConfig
    NORMALISED = True
    SHARES_ROWS = True
    cfg: GeometryConfig

    def run(self) -> Findings:
        cfg, sae = self.cfg, self.sae
        firing, moments = look(self, cfg.covariance_rows)
        self.latents = alive(firing, cfg.least)
        self.who = f"latents that fire on at least {cfg.least} of {firing.n} rows"
        self.nulls = nulls([moments])
        share = Metric(
            value=len(self.latents) / sae.d_sae,
            definition=f"share of {self.who}: all other numbers are of those",
            n=firing.n,
        )
        at = self.latents.to(sae.device)
        W_dec, W_enc = sae.W_dec[at], sae.W_enc.T[at]
        found = [
            Findings(metrics={"alive_share": share}, arrays={"latent": self.latents.numpy()}),
            self._neighbours("dec", "decoder row", W_dec, SIGNS),
            self._neighbours("enc", "encoder column", W_enc, ("abs",)),
            self._encoder_decoder(W_enc, W_dec),
        ]
        return Findings(
            metrics={name: metric for one in found for name, metric in one.metrics.items()},
            arrays={name: array for one in found for name, array in one.arrays.items()},
        )

    def _neighbours(
        self, side: str, what: str, W: Float[Tensor, "latent d"], signs: tuple[Sign, ...]
    ) -> Findings:
        """How long the rows of W are, and how near to each other."""
        cfg = self.cfg
        metrics = self._lengths(side, what, W)
        rows, there = unit_rows(W)
        if not bool(there.all()):
            log.warning("%d latents whose %s is 0 are left out", int((~there).sum()), what)
        asked = torch.arange(len(rows))
        if len(rows) > cfg.max_latents:
            drawn = torch.randperm(len(rows), generator=stream("geometry", cfg.seed))
            asked = drawn[: cfg.max_latents].sort().values

        def numbers(
            rows: Float[Tensor, "latent d"], found: dict[Sign, Nearest]
        ) -> dict[str, float]:
            of = {
                f"max_cos_{side}_{sign}_{name}": value
                for sign in signs
                for name, value in summary(found[sign].cosine, cfg.over).items()
            }
            return of | {f"pair_cos_{side}_{name}": v for name, v in pair_cosines(rows).items()}

        try:
            found = nearest_by_all(rows[asked], rows, asked, self.mesh)
        except Undefined as reason:
            log.warning("max_cos_%s and pair_cos_%s are left out: %s", side, side, reason)
            return Findings(metrics=metrics)
        compared = beside_nulls(
            numbers(rows, found),
            lambda random: numbers(random, nearest_by_all(random[asked], random, asked, self.mesh)),
            [rows],
            # Encoder columns do not follow the data's covariance; some undo it.
            self.nulls if side == "dec" else {"null": self.nulls["null"]},
            self._definitions(side, what, signs, len(asked)),
            draws=cfg.null_draws,
            seed=cfg.seed,
        )
        for name, metric in compared.items():
            n = len(asked) if name.startswith("max_cos") else len(rows)
            metrics[name] = replace(metric, n=n)
        which = self.latents[there.cpu()]
        arrays = {f"nearest_{side}_of": which[asked].numpy()}
        for sign in signs:
            arrays[f"nearest_{side}_{sign}_latent"] = which[found[sign].row].numpy()
            arrays[f"nearest_{side}_{sign}_cosine"] = found[sign].cosine.numpy()
        return Findings(metrics=metrics, arrays=arrays)

    def _definitions(
        self, side: str, what: str, signs: tuple[Sign, ...], asked: int
    ) -> dict[str, str]:
        """Of what `_neighbours` names."""
        found = {
            f"pair_cos_{side}_mean": f"mean of cos over all pairs of {what}s of the {self.who}",
            f"pair_cos_{side}_rms": "root of the mean of cos^2 over all pairs of "
            f"{what}s of the {self.who}; 1/sqrt(d) = {self.sae.d_in**-0.5:.4g} is chance",
        }
        for sign in signs:
            largest = (
                "max over j != i of " + {"signed": "cos(w_i, w_j)", "abs": "|cos(w_i, w_j)|"}[sign]
            )
            of = f"{largest}, of {what}s w, over {asked} of the {self.who}"
            for name in ("mean", "median", "p99"):
                found[f"max_cos_{side}_{sign}_{name}"] = f"{name} over i of {of}"
            for over in self.cfg.over:
                key = f"max_cos_{side}_{sign}_share_over_{over:g}"
                found[key] = f"share of i above {over:g} of {of}"
        return found

    def _lengths(self, side: str, what: str, W: Float[Tensor, "latent d"]) -> dict[str, Metric]:
        if len(W) == 0:
            return {}
        length = torch.linalg.vector_norm(W, dim=1, dtype=torch.float64).cpu().numpy()
        values = {"mean": float(length.mean())}
        values |= {f"p{p}": float(np.percentile(length, p)) for p in (5, 50, 95)}
        return {
            f"{side}_norm_{name}": Metric(
                value=value, definition=f"{name} of |{what}| over the {self.who}", n=len(length)
            )
            for name, value in values.items()
        }

    def _encoder_decoder(
        self, W_enc: Float[Tensor, "latent d"], W_dec: Float[Tensor, "latent d"]
    ) -> Findings:
        """The cosine of each latent's encoder with its own decoder, and with that of another."""
        there = unit_rows(W_enc)[1] & unit_rows(W_dec)[1]
        encoder, decoder = unit_rows(W_enc[there])[0], unit_rows(W_dec[there])[0]
        n = len(encoder)
        if n < 2:
            log.warning("enc_dec_cos is left out: %d latents have an encoder and a decoder", n)
            return Findings(metrics={})
        shift = int(torch.randint(1, n, (1,), generator=stream("enc_dec_cos", self.cfg.seed)))
        own = (encoder.double() * decoder.double()).sum(1).cpu().numpy()
        other = (encoder.double() * decoder.double().roll(shift, 0)).sum(1).cpu().numpy()
        metrics = {}
        for suffix, cosine, whose in (("", own, "its own"), ("_null", other, "another's")):
            values = {"mean": float(cosine.mean())}
            values |= {f"p{p}": float(np.percentile(cosine, p)) for p in (5, 50, 95)}
            for name, value in values.items():
                metrics[f"enc_dec_cos_{name}{suffix}"] = Metric(
                    value=value,
                    definition=f"{name} of the cosine of a latent's encoder column with {whose} "
                    f"decoder row, over the {self.who}",
                    n=n,
                )
        which = self.latents[there.cpu()].numpy()
        return Findings(metrics=metrics, arrays={"enc_dec_cos_of": which, "enc_dec_cos": own})


EVAL = Geometry


def summary(cosine: Float[Tensor, " latent"], over: Sequence[float]) -> dict[str, float]:
    """Mean, median, 99th percentile (by linear interpolation), and shares above."""
    values = cosine.double().numpy()
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p99": float(np.percentile(values, 99)),
    } | {f"share_over_{least:g}": float((values > least).mean()) for least in over}


def pair_cosines(rows: Float[Tensor, "latent d"]) -> dict[str, float]:
    """Mean and root mean square of the cosine over all pairs i != j of unit rows, from
    sum_ij cos = |sum_i w_i|^2 and sum_ij cos^2 = |W^T W|^2, so without the pairs."""
    rows = rows.double()
    n, length = len(rows), rows.square().sum(1)
    total = float(rows.sum(0).square().sum() - length.sum())
    squares = float((rows.T @ rows).square().sum() - length.square().sum())
    count = n * (n - 1)
    return {"mean": total / count, "rms": (max(squares, 0.0) / count) ** 0.5}
