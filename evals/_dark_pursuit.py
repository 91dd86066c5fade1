"""What gradient pursuit over an SAE's decoder leaves of the activations, beside what the SAE itself
leaves: how much of the nonlinear error is the encoder's fault (arXiv 2410.14670, sec. 6).

Axes: row, d.
"""

from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.evals._dark_parts import Rows, Seen, Subject
from saekit.evals._dark_table import Table
from saekit.evals._linear import Moments
from saekit.evals._pursuit import gradient_pursuit
from saekit.evals._resample import Resamples, Scatter

_CODES = ("sae", "pursuit")


@dataclass(frozen=True, eq=False)
class _Left:
    """Sums over held-out rows."""

    x: Scatter
    squares: Float[Tensor, " six"]
    """For the SAE's code and the pursuit's: sums of |e|^2, of |NonlinErr|^2, and of the L0."""

    def __add__(self, other: "_Left") -> "_Left":
        return _Left(self.x + other.x, self.squares + other.squares)


def pursue(table: Table, subject: Subject, fit: Rows, held_out: Rows, ridge: float) -> None:
    """Add the pursuit's numbers to the table. The linear parts of both errors are fitted on the
    same rows and measured on the same rows, so that they compare."""
    every = Resamples.of(held_out.documents(), 0, 0)
    batches = fit.seen("pursuit to fit on", subject)
    moments = reduce(add, (Moments.of(seen.x, _errors(subject, seen)[0]) for _, (seen,) in batches))
    linear = moments.solve(intercept=True, ridge=ridge)

    def judge(index: Tensor, seen: Seen) -> _Left:
        errors, l0 = _errors(subject, seen)
        rest = errors - linear(seen.x)
        sums = [
            total
            for i, part in enumerate(zip(errors.chunk(2, 1), rest.chunk(2, 1), strict=True))
            for total in (*(p.square().sum() for p in part), l0[i].sum())
        ]
        document = held_out.documents(index)
        return _Left(Scatter.of(every, seen.x, document, moments.x_mean), torch.stack(sums))

    held = held_out.seen("pursuit to measure on", subject)
    found = reduce(add, (judge(index, seen) for index, (seen,) in held))
    _add(table, found, len(held_out.index), len(fit.index))


def _errors(
    subject: Subject, seen: Seen
) -> tuple[Float[Tensor, "row two_d"], tuple[Float[Tensor, " row"], ...]]:
    """Errors of the SAE and of the pursuit side by side, and the L0 of both."""
    x = seen.x.float()
    code = gradient_pursuit(subject.sae, x, seen.l0.long())
    x_hat = subject.sae.decode(code, x).double()
    l0 = (code.values != 0).sum(1).double()
    return torch.cat([seen.error, seen.x - x_hat], 1), (seen.l0, l0)


def _add(table: Table, found: _Left, n: int, n_fit: int) -> None:
    scatter = float(found.x.total[0])
    of = {"sae": "of the SAE's own code", "pursuit": "of gradient pursuit over its decoder"}
    same = f"; on the first {n} rows, linear parts fitted on {n_fit} rows"
    for code, sums in zip(_CODES, found.squares.view(2, 3).tolist(), strict=True):
        prefix = "pursuit" if code == "pursuit" else "pursuit_sae"
        total, nonlinear, l0 = sums
        table.add(
            f"{prefix}_l0_mean",
            l0 / n,
            f"mean number of latents != 0 {of[code]}; pursuit may take the SAE's own count at most"
            f"{same}",
            n,
        )
        if scatter != scatter:
            table.leave_out(f"{prefix}_fvu_total", "the activations are all the same")
            continue
        table.add(
            f"{prefix}_fvu_total",
            total / scatter,
            f"sum|e|^2 / sum|x - mu|^2 {of[code]}{same}",
            n,
        )
        table.add(
            f"{prefix}_fvu_nonlinear",
            nonlinear / scatter,
            f"sum|e - LinErr|^2 / sum|x - mu|^2 {of[code]}{same}",
            n,
        )
