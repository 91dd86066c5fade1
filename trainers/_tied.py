"""What the kinds that encode with their decoder's own rows have in common: those rows, which have
norm 1 throughout, and a decoder bias.

The gradient's part along a row is taken out before each step, and rows are normalised after it.
"""

import torch
from torch import Tensor, nn

from saekit.config import TrainConfig
from saekit.trainers._base import (
    Trainer,
    keep_near,
    normalise_rows,
    project_out_rows,
    unit_rows,
)

LATENTS = {"W_dec": 0, "anchor": 0, "dead.since": 0, "dead.fired": 0}
"""See `Trainer.LATENTS`."""


class Tied(Trainer):
    """See the module. A kind gives `losses` and `export`, and says what b_dec starts as."""

    FREEZES = {"decoder": ("W_dec",)}

    def __init__(self, cfg: TrainConfig, d_in: int) -> None:
        super().__init__(cfg, d_in)
        rows = unit_rows(cfg.d_sae, d_in, self.mesh)
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        if cfg.soft_cosine is not None:
            self.register_buffer("anchor", rows.clone())

    def before_step(self) -> None:
        if self.W_dec.grad is not None:
            project_out_rows(self.W_dec.grad, self.W_dec)

    def after_step(self) -> None:
        if self.cfg.soft_cosine is not None:
            assert isinstance(self.anchor, Tensor)
            keep_near(self.W_dec, self.anchor, self.cfg.soft_cosine)
        if self.W_dec.requires_grad:
            normalise_rows(self.W_dec)
