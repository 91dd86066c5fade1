"""What the comparisons of dictionaries need to know of the rows: which latents fire, and how the
activations are spread.

Axes: row, d, latent.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.errors import Undefined
from saekit.evals._base import Eval
from saekit.evals._linear import Moments
from saekit.evals._metrics import Firing
from saekit.evals._ranks import joined


def root(moments: Moments) -> Float[Tensor, "d d"]:
    """The symmetric matrix R with R R^T the covariance of the rows. Raises Undefined where rows do
    not differ."""
    values, vectors = torch.linalg.eigh(moments.xx.cpu() / moments.n)
    # The symmetric one: no sign of an eigenvector is left to the library.
    found: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    if float(values[-1]) <= 1e-24 * float(moments.x_mean.square().sum()) or values[-1] <= 0:
        raise Undefined(
            f"the {moments.n} activations are all the same: there is no covariance to draw from"
        )
    return found


def look(of: Eval, covariance_rows: int) -> tuple[Firing, Moments | None]:
    """One pass over the rows of an evaluation, of all processes: how often latents fire, and the
    moments of the first `covariance_rows`."""
    firing: Firing | None = None
    moments: Moments | None = None
    left = max(0, covariance_rows - of.before(len(of.rows())))
    for x in of.batches():
        here = Firing.of(of.sae.encode_sparse(x), of.sae.d_sae)
        firing = here if firing is None else firing + here
        if left or moments is None:
            some = Moments.of(x[:left])
            moments = some if moments is None else moments + some
            left -= some.n
    assert firing is not None and moments is not None
    moments = joined(moments, of.mesh)
    return joined(firing, of.mesh), moments if covariance_rows else None


def alive(firing: Firing, least: int) -> Int[Tensor, " alive"]:
    """The latents that fire on at least `least` rows."""
    return (firing.count >= least).nonzero().flatten()
