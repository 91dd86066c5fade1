"""Whole training steps of TopK and BatchTopK SAEs: in plain PyTorch, by saekit's ops, and fused in
Triton.

A step is the bare one: forward, backward, Adam; no AuxK, no data. What is saekit's own also
projects the decoder's gradients and keeps its rows of unit length, which plain PyTorch here does
not. `check_step` holds its loss, gradients and choice of latents to float64, with fewer latents and
rows; `steps` times it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit import kernels
from saekit.kernels import reference
from saekit.kernels.bench_setting import (
    PLAIN,
    Facts,
    Line,
    Mistaken,
    Setting,
    Shape,
    distance,
    smaller,
)

NAMES = ("W_enc_T", "W_dec", "b_enc", "b_dec")
LR = 1e-4
TOPK, BATCH_TOPK = "topk step", "batch_topk step"
AS_TRAINED = {"deterministic": True, "split_master": True, "graph": True}
"""Options of the fused step in `trainers`. On a GPU without bfloat16 nothing is split."""

OFTEN_BIAS = 2.8
"""Added to the pre-activations, of variance 1, of latents that are to fire on almost half the
rows."""

_TURNS = 3
"""Steps of a check: the second of a graph is the one that is captured, the third a replay."""
_LOSS = {"bfloat16": 1e-3, "float32": 1e-5}
_MISSED = {"bfloat16": 5e-4, "float32": 1e-6}
"""Of the sum of the largest pre-activations, the share that a choice of others may lose."""
_GRADIENT = {"bfloat16": {"W_enc_T": 2e-2, "W_dec": 1e-2, "b_enc": 1e-2, "b_dec": 1e-2}}
_GRADIENT["float32"] = dict.fromkeys(NAMES, 1e-4)
"""Largest ||ours - theirs|| / ||theirs||: operands are rounded to 8 or 24 bits. That of b_dec is
the difference of two sums, and small where few latents fire often."""


def impls(setting: Setting) -> list[str]:
    """Of steps, by saekit and in plain PyTorch."""
    backend = setting.backend
    return [PLAIN, f"{backend} ops"] + (["fused"] if backend == "triton" else [])


def steps(setting: Setting, op: str) -> Iterator[Line]:
    for impl in impls(setting):
        options = as_trained(setting) if impl == "fused" else {}
        make = partial(timed_step, setting, op, impl, **options)
        yield setting.measure(op, impl, make, options=options)


def as_trained(setting: Setting) -> dict[str, Any]:
    """Options of the fused step as a trainer takes it on a device."""
    return AS_TRAINED | {"split_master": setting.precision == "bfloat16"}


def timed_step(
    setting: Setting, op: str, impl: str, **options: Any
) -> tuple[Callable[[], object], Facts]:
    step, following = make_step(setting, op, impl, **options), setting.following
    step.set_lr(LR)
    facts: Facts = {}

    def one() -> None:
        facts["loss"] = step(following())

    return one, facts


class BenchStep(ABC):
    """A training step: takes a batch, returns the loss of before it."""

    projects = True
    """Whether the gradients of W_dec are projected off its rows."""
    parameters: Mapping[str, Tensor]

    @abstractmethod
    def __call__(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]: ...

    @abstractmethod
    def set_lr(self, lr: float) -> None: ...

    @abstractmethod
    def kept(self) -> tuple[Int[Tensor, " kept"], Int[Tensor, " kept"]]:
        """Rows and latents of what the last batch kept above 0."""

    @abstractmethod
    def means(self) -> dict[str, Tensor]:
        """Adam's first moments, by the parameters' names."""


class _TorchStep(BenchStep):
    """By autograd and torch's fused Adam."""

    def __init__(self, start: Mapping[str, Tensor], k: int, whole: bool, precision: str) -> None:
        self._k, self._whole, self._halves = k, whole, precision == "bfloat16"
        held = {name: nn.Parameter(start[name]) for name in NAMES}
        self.parameters: Mapping[str, nn.Parameter] = held
        self._adam = torch.optim.Adam(list(held.values()), lr=LR, fused=True)
        self._code: tuple[Tensor, Tensor, Tensor | None]

    def set_lr(self, lr: float) -> None:
        self._adam.param_groups[0]["lr"] = lr

    def means(self) -> dict[str, Tensor]:
        return {name: self._adam.state[p]["exp_avg"] for name, p in self.parameters.items()}

    def __call__(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._halves):
            loss = self._loss(x)
        loss.backward()
        self._update()
        self._adam.zero_grad(set_to_none=True)
        return loss.detach()

    def _loss(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _update(self) -> None:
        self._adam.step()


class PlainStep(_TorchStep):
    """What one writes first in PyTorch: gradients of the encoder are dense."""

    projects = False

    def _loss(self, x: Tensor) -> Tensor:
        W_enc_T, W_dec, b_enc, b_dec = self.parameters.values()
        z = F.linear(x - b_dec, W_enc_T, b_enc).relu()
        if self._whole:
            values, at = z.flatten().topk(self._k * len(x), sorted=False)
            x_hat = torch.zeros_like(z).view(-1).scatter(0, at, values).view_as(z) @ W_dec
        else:
            values, at = z.topk(self._k, sorted=False)
            values = values.to(W_dec.dtype)
            x_hat = F.embedding_bag(at, W_dec, mode="sum", per_sample_weights=values)
        self._code = values.detach(), at, None
        return (x_hat + b_dec - x).square().sum(-1).mean()

    def kept(self) -> tuple[Tensor, Tensor]:
        values, at, _ = self._code
        if self._whole:
            at = at[values > 0]
            d_sae = len(self.parameters["W_dec"])
            return at // d_sae, at % d_sae
        rows, _ = (values > 0).nonzero(as_tuple=True)
        return rows, at[values > 0]


class OpsStep(_TorchStep):
    """By saekit's ops, as the trainers take it where no step is fused."""

    def _loss(self, x: Tensor) -> Tensor:
        W_enc_T, W_dec, b_enc, b_dec = self.parameters.values()
        centred = x - b_dec
        offsets = None
        if self._whole:
            n = self._k * len(x)
            values, indices, offsets = kernels.encode(
                centred, W_enc_T.T, b_enc, lambda pre: kernels.batch_topk(pre, n)
            )
        else:
            values, indices = kernels.topk_encode(centred, W_enc_T.T, b_enc, self._k)
        self._code = values.detach(), indices, offsets
        error = centred - kernels.sparse_decode(values, indices, W_dec, offsets)
        return error.square().sum(1).mean()

    @torch.no_grad()
    def _update(self) -> None:
        W_dec = self.parameters["W_dec"]
        assert W_dec.grad is not None
        along = (W_dec.grad * W_dec).sum(1, keepdim=True)
        W_dec.grad.addcmul_(along, W_dec, value=-1)
        self._adam.step()
        W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    def kept(self) -> tuple[Tensor, Tensor]:
        values, indices, offsets = self._code
        if offsets is not None:
            return reference.rows_of(offsets)[values > 0], indices[values > 0]
        rows, _ = (values > 0).nonzero(as_tuple=True)
        return rows, indices[values > 0]


class FusedStep(BenchStep):
    """See `triton_step.FusedTopKStep`, which is at `fused`."""

    def __init__(
        self,
        start: Mapping[str, Tensor],
        k: int,
        whole: bool,
        precision: str,
        *,
        batch_size: int,
        economy: bool = False,
        **options: Any,
    ) -> None:
        """`economy`: as trainers take it, moments in bfloat16, and candidates looked for in float8
        where rows are long enough for it to pay."""
        from saekit.kernels import triton_candidates
        from saekit.kernels.triton_step import FusedTopKStep
        from saekit.kernels.triton_step_forms import FusedBatchTopKStep

        def counts() -> Tensor:
            return torch.zeros(len(start["W_dec"]), dtype=torch.int64, device=start["W_dec"].device)

        W_dec = start["W_dec"]
        if economy:
            options["moments"] = torch.bfloat16
            wide = W_dec.shape[1] >= triton_candidates.LEAST_WIDTH
            if wide and triton_candidates.served(W_dec.device, W_dec.shape[1]) and not whole:
                options["candidates"] = min(len(W_dec), triton_candidates.candidates_of(k))
        self.fused = (FusedBatchTopKStep if whole else FusedTopKStep)(
            *(start[name] for name in NAMES),
            k=k,
            batch_size=batch_size,
            precision="bfloat16" if precision == "bfloat16" else "float32",
            since=counts(),
            fired=counts(),
            **options,
        )
        self.parameters = self.fused.parameters
        self._copies = not options.get("graph", False)
        self._x: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        # As a graph does, which copies the batch into its own memory.
        if self._copies:
            self._x = torch.empty_like(x) if self._x is None else self._x
            x = self._x.copy_(x)
        return self.fused(x)

    def set_lr(self, lr: float) -> None:
        self.fused.lr.fill_(lr)

    def means(self) -> dict[str, Tensor]:
        return {name: self.fused.state[name]["exp_avg"] for name in NAMES}

    def kept(self) -> tuple[Tensor, Tensor]:
        rank, rows = self.fused._rank, self.fused._rows
        if rows is None:
            rows = torch.arange(len(rank), device=rank.device)[:, None].expand_as(rank)
        return rows[rank >= 0].long(), self.fused._indices[rank >= 0].long()


def make_step(setting: Setting, op: str, impl: str, *, often: int = 0, **options: Any) -> BenchStep:
    """A step from random weights. `often`: so many latents fire on almost half the rows."""
    start = weights(setting.shape, setting.device, often)
    given = (start, setting.shape.k, op == BATCH_TOPK, setting.precision)
    if impl == PLAIN:
        return PlainStep(*given)
    if impl == "fused":
        return FusedStep(*given, batch_size=setting.batch_size, **options)
    return OpsStep(*given)


def weights(shape: Shape, device: torch.device, often: int = 0) -> dict[str, Tensor]:
    W_dec = torch.randn(shape.d_sae, shape.d_in, device=device)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    b_enc = 0.02 * torch.randn(shape.d_sae, device=device)
    b_enc[:often] += OFTEN_BIAS
    b_dec = 0.1 * torch.randn(shape.d_in, device=device)
    return dict(zip(NAMES, (W_dec.clone(), W_dec, b_enc, b_dec), strict=True))


def check_steps(setting: Setting) -> None:
    for op in (TOPK, BATCH_TOPK):
        for impl in impls(setting):
            check_step(setting, op, impl, as_trained(setting) if impl == "fused" else {})


def check_step(setting: Setting, op: str, impl: str, options: Mapping[str, Any]) -> Line:
    """A step against float64 with the latents that it chose, and these against the best. At a rate
    of 0, so that Adam's first moment is a known share of the gradient.

    Raises Mistaken where they are further apart than rounding explains.
    """
    setting = smaller(setting)
    shape, precision = setting.shape, setting.precision
    step = make_step(setting, op, impl, **options)
    parameters = [nn.Parameter(step.parameters[name].detach().double()) for name in NAMES]
    x = torch.randn(setting.batch_size, shape.d_in, device=setting.device)
    step.set_lr(0.0)
    loss = [float(step(x)) for _ in range(_TURNS)][-1]

    W_enc_T, W_dec, b_enc, b_dec = parameters
    rows, latents = step.kept()
    centred = x.double() - b_dec
    pre = (centred @ W_enc_T.T + b_enc).relu()
    values = pre[rows, latents]
    best = pre.detach().flatten().topk(shape.k * len(x)).values
    if op == TOPK:
        best = pre.detach().topk(shape.k).values
    missed = float(1 - values.sum().detach() / best.sum())
    z = torch.zeros_like(pre).index_put((rows, latents), values)
    error = z @ W_dec - centred
    wanted = error.square().sum(1).mean()
    gradients = torch.autograd.grad(wanted, parameters)
    grads = {name: grad.detach() for name, grad in zip(NAMES, gradients, strict=True)}
    if step.projects:
        rows_of_W = W_dec.detach()
        along = (grads["W_dec"] * rows_of_W).sum(1, keepdim=True)
        grads["W_dec"] = grads["W_dec"] - along * rows_of_W
    norm = sum(float(grad.square().sum()) for grad in grads.values()) ** 0.5
    clip_norm = options.get("clip_norm")
    share = 1 - 0.9**_TURNS
    if clip_norm is not None:
        share *= min(1.0, clip_norm / norm)
    found = {name: distance(step.means()[name], share * grads[name]) for name in NAMES}
    gradients_off = {name: float(f"{apart:.1e}") for name, apart in found.items()}
    of_loss = abs(loss / wanted.item() - 1)
    once = (rows * shape.d_sae + latents).unique().numel() == len(rows)
    counts = torch.bincount(rows, minlength=len(x))
    fits = len(rows) <= shape.k * len(x) and (op != TOPK or int(counts.max()) <= shape.k)
    limits = _GRADIENT[precision]
    good = once and fits and of_loss <= _LOSS[precision] and missed <= _MISSED[precision]
    if not good or not all(found[name] <= limits[name] for name in NAMES):
        raise Mistaken(
            f"{impl}, {op} {dict(options)}, at {setting.shape} is not what float64 makes of it: "
            f"loss off by {of_loss:.1e}, gradients by {gradients_off}, {missed:.1e} of the largest "
            f"pre-activations missed, each latent once a row: {once}, not too many: {fits}. "
            "SAEKIT_KERNELS=eager does without Triton; please report it"
        )
    return setting.line(
        op,
        impl,
        options=dict(options),
        check={
            "loss": float(f"{of_loss:.1e}"),
            "missed": float(f"{missed:.1e}"),
            "gradients": gradients_off,
        },
    )
