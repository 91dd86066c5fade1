import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saekit.kernels import ops, reference

DEVICE = runpy.run_path(str(Path(__file__).with_name("_interpret.py")))["DEVICE"]
triton_decode = pytest.importorskip("saekit.kernels.triton_decode")
triton_index = pytest.importorskip("saekit.kernels.triton_index")

# float32 sums of up to some hundred terms, against float64.
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEKIT_KERNELS", "triton")


def matches(values: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int, d: int) -> None:
    W_dec = torch.randn(d_sae, d)
    batch = len(indices) if offsets is None else len(offsets) - 1
    upstream = torch.randn(batch, d)
    results = []
    for op, dtype in ((ops.sparse_decode, None), (reference.sparse_decode, torch.double)):
        weights, table, grad = (
            t.to(DEVICE, dtype).detach().clone() for t in (values, W_dec, upstream)
        )
        weights.requires_grad_()
        table.requires_grad_()
        ends = None if offsets is None else offsets.to(DEVICE)
        x_hat = op(weights, indices.to(DEVICE), table, ends)
        results.append((x_hat, *torch.autograd.grad(x_hat, (weights, table), grad)))
    for ours, theirs in zip(*results, strict=True):
        close(ours.double(), theirs)


@pytest.mark.parametrize("d", [1, 65, 300])  # beyond one slice
@pytest.mark.parametrize(("batch", "k"), [(0, 3), (1, 1), (4, 20)])
def test_sparse_decode_matches_the_reference_with_all_gradients(batch: int, k: int, d: int) -> None:
    # Repeats, within a row and across rows, so that gradients must add up.
    matches(torch.rand(batch, k), torch.randint(0, 7, (batch, k)), None, 9, d)


@pytest.mark.parametrize("d", [1, 65])
def test_sparse_decode_of_uneven_rows_matches_the_reference_with_all_gradients(
    d: int,
) -> None:
    offsets = torch.tensor([0, 0, 3, 4, 4, 9, 9])  # rows of 0, 3, 1, 0, 5 and 0 latents
    indices = torch.tensor([2, 2, 0, 6, 1, 2, 3, 5, 5])
    matches(torch.rand(9), indices, offsets, 7, d)


def test_rows_that_are_all_empty_decode_to_zeros() -> None:
    nothing, offsets = torch.zeros(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    matches(torch.rand(0), nothing, offsets, 7, 5)


@pytest.mark.parametrize("heavy", [4, 17])
def test_a_latent_that_fires_on_most_rows_is_shared_among_programs(
    heavy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_index, "HEAVY", heavy)
    indices = torch.randint(0, 8, (40, 3))
    indices[:, 1] = 5
    matches(torch.rand(40, 3), indices, None, 8, 20)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_one_gradient_alone_is_the_same(
    wanted: tuple[bool, bool], deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_index, "HEAVY", 4)
    values, indices = torch.rand(6, 3, device=DEVICE), torch.randint(0, 3, (6, 3), device=DEVICE)
    table, grad = torch.randn(4, 10, device=DEVICE), torch.randn(6, 10, device=DEVICE)
    call = partial(triton_decode.decode_gradients, values, indices, None, table, grad)
    both = call()
    one = call(want_values=wanted[0], want_table=wanted[1], deterministic=deterministic)
    for want, alone, together in zip(wanted, one, both, strict=True):
        assert (alone is not None) == want
        if alone is not None:
            close(alone, together)


@pytest.mark.parametrize("heavy", [5, 40, 256])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("distinct", [False, True])
def test_the_index_holds_each_entry_once_below_its_latent(
    heavy: int, deterministic: bool, distinct: bool
) -> None:
    if distinct:
        # Latent 3 in all rows, at any place of them.
        indices = torch.stack([torch.randperm(11)[:4] for _ in range(30)])
        indices[:, 1] = torch.where((indices == 3).any(1), indices[:, 1], 3)
        indices = indices.to(DEVICE)
    else:
        indices = torch.randint(0, 11, (30, 4), device=DEVICE)
        indices[:, 0] = 3
    values = torch.rand(30, 4, device=DEVICE)
    index = triton_index.LatentIndex(
        13,
        120,
        values.device,
        deterministic=deterministic,
        distinct=30 if distinct else 0,
        heavy=heavy,
    )
    # A second time, into what the first has left.
    for shift in (0, 1):
        latents = (indices + shift).flatten()
        index.clear()
        index.of(values, latents.view(30, 4), k=4)
        for latent in range(13):
            first, n = int(index.start[latent]), int(index.count[latent])
            found = index.position[first : first + n].long()
            there = (latents == latent).nonzero().flatten()
            assert (found if deterministic else found.sort().values).equal(there)
            assert index.row[first : first + n].equal((found // 4).int())
            assert index.value[first : first + n].equal(values.flatten()[found])
        total, chunk_latent, _, length = index.chunks()
        n_chunks = int(total[1])
        covered = torch.zeros(13, dtype=torch.int32, device=DEVICE)
        covered.index_add_(0, chunk_latent[:n_chunks], length[:n_chunks])
        assert covered.equal(torch.where(index.count > heavy, index.count, 0))


def test_a_table_in_bfloat16_is_summed_in_float32() -> None:
    table = torch.randn(300, 5, device=DEVICE).bfloat16()
    values = torch.rand(2, 300, device=DEVICE)
    indices = torch.arange(300, device=DEVICE).expand(2, 300)
    x_hat = ops.sparse_decode(values, indices, table)
    theirs = values.double() @ table.double()
    # One rounding (which the interpreter does towards 0).
    assert x_hat.dtype == torch.bfloat16
    torch.testing.assert_close(x_hat.double(), theirs, rtol=2**-7, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("d", [768, 2_048, 5_000])
def test_large_codes_match_float64(d: int, dtype: torch.dtype) -> None:
    indices = torch.randint(0, 4_000, (1_000, 32), device=DEVICE)
    indices[:, :2] = torch.tensor([7, 9], device=DEVICE)
    values = torch.rand(1_000, 32, device=DEVICE, requires_grad=True)
    table = torch.randn(4_000, d, device=DEVICE).to(dtype).requires_grad_()
    upstream = torch.randn(1_000, d, device=DEVICE).to(dtype)
    x_hat = ops.sparse_decode(values, indices, table)
    found = (x_hat, *torch.autograd.grad(x_hat, (values, table), upstream))
    weights, rows = values.detach().double(), table.detach().double()
    dense = torch.zeros(1_000, 4_000, device=DEVICE, dtype=torch.double)
    dense.scatter_add_(1, indices, weights)
    wanted = (
        dense @ rows,
        (upstream.double() @ rows.T).gather(1, indices),
        dense.T @ upstream.double(),
    )
    # bfloat16: what goes out is rounded once, and what the values are given is not.
    limit = 3e-3 if dtype == torch.bfloat16 else 1e-6
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.double() - theirs).norm() < limit * theirs.norm()


@pytest.mark.gpu
def test_deterministic_gradients_are_the_same_bits() -> None:
    indices = torch.randint(0, 300, (4_000, 16), device=DEVICE)
    indices[:, 0] = 5
    values = torch.rand(4_000, 16, device=DEVICE)
    table, grad = torch.randn(300, 768, device=DEVICE), torch.randn(4_000, 768, device=DEVICE)
    call = partial(triton_decode.decode_gradients, values, indices, None, table, grad)
    first = call(deterministic=True)
    for _ in range(3):
        for one, other in zip(first, call(deterministic=True), strict=True):
            assert one.equal(other)
