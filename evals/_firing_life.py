"""What a training run wrote down of its latents' lives, read from its folder.

Axes: window (of the run, in order; the record of the start, which has no rows, is left out),
latent.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saekit import checkpoint
from saekit.errors import CheckpointError
from saekit.sae import SAE

FILE = "latent_life.safetensors"
"""What the trainers write; they and the evaluations know each other by files alone."""


@dataclass(frozen=True, eq=False)
class Life:
    """Counts of a run, over windows of training that together are all of it."""

    step: Int[Tensor, " window"]
    """Steps taken when the window ended."""
    rows: Int[Tensor, " window"]
    """Rows trained on in it."""
    fired: Int[Tensor, "window latent"]
    """Rows of the window on which each latent fired."""
    since: Int[Tensor, "window latent"]
    """Rows since each latent last fired, when the window ended."""
    replanted: Bool[Tensor, "window latent"]
    """Given new weights in the window."""
    dead_after: int
    """Rows without firing after which training called a latent dead."""

    @classmethod
    def read(cls, run: Path, sae: SAE) -> "Life":
        """The lives of the latents of this SAE (in fp32), from the run that made it.

        Raises CheckpointError where the folder holds another SAE, or no record.
        """
        own = checkpoint.load(run)
        if checkpoint.fingerprint(own.to(torch.float32)) != checkpoint.fingerprint(
            sae.to("cpu", torch.float32)
        ):
            raise CheckpointError(
                f"run_folder={run} holds another SAE than the one evaluated, whose latents had "
                "other lives: give the folder of the run that made this one, or leave it out"
            )
        if own.provenance is None or not (run / FILE).exists():
            raise CheckpointError(
                f"run_folder={run} holds no {FILE}: training writes one unless life_windows=0. "
                "Leave run_folder out, or train with life_windows above 0"
            )
        try:
            held = load_file(run / FILE)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{run / FILE} cannot be read: {error}") from error
        names = ("step", "rows", "fired", "since", "replanted")
        windows = held["rows"] > 0
        kept = {name: held[name][windows] for name in names}
        return cls(**kept, dead_after=int(own.provenance.config["dead_after"]))

    @property
    def fired_share(self) -> Float[Tensor, " window"]:
        """Share of the latents that fired on at least one row of the window."""
        return (self.fired > 0).double().mean(1)

    @property
    def dead_share(self) -> Float[Tensor, " window"]:
        """Share that had not fired for `dead_after` rows or more when the window ended."""
        return (self.since >= self.dead_after).double().mean(1)

    @property
    def dying(self) -> Bool[Tensor, " latent"]:
        """Fired on at least one row of the first window and on none of the last."""
        return (self.fired[0] > 0) & (self.fired[-1] == 0)
