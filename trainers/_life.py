"""How each latent did over a run: written down at equal distances, for `saekit inspect RUN --dead`.

Axes: record (the start of the run, then each of its windows, in order), latent.
"""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from saekit import kernels
from saekit.distributed import ALONE, Mesh
from saekit.files import write_atomic
from saekit.sae import SAE, JumpReLU, MatchingPursuit, TopK
from saekit.trainers._dead_latents import DeadLatents

FILE = "latent_life.safetensors"
SHARE = 1 / 100
"""Of a window's rows, that pre-activations are taken over. One costs about 0.6 of a row that is
trained on, so all of it takes less than a hundredth of a run's time."""
ROWS = range(128, 513)
"""How many they may be: with fewer the largest says little, and more say hardly more."""
COMMON = ("step", "rows")
"""What there is once a record; all else is [record, latent]."""
PENDING = "pending"
"""What is not yet of a record, [latent]."""
_CHUNK = 256
"""Rows whose pre-activations are held at once."""


class LifeHistory:
    """Per record and latent, [record, latent]:

    - `fired`: rows of the window on which it fired
    - `since`: tokens since it last fired
    - `top`, `mean`, `spread`: of its pre-activations over the last batch of the window, the
      largest, the mean and the standard deviation
    - `margin`: how far they came above what it needed to fire, at best; negative for one that
      stayed silent
    - `enc_norm`, `dec_norm`: of its weights, as exported
    - `replanted`: whether it was given new weights in the window

    and per record `step` (steps taken when the window ended) and `rows` (rows in it). The first
    record is of the start: step 0, no rows, and the rest as the initial weights have it.

    A record takes 41 bytes a latent, and there are `life_windows` + 1 of them at most.
    """

    def __init__(self, window: int) -> None:
        """`window` is about how many rows one holds."""
        self._rows = min(max(round(SHARE * window), ROWS[0]), ROWS[-1])
        self._records: list[dict[str, Tensor]] = []
        self._replanted: Tensor | None = None

    def replanted(self, latents: Int[Tensor, " latent"], d_sae: int) -> None:
        """Note latents that were given new weights."""
        if self._replanted is None:
            self._replanted = torch.zeros(d_sae, dtype=torch.bool)
        self._replanted[latents.cpu()] = True

    @torch.no_grad()
    def end_window(
        self, step: int, rows: int, sae: SAE, dead: DeadLatents, x: Float[Tensor, "row d_in"]
    ) -> None:
        """Write down a window that ends after `step` steps; the start is one of no rows. Of a
        mesh, `sae` is the part that is held here, and x the rows of all."""
        replanted, self._replanted = self._replanted, None
        if replanted is None:
            replanted = torch.zeros(len(dead.since), dtype=torch.bool)
        record = {
            "step": torch.tensor(step),
            "rows": torch.tensor(rows),
            "fired": dead.take_fired(),
            "since": dead.since.clone(),
            "enc_norm": sae.W_enc.norm(dim=0),
            "dec_norm": sae.W_dec.norm(dim=1),
            "replanted": replanted,
            **pre_activations(sae, x[: self._rows], dead.mesh),
        }
        self._records.append({name: t.cpu() for name, t in record.items()})

    def tensors(self) -> dict[str, Tensor]:
        """All records stacked, and what is not yet of one."""
        held = {}
        if self._records:
            held = {n: torch.stack([r[n] for r in self._records]) for n in self._records[0]}
        return held if self._replanted is None else held | {PENDING: self._replanted}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        self._replanted = tensors.get(PENDING)
        stacked = {name: t for name, t in tensors.items() if name != PENDING}
        count = len(stacked["step"]) if stacked else 0
        self._records = [{name: t[i] for name, t in stacked.items()} for i in range(count)]

    def save(self, run: Path, mesh: Mesh = ALONE) -> None:
        if self._records:
            tensors = {
                n: (t if n in COMMON else mesh.collect(t, 1)).contiguous()
                for n, t in self.tensors().items()
                if n != PENDING
            }
            if mesh.rank == 0:
                write_atomic(run / FILE, lambda path: save_file(tensors, path))


def pre_activations(
    sae: SAE, x: Float[Tensor, "row d_in"], mesh: Mesh = ALONE
) -> dict[str, Float[Tensor, " latent"]]:
    """`top`, `mean`, `spread` and `margin` of each latent over rows."""
    mean = sae.pre(x.mean(0, keepdim=True))[0]
    top = torch.full_like(mean, -torch.inf)
    margin, squares = top.clone(), torch.zeros_like(mean)
    for rows in x.split(_CHUNK):
        pre = sae.pre(rows)
        torch.maximum(top, pre.amax(0), out=top)
        torch.maximum(margin, _margin(sae, rows, pre, mesh), out=margin)
        squares += pre.sub_(mean).square_().sum(0)
    return {"top": top, "mean": mean, "spread": (squares / len(x)).sqrt(), "margin": margin}


def _margin(
    sae: SAE, x: Float[Tensor, "row d_in"], pre: Float[Tensor, "row latent"], mesh: Mesh
) -> Float[Tensor, " latent"]:
    """How far each latent came above what it needed to fire, at best."""
    match sae.activation:
        case TopK(k):
            best = pre.topk(min(k, pre.shape[1]), dim=1).values
            if mesh.latent > 1:
                best = mesh.gather(best, "latent").movedim(0, 1).flatten(1).topk(k, dim=1).values
            return (pre - best[:, -1:].clamp_min(0)).amax(0)
        case JumpReLU(threshold):
            return (pre - threshold).amax(0)
        case MatchingPursuit() as how:
            return _pursuit_margin(sae, how, x, mesh)
        case _:
            return pre.amax(0)


def _pursuit_margin(
    sae: SAE, how: MatchingPursuit, x: Float[Tensor, "row d_in"], mesh: Mesh
) -> Float[Tensor, " latent"]:
    """How far each latent fell short of the one that was taken, in the step in which it came
    closest; those that were taken are at 0 themselves."""
    rest = x - sae.b_dec
    products = rest @ sae.W_enc
    products = products.abs() if how.signed else products
    most = mesh.reduce(products.amax(1, keepdim=True), "latent", "max")
    margin = (products - most.clamp_min(0)).amax(0)
    values, indices, _ = kernels.matching_pursuit(
        rest, sae.W_dec, how.steps, how.residual, how.signed, mesh
    )
    for value, latent in zip(values.T, indices.T, strict=True):
        # Each value is above 0 (or not 0) with one process, and 0 with all others.
        going = mesh.reduce((value != 0).float(), "latent") > 0
        products = rest[going] @ sae.W_enc
        products = products.abs() if how.signed else products
        taken = products.gather(1, latent[going, None])
        if mesh.latent > 1:
            taken = mesh.reduce(taken.masked_fill(value[going, None] == 0, 0), "latent")
        margin = torch.cat([products - taken, margin[None]]).amax(0)
        rest = rest - mesh.add_up(value[:, None] * sae.W_dec[latent])
    return margin
