from functools import partial

import pytest
import torch
from torch import Tensor

from saekit import kernels
from saekit.kernels import eager, reference

# float64 on both sides: what is left is the order of summation.
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("d_in", [1, 48, 65])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_topk_encode_matches_the_reference_with_all_gradients(d_in: int, k: int) -> None:
    x = torch.randn(5, d_in, dtype=torch.float64, requires_grad=True)
    W_enc = torch.randn(d_in, 7, dtype=torch.float64, requires_grad=True)
    b_enc = torch.randn(7, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, 7, dtype=torch.float64)
    dense, grads = [], []
    for op in (kernels.topk_encode, reference.topk_encode):
        values, indices = op(x, W_enc, b_enc, k)
        z = torch.zeros(5, 7, dtype=torch.float64).scatter(1, indices, values)
        dense.append(z)
        grads.append(torch.autograd.grad(z, (x, W_enc, b_enc), upstream))
    close(*dense)
    for ours, theirs in zip(*grads, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("d_out", [1, 48, 65])
@pytest.mark.parametrize("batch", [1, 6])
def test_sparse_decode_matches_the_reference_with_all_gradients(d_out: int, batch: int) -> None:
    values = torch.rand(batch, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.randint(0, 4, (batch, 3))  # repeats, so that the decoder's gradient must add up
    W_dec = torch.randn(7, d_out, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(batch, d_out, dtype=torch.float64)
    results = []
    for op in (kernels.sparse_decode, reference.sparse_decode):
        x_hat = op(values, indices, W_dec)
        results.append((x_hat, *torch.autograd.grad(x_hat, (values, W_dec), upstream)))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


def test_a_row_without_positive_preactivations_has_only_zeros() -> None:
    values, _ = kernels.topk_encode(torch.ones(2, 3), -torch.ones(3, 5), torch.zeros(5), 2)
    assert values.eq(0).all()


def test_an_empty_batch_is_encoded_and_decoded() -> None:
    values, indices = kernels.topk_encode(torch.empty(0, 3), torch.randn(3, 5), torch.zeros(5), 2)
    assert kernels.sparse_decode(values, indices, torch.randn(5, 4)).shape == (0, 4)


def ragged(pre: Tensor) -> tuple[Tensor, Tensor]:
    """A rule: what is above 0.3; none in some rows, and some that are negative elsewhere."""
    rows, indices = ((pre > 0.3) | (pre < -2)).nonzero(as_tuple=True)
    return indices, reference.row_offsets(rows, len(pre))


@pytest.mark.parametrize("d_in", [1, 48, 65])
@pytest.mark.parametrize("rule", [ragged, lambda pre: (pre[:, :2].argsort(), None)])
def test_encode_matches_the_reference_with_all_gradients(d_in: int, rule: reference.Rule) -> None:
    x = torch.randn(6, d_in, dtype=torch.float64)
    x[2] = 0
    x.requires_grad_()
    W_enc = torch.randn(d_in, 7, dtype=torch.float64, requires_grad=True)
    b_enc = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    results = []
    for op in (kernels.encode, reference.encode):
        values, indices, offsets = op(x, W_enc, b_enc, rule)
        upstream = torch.linspace(-1, 1, values.numel()).double().view_as(values)
        grads = torch.autograd.grad(values, (x, W_enc, b_enc), upstream)
        results.append((values, indices, *([] if offsets is None else [offsets]), *grads))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


def test_encode_of_a_rule_that_keeps_nothing_has_no_gradient() -> None:
    x, W_enc, b_enc = torch.randn(4, 3), torch.randn(3, 5), torch.zeros(5)
    W_enc.requires_grad_()
    nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    values, indices, offsets = kernels.encode(x, W_enc, b_enc, lambda pre: nothing)
    x_hat = kernels.sparse_decode(values, indices, torch.randn(5, 2), offsets)
    assert x_hat.tolist() == [[0, 0]] * 4
    (grad,) = torch.autograd.grad(x_hat.sum(), W_enc)
    assert grad.eq(0).all()


@pytest.mark.parametrize("d_out", [1, 48, 65])
def test_sparse_decode_of_uneven_rows_matches_the_reference_with_all_gradients(
    d_out: int,
) -> None:
    offsets = torch.tensor([0, 0, 3, 4, 4, 9, 9])  # rows of 0, 3, 1, 0, 5 and 0 latents
    indices = torch.tensor([2, 2, 0, 6, 1, 2, 3, 5, 5])  # repeats, within a row and across rows
    values = torch.rand(9, dtype=torch.float64, requires_grad=True)
    W_dec = torch.randn(7, d_out, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(6, d_out, dtype=torch.float64)
    results = []
    for op in (kernels.sparse_decode, reference.sparse_decode):
        x_hat = op(values, indices, W_dec, offsets)
        results.append((x_hat, *torch.autograd.grad(x_hat, (values, W_dec), upstream)))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


def same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("n", [0, 1, 17, 60, 1000])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (13, 31), (0, 5)])
def test_batch_topk_matches_the_reference(shape: tuple[int, int], n: int) -> None:
    pre = torch.randn(*shape)
    same(eager.batch_topk(pre, n), reference.batch_topk(pre, n))


def test_batch_topk_keeps_the_largest_of_all_row_by_row() -> None:
    pre = torch.tensor([[1.0, -1.0, 7.0], [-2.0, -3.0, -4.0], [6.0, 5.0, 0.0]])
    indices, offsets = eager.batch_topk(pre, 3)
    assert (indices.tolist(), offsets.tolist()) == ([2, 0, 1], [0, 1, 1, 3])
    # Four of nine are above 0; a zero is not kept.
    assert eager.batch_topk(pre, 9)[0].tolist() == [0, 2, 0, 1]


@pytest.mark.parametrize(
    "kind", ["alike", "a few large columns", "a few large rows", "few above 0"]
)
def test_batch_topk_is_exact_whatever_its_sample_says(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eager, "_SAMPLE", 200)
    pre = torch.randn(120, 150)
    match kind:
        case "a few large columns":
            pre[:, ::50] += 10
        case "a few large rows":
            pre[::50] += 10
        case "few above 0":
            pre -= 2
    for n in (3, 500, 2_000):
        same(eager.batch_topk(pre, n), reference.batch_topk(pre, n))
    # What the sample meets is no measure of the rest: every bound is too high.
    pre.flatten()[:: 120 * 150 // 200 | 1] += 10
    for n in (500, 2_000):
        same(eager.batch_topk(pre, n), reference.batch_topk(pre, n))


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (13, 31), (0, 5)])
def test_column_topk_matches_the_reference(shape: tuple[int, int]) -> None:
    pre = torch.randn(*shape)
    for quotas in (torch.zeros(shape[1]), torch.randint(0, 20, shape[1:]), torch.ones(shape[1])):
        same(eager.column_topk(pre, quotas.long()), reference.column_topk(pre, quotas.long()))


def test_column_topk_keeps_the_largest_of_each_column() -> None:
    pre = torch.tensor([[1.0, -1.0, 7.0], [3.0, -3.0, 4.0], [6.0, 5.0, 8.0]])
    indices, offsets = eager.column_topk(pre, torch.tensor([2, 2, 0]))
    assert (indices.tolist(), offsets.tolist()) == ([0, 0, 1], [0, 0, 1, 3])


@pytest.mark.parametrize("rows", [10, 100])
@pytest.mark.parametrize("kind", ["alike", "the sample is large", "few above 0", "columns differ"])
def test_column_topk_is_exact_whatever_its_sample_says(
    kind: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eager, "_SAMPLE_ROWS", rows)
    pre = torch.randn(400, 50)
    match kind:
        case "the sample is large":
            pre[:: 400 // rows] += 10
        case "few above 0":
            pre -= 2
        case "columns differ":
            pre *= torch.rand(50)
            pre += torch.linspace(-2, 2, 50)
    for most in (1, 5, 150, 400):
        quotas = torch.randint(0, most + 1, (50,))
        same(eager.column_topk(pre, quotas), reference.column_topk(pre, quotas))


def test_of_equal_entries_as_many_are_kept_as_may_be() -> None:
    pre = torch.ones(6, 8)
    assert len(eager.batch_topk(pre, 11)[0]) == 11
    indices, _ = eager.column_topk(pre, torch.arange(8))
    assert torch.bincount(indices, minlength=8).tolist() == [0, 1, 2, 3, 4, 5, 6, 6]
