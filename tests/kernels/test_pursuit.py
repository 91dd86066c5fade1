from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from saekit.kernels import matching_pursuit, merge_repeats, pursuit, reference
from saekit.kernels.pursuit import _largest, gram_pays

# float64 on both sides: what is left is the order of summation.
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)


@pytest.fixture(params=[True, False], ids=["gram", "products"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either way to find the inner products, whatever would pay at these sizes."""
    monkeypatch.setattr(pursuit, "gram_pays", lambda *_: request.param)


def unit_rows(n: int, d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d, dtype=dtype))


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("residual", [0.0, 0.3])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("d_sae", "d", "steps"), [(1, 1, 3), (13, 5, 20), (40, 17, 12), (600, 9, 4)]
)
def test_matches_the_reference_with_all_gradients(
    d_sae: int, d: int, steps: int, signed: bool, residual: float
) -> None:
    x = torch.randn(33, d, dtype=torch.float64)
    x[4] = 0  # stops before its first step
    x.requires_grad_()
    W_dec = unit_rows(d_sae, d).requires_grad_()
    upstream = torch.randn(33, steps, dtype=torch.float64), torch.randn(33, d, dtype=torch.float64)
    results = []
    for op in (matching_pursuit, reference.matching_pursuit):
        values, indices, rest = op(x, W_dec, steps, residual, signed)
        grads = torch.autograd.grad((values, rest), (x, W_dec), upstream)
        results.append((values, indices, rest, *grads))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)
    if d_sae == 13 and residual:
        assert 0.1 < (values == 0).double().mean() < 0.95, "rows stop at different steps"
    elif d_sae == 13:
        assert values[0].count_nonzero() > len(indices[0].unique()), "an atom comes twice"


@pytest.mark.usefixtures("route")
def test_gradients_are_those_of_finite_differences() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    W_dec = unit_rows(9, 6).requires_grad_()

    def values_and_rest(x: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor]:
        values, _, rest = matching_pursuit(x, W_dec, 7, 0.1, signed=True)
        return values, rest

    assert torch.autograd.gradcheck(values_and_rest, (x, W_dec))


@pytest.mark.usefixtures("route")
def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    W_dec = unit_rows(20, 8).requires_grad_()
    results = []
    for block in (1, 7 * 20, 2**20):
        monkeypatch.setattr(pursuit, "_BLOCK", block)
        values, indices, rest = matching_pursuit(x, W_dec, 9, 0.2)
        grads = torch.autograd.grad(rest.square().sum() + values.sum(), (x, W_dec))
        results.append((values, indices, rest, *grads))
    for one, some, all_ in zip(*results, strict=True):
        close(one, all_)
        close(some, all_)


@pytest.mark.usefixtures("route")
def test_an_empty_batch_is_taken_apart() -> None:
    values, indices, rest = matching_pursuit(torch.empty(0, 3), unit_rows(5, 3).float(), 2)
    assert values.shape == indices.shape == (0, 2)
    assert rest.shape == (0, 3)


@pytest.mark.usefixtures("route")
def test_a_row_that_is_not_finite_is_left_so() -> None:
    """A loss of it is then no number, and training says that it diverged."""
    x = torch.ones(3, 4)
    x[1, 2] = torch.nan
    _, _, rest = matching_pursuit(x, unit_rows(5, 4, torch.float32), 3)
    assert rest.isfinite().all(1).tolist() == [True, False, True]


def test_what_is_kept_for_the_gradient_does_not_grow_with_steps_times_width() -> None:
    x, W_dec = torch.randn(64, 16), unit_rows(128, 16, torch.float32).requires_grad_()
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        matching_pursuit(x, W_dec, 10)
    assert sorted(kept) == [64 * 10, 64 * 10, 64 * 16, 128 * 16]


@pytest.mark.parametrize("d_sae", [5, 512, 577, 1000])
@pytest.mark.parametrize("signed", [False, True])
def test_the_largest_is_found_where_it_stands(d_sae: int, signed: bool) -> None:
    scores = torch.randint(-9, 9, (2000, d_sae)).float()  # with many equals
    scores[torch.arange(2000), torch.randint(0, d_sae, (2000,))] = 9.5
    scores[:10] = -scores[:10]
    scores[11, 3] = torch.nan
    expected = (scores.abs() if signed else scores).argmax(1)
    assert _largest(scores, signed).equal(expected)


def test_the_products_of_all_atoms_are_made_where_they_fit_and_pay() -> None:
    assert gram_pays(4096, 4096, 32, torch.float32)
    assert not gram_pays(4096, 4096, 1, torch.float32), "they serve from the second step on"
    assert not gram_pays(16, 4096, 32, torch.float32), "too few rows share the cost"
    assert not gram_pays(2**20, 2**17, 32, torch.float32), "64 GiB"


def test_a_latent_that_comes_twice_is_merged_into_one_slot() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 0.0, -1.0, 3.0]], requires_grad=True)
    indices = torch.tensor([[5, 3, 5, 5], [2, 0, 2, 0]])
    merged, latents = merge_repeats(values, indices)
    z = torch.zeros(2, 6).scatter_add(1, latents, merged)
    assert z.tolist() == [[0, 0, 0, 2, 0, 13], [3, 0, 0, 0, 0, 0]]
    assert merged.count_nonzero(1).tolist() == [2, 1]
    (grad,) = torch.autograd.grad((z * torch.arange(6)).sum(), values)
    assert grad.tolist() == indices.tolist()
