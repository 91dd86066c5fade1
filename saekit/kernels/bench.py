"""How long the ops and whole training steps of TopK and BatchTopK SAEs take on this machine, beside
plain PyTorch.

A step is the bare one: forward, backward, Adam; no AuxK, no data. What is saekit's own also
projects the decoder's gradients and keeps its rows of unit length, which plain PyTorch here does
not. Before anything is timed it is checked: an op against the reference, a step's loss, gradients
and choice of latents against float64, with fewer latents and rows.

Times are of the GPU's own clock, or of the CPU's; medians. Four batches in rotation. Memory is the
most that torch had in use for a case, weights and moments with it, the four batches without.
"""

import gc
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

import saekit
from saekit import kernels
from saekit.errors import ConfigError, SaekitError, first_line, nearest
from saekit.kernels import eager, reference
from saekit.kernels._choose import triton_backend

Line = dict[str, Any]
"""Of results. `ms` is the median, None where there is an `error`."""
Facts = dict[str, Any]
"""Plain values for a line, or tensors of one number. `loss` must be finite."""
Make = Callable[[], tuple[Callable[[], object], Facts]]
"""Builds what is timed; its call may renew the facts."""

GIB = 1 << 30
NAMES = ("W_enc_T", "W_dec", "b_enc", "b_dec")
LR = 1e-4
PLAIN = "plain torch"
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
_OP = 1e-5


@dataclass(frozen=True)
class Shape:
    d_in: int
    d_sae: int
    k: int

    def __post_init__(self) -> None:
        if self.d_in < 1 or self.d_sae < 1:
            raise ConfigError(
                f"shape {self.d_in} {self.d_sae} {self.k} lacks dimensions or latents: there must "
                "be at least one of each; give d_in, d_sae and k"
            )
        if not 0 < self.k <= self.d_sae:
            raise ConfigError(
                f"k={self.k} must lie in 1..d_sae={self.d_sae}: it is how many latents fire; "
                "give d_in, d_sae and k"
            )


SHAPES = {
    "S": Shape(768, 24_576, 32),
    "M": Shape(2_048, 65_536, 64),
    "L": Shape(4_096, 131_072, 64),
}


def shape_named(name: str) -> Shape:
    if name not in SHAPES:
        raise ConfigError(
            f"'{name}' is no shape that is known (--shape D_IN D_SAE K gives one of your own); "
            f"{nearest(name, SHAPES)}"
        )
    return SHAPES[name]


class Mistaken(SaekitError):
    """Something to be timed does not do what it should."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One shape on one device, and how often each case is timed."""

    shape: Shape
    batch_size: int
    device: torch.device
    rounds: int = 20
    warm_ups: int = 5
    name: str = ""
    """Of the shape."""
    plain: dict[str, list[float]] = field(default_factory=dict)
    """Milliseconds of plain PyTorch by op, once they are known."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "rounds"):
            if (given := getattr(self, name)) < 1:
                raise ConfigError(f"{name}={given} must be at least 1")

    @property
    def precision(self) -> str:
        """What is multiplied; weights and moments are float32."""
        return _precision(self.device)

    @cached_property
    def following(self) -> Callable[[], Float[Tensor, "batch d_in"]]:
        """Gives the next of four batches."""
        return rotation(self.shape.d_in, self.batch_size, self.device)

    @property
    def backend(self) -> str:
        return kernels.choose(self.device, torch.float32, self.shape.d_in).backend

    def line(self, op: str, impl: str, variant: str = "", **more: Any) -> Line:
        return {
            "impl": impl,
            "op": op,
            "variant": variant,
            "shape": self.name,
            "d_in": self.shape.d_in,
            "d_sae": self.shape.d_sae,
            "k": self.shape.k,
            "batch": self.batch_size,
            "precision": self.precision,
            "device": self.device.type,
            "hardware": hardware(self.device),
            "versions": versions(),
            **more,
        }

    def measure(self, op: str, impl: str, make: Make, variant: str = "", **more: Any) -> Line:
        """Time what `make` builds. Where memory does not suffice, the line says so."""
        # The batches are no case's own.
        _ = self.following
        forget(self.device)
        before = allocated(self.device)
        try:
            call, facts = make()
            took = milliseconds(call, self.device, self.rounds, self.warm_ups)
        except torch.OutOfMemoryError as error:
            return self.line(op, impl, variant, ms=None, error=first_line(error), **more)
        facts = {name: _plain_value(fact) for name, fact in facts.items()}
        if not _finite(facts.get("loss", 0.0)):
            raise Mistaken(
                f"the loss of {impl}, {op}, is {facts['loss']}, so its times say nothing; please "
                "report it"
            )
        if impl == PLAIN:
            self.plain[op] = took
        found = self.line(op, impl, variant, **summary(took), **more, **facts)
        if op.endswith("step"):
            found["tokens_per_s"] = round(self.batch_size / found["ms"] * 1e3)
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) - before
            found["peak_gib"] = round(peak / GIB, 3)
        if op in self.plain:
            found |= {"against": PLAIN, **ratio(took, self.plain[op])}
        return found


def _precision(device: torch.device) -> str:
    halves = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if halves else "float32"


def _plain_value(fact: Any) -> Any:
    return float(fact) if isinstance(fact, Tensor) else fact


def _finite(loss: float) -> bool:
    return abs(loss) < float("inf")


def every(setting: Setting, *, peers: bool = False) -> Iterator[Line]:
    """The ops and the steps of a shape; those of other libraries, too, that are installed."""
    check_ops(setting)
    check_steps(setting)
    yield from ops(setting)
    for op in (TOPK, BATCH_TOPK):
        yield from steps(setting, op)
    if peers:
        yield from peer_steps(setting)


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


def peer_steps(setting: Setting) -> Iterator[Line]:
    """A peer's failure is a line, too."""
    from saekit.kernels import bench_peers

    shape = setting.shape
    sizes = (shape.d_in, shape.d_sae, shape.k, setting.batch_size)
    for name, mode, make in bench_peers.peers(*sizes, setting.following):
        try:
            line = setting.measure(TOPK, name, make, mode)
        except Exception as error:
            line = setting.line(TOPK, name, mode, ms=None, error=first_line(error))
        yield line


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
        **options: Any,
    ) -> None:
        from saekit.kernels.triton_step import FusedBatchTopKStep, FusedTopKStep

        def counts() -> Tensor:
            return torch.zeros(len(start["W_dec"]), dtype=torch.int64, device=start["W_dec"].device)

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
    setting = _smaller(setting)
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


def _smaller(setting: Setting) -> Setting:
    """What float64 is quick at."""
    latents, rows = (8_192, 2_048) if setting.device.type == "cuda" else (2_048, 256)
    shape = setting.shape
    d_sae = min(shape.d_sae, max(latents, shape.k))
    return replace(
        setting, shape=replace(shape, d_sae=d_sae), batch_size=min(setting.batch_size, rows)
    )


def distance(ours: Tensor, theirs: Tensor) -> float:
    norm = float(theirs.norm())
    return float((ours.double() - theirs).norm()) / (norm or 1.0)


@dataclass(frozen=True)
class _Code:
    """What the ops of a shape are timed on."""

    centred: Float[Tensor, "batch d_in"]
    W_enc_T: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    pre: Float[Tensor, "batch d_sae"]
    values: Float[Tensor, "batch k"]
    indices: Int[Tensor, "batch k"]


def _code(setting: Setting) -> _Code:
    start = weights(setting.shape, setting.device)
    low = torch.bfloat16 if setting.precision == "bfloat16" else torch.float32
    centred = (setting.following() - start["b_dec"]).to(low)
    W_enc_T, b_enc = start["W_enc_T"].to(low), start["b_enc"].to(low)
    pre = torch.addmm(b_enc, centred, W_enc_T.T)
    values, indices = pre.topk(setting.shape.k, sorted=False)
    # Of the decoder's precision, as in a step.
    values = values.relu().float()
    return _Code(centred, W_enc_T, b_enc, start["W_dec"], pre, values, indices)


def _module(setting: Setting) -> ModuleType:
    """Of the backend that calls take."""
    found: ModuleType = {"eager": lambda: eager, "triton": triton_backend}.get(
        setting.backend, lambda: reference
    )()
    return found


def ops(setting: Setting) -> Iterator[Line]:
    """Each op by itself: in plain PyTorch, and on the backend that calls take."""
    forget(setting.device)
    try:
        code = _code(setting)
    except torch.OutOfMemoryError as error:
        yield setting.line("encoder matmul", PLAIN, ms=None, error=first_line(error))
        return
    n, backend = setting.shape.k * setting.batch_size, setting.backend
    W_enc = code.W_enc_T.T

    def matmul() -> None:
        torch.addmm(code.b_enc, code.centred, W_enc, out=code.pre)

    timed: list[tuple[str, str, Callable[[], Callable[[], object]]]] = [
        ("encoder matmul", PLAIN, lambda: matmul),
        ("select", PLAIN, lambda: lambda: code.pre.relu().topk(setting.shape.k, sorted=False)),
        ("select", backend, lambda: partial(_select(setting), code.pre, setting.shape.k)),
        ("select of a batch", PLAIN, lambda: partial(_select_flat, code.pre, n)),
        ("select of a batch", backend, lambda: partial(kernels.batch_topk, code.pre, n)),
        ("decode", PLAIN, lambda: partial(_bags, code.values, code.indices, code.W_dec)),
        ("decode", backend, lambda: partial(_decode, code.values, code.indices, code.W_dec)),
        ("decode backward", PLAIN, lambda: _backward(_bags, code)),
        ("decode backward", backend, lambda: _backward(_decode, code)),
        ("index", PLAIN, lambda: partial(_sorted, code.indices, setting.shape.d_sae)),
    ]
    if backend == "triton":
        timed.append(("index", backend, lambda: _index(setting, code)[1]))
    for op, impl, make in timed:
        precision = "float32" if op.startswith("decode") else setting.precision
        yield setting.measure(op, impl, partial(_without_facts, make)) | {"precision": precision}


def _without_facts(
    make: Callable[[], Callable[[], object]],
) -> tuple[Callable[[], object], Facts]:
    return make(), {}


def _select(setting: Setting) -> Callable[[Tensor, int], Tensor]:
    if setting.backend == "reference":
        return lambda pre, k: pre.relu().topk(k, sorted=False).indices
    topk: Callable[[Tensor, int], Tensor] = _module(setting).topk
    return topk


def _select_flat(pre: Tensor, n: int) -> Tensor:
    return pre.relu().flatten().topk(n, sorted=False).indices


def _bags(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    return F.embedding_bag(indices, W_dec, mode="sum", per_sample_weights=values)


def _decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    return kernels.sparse_decode(values, indices, W_dec)


def _backward(decode: Callable[[Tensor, Tensor, Tensor], Tensor], code: _Code) -> Callable[[], Any]:
    """Gradients of the values and of W_dec, given those of x_hat."""
    given = [tensor.detach().requires_grad_() for tensor in (code.values, code.W_dec)]
    out = decode(given[0], code.indices, given[1])
    upstream = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, given, upstream, retain_graph=True)


def _sorted(indices: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """Entries by latent, and where each latent's begin."""
    latent, order = indices.flatten().sort(stable=True)
    return order, reference.row_offsets(latent, d_sae)


def _index(setting: Setting, code: _Code) -> tuple[Any, Callable[[], None]]:
    from saekit.kernels.triton_index import LatentIndex

    rows, k = code.indices.shape
    index = LatentIndex(
        setting.shape.d_sae, rows * k, setting.device, deterministic=True, distinct=rows
    )
    indices = code.indices.int()

    def build() -> None:
        index.clear()
        index.of(code.values, indices, k=k)

    return index, build


def check_ops(setting: Setting) -> None:
    """Each op beside its definition. Raises Mistaken where they differ by more than rounding."""
    small = _smaller(setting)
    code = _code(small)
    wrong = {}
    # Of the full width, on which depends how it is selected from.
    pre = torch.randn(64, setting.shape.d_sae, device=setting.device).to(code.pre.dtype)
    top = pre.gather(1, _select(small)(pre, small.shape.k)).relu()
    wanted = pre.relu().topk(small.shape.k).values
    wrong["select"] = distance(top.sort(descending=True).values, wanted.double())
    n = small.shape.k * len(pre)
    indices, offsets = kernels.batch_topk(pre, n)
    top = pre[reference.rows_of(offsets), indices].sort(descending=True).values
    wanted = pre.flatten().topk(n).values
    wrong["select of a batch"] = distance(top, wanted[wanted > 0].double())
    upstream = torch.randn(small.batch_size, small.shape.d_in, device=small.device)
    ours, theirs = (
        _gradients(op, code.values.to(dtype), code.indices, code.W_dec.to(dtype), upstream)
        for op, dtype in ((_decode, torch.float32), (reference.sparse_decode, torch.float64))
    )
    for name, a, b in zip(("decode", "of values", "of W_dec"), ours, theirs, strict=True):
        wrong[name] = distance(a, b)
    if small.backend == "triton":
        index, build = _index(small, code)
        build()
        order, first = _sorted(code.indices, small.shape.d_sae)
        within = torch.arange(len(order), device=small.device)
        within -= first[:-1].repeat_interleave(first.diff())
        at = index.start.repeat_interleave(first.diff()) + within
        wrong["index"] = distance(index.position[at], order.double())
    if bad := {name: f"{apart:.1e}" for name, apart in wrong.items() if not apart <= _OP}:
        raise Mistaken(
            f"{small.backend} ops at {small.shape} are not what they are defined as: off by {bad}. "
            "SAEKIT_KERNELS=reference is the definition; please report it"
        )


def _gradients(
    op: Callable[[Tensor, Tensor, Tensor], Tensor],
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    upstream: Tensor,
) -> tuple[Tensor, ...]:
    """x_hat, and the gradients of the values and of W_dec."""
    given = [tensor.detach().requires_grad_() for tensor in (values, W_dec)]
    out = op(given[0], indices, given[1])
    return out.detach(), *torch.autograd.grad(out, given, upstream.to(out.dtype))


def milliseconds(
    call: Callable[[], object], device: torch.device, rounds: int, warm_ups: int
) -> list[float]:
    for _ in range(warm_ups):
        call()
    if device.type != "cuda":
        took = []
        for _ in range(rounds):
            begun = time.perf_counter()
            call()
            took.append((time.perf_counter() - begun) * 1e3)
        return took
    events = []
    for _ in range(rounds):
        begins, ends = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begins.record()
        call()
        ends.record()
        events.append((begins, ends))
    torch.cuda.synchronize(device)
    return [float(begins.elapsed_time(ends)) for begins, ends in events]


def rotation(d_in: int, batch_size: int, device: torch.device) -> Callable[[], Tensor]:
    held = [torch.randn(batch_size, d_in, device=device) for _ in range(4)]
    number = [0]

    def following() -> Tensor:
        number[0] += 1
        return held[number[0] % len(held)]

    return following


def forget(device: torch.device) -> None:
    """Give a GPU's memory back, so that a case is not charged with that of the one before."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def summary(took: list[float]) -> Line:
    return {
        "ms": round(median(took), 5),
        "ms_min": round(min(took), 5),
        "ms_max": round(max(took), 5),
        "rounds": len(took),
    }


def ratio(took: list[float], plain: list[float]) -> dict[str, float]:
    """How many times as fast as plain PyTorch: of the medians, and pair by pair at least and at
    most."""
    pairs = [theirs / ours for ours, theirs in zip(took, plain, strict=True)]
    return {
        "ratio": round(median(plain) / median(took), 4),
        "ratio_min": round(min(pairs), 4),
        "ratio_max": round(max(pairs), 4),
    }


def hardware(device: torch.device) -> str:
    """What a device is called, and how many threads a CPU's work is spread over."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    named = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    name = named[0] if named else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "saekit": saekit.__version__}
    for package in ("torch", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


COLUMNS = ("shape", "what", "ms", "min..max", "tokens/s", "GiB", f"times {PLAIN}")


def rows(lines: Iterable[Line]) -> Iterator[tuple[str, ...]]:
    """Lines of results as a table under COLUMNS. GiB: memory at its fullest."""
    for line in lines:
        sizes = f"{line['d_in']} {line['d_sae']} {line['k']}"
        what = ", ".join(filter(None, (line["op"], line["impl"], line["variant"])))
        if line["ms"] is None:
            yield line["shape"] or sizes, f"{what}: {line['error']}", "-", "", "", "", ""
            continue
        yield (
            line["shape"] or sizes,
            what,
            _short(line["ms"]),
            f"{_short(line['ms_min'])}..{_short(line['ms_max'])}",
            f"{line['tokens_per_s']:,}" if "tokens_per_s" in line else "",
            f"{line['peak_gib']:.2f}" if "peak_gib" in line else "",
            f"{line['ratio']:.2f}" if "ratio" in line else "",
        )


def _short(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 1000 else f"{ms:.3g}"
