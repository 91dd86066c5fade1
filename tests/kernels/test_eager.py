"""The parts that `eager.py` finds in ways of its own, beside what they are."""

import pytest
import torch

from saekit.kernels import eager

NAN = float("nan")


@pytest.mark.parametrize("dtype", eager.BITS)
@pytest.mark.parametrize(("n", "k"), [(7, 3), (64, 1), (100, 100), (1024, 5), (2048, 500)])
def test_topk_finds_the_largest_above_0_ties_and_nan_with_them(
    dtype: torch.dtype, n: int, k: int
) -> None:
    pre = torch.randn(12, n).to(dtype)
    pre[1] = -pre[1].abs()
    pre[2] = 0
    pre[3, ::2] = 1
    for row, nan in ((4, NAN), (5, -NAN)):
        pre[row, n // 2] = torch.copysign(torch.tensor(NAN), torch.tensor(nan)).to(dtype)
    pre[6] = torch.inf
    before = pre.clone()
    indices = eager.topk(pre, k)
    found = pre.gather(1, indices).relu().sort(1).values
    wanted = pre.topk(k).values.relu().sort(1).values
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert all(len(set(row)) == k for row in indices.tolist())
    torch.testing.assert_close(pre, before, rtol=0, atol=0, equal_nan=True)


def test_topk_of_no_rows() -> None:
    assert eager.topk(torch.empty(0, 64), 2).shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_products_of_rows_with_what_indices_name(dtype: torch.dtype, index: torch.dtype) -> None:
    # Whole numbers, which bfloat16 adds up without rounding; the table lies transposed.
    table = torch.randint(-3, 4, (5, 7)).to(dtype).T
    rows = torch.randint(-3, 4, (1, 5)).to(dtype).expand(4, 5)
    indices = torch.randint(7, (4, 3), dtype=index)
    offsets = torch.tensor([0, 0, 2, 11, 12], dtype=index)
    of = torch.arange(4).repeat_interleave(offsets.diff())
    wanted = (rows[:, None] * table[indices]).sum(-1)
    torch.testing.assert_close(eager.products(indices, None, rows, table), wanted)
    flat = indices.flatten()
    wanted = (rows[of] * table[flat]).sum(-1)
    torch.testing.assert_close(eager.products(flat, offsets, rows, table), wanted)
