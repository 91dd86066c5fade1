"""What every kind of SAE gives the training loop.

A kind is one public module of this folder: a config, a `Trainer`, and `KIND = ThatTrainer`.

**The loss convention.** Every term of a loss is a sum over d_in (or over latents) and a mean over
rows, already weighted; the loop adds the terms up and knows nothing else about a kind. A
coefficient that was published under another convention is turned into ours by
`saekit.trainers.coefficient`. Axes: batch, d_in, d_sae.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.config import TrainConfig
from saekit.distributed import ALONE, Mesh, here
from saekit.errors import ConfigError
from saekit.sae import SAE, JumpReLU
from saekit.seeds import stream
from saekit.trainers._dead_latents import DeadLatents


@dataclass(frozen=True)
class Batch:
    """Some rows of a cache, scaled as the run's config asks; what a kind does not need is None."""

    x: Float[Tensor, "batch d_in"]
    grad: Float[Tensor, "batch d_in"] | None = None
    """Of the model's summed next-token loss with respect to x."""
    label: Int[Tensor, "batch 3"] | None = None
    """Document, position and token of each row."""


class Step:
    """Takes steps of training; the parameters and the optimiser's moments are changed in place."""

    clipped: Tensor
    """Steps whose gradient was longer than clip_norm, since it was last set to 0."""

    def __call__(self, batch: Batch, lr: float) -> dict[str, Float[Tensor, ""]]:
        """Returns the terms of the loss, of before the step."""
        raise NotImplementedError

    def settle(self) -> None:
        """Before anybody else reads parameters or moments."""

    def take_over(self) -> None:
        """After somebody else changed parameters, moments or counters."""


class Trainer(nn.Module):
    """The trainable form of one kind.

    Every tensor that a resumed run needs is a parameter or a buffer. What is drawn at random in
    training comes from `self.generator`, which belongs to this SAE alone and is kept with it.
    """

    Config: ClassVar[type[TrainConfig]]
    NEEDS: ClassVar[frozenset[Literal["grad", "label"]]] = frozenset()
    """What must be in a `Batch` beside x."""
    FREEZES: ClassVar[dict[str, tuple[str, ...]]] = {}
    """The parameters that `freeze` means by "encoder" and by "decoder"."""
    LATENTS: ClassVar[Mapping[str, int]] = {}
    """The tensors of the state that have latents, and along which axis. A kind that several
    processes can train together says so by this, in its own class; one made from it does not
    inherit that."""

    def __init__(self, cfg: TrainConfig, d_in: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.d_in = d_in
        self.mesh = here()
        """The processes that this SAE is trained by, which share out its latents and the rows."""
        self.n_latents = cfg.d_sae // self.mesh.latent
        """Latents that are held here."""
        self.dead = DeadLatents(self.n_latents, cfg.dead_after, self.mesh)
        self.step = 0
        """How many steps were taken; the loop counts."""
        self.generator = torch.Generator()

    def to_device(self, device: str) -> None:
        """Once, before anything is drawn."""
        self.to(device)
        self.generator = stream("training", self.cfg.seed, device=device)

    def initialise(self, sample: Float[Tensor, "row d_in"]) -> None:
        """Set what depends on the data, from a sample of it. Called once, before the first step."""

    def losses(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """The terms of the loss by name, each already weighted; `mse` is the reconstruction's.

        Tells `self.dead` what fired. A kind that learns without gradients does so here, and its
        losses need none.
        """
        raise NotImplementedError

    def fused_step(self, optimiser: torch.optim.Optimizer, device: str) -> Step | None:
        """Steps of this kind's own that do what `losses`, the optimiser and the constraints do;
        None where it has none, or they cannot serve."""
        return None

    def before_step(self) -> None:
        """After the gradients are there, before the optimiser uses them."""

    def after_step(self) -> None:
        """After the optimiser's step: constraints."""

    def replant(
        self, batch: Batch, optimiser: torch.optim.Optimizer
    ) -> Int[Tensor, " latent"] | None:
        """Between steps: give dead latents new weights, where the config says that it is time.
        Returns those that were given some."""
        return None

    def per_row(self, n: Int[Tensor, ""] | Float[Tensor, ""], rows: int) -> Float[Tensor, ""]:
        """What is counted here on so many rows, as a mean over the rows of the whole batch."""
        return self.mesh.reduce(n, "all") / (rows * self.mesh.data)

    def over_latents(self, n: int, how: Literal["sum", "max"] = "sum") -> int:
        """What is counted of the latents held here, of all."""
        if self.mesh.latent == 1:
            return n
        return int(self.mesh.reduce(torch.tensor(n), "latent", how))

    def metrics(self) -> dict[str, float]:
        """Figures of the last batch for the log."""
        return {"dead": self.dead.share}

    def export(self) -> SAE:
        """The inference form, in the units that `losses` sees."""
        raise NotImplementedError

    def extras(self) -> dict[str, Tensor]:
        """What else the run leaves behind, written as `extras.safetensors`."""
        return {}

    def frozen(self) -> list[str]:
        """The parameters that the config keeps from learning.

        Raises ConfigError where the kind has no such part.
        """
        part = self.cfg.freeze.partition(":")[0].removeprefix("soft_")
        if part == "none":
            return []
        missing = {"all": {"encoder", "decoder"}}.get(part, {part}) - self.FREEZES.keys()
        if missing:
            raise ConfigError(
                f"freeze='{self.cfg.freeze}': this kind has no {' or '.join(sorted(missing))} of "
                f"its own to freeze (it has: {', '.join(self.FREEZES) or 'none'})"
            )
        if self.cfg.soft_cosine is not None:
            return []
        parts = self.FREEZES if part == "all" else (part,)
        return [name for one in parts for name in self.FREEZES[one]]


def coefficient(
    value: float,
    convention: Literal["sum", "mean", "fvu"],
    *,
    d_in: int,
    variance: float | None = None,
    penalty: Literal["l1", "l0"] = "l1",
    scale: float = 1.0,
) -> float:
    """A sparsity coefficient published under another convention, as ours (sum over d_in).

    With E the squared error summed over d_in and S the penalty, both means over rows, a paper's
    loss is E + c S ("sum": SAELens, dictionary_learning, Anthropic), E / d_in + c S ("mean"), or
    E / variance + c S ("fvu": sparsify; `variance` about the mean, summed over d_in, in our units).
    `scale` is our input's norm over theirs: E grows with its square, an L1 penalty with it, an L0
    penalty not at all. Raises ConfigError for "fvu" without a variance.
    """
    if convention == "fvu" and variance is None:
        raise ConfigError(
            "convention 'fvu' divides the error by the variance of x: give variance, in the units "
            "that training sees"
        )
    units = {"sum": 1.0, "mean": float(d_in), "fvu": variance or 0.0}[convention]
    if convention == "fvu":
        # E / variance has no units, so only the penalty's are left to undo.
        return value * units / scale ** (1 if penalty == "l1" else 0)
    return value * units * scale ** (1 if penalty == "l1" else 2)


def input_scale(cfg: TrainConfig, mean_norm: float, d_in: int) -> float:
    """What activations of a mean norm above 0 are multiplied by before training sees them."""
    match cfg.input_scaling:
        case "sqrt_d":
            return math.sqrt(d_in) / mean_norm
        case "unit":
            return 1 / mean_norm
        case "none":
            return 1.0


def fold_input_scale(sae: SAE, scale: float) -> SAE:
    """The SAE for `x` that does what this one does for `scale * x`.

    Decoder rows keep their norm; latents, biases and thresholds shrink by the scale instead. A
    matching pursuit's residual threshold is relative, and stays.
    """
    activation = sae.activation
    if isinstance(activation, JumpReLU):
        activation = JumpReLU(activation.threshold / scale)
    return replace(sae, b_enc=sae.b_enc / scale, b_dec=sae.b_dec / scale, activation=activation)


def unit_rows(d_sae: int, d_in: int, mesh: Mesh = ALONE) -> Float[Tensor, "latent {d_in}"]:
    """Random directions; of a mesh, those of the latents held here, as one process draws them."""
    held = mesh.held(d_sae)
    ends = [*range(DRAWN_AT_ONCE, d_sae - DRAWN_AT_ONCE + 1, DRAWN_AT_ONCE), d_sae]
    rows = torch.empty(held.stop - held.start, d_in)
    first = 0
    for end in [d_sae] if mesh.latent == 1 else ends:
        drawn = torch.randn(end - first, d_in)
        ours = slice(max(first, held.start), min(end, held.stop))
        if ours.start < ours.stop:
            rows[ours.start - held.start : ours.stop - held.start] = drawn[
                ours.start - first : ours.stop - first
            ]
        first = end
    normalise_rows(rows)
    return rows


DRAWN_AT_ONCE = 8_192
"""Rows; torch draws normal numbers 16 at a time, so that a multiple of 16 is drawn as a part of
more would be."""


@torch.no_grad()
def project_out_rows(grad: Float[Tensor, "d_sae d_in"], W: Float[Tensor, "d_sae d_in"]) -> None:
    """Take from each row of `grad` its part along the unit row of `W`, which would only change its
    norm."""
    # On a CPU so few at a time that what is made of them stays in the cache.
    at_once = 1_024 if W.device.type == "cpu" else len(W)
    for some, rows in zip(grad.split(at_once), W.split(at_once), strict=True):
        along = (some * rows).sum(1, keepdim=True)
        some.addcmul_(along, rows, value=-1)


@torch.no_grad()
def normalise_rows(W: Float[Tensor, "d_sae d_in"]) -> None:
    """Give each row of `W` norm 1, in place."""
    W.div_(W.norm(dim=1, keepdim=True))


@torch.no_grad()
def keep_near(
    W: Float[Tensor, "d_sae d_in"], anchor: Float[Tensor, "d_sae d_in"], cosine: float
) -> None:
    """Move each row of `W` whose cosine with its anchor (a unit row) is less than `cosine` to the
    nearest direction that has it, in place; norms stay."""
    norm = W.norm(dim=1, keepdim=True)
    along = (W * anchor).sum(1, keepdim=True)
    across = W - along * anchor
    width = across.norm(dim=1, keepdim=True).clamp_min(1e-12)
    back = cosine * anchor + math.sqrt(1 - cosine**2) * across / width
    W.copy_(torch.where(along < cosine * norm, norm * back, W))


def variance_of(x: Float[Tensor, "row d_in"], mesh: Mesh = ALONE) -> Float[Tensor, ""]:
    """Variance about the mean, summed over d_in, of the rows of a mesh. A tiny floor keeps a
    constant x from dividing by 0."""
    about = x - mesh.mean(x.mean(0))
    return mesh.mean(about.square().sum(1).mean()).clamp_min(1e-12)


Centre = Literal["geometric_median", "mean", "zero"]
"""What a decoder bias starts as."""


def centre(x: Float[Tensor, "row d_in"], which: Centre) -> Float[Tensor, " d_in"]:
    """Of the rows: their geometric median, their mean, or 0."""
    match which:
        case "geometric_median":
            return geometric_median(x)
        case "mean":
            return x.mean(0)
        case "zero":
            return torch.zeros_like(x[0])


def geometric_median(
    x: Float[Tensor, "row d_in"], *, tolerance: float = 1e-6, max_steps: int = 100
) -> Float[Tensor, " d_in"]:
    """The point with the least summed distance to the rows (Weiszfeld's iteration from the
    mean)."""
    point = x.mean(0)
    for _ in range(max_steps):
        weight = 1 / (x - point).norm(dim=1).clamp_min(1e-12)
        moved = (weight @ x) / weight.sum()
        if (moved - point).norm() <= tolerance * point.norm().clamp_min(1e-12):
            break
        point = moved
    return point
