"""An SAE as a file of another tool holds it, with what that tool does around its tensors.

    x, each row normalised (`row_norm`), times scale_in, whitened, less b_dec where `centred`
    pre = x @ W_enc + b_enc                    (where gated: x @ W_enc, see `Gate`)
    z = activation(pre * score)                (/ score, unless `gives_scores`)
    x_hat = z @ W_dec + b_dec                  (z / score again, where scores are given)
            whitening undone, / scale_out, row_norm undone, x @ W_skip added

`encode` and `decode` compute that as it stands, step by step, in plain PyTorch. `fold` moves the
steps into the weights instead, which gives a `saekit.sae.SAE`. The two share no line, so that each
proves the other: see `_parity`. Axes: batch, d_in, d_out, d_sae.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.errors import CheckpointError
from saekit.sae import SAE, Activation, JumpReLU, MatchingPursuit, ReLU, RowNorm, TopK

_NEVER = torch.finfo(torch.float32).max
"""A threshold that nothing reaches."""

Weights = dict[str, Tensor]
"""Tensors under the names that an SAE gives them; of a JumpReLU `threshold`, too."""


@dataclass(frozen=True)
class Gate:
    """Of a gated SAE (Rajamanoharan et al. 2024): a latent fires where pre + b_gate > 0, with the
    value relu(exp(r_mag) * pre + b_enc)."""

    b_gate: Float[Tensor, " d_sae"]
    r_mag: Float[Tensor, " d_sae"]


@dataclass(frozen=True)
class Whitening:
    """x is read as (x - mean) @ matrix, and x_hat given out as x_hat @ inverse + mean."""

    mean: Float[Tensor, " d_in"]
    matrix: Float[Tensor, "d_in d_in"]
    inverse: Float[Tensor, "d_in d_in"]


@dataclass(frozen=True)
class Step:
    """One thing that a tool does at run time, as a change of the weights, and the way back."""

    name: str
    do: Callable[[Weights], Weights]
    undo: Callable[[Weights], Weights]


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """Tensors as they stand in the file, but for their axes, which are an SAE's."""

    format: str
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    activation: Activation
    W_skip: Float[Tensor, "d_in d_out"] | None = None
    """Reads x as it comes, and adds to what comes out last."""
    row_norm: RowNorm | None = None
    scale_in: float = 1.0
    scale_out: float = 1.0
    centred: bool = False
    whitening: Whitening | None = None
    gate: Gate | None = None
    """With it the activation is ReLU."""
    score: Float[Tensor, " d_sae"] | None = None
    """What each latent's pre-activation is multiplied by before the activation chooses."""
    gives_scores: bool = True
    """Whether a latent's value is its score; else it is its pre-activation."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Whatever else the file says of the SAE: model, hook point, training."""

    def __post_init__(self) -> None:
        pursuit = isinstance(self.activation, MatchingPursuit)
        scaled = self.scale_in != 1 or self.scale_out != 1 or self.score is not None
        if pursuit and (scaled or self.whitening is not None):
            raise CheckpointError(
                "a matching pursuit whose input is scaled or whitened cannot be held: its latents "
                "would be in other units than its decoder's rows"
            )
        if self.gate is not None and not isinstance(self.activation, ReLU):
            raise CheckpointError("a gated SAE with another activation than ReLU cannot be held")
        if self.W_skip is not None and self.row_norm is not None:
            raise CheckpointError(
                "a skip path beside rows that are normalised cannot be held: nothing says which of "
                "both the path would read"
            )
        if not (0 < self.scale_in < math.inf and 0 < self.scale_out < math.inf):
            raise CheckpointError(
                f"scaled by {self.scale_in} and {self.scale_out}: both must be above 0, and finite"
            )

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Latents as the tool gives them out."""
        if self.row_norm is not None:
            x = self.row_norm.normalise(x)
        x = x * self.scale_in
        if self.whitening is not None:
            x = (x - self.whitening.mean) @ self.whitening.matrix
        if self.centred:
            x = x - self.b_dec
        if isinstance(self.activation, MatchingPursuit):
            return self._pursue(x, self.activation)
        pre = x @ self.W_enc
        if self.gate is not None:
            open_ = pre + self.gate.b_gate > 0
            return open_ * (pre * self.gate.r_mag.exp() + self.b_enc).relu()
        pre = pre + self.b_enc
        scores = pre if self.score is None else pre * self.score
        match self.activation:
            case ReLU():
                kept = scores > 0
            case JumpReLU(threshold):
                kept = (scores > threshold) & (scores > 0)
            case TopK(k):
                chosen = torch.zeros_like(scores, dtype=torch.bool)
                kept = chosen.scatter(-1, scores.topk(k).indices, True) & (scores > 0)
        return torch.where(kept, scores if self.gives_scores else pre, 0.0)

    def _pursue(
        self, left: Float[Tensor, "batch d_in"], how: MatchingPursuit
    ) -> Float[Tensor, "batch d_sae"]:
        z = left.new_zeros(len(left), len(self.W_dec))
        enough = how.residual * left.norm(dim=1)
        # A row of zeros has nothing to take.
        going = left.norm(dim=1) > enough
        row = torch.arange(len(left), device=left.device)
        for _ in range(how.steps):
            products = left @ self.W_dec.T
            latent = (products.abs() if how.signed else products).argmax(1)
            value = products[row, latent] * going
            value = value if how.signed else value.relu()
            again = z[row, latent] != 0
            z[row, latent] += value
            left = left - value[:, None] * self.W_dec[latent]
            length = left.norm(dim=1)
            going = going & (length > enough) & (value != 0) & (length >= how.rest)
            going = going & ~(again & how.once)
        return z

    @torch.no_grad()
    def decode(
        self, z: Float[Tensor, "batch d_sae"], x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "batch d_out"]:
        """The reconstruction of latents that `encode` gave for x."""
        if self.score is not None and self.gives_scores:
            z = torch.where(self.score > 0, z / self.score, 0.0)
        x_hat = z @ self.W_dec + self.b_dec
        if self.whitening is not None:
            x_hat = x_hat @ self.whitening.inverse + self.whitening.mean
        x_hat = x_hat / self.scale_out
        if self.row_norm is not None:
            x_hat = self.row_norm.restore(x_hat, x)
        return x_hat if self.W_skip is None else x_hat + x @ self.W_skip

    @property
    def unit(self) -> Float[Tensor, " d_sae"] | None:
        """What 1 of a latent, as the tool gives it out, is in the folded SAE; None where it is
        1."""
        if self.score is None or self.gives_scores or not isinstance(self.activation, TopK):
            return None
        return self.score

    def steps(self) -> list[Step]:
        """What `fold` does, in order."""
        found = []
        if self.gate is not None:
            found.append(_ungate(self.gate))
        if self.score is not None:
            # Only a choice among latents needs their scores; a threshold can be in pre's units.
            found.append(_score(self.score, self.gives_scores or self.unit is not None))
        if self.centred and not isinstance(self.activation, MatchingPursuit):
            found.append(_CENTRE)
        if self.whitening is not None:
            found.append(_whiten(self.whitening))
        if self.scale_in != 1 or self.scale_out != 1:
            found.append(_scale(self.scale_in, self.scale_out))
        return found

    def fold(self) -> SAE:
        """The SAE that gives the same latents (in `unit`) and reconstructions.

        Folding is done in float64; the result is in the file's precision, float32 at least, as
        folded weights no longer fit half precision.
        """
        weights = self.weights()
        for step in self.steps():
            weights = step.do(weights)
        wide = torch.promote_types(self.W_enc.dtype, torch.float32)
        for name, tensor in weights.items():
            weights[name] = tensor.to(wide)
            if not weights[name].isfinite().all():
                raise CheckpointError(
                    f"{name} is not finite in {wide} once its tool's scaling is part of it: it "
                    "cannot be held"
                )
        return self.sae_of(weights)

    def weights(self) -> Weights:
        """The tensors as they are, in float64."""
        named = {name: getattr(self, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        if isinstance(self.activation, JumpReLU):
            named["threshold"] = self.activation.threshold
        if self.W_skip is not None:
            named["W_skip"] = self.W_skip
        return {name: tensor.double() for name, tensor in named.items()}

    def sae_of(self, weights: Weights) -> SAE:
        """An SAE of these weights that chooses latents as this one does."""
        weights = dict(weights)
        if isinstance(self.activation, MatchingPursuit):
            b_dec = weights["b_dec"] if self.centred else torch.zeros_like(weights["b_dec"])
            if not self.centred and weights["b_dec"].any():
                raise CheckpointError(
                    "a matching pursuit of x itself, whose reconstruction adds a bias, cannot be "
                    "held: here it takes x - b_dec apart"
                )
            sae = SAE.of_atoms(weights["W_dec"], b_dec, self.activation)
            return replace(sae, row_norm=self.row_norm)
        threshold = weights.pop("threshold", None)
        how = self.activation if threshold is None else JumpReLU(threshold.clamp_min(0))
        return SAE(
            W_enc=weights["W_enc"],
            b_enc=weights["b_enc"],
            W_dec=weights["W_dec"],
            b_dec=weights["b_dec"],
            activation=how,
            W_skip=weights.get("W_skip"),
            row_norm=self.row_norm,
        )


def plain(sae: SAE, format: str = "saekit", origin: dict[str, Any] | None = None) -> Stored:
    """An SAE of our own as `Stored`: nothing around its tensors but what an SAE holds itself."""
    tensors = sae.tensors()
    tensors.pop("threshold", None)
    return Stored(
        format=format,
        **tensors,  # type: ignore[arg-type]
        activation=sae.activation,
        row_norm=sae.row_norm,
        centred=isinstance(sae.activation, MatchingPursuit),
        origin=origin or {},
    )


def uncentred(sae: SAE) -> Float[Tensor, " d_sae"]:
    """The encoder's bias of a format whose tool subtracts b_dec from x."""
    wide = sae.b_enc.double() + sae.b_dec.double() @ sae.W_enc.double()
    return wide.to(sae.b_enc.dtype)


def _ungate(gate: Gate) -> Step:
    r"""Of both conditions on pre, pre > -b_gate and exp(r_mag) * pre + b_mag > 0, the stronger is a
    threshold on the latent itself: max(0, b_mag - exp(r_mag) * b_gate)."""
    b_gate, grow = gate.b_gate.double(), gate.r_mag.double().exp()

    def do(w: Weights) -> Weights:
        threshold = (w["b_enc"] - grow * b_gate).clamp_min(0)
        return {**w, "W_enc": w["W_enc"] * grow, "threshold": threshold}

    def undo(w: Weights) -> Weights:
        return {name: t for name, t in w.items() if name != "threshold"} | {
            "W_enc": w["W_enc"] / grow
        }

    return Step("the gate becomes a threshold, exp(r_mag) part of W_enc", do, undo)


def _score(score: Tensor, into_latents: bool) -> Step:
    score = score.double()
    # What scores 0 never fires, whatever its weights.
    back = torch.where(score > 0, 1 / score, 0.0)

    def do(w: Weights) -> Weights:
        if into_latents:
            return {
                **w,
                "W_enc": w["W_enc"] * score,
                "b_enc": w["b_enc"] * score,
                "W_dec": w["W_dec"] * back[:, None],
            }
        if "threshold" not in w:
            return w
        return {**w, "threshold": torch.where(score > 0, w["threshold"] * back, _NEVER)}

    def undo(w: Weights) -> Weights:
        if into_latents:
            return {
                **w,
                "W_enc": w["W_enc"] * back,
                "b_enc": w["b_enc"] * back,
                "W_dec": w["W_dec"] * score[:, None],
            }
        if "threshold" not in w:
            return w
        return {**w, "threshold": torch.where(score > 0, w["threshold"] * score, 0.0)}

    where = "W_enc, b_enc and W_dec" if into_latents else "the thresholds"
    return Step(f"the factor by which latents are compared becomes part of {where}", do, undo)


def _add_centre(w: Weights, sign: int) -> Weights:
    return {**w, "b_enc": w["b_enc"] + sign * (w["b_dec"] @ w["W_enc"])}


_CENTRE = Step(
    "b_dec, which is subtracted from x, becomes part of b_enc",
    lambda w: _add_centre(w, -1),
    lambda w: _add_centre(w, 1),
)


def _whiten(by: Whitening) -> Step:
    mean, matrix, inverse = by.mean.double(), by.matrix.double(), by.inverse.double()

    def do(w: Weights) -> Weights:
        return {
            **w,
            "W_enc": (W_enc := matrix @ w["W_enc"]),
            "b_enc": w["b_enc"] - mean @ W_enc,
            "W_dec": w["W_dec"] @ inverse,
            "b_dec": w["b_dec"] @ inverse + mean,
        }

    def undo(w: Weights) -> Weights:
        return {
            **w,
            "W_enc": inverse @ w["W_enc"],
            "b_enc": w["b_enc"] + mean @ w["W_enc"],
            "W_dec": w["W_dec"] @ matrix,
            "b_dec": (w["b_dec"] - mean) @ matrix,
        }

    return Step("whitening becomes part of all weights", do, undo)


def _scale(into: float, out: float) -> Step:
    def change(w: Weights, into: float, out: float) -> Weights:
        return {
            **w,
            "W_enc": w["W_enc"] * into,
            "W_dec": w["W_dec"] / out,
            "b_dec": w["b_dec"] / out,
        }

    return Step(
        f"x * {into:.8g} becomes part of W_enc, x_hat / {out:.8g} of W_dec and b_dec",
        lambda w: change(w, into, out),
        lambda w: change(w, 1 / into, 1 / out),
    )
