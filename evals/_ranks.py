"""What several processes have found of an evaluation's rows or latents, as one."""

import dataclasses
from functools import reduce
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.distributed import Mesh
from saekit.evals._metrics import Mean
from saekit.evals._splice import Losses
from saekit.matching import SIGNS, Nearest, Sign, nearest, rows_at_once

_T = TypeVar("_T")


def joined(part: _T, mesh: Mesh) -> _T:
    """The sum, by `+` and in the order of the ranks, of what each process has: a dataclass of
    numbers (float64 or whole), of tensors that have one shape in all processes, of such
    dataclasses, and of None where it is None in all.
    """
    if mesh.data == 1:
        return part
    total: _T = reduce(lambda one, other: one + other, _gathered(part, mesh))
    return total


def _gathered(part: Any, mesh: Mesh) -> list[Any]:
    """Of each process."""
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        names = [field.name for field in dataclasses.fields(part)]
        columns = [_gathered(getattr(part, name), mesh) for name in names]
        return [
            type(part)(**dict(zip(names, values, strict=True)))
            for values in zip(*columns, strict=True)
        ]
    if part is None:
        return [None] * mesh.data
    if isinstance(part, Tensor):
        return list(mesh.gather(part, "data").unbind())
    dtype = torch.int64 if isinstance(part, int) else torch.float64
    found: list[Any] = mesh.gather(torch.tensor(part, dtype=dtype), "data").tolist()
    return found


def nearest_by_all(
    a: Float[Tensor, "a d"], b: Float[Tensor, "b d"], own: Int[Tensor, " a"], mesh: Mesh
) -> dict[Sign, Nearest]:
    """`matching.nearest`, of which each process looks for a part of the rows of a: in the blocks of
    one process, and so with its numbers."""
    if mesh.data == 1 or len(a) == 0 or len(b) < 2:
        return nearest(a, b, own)
    block = rows_at_once(len(b))
    size = -(-len(a) // (block * mesh.data)) * block
    part = slice(mesh.data_rank * size, (mesh.data_rank + 1) * size)
    found = nearest(a[part], b, own[part]) if len(a[part]) else {}

    def whole(here: Tensor) -> Tensor:
        padded = here.new_zeros(size)
        padded[: len(here)] = here
        return mesh.gather(padded, "data").flatten()[: len(a)]

    nothing = Nearest(a.new_zeros(0), own.new_zeros(0))
    return {
        sign: Nearest(whole(one.cosine), whole(one.row))
        for sign in SIGNS
        for one in [found.get(sign, nothing)]
    }


def joined_losses(losses: dict[str, Losses], mesh: Mesh) -> dict[str, Losses]:
    """The same of losses, whose documents differ from process to process."""
    if mesh.data == 1:
        return losses
    return {name: _of_documents(one, mesh) for name, one in losses.items()}


def _of_documents(losses: Losses, mesh: Mesh) -> Losses:
    rows = [
        [float(document), ce.total, float(ce.n), kl.total, float(kl.n)]
        for document, (ce, kl) in losses.documents.items()
    ]
    n = mesh.gather(torch.tensor(len(rows)), "data")
    # Whole numbers below 2^53 are exact in float64.
    table = torch.zeros(int(n.max()), 5, dtype=torch.float64)
    table[: len(rows)] = torch.tensor(rows, dtype=torch.float64).view(-1, 5)
    tables = mesh.gather(table, "data")
    totals = zip(_gathered(losses.ce, mesh), _gathered(losses.kl, mesh), strict=True)
    total = Losses()
    for (ce, kl), count, each in zip(totals, n.tolist(), tables.tolist(), strict=True):
        documents = {
            int(document): (Mean(ce_total, int(ce_n)), Mean(kl_total, int(kl_n)))
            for document, ce_total, ce_n, kl_total, kl_n in each[:count]
        }
        total += Losses(ce, kl, documents)
    return total
