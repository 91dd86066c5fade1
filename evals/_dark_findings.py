"""What `dark_matter` reports, with the definition of each number.

Axes: sample (resamples of documents, the first of them the rows as they are).
"""

import math

from jaxtyping import Float
from torch import Tensor

from saekit.evals._dark_norms import BASELINES, Measured
from saekit.evals._dark_others import PARTS, Compared
from saekit.evals._dark_parts import NORMS, Split, Subject
from saekit.evals._dark_table import Table
from saekit.evals._metrics import MIN_CE_RISE
from saekit.evals._resample import Explained

SUFFIXES = {True: "", False: "_no_intercept"}
"""Of the numbers of a fit with an intercept, and without, as in the paper."""

AMPLE = 10
"""Rows for each weight of a target below which a fit is called loose: it takes up about one part in
this of what is noise to it, and loses as much again on other rows."""

_HOW = {
    True: "from x by least squares with intercept, fitted on the train split",
    False: "from x by least squares without intercept (the paper's way), fitted on the train split",
}
_MEANING = {
    "error": "e",
    "rescaled_error": "x - gamma* x_hat",
    "x": "x",
    "x_hat": "x_hat",
    "linear": "LinErr",
    "nonlinear": "NonlinErr",
    "x_hat_plus_nonlinear": "x_hat + NonlinErr (= x - LinErr)",
}
_SAME = "it does not vary over the rows measured on, so there is no variance to explain"


def add_measured(table: Table, found: Measured, split: Split) -> None:
    """The numbers of the error's parts on held-out rows."""
    d = split.error.weight.shape[0]
    if table.n_fit < AMPLE * (d + 1):
        table.note(
            f"{table.n_fit} rows are few to fit maps with {d + 1} weights a target, fewer than "
            f"{AMPLE} for each: on held-out rows they explain less than the best maps would"
        )
    _add_gain(table, split)
    _add_fvu(table, found, "", 0)
    if split.gain is not None:
        _add_fvu(table, found, "_rescaled", 3)
    ways = zip(SUFFIXES.items(), found.vectors, found.norms, strict=True)
    for (intercept, suffix), vectors, norms in ways:
        how = _HOW[intercept]
        _add_vectors(table, suffix, vectors[:d], f"e = x - x_hat, predicted {how}")
        if split.gain is not None:
            what = f"e = x - gamma* x_hat, predicted {how}"
            _add_vectors(table, f"_rescaled{suffix}", vectors[d:], what)
        for i, name in enumerate(NORMS):
            if name != "rescaled_error" or split.gain is not None:
                end = {"error": "", "rescaled_error": "_rescaled"}.get(name, f"_{name}")
                _add_norm(table, name, end + suffix, norms[i : i + 1], how)
    for i, (name, meaning) in enumerate(BASELINES.items()):
        table.estimate(
            f"r2_norm_sq_from_{name}",
            found.baselines[i : i + 1].pooled,
            f"baseline of r2_norm_sq: the same with |e|^2 predicted by {meaning}",
            f"|e|^2: {_SAME}",
        )


def _add_gain(table: Table, split: Split) -> None:
    if split.gain is None:
        table.leave_out("gain_star", "x_hat is 0 on all rows, so no factor on it changes anything")
        return
    table.add(
        "gain_star",
        split.gain,
        "gamma* = sum(x . x_hat) / sum|x_hat|^2 over the fitted rows, the factor on x_hat that "
        "leaves the least error; above 1 is shrinkage, which alone makes the error linear in x",
        table.n_fit,
    )


def _add_fvu(table: Table, found: Measured, end: str, at: int) -> None:
    """`at`: the column of `Parts.unexplained` that holds |e|^2, before that of |NonlinErr|^2."""
    what = "e = x - gamma* x_hat" if end else "e = x - x_hat"
    undefined = "the activations measured on are all the same: there is no variance to explain"
    for (intercept, suffix), parts in zip(SUFFIXES.items(), found.left, strict=True):
        total, nonlinear = (parts[:, i] / found.x.total for i in (at, at + 1))
        if intercept:
            table.estimate(
                f"fvu_total{end}",
                total,
                f"sum|e|^2 / sum|x - mu|^2 with {what}, mu the mean of the rows measured on; 0 is "
                "perfect, 1 is what mu would score",
                undefined,
            )
            table.arrays[f"fvu_total{end}_samples"] = total.cpu().numpy()
        table.arrays[f"fvu_nonlinear{end}{suffix}_samples"] = nonlinear.cpu().numpy()
        table.estimate(
            f"fvu_nonlinear{end}{suffix}",
            nonlinear,
            f"sum|e - LinErr|^2 / sum|x - mu|^2 with {what} and LinErr its prediction "
            f"{_HOW[intercept]}",
            undefined,
        )
        table.estimate(
            f"fvu_linear{end}{suffix}",
            total - nonlinear,
            f"fvu_total{end} - fvu_nonlinear{end}{suffix}: the share of x's variance that adding "
            "LinErr to the reconstruction wins back",
            undefined,
        )


def _add_vectors(table: Table, suffix: str, vectors: Explained, what: str) -> None:
    d = vectors.residual.shape[1]
    varying = int((~vectors.scatter.by_dimension[0].isnan()).sum())
    constant = "" if varying == d else f" that vary, {varying} of {d}"
    table.estimate(
        f"r2_vec_uniform{suffix}",
        vectors.uniform,
        f"mean over dimensions{constant} of 1 - sum(e_j - prediction)^2 / sum(e_j - mean e_j)^2, "
        f"{what}; each dimension weighs the same, 0 is what the mean would score",
        f"the error: {_SAME}",
    )
    table.estimate(
        f"r2_vec_pooled{suffix}",
        vectors.pooled,
        f"1 - sum|e - prediction|^2 / sum|e - mean e|^2 over all dimensions at once, {what}; "
        "dimensions weigh by their variance, 0 is what the mean would score",
        f"the error: {_SAME}",
    )


def _add_norm(table: Table, name: str, suffix: str, norm: Explained, how: str) -> None:
    table.estimate(
        f"r2_norm_sq{suffix}",
        norm.pooled,
        "1 - sum(t - prediction)^2 / sum(t - mean t)^2 of the squared length t = "
        f"|{_MEANING[name]}|^2, predicted {how}",
        f"|{_MEANING[name]}|^2: {_SAME}",
    )


def add_losses(
    table: Table,
    found: Measured,
    ce: dict[str, Float[Tensor, " sample"]],
    n: int,
    documents: int,
) -> None:
    """What each part of the error costs the model, beside what it costs in variance."""
    replaced = {
        "clean": "with nothing replaced",
        "sae": "with the activation replaced by x_hat",
        "sae_plus_linear": "with the activation replaced by x_hat + LinErr",
        "sae_plus_nonlinear": "with the activation replaced by x_hat + NonlinErr",
    }
    for name, how in replaced.items():
        table.estimate(
            f"ce_{name}",
            ce[name],
            f"mean over tokens of -log p(next token), nats, {how}, LinErr with intercept; only "
            "positions that the token mask keeps are replaced, and only they are scored",
            "the losses are not finite",
            n,
            documents,
        )
    rise = ce["sae"] - ce["clean"]
    left = found.left[0]
    for at, part in ((1, "linear"), (2, "nonlinear")):
        share = (ce["sae"] - ce[f"sae_plus_{part}"]) / rise
        table.estimate(
            f"ce_recovered_from_sae_{part}",
            share.where(rise > MIN_CE_RISE, math.nan),
            f"(ce_sae - ce_sae_plus_{part}) / (ce_sae - ce_clean): the share of the loss that the "
            "SAE costs which this part of its error wins back; 1 is the untouched model",
            f"the SAE raises the loss by {float(rise[0]):.3g} nats, not by more than "
            f"{MIN_CE_RISE:g}, so there is nothing to win back",
            n,
            documents,
        )
        table.estimate(
            f"variance_recovered_from_sae_{part}",
            1 - left[:, at] / left[:, 0],
            f"1 - sum|e - part|^2 / sum|e|^2: the share of the SAE's squared error that this part "
            f"wins back, to hold beside ce_recovered_from_sae_{part}",
            "the SAE makes no error",
        )


def add_compared(table: Table, found: Compared, subjects: tuple[Subject, ...]) -> None:
    """The numbers of other SAEs as predictors; the first of the subjects is the SAE evaluated."""
    for other, ways in zip(subjects[1:], found.parts, strict=True):
        for suffix, parts in zip(SUFFIXES.values(), ways, strict=True):
            d = parts.residual.shape[1] // len(PARTS)
            for i, (part, meaning) in enumerate(PARTS.items()):
                explained = parts[i * d : (i + 1) * d]
                for kind, values in (("uniform", explained.uniform), ("pooled", explained.pooled)):
                    table.estimate(
                        f"r2_{part}_{kind}_from_{other.name}{suffix}",
                        values,
                        f"r2_vec_{kind}{suffix} with {meaning} in place of e, predicted from the "
                        f"reconstruction at '{other.hook}' of the SAE '{other.name}'",
                        f"{meaning}: {_SAME}",
                    )
    _add_lengths(table, found, [subject.name for subject in subjects])


def _add_lengths(table: Table, found: Compared, names: list[str]) -> None:
    n = len(names)
    r2, with_nonlinear = (
        (1 - e.residual / e.scatter.by_dimension).view(-1, n, n)
        for e in (found.length, found.length_with_nonlinear)
    )
    if r2[0].isnan().any():
        table.leave_out("length_r2", "the length of an SAE's error does not vary over the rows")
        return
    table.arrays["length_r2"] = r2[0].cpu().numpy()
    table.arrays["length_r2_with_nonlinear"] = with_nonlinear[0].cpu().numpy()
    order = ", ".join(names)
    for i, name in enumerate(names[1:], 1):
        alone, both = r2[:, i, 0], with_nonlinear[:, i, 0]
        table.estimate(
            f"length_r2_from_{name}",
            alone,
            f"1 - sum(|e| - prediction)^2 / sum(|e| - mean|e|)^2 of alpha |e_i| + beta, with e_i "
            f"the error of the SAE '{name}' on the same token; from row to column, array length_r2 "
            f"has all pairs of: {order}",
            _SAME,
        )
        left = 1 - alone
        table.estimate(
            f"length_gain_from_{name}",
            ((both - alone) / left).where(left > 0, math.nan),
            f"(R2 - length_r2_from_{name}) / (1 - length_r2_from_{name}): the share of what |e_i| "
            "left that |NonlinErr_i|, a second regressor, explains",
            "|e_i| alone explains all of |e|",
        )
