"""What a sparse autoencoder is, once trained: the one inference form of every kind and every file
format.

    z = activation(x @ W_enc + b_enc),    x_hat = z @ W_dec + b_dec  (+ x @ W_skip)

A matching pursuit is the exception: its latents come of several steps, each of which reads what the
steps before have left (see `MatchingPursuit`).

Whatever a trainer does to its input (centring by b_dec, scaling) is folded into these weights when
it exports. What hangs on the row cannot be: SAEs of some other tools normalise each row, which
`row_norm` holds. Axes: batch, d_in, d_out (= d_in but for transcoders), d_sae (latents), k (latents
kept a row).
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit import kernels
from saekit.errors import ConfigError
from saekit.results import Provenance


@dataclass(frozen=True)
class ReLU:
    """Every positive pre-activation is kept."""


@dataclass(frozen=True)
class TopK:
    """The k largest pre-activations of each row are kept, and of those the positive ones."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"k={self.k} must be at least 1: it is how many latents a row keeps")


@dataclass(frozen=True, eq=False)
class JumpReLU:
    """A pre-activation is kept, unchanged, where it exceeds its latent's threshold (>= 0)."""

    threshold: Float[Tensor, " d_sae"]


@dataclass(frozen=True)
class MatchingPursuit:
    """x - b_dec is taken apart in steps (Mallat and Zhang 1993): each takes the latent whose
    decoder row has the largest inner product with what is left, and that part away.

    A latent's value is the sum of what it took. The SAE's decoder rows must have norm 1, its
    encoder is their transpose, and `pre` gives the inner products of the first step. Fields may be
    changed on a trained SAE: more steps leave less.
    """

    steps: int
    residual: float = 0.0
    """A row stops once what is left of it is no longer than this share of its x - b_dec. Without,
    it goes on to fit what rounding left."""
    signed: bool = False
    """Take the inner product that is largest in absolute value, so that latents may be negative.
    Otherwise a row stops where none is above 0."""
    rest: float = 0.0
    """A row stops once what is left of it is shorter than this, in units of x. No kind that is
    trained here has one; SAELens does."""
    once: bool = False
    """A row stops with the first step that takes a latent again. As `rest`."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(
                f"steps={self.steps} must be at least 1: each takes one latent of a row"
            )
        if not 0 <= self.rest < math.inf:
            raise ConfigError(f"rest={self.rest} must be 0 or more: it is a length")
        if not 0 <= self.residual < 1:
            raise ConfigError(
                f"residual={self.residual} must lie in 0..1, below 1: it is the share of a row's "
                "length that may be left"
            )


Activation = ReLU | TopK | JumpReLU | MatchingPursuit


@dataclass(frozen=True)
class LayerNorm:
    """Each row is taken less its mean, over its standard deviation (of n - 1) plus eps. What is put
    back is the standard deviation alone, as in the code of Gao et al. (2024)."""

    eps: float = 1e-5

    def __post_init__(self) -> None:
        if not 0 <= self.eps < math.inf:
            raise ConfigError(f"eps={self.eps} must be 0 or more: it keeps a constant row finite")

    def normalise(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps)

    def restore(
        self, x_hat: Float[Tensor, "batch d_out"], x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "batch d_out"]:
        return x_hat * x.std(-1, keepdim=True) + x.mean(-1, keepdim=True)


@dataclass(frozen=True)
class UnitRow:
    """Each row is scaled to the length sqrt(d_in); a row of zeros stays one."""

    def normalise(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        length = self._length(x)
        return x / torch.where(length > 0, length, 1.0)

    def restore(
        self, x_hat: Float[Tensor, "batch d_out"], x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "batch d_out"]:
        return x_hat * self._length(x)

    def _length(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch 1"]:
        length: Tensor = x.norm(dim=-1, keepdim=True)
        return length / math.sqrt(x.shape[-1])


RowNorm = LayerNorm | UnitRow


@dataclass(frozen=True, eq=False)
class SparseCode:
    """The active latents of each row. A slot whose value is 0 holds no latent, whatever its index
    says."""

    values: Float[Tensor, "batch k"]
    indices: Int[Tensor, "batch k"]

    def dense(self, d_sae: int) -> Float[Tensor, "batch {d_sae}"]:
        z = self.values.new_zeros(self.values.shape[0], d_sae)
        return z.scatter_add_(1, self.indices, self.values)


@dataclass(frozen=True, eq=False)
class SAE:
    """A sparse autoencoder ready for use: tensors in, tensors out, nothing hidden."""

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    activation: Activation
    W_skip: Float[Tensor, "d_in d_out"] | None = None
    row_norm: RowNorm | None = None
    """What is done to each row before all else, and undone to its reconstruction: latents are in
    units of the normalised row. None for every SAE that was trained here."""
    provenance: Provenance | None = None
    """Where it comes from; None for weights made by hand."""

    def __post_init__(self) -> None:
        d_in, d_sae = self.W_enc.shape
        want = {
            "W_enc": (d_in, d_sae),
            "b_enc": (d_sae,),
            "W_dec": (d_sae, self.d_out),
            "b_dec": (self.d_out,),
            "W_skip": (d_in, self.d_out),
            "threshold": (d_sae,),
        }
        for name, tensor in self.tensors().items():
            shape = want[name]
            if tuple(tensor.shape) != shape:
                raise ConfigError(
                    f"{name} has shape {tuple(tensor.shape)}, but W_enc {tuple(self.W_enc.shape)} "
                    f"and W_dec {tuple(self.W_dec.shape)} ask for {shape}"
                )
        if isinstance(self.activation, TopK) and self.activation.k > d_sae:
            raise ConfigError(
                f"k={self.activation.k} exceeds d_sae={d_sae}: at most all latents can be kept"
            )
        if self.row_norm is not None and self.W_skip is not None:
            raise ConfigError(
                "an SAE has a W_skip or a row_norm: nothing says whether the skip path would read "
                "rows before they are normalised or after"
            )
        if isinstance(self.activation, MatchingPursuit):
            self._check_atoms()

    def _check_atoms(self) -> None:
        """What a matching pursuit asks of the weights, up to what rounding them may change."""
        remedy = "SAE.of_atoms makes one from decoder rows of norm 1"
        if self.W_skip is not None:
            raise ConfigError(
                "a matching pursuit takes x itself apart, so there can be no W_skip: leave it out"
            )
        if not self.W_enc.equal(self.W_dec.T):
            raise ConfigError(
                f"W_enc is not W_dec's transpose, as a matching pursuit asks for: {remedy}"
            )
        wide = torch.promote_types(self.W_dec.dtype, torch.float32)
        allowed = max(1e-3, 2 * torch.finfo(self.W_dec.dtype).eps)
        norm = torch.linalg.vector_norm(self.W_dec.detach(), dim=1, dtype=wide)
        off = (norm - 1).abs()
        if (off > allowed).any():
            worst = int(off.argmax())
            raise ConfigError(
                f"W_dec's row {worst} has norm {float(norm[worst]):.4g}, and in a matching pursuit "
                "what is left of x may grow unless it is 1: divide each row by its norm"
            )
        b_dec = self.b_dec.detach().to(wide)
        apart = (self.b_enc.detach() + b_dec @ self.W_enc.detach().to(wide)).abs()
        if (apart > allowed * b_dec.norm()).any():
            raise ConfigError(
                f"b_enc is not -b_dec @ W_enc, as a matching pursuit asks for: {remedy}"
            )

    @classmethod
    def of_atoms(
        cls,
        W_dec: Float[Tensor, "d_sae d_in"],
        b_dec: Float[Tensor, " d_in"],
        activation: MatchingPursuit,
    ) -> "SAE":
        """A matching pursuit's SAE, whose encoder follows from its decoder."""
        W_enc = W_dec.T
        return cls(W_enc, -b_dec @ W_enc, W_dec, b_dec, activation)

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    def pre(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Pre-activations: what the activation chooses from."""
        return self.normalised(x) @ self.W_enc + self.b_enc

    def normalised(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """The rows as the encoder reads them: x itself where there is no `row_norm`."""
        return x if self.row_norm is None else self.row_norm.normalise(x)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Latents as a dense matrix; for many rows or latents prefer `encode_sparse`."""
        match self.activation:
            case ReLU():
                return self.pre(x).relu()
            case JumpReLU(threshold):
                pre = self.pre(x)
                return pre * (pre > threshold)
            case TopK() | MatchingPursuit():
                return self.encode_sparse(x).dense(self.d_sae)

    def encode_sparse(self, x: Float[Tensor, "batch d_in"]) -> SparseCode:
        """Latents as (values, indices), a latent once in a row at most. ReLU and JumpReLU rows are
        padded to the widest row's count."""
        how = self.activation
        if isinstance(how, TopK):
            x = self.normalised(x)
            return SparseCode(*kernels.topk_encode(x, self.W_enc, self.b_enc, how.k))
        if isinstance(how, MatchingPursuit):
            x = self.normalised(x) - self.b_dec
            values, indices, _ = kernels.matching_pursuit(
                x, self.W_dec, how.steps, how.residual, how.signed
            )
            if how.rest or how.once:
                values = _cut(values, indices, x, self.W_dec, how)
            return SparseCode(*kernels.merge_repeats(values, indices))
        z = self.encode(x)
        # One slot at least, so that a batch on which nothing fires still has a code.
        widest = max(1, int((z > 0).sum(-1).max())) if z.shape[0] else 1
        values, indices = z.topk(widest, dim=-1, sorted=False)
        return SparseCode(values, indices)

    def decode(
        self,
        z: Float[Tensor, "batch d_sae"] | SparseCode,
        x: Float[Tensor, "batch d_in"] | None = None,
    ) -> Float[Tensor, "batch d_out"]:
        """Reconstruction from latents, dense or sparse; `x` is needed where there is a skip path or
        a `row_norm`."""
        if isinstance(z, SparseCode):
            x_hat = kernels.sparse_decode(z.values, z.indices, self.W_dec) + self.b_dec
        else:
            x_hat = z @ self.W_dec + self.b_dec
        if self.W_skip is None and self.row_norm is None:
            return x_hat
        if x is None:
            what = "has a skip path" if self.row_norm is None else "normalises each row"
            raise ConfigError(f"this SAE {what}: decode needs the input x beside the latents")
        if self.W_skip is not None:
            return x_hat + x @ self.W_skip
        assert self.row_norm is not None
        return self.row_norm.restore(x_hat, x)

    def __call__(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        """The reconstruction of x (for a transcoder: the prediction of its target)."""
        return self.decode(self.encode_sparse(x), x)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by the name it has in a file."""
        named = {name: getattr(self, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        if self.W_skip is not None:
            named["W_skip"] = self.W_skip
        if isinstance(self.activation, JumpReLU):
            named["threshold"] = self.activation.threshold
        return named

    def to(self, *args: Any, **kwargs: Any) -> "SAE":
        """A copy on another device or of another dtype; the arguments of `Tensor.to`."""
        moved: dict[str, Any] = {n: t.to(*args, **kwargs) for n, t in self.tensors().items()}
        threshold = moved.pop("threshold", None)
        activation = self.activation if threshold is None else JumpReLU(threshold)
        return replace(self, **moved, activation=activation)

    @property
    def device(self) -> torch.device:
        return self.W_enc.device


def _cut(
    values: Float[Tensor, "batch steps"],
    indices: Int[Tensor, "batch steps"],
    left: Float[Tensor, "batch d_in"],
    W_dec: Float[Tensor, "d_sae d_in"],
    how: MatchingPursuit,
) -> Float[Tensor, "batch steps"]:
    """A pursuit's steps without those that come after a row's end by `rest` or `once`: what a step
    takes does not hang on whether the row goes on after it."""
    going = torch.ones(len(values), dtype=torch.bool, device=values.device)
    kept = torch.zeros_like(values)
    for step in range(values.shape[1]):
        value, latent = values[:, step] * going, indices[:, step]
        kept[:, step] = value
        left = left - value[:, None] * W_dec[latent]
        if how.rest:
            going = going & (left.norm(dim=1) >= how.rest)
        if how.once:
            before = (indices[:, :step] == latent[:, None]) & (values[:, :step] != 0)
            going = going & ~before.any(1)
    return kept
