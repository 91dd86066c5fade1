from functools import partial

import pytest
import torch

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
    for op in (eager.topk_encode, reference.topk_encode):
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
    for op in (eager.sparse_decode, reference.sparse_decode):
        x_hat = op(values, indices, W_dec)
        results.append((x_hat, *torch.autograd.grad(x_hat, (values, W_dec), upstream)))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


def test_a_row_without_positive_preactivations_has_only_zeros() -> None:
    values, _ = eager.topk_encode(torch.ones(2, 3), -torch.ones(3, 5), torch.zeros(5), 2)
    assert values.eq(0).all()


def test_an_empty_batch_is_encoded_and_decoded() -> None:
    values, indices = eager.topk_encode(torch.empty(0, 3), torch.randn(3, 5), torch.zeros(5), 2)
    assert eager.sparse_decode(values, indices, torch.randn(5, 4)).shape == (0, 4)
