"""Each Triton kernel beside its definition, on small random inputs: what a GPU, a driver or a
version of Triton that nobody has tried yet must pass before anything is trained with it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from saekit.kernels import reference, triton_backend, triton_pursuit
from saekit.kernels.reference import rows_of
from saekit.kernels.triton_step import FusedTopKStep
from saekit.kernels.triton_step_forms import FusedBatchTopKStep, FusedJumpReLUStep

_LIMIT = 1e-4
"""Largest ||ours - theirs|| / ||theirs||: float32 sums against float64."""

BATCH, D_IN, D_SAE, K = 300, 100, 5_000, 7


def failures(device: torch.device) -> dict[str, str]:
    """The ops that are off on this device, and by how much, or what they raise."""
    found = {}
    generator = torch.Generator().manual_seed(0)
    for name, check in CHECKS.items():
        try:
            off = check(partial(_normal, generator, device))
        except Exception as error:
            # Whatever a compiler or a driver raises: it is the finding.
            found[name] = f"{type(error).__name__}: {error}"
            continue
        if not off <= _LIMIT:
            found[name] = f"it differs from its definition by {off:.1e} (at most {_LIMIT:.0e})"
    return found


def _normal(generator: torch.Generator, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(device)


Normal = Callable[..., Tensor]


def _distance(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))


def _topk(normal: Normal) -> float:
    pre = normal(BATCH, D_SAE).bfloat16()
    values = pre.gather(1, triton_backend.topk(pre, K)).relu()
    wanted = pre.relu().float().topk(K).values
    return _distance(values.float().sort(1, descending=True).values, wanted.double())


def _batch_topk(normal: Normal) -> float:
    pre = normal(BATCH, D_SAE)
    indices, offsets = triton_backend.batch_topk(pre, K * BATCH)
    theirs, rows = reference.batch_topk(pre, K * BATCH)
    same = indices.equal(theirs) and offsets.equal(rows)
    return 0.0 if same else float("inf")


def _code(normal: Normal) -> tuple[Tensor, Tensor]:
    indices = normal(BATCH, D_SAE).topk(K).indices
    indices[:, 0] = 3  # on every row, and on some twice
    return normal(BATCH, K), indices


def _weighted_rows(normal: Normal) -> float:
    (values, indices), table = _code(normal), normal(D_SAE, D_IN)
    ours = triton_backend.weighted_rows(values, indices, None, table)
    return _distance(ours, reference.sparse_decode(values.double(), indices, table.double()))


def _decode_gradients(normal: Normal) -> float:
    values, indices = _code(normal)
    table, grad = normal(D_SAE, D_IN), normal(BATCH, D_IN)
    ours = triton_backend.decode_gradients(values, indices, None, table, grad)
    held = [values.double().requires_grad_(), table.double().requires_grad_()]
    x_hat = reference.sparse_decode(held[0], indices, held[1])
    theirs = torch.autograd.grad(x_hat, held, grad.double())
    assert ours[0] is not None and ours[1] is not None
    return max(
        _distance(one, other) for one, other in zip(ours, theirs, strict=True) if one is not None
    )


def _pursuit(normal: Normal) -> float:
    """What is left of each row, and its gradient; which of two atoms that tie is taken, is not
    asked."""
    atoms, x = normal(D_SAE, D_IN), normal(BATCH, D_IN)
    atoms /= atoms.norm(dim=1, keepdim=True)
    found = []
    for op, dtype in (
        (triton_pursuit.matching_pursuit, torch.float32),
        (reference.matching_pursuit, torch.float64),
    ):
        held = x.to(dtype).requires_grad_()
        _, _, rest = op(held, atoms.to(dtype), K)
        left = rest.norm(dim=1)
        found.append((left, *torch.autograd.grad(left.sum(), held)))
    return max(_distance(one, other) for one, other in zip(*found, strict=True))


def _start(normal: Normal) -> tuple[list[Tensor], list[Tensor]]:
    """Of a step: parameters, and the same in float64."""
    W_dec = normal(D_SAE, D_IN)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    b_enc, b_dec = 0.1 * normal(D_SAE), 0.1 * normal(D_IN)
    b_enc[:2] += 3  # on most rows
    start = [W_dec.clone(), W_dec, b_enc, b_dec]
    return start, [tensor.double().requires_grad_() for tensor in start]


@contextmanager
def _in_full_float32() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _gradients_off(step: FusedTopKStep, loss: Tensor, wanted: Tensor, held: list[Tensor]) -> float:
    """The gradients are what Adam's first moment holds of after a step, times 1 / 0.1."""
    grads = list(torch.autograd.grad(wanted, held))
    grads[1] = grads[1] - (grads[1] * held[1]).sum(1, keepdim=True) * held[1].detach()
    ours = [10 * step.state[name]["exp_avg"] for name in ("W_enc_T", "W_dec", "b_enc", "b_dec")]
    off = [_distance(one, other) for one, other in zip(ours, grads, strict=True)]
    return max(*off, _distance(loss, wanted))


def _step(form: type[FusedTopKStep], normal: Normal) -> float:
    (start, held), x = _start(normal), normal(BATCH, D_IN)
    step = form(*start, k=K, batch_size=BATCH, precision="float32", deterministic=True)
    with _in_full_float32():
        loss = step(x)
    # With the code that it chose: whether that is right is asked of `topk` and `batch_topk`.
    indices, offsets = step.code()
    centred = x.double() - held[3]
    pre = centred @ held[0].T + held[2]
    kept = pre.gather(1, indices) if offsets is None else pre[rows_of(offsets), indices]
    error = centred - reference.sparse_decode(kept.relu(), indices, held[1], offsets)
    return _gradients_off(step, loss, error.square().sum(1).mean(), held)


def _jumprelu_step(normal: Normal) -> float:
    (start, held), x = _start(normal), normal(BATCH, D_IN)
    level, penalty = 2 + normal(D_SAE).abs(), 0.1
    factor, half = torch.full_like(start[3][0], 0.9), torch.full_like(start[3][0], 0.2)
    step = FusedJumpReLUStep(
        *start,
        level=level.clone(),
        factor=factor,
        half=half,
        k=K,
        batch_size=BATCH,
        precision="float32",
        deterministic=True,
    )
    assert step.jump is not None
    step.jump[2] = penalty
    with _in_full_float32():
        loss = step(x)
    threshold = level * factor
    # As its own sums of products, rounded, have it.
    fires, near = step._pre > threshold, (step._pre > threshold - half)
    near &= step._pre < threshold + half
    centred = x.double() - held[3]
    z = ((centred @ held[0].T + held[2]) * fires).requires_grad_()
    error = centred - z @ held[1]
    wanted = error.square().sum(1).mean()
    (d_z,) = torch.autograd.grad(wanted, z, retain_graph=True)
    pull = threshold * (d_z * near).sum(0) + penalty * near.sum(0)
    levels = _distance(10 * step.state["level"]["exp_avg"], -factor * pull / (2 * half))
    return max(levels, _gradients_off(step, loss, wanted, held))


CHECKS: dict[str, Callable[[Normal], float]] = {
    "topk": _topk,
    "batch_topk": _batch_topk,
    "weighted_rows": _weighted_rows,
    "decode_gradients": _decode_gradients,
    "matching pursuit": _pursuit,
    "fused TopK step": partial(_step, FusedTopKStep),
    "fused BatchTopK step": partial(_step, FusedBatchTopKStep),
    "fused JumpReLU step": _jumprelu_step,
}
