"""The numbers of `firing` by name, with their definitions.

Each function turns sums that were gathered over the rows into metrics and arrays. A number without
a meaning is left out, and the log says why.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saekit.errors import Undefined
from saekit.evals._base import Findings
from saekit.evals._firing_life import Life
from saekit.evals._firing_rows import RowMeans
from saekit.evals._firing_units import Posterior, Spread
from saekit.evals._firing_windows import Windows, Zipf, log_histogram, zipf_likelihood, zipf_line
from saekit.evals._metrics import Firing
from saekit.evals._resample import few
from saekit.results import Metric

log = logging.getLogger(__name__)

ACTIVE = 0.01
"""Variance above which a unit counts as active (Burda et al. 2016, as remembered)."""


def means(sums: RowMeans, definitions: Mapping[str, str]) -> Findings:
    """Means over rows, each with its interval where it has one."""
    metrics = {}
    for i, (name, definition) in enumerate(definitions.items()):
        n, found = sums.n(i), sums.estimate(i)
        if found is None:
            log.warning("%s is left out: all rows are 0, and it is of the others", name)
            continue
        told = definition + (few(sums.documents) if found.interval else "")
        metrics[name] = Metric(value=found.value, definition=told, n=n, interval=found.interval)
    return Findings(metrics=metrics)


def sparsities(firing: Firing) -> Findings:
    """How L0 is distributed over rows."""
    n, rows = firing.n, firing.rows_with
    apart = torch.arange(len(rows)).double() - firing.l0_mean
    metrics = {
        "l0_sd": Metric(
            value=float(rows.double() @ apart.square() / n) ** 0.5,
            definition="standard deviation over rows of the number of latents != 0",
            n=n,
        )
    }
    for percent in (5, 25, 50, 75, 95):
        metrics[f"l0_p{percent}"] = Metric(
            value=firing.l0_quantile(percent / 100),
            definition=f"the smallest number of latents != 0 that {percent} % of rows do not "
            "exceed",
            n=n,
        )
    most = int(rows.nonzero().max())
    return Findings(metrics=metrics, arrays={"l0_rows": rows[: most + 1].numpy()})


def windows(counted: Sequence[Windows], rules: Sequence[int]) -> Findings:
    """Dead latents by window and rule, and those that fall silent or wake between the first window
    and the last."""
    metrics = {}
    for window in counted:
        size, n = window.size, window.n * window.size
        for least in rules:
            metrics[f"dead_share_lt{least}_in_{size}"] = Metric(
                value=window.dead_share(least),
                definition=f"share of latents that fire on fewer than {least} of {size} rows, on "
                f"the mean over {window.n} complete windows in stored order; one that never fires "
                f"in them has a density below 3/{size} = {3 / size:.2g} (95 % bound)",
                n=n,
            )
            if window.n < 2:
                continue
            for name, mask, first, last in (
                ("dying", window.dying(least), f"at least {least}", "fewer"),
                ("waking", window.waking(least), f"fewer than {least}", "at least as many"),
            ):
                metrics[f"{name}_share_lt{least}_in_{size}"] = Metric(
                    value=float(mask.double().mean()),
                    definition=f"share of latents that fire on {first} of the {size} rows of the "
                    f"first window and on {last} of those of the last, of {window.n}. The SAE "
                    "stays the same: only dying less waking says something, and of the text",
                    n=n,
                )
    return Findings(metrics=metrics)


def densities(firing: Firing, dense: Sequence[float], least: int, bins: int) -> Findings:
    """Dense latents, the histogram of densities, and their law."""
    metrics, n, d_sae = {}, firing.n, len(firing.count)
    alive = int((firing.count > 0).sum())
    for share in dense:
        over = int((firing.density > share).sum())
        key, what = f"over_{share * 100:g}_percent", f"fire on more than {share:g} of the rows"
        metrics[f"dense_share_{key}"] = Metric(
            value=over / d_sae, definition=f"share of latents that {what}", n=n
        )
        if alive:
            metrics[f"dense_share_of_alive_{key}"] = Metric(
                value=over / alive,
                definition=f"share that {what}, of the {alive} latents that fire at all",
                n=n,
            )
    among = f"the latents that fire on at least {least} rows; n counts latents"
    metrics |= _fit(
        "line",
        lambda: zipf_line(firing.count, least),
        "s of count(rank) ~ rank^-s, by least squares of log count on log rank, each latent "
        f"weighing the same, over {among}",
        "r2",
        "R2 of the line behind zipf_exponent_line: 1 - sum(residual^2) / sum((y - mean y)^2) with "
        "y = log count; 1 is Zipf's law, yet other laws come near; n counts latents",
    )
    metrics |= _fit(
        "likelihood",
        lambda: zipf_likelihood(firing.count, least),
        "s of p(rank) = rank^-s / sum_q q^-s, by maximum likelihood of the ranks of all firings, "
        f"over {among}",
        "ks",
        "Kolmogorov-Smirnov distance max_r |F(r) - F_p(r)| of the firings' ranks from the law "
        "behind zipf_exponent_likelihood; 0 is Zipf's law. No p-value: ranks come from the same "
        "counts; n counts latents",
    )
    counts, edges, never = log_histogram(firing.count, n, bins)
    arrays = {
        "count": firing.count.numpy(),
        "density_histogram": counts.numpy(),
        "density_log10_edges": edges.numpy(),
        "density_never": np.array([never]),
    }
    return Findings(metrics=metrics, arrays=arrays)


def _fit(
    how: str, fit: Callable[[], Zipf], exponent: str, quality: str, definition: str
) -> dict[str, Metric]:
    try:
        law = fit()
    except Undefined as reason:
        log.warning("zipf_exponent_%s is left out: %s", how, reason)
        return {}
    return {
        f"zipf_exponent_{how}": Metric(value=law.exponent, definition=exponent, n=law.n),
        f"zipf_{quality}_{how}": Metric(value=law.fit, definition=definition, n=law.n),
    }


def units(
    spread: Spread,
    length: Float[Tensor, " latent"],
    scale: float,
    posterior: Posterior | None,
    variance: str | None,
    delta: float,
) -> Findings:
    """Latents that vary over the rows, and those of a variational SAE whose posterior is the
    prior. `length` is that of the decoder rows, `scale` what training multiplied x by."""
    n = spread.n
    of_code = spread.variance * (length.double().cpu() * scale).square()
    metrics = {
        "active_units_share": Metric(
            value=_share(of_code > ACTIVE),
            definition=f"share of latents whose z_i |d_i| has a variance over rows above {ACTIVE}, "
            f"in the units of training (x times {scale:.4g}); after Burda et al. 2016, as "
            "remembered",
            n=n,
        )
    }
    arrays = {"code_variance": of_code.numpy()}
    if posterior is None:
        return Findings(metrics=metrics, arrays=arrays)
    metrics["posterior_active_units_share"] = Metric(
        value=_share(posterior.spread.variance > ACTIVE),
        definition="share of latents whose posterior mean, before any selection, has a variance "
        f"over rows above {ACTIVE}, in the units of training; after Burda et al. 2016, as "
        "remembered",
        n=n,
    )
    part = "" if variance == "fixed" else "; the learned variance, which export does not keep, adds"
    metrics["posterior_collapsed_share"] = Metric(
        value=posterior.collapsed_share(delta),
        definition=f"share of latents with KL_i < {posterior.epsilon:g} nats on at least "
        f"{1 - delta:g} of the rows, a reconstruction of (epsilon, delta)-collapse; KL_i is "
        f"mu_i^2 / 2{part}. A latent for something rare counts, too",
        n=n,
    )
    arrays["posterior_kl"] = (posterior.kl / n).numpy()
    arrays["posterior_variance"] = posterior.spread.variance.numpy()
    return Findings(metrics=metrics, arrays=arrays)


def lives(life: Life) -> Findings:
    """What became of the latents in training."""
    n, first, last = int(life.rows.sum()), int(life.rows[0]), int(life.rows[-1])
    of = "share of latents that"
    metrics = {
        f"life_dead_share_lt1_in_{life.dead_after}": Metric(
            value=float(life.dead_share[-1]),
            definition=f"{of} had not fired for {life.dead_after} rows or more when training "
            "ended; its own rule, on training rows",
            n=n,
        ),
        f"life_dead_share_lt1_in_{last}": Metric(
            value=float(1 - life.fired_share[-1]),
            definition=f"{of} fired on fewer than 1 of the last {last} rows of training",
            n=last,
        ),
        "life_dying_share": Metric(
            value=_share(life.dying),
            definition=f"{of} fired on at least 1 of the first {first} rows of training and on "
            f"none of the last {last}",
            n=first + last,
        ),
        "life_replanted_share": Metric(
            value=_share(life.replanted.any(0)),
            definition=f"{of} were given new weights in training at least once",
            n=n,
        ),
    }
    arrays = {
        "life_step": life.step.numpy(),
        "life_rows": life.rows.numpy(),
        "life_fired_share": life.fired_share.numpy(),
        "life_dead_share": life.dead_share.numpy(),
        "life_replanted": life.replanted.sum(1).numpy(),
    }
    return Findings(metrics=metrics, arrays=arrays)


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())
