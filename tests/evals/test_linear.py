from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from torch import Tensor

from saekit.errors import SaekitError
from saekit.evals._linear import Affine, Moments
from saekit.evals._resample import Explained, Resamples


def pair(n: int = 60, p: int = 5, q: int = 3) -> tuple[Tensor, Tensor]:
    """Rows with a mean, and targets that are in part linear in them."""
    x = 2 + torch.randn(n, p, dtype=torch.float64)
    return x, x @ torch.randn(p, q, dtype=torch.float64) + 7 + torch.randn(n, q).double()


def in_pieces(x: Tensor, y: Tensor, size: int) -> Moments:
    parts = zip(torch.split(x, size), torch.split(y, size), strict=True)
    return reduce(add, (Moments.of(*part) for part in parts))


def lstsq(x: Tensor, y: Tensor, intercept: bool) -> tuple[Tensor, Tensor]:
    if intercept:
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    found = torch.from_numpy(np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0])
    return (found[:-1], found[-1]) if intercept else (found, torch.zeros(y.shape[1]).double())


def r2(fit: Affine, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Uniform and pooled, on rows of one document."""
    document = torch.zeros(len(x), dtype=torch.long)
    resamples = Resamples.of(document, 0, 0)
    found = Explained.of(resamples, y, fit(x), document, fit.y_mean)
    return float(found.uniform), float(found.pooled)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("size", [1, 7, 60])
def test_it_is_least_squares_however_rows_are_batched(intercept: bool, size: int) -> None:
    x, y = pair()
    fit = in_pieces(x, y, size).solve(intercept=intercept)
    weight, bias = lstsq(x, y, intercept)
    torch.testing.assert_close(fit.weight, weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fit.bias, bias, rtol=1e-9, atol=1e-9)
    assert fit.rank == 5
    torch.testing.assert_close(fit[1:2](x), fit(x)[:, 1:2])


def test_a_line_worked_by_hand() -> None:
    """y = 2 x + 1 through (0, 1), (1, 3), (2, 5); through the origin 13 / 5."""
    moments = Moments.of(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.0], [3.0], [5.0]]))
    line, ray = (moments.solve(intercept=intercept) for intercept in (True, False))
    assert (float(line.weight), float(line.bias)) == pytest.approx((2, 1))
    assert (float(ray.weight), float(ray.bias)) == pytest.approx((13 / 5, 0))


def test_joining_does_not_depend_on_the_grouping() -> None:
    x, y = pair()
    a, b, c = (Moments.of(*(t[rows] for t in (x, y))) for rows in np.split(np.arange(60), [2, 30]))
    left, right = ((a + b) + c), (a + (b + c))
    for name in ("x_mean", "y_mean", "xx", "xy"):
        torch.testing.assert_close(getattr(left, name), getattr(right, name))


def test_a_large_mean_costs_no_digits() -> None:
    x, y = pair()
    far = in_pieces(x + 1e6, y - 1e6, 9).solve(intercept=True)
    torch.testing.assert_close(far.weight, lstsq(x, y, True)[0], rtol=1e-6, atol=1e-8)


def test_dimensions_of_very_different_size_are_all_used() -> None:
    x, y = pair()
    sizes = torch.tensor([1e-6, 1.0, 1e7, 1e3, 1e-3]).double()
    fit = Moments.of(x * sizes, y).solve(intercept=True)
    assert fit.rank == 5
    torch.testing.assert_close(fit.weight * sizes[:, None], lstsq(x, y, True)[0])


def test_directions_in_which_x_does_not_vary_get_no_weight() -> None:
    """A dimension that is constant, and one that is the sum of two others."""
    x, y = pair()
    constant = torch.full((60, 1), 0.1, dtype=torch.float64)  # whose mean rounds to another number
    assert float((constant - constant.mean()).abs().max()) > 0
    doubled = torch.cat([x, constant, x[:, :1] + x[:, 1:2]], 1)
    fit = Moments.of(doubled, y).solve(intercept=True)
    weight, bias = lstsq(x, y, True)
    assert fit.rank == 5
    assert not fit.weight[5].any()
    torch.testing.assert_close(fit(doubled), x @ weight + bias)


def test_ridge_is_a_share_of_each_predictors_own_square() -> None:
    x, y = pair()
    centred, target = x - x.mean(0), y - y.mean(0)
    square = torch.diag(centred.square().sum(0))
    weight = torch.linalg.solve(centred.T @ centred + 0.3 * square, centred.T @ target)
    fit = Moments.of(x, y).solve(intercept=True, ridge=0.3)
    torch.testing.assert_close(fit.weight, weight)
    torch.testing.assert_close(fit.bias, y.mean(0) - x.mean(0) @ weight)


def test_some_predictors_alone_are_as_if_the_others_were_not_there() -> None:
    x, y = pair()
    some = Moments.of(x, y)[[3, 1]].solve(intercept=True)
    torch.testing.assert_close(some.weight, lstsq(x[:, [3, 1]], y, True)[0])


@pytest.mark.parametrize(("n", "intercept"), [(6, True), (5, False)])
def test_too_few_rows_to_determine_the_weights_are_refused(n: int, intercept: bool) -> None:
    x, y = pair(n)
    with pytest.raises(SaekitError, match=f"{n} rows do not determine a linear map with {n} wei"):
        Moments.of(x, y).solve(intercept=intercept)
    assert Moments.of(x, y).solve(intercept=intercept, ridge=0.1).weight.isfinite().all()


def test_averaging_over_dimensions_hides_what_pooling_shows() -> None:
    """Errors that are noise, in part linear, and noise beside one large predictable dimension."""
    generator = np.random.default_rng(0)
    x = generator.normal(0.5, 1, (4000, 32))
    noise = generator.normal(0, 0.3, (4000, 32))
    peaked = np.concatenate([20 * x[:, :1], noise[:, 1:]], 1)
    expected = {"noise": (-0.017, -0.017), "part": (0.495, 0.495), "peaked": (0.015, 0.993)}
    for name, e in (("noise", noise), ("part", 0.3 * x + noise), ("peaked", peaked)):
        a, b = torch.from_numpy(x), torch.from_numpy(e)
        fit = in_pieces(a[:2000], b[:2000], 300).solve(intercept=False)
        assert r2(fit, a[2000:], b[2000:]) == pytest.approx(expected[name], abs=1e-3)
