"""The ops of TopK and BatchTopK SAEs one by one: matrix product, selection, decoding and its
gradients, each in plain PyTorch and on the backend that calls take.

`check_ops` holds each to its definition, with fewer latents and rows; `ops` then times them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from saekit import kernels
from saekit.errors import first_line
from saekit.kernels import eager, reference
from saekit.kernels._choose import triton_backend
from saekit.kernels.bench_setting import (
    PLAIN,
    Facts,
    Line,
    Mistaken,
    Setting,
    distance,
    forget,
    smaller,
)
from saekit.kernels.bench_steps import weights

_OFF = 1e-5
"""Largest ||ours - theirs|| / ||theirs|| of a check."""


def check_ops(setting: Setting) -> None:
    """Each op beside its definition. Raises Mistaken where they differ by more than rounding."""
    small = smaller(setting)
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
    if bad := {name: f"{apart:.1e}" for name, apart in wrong.items() if not apart <= _OFF}:
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


def _select(setting: Setting) -> Callable[[Tensor, int], Tensor]:
    if setting.backend == "reference":
        return lambda pre, k: pre.relu().topk(k, sorted=False).indices
    module = triton_backend() if setting.backend == "triton" else eager
    topk: Callable[[Tensor, int], Tensor] = module.topk
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
