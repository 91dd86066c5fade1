"""Codes of the activations at the places of prompts.

Rows are the places one after another, prompt by prompt. Everything that comes out is on the CPU.
Axes: row (prompts), place, d, k, d_sae; rows (prompts times places).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.errors import SaekitError
from saekit.evals._indirect_object_prompts import Prompts
from saekit.evals._task_interpretability import Sight, families
from saekit.sae import SAE, SparseCode


@dataclass(frozen=True)
class Coder:
    """An SAE that is read a batch at a time."""

    sae: SAE
    batch_size: int

    def code(self, x: Float[Tensor, "row place d"]) -> SparseCode:
        """Every slot that is not used names latent 0, so that codes do not depend on the batch."""
        batches = torch.split(x.flatten(0, 1), self.batch_size)
        codes = [self.sae.encode_sparse(some.to(self.sae.device)) for some in batches]
        widest = max(code.values.shape[1] for code in codes)
        values = torch.cat([_padded(code.values, widest) for code in codes])
        indices = torch.cat([_padded(code.indices, widest) for code in codes])
        if not values.isfinite().all():
            raise SaekitError(
                "the SAE's latents contain NaN or infinity on the task's prompts; check its weights"
            )
        return SparseCode(values, indices.where(values != 0, 0))

    def decode(
        self, code: SparseCode, x: Float[Tensor, "row place d"]
    ) -> Float[Tensor, "row place d"]:
        """x_hat; `x` is for a skip path."""
        device, parts = self.sae.device, []
        rows = x.flatten(0, 1)
        for first in range(0, len(rows), self.batch_size):
            some = slice(first, first + self.batch_size)
            here = SparseCode(code.values[some].to(device), code.indices[some].to(device))
            parts.append(self.sae.decode(here, rows[some].to(device)).cpu())
        return torch.cat(parts).view_as(x)

    def sight(self, x: Float[Tensor, "row place d"], prompts: Prompts, union: int) -> Sight:
        """What each latent does at each place."""
        code, n = self.code(x), x.shape[1]
        codes = [SparseCode(code.values[i::n], code.indices[i::n]) for i in range(n)]
        return Sight.of(codes, self.sae.d_sae, families(prompts, union))


def _padded(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x.cpu(), (0, width - x.shape[1]))
