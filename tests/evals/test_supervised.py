import numpy as np
import pytest
import torch
from torch import Tensor

from saekit.errors import SaekitError
from saekit.evals._supervised import Code, Design, SupervisedDictionary

SIZES = {"IO": 4, "S": 3, "Pos": 2}
CODES: tuple[Code, ...] = ("mean", "mse")

# One row for each pair of values: a = 10 + (0 or 4) + (0 or 2).
HAND = torch.tensor([[10.0], [12.0], [14.0], [16.0]])
HAND_VALUES = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])


def rows(n: int = 60, d: int = 5) -> tuple[Tensor, Tensor]:
    """Attributes that are correlated, and activations that are not sums of codes."""
    generator = torch.Generator().manual_seed(3)
    io = torch.randint(4, (n,), generator=generator)
    s = (io + torch.randint(2, (n,), generator=generator)) % 3
    pos = torch.randint(2, (n,), generator=generator)
    return torch.randn(n, d, generator=generator) + 7, torch.stack([io, s, pos], 1)


def fitted(a: Tensor, values: Tensor, code: Code, size: int = 10_000) -> SupervisedDictionary:
    parts = zip(torch.split(a, size), torch.split(values, size), strict=True)
    first, *rest = (Design.of(x, v, SIZES) for x, v in parts)
    return SupervisedDictionary.fit(sum(rest, first), code)


@pytest.mark.parametrize("code", CODES)
def test_codes_worked_by_hand(code: Code) -> None:
    design = Design.of(HAND, HAND_VALUES, {"a": 2, "b": 2})
    dictionary = SupervisedDictionary.fit(design, code)
    assert dictionary.mean.tolist() == [13]
    assert dictionary.codes[:, 0].tolist() == pytest.approx([-2, 2, -1, 1])
    torch.testing.assert_close(dictionary.reconstruct(HAND_VALUES), HAND.double())


def test_mean_codes_agree_with_a_loop() -> None:
    a, values = rows()
    dictionary = fitted(a, values, "mean")
    centre = [sum(row) / len(a) for row in zip(*a.tolist(), strict=True)]
    place = 0
    for attribute, size in enumerate(SIZES.values()):
        for value in range(size):
            mine = [row for row, v in zip(a.tolist(), values, strict=True) if v[attribute] == value]
            mean = [sum(column) / len(mine) for column in zip(*mine, strict=True)]
            expected = [m - c for m, c in zip(mean, centre, strict=True)]
            assert dictionary.codes[place].tolist() == pytest.approx(expected, abs=1e-9)
            place += 1


def test_mse_codes_reconstruct_as_least_squares_does() -> None:
    a, values = rows()
    hot = np.concatenate(
        [np.eye(size)[values[:, i]] for i, size in enumerate(SIZES.values())], axis=1
    )
    wide = a.double().numpy()
    centred = wide - wide.mean(0)
    solution = np.linalg.lstsq(hot, centred, rcond=None)[0]
    dictionary = fitted(a, values, "mse")
    np.testing.assert_allclose(dictionary.codes.numpy(), solution, atol=1e-9)
    np.testing.assert_allclose(
        dictionary.reconstruct(values).numpy(), wide.mean(0) + hot @ solution, atol=1e-9
    )


def test_no_code_explains_more_than_least_squares() -> None:
    a, values = rows()
    mean, mse = (
        float((a - fitted(a, values, code).reconstruct(values)).square().sum()) for code in CODES
    )
    assert mse < mean


def test_only_least_squares_recovers_codes_of_correlated_attributes() -> None:
    _, values = rows(400)
    generator = torch.Generator().manual_seed(1)
    codes = [torch.randn(size, 5, generator=generator) for size in SIZES.values()]
    parts = [code[values[:, i]] for i, code in enumerate(codes)]
    a = 3 + sum(parts, torch.zeros(1))
    new = (values[:, 0] + 1) % 4
    counterfactual = a - parts[0] + codes[0][new]
    edited = fitted(a, values, "mse").edit(a, "IO", values[:, 0], new)
    torch.testing.assert_close(edited, counterfactual.double(), rtol=1e-5, atol=1e-5)
    off = fitted(a, values, "mean").edit(a, "IO", values[:, 0], new) - counterfactual
    assert off.abs().max() > 0.1


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("size", [1, 7])
def test_batch_size_changes_no_code(code: Code, size: int) -> None:
    a, values = rows()
    whole, parts = fitted(a, values, code), fitted(a, values, code, size)
    torch.testing.assert_close(parts.codes, whole.codes, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("code", CODES)
def test_places_side_by_side_have_the_codes_that_each_has_alone(code: Code) -> None:
    a, values = rows(d=6)
    both = fitted(a, values, code).codes
    for columns in (slice(0, 2), slice(2, 6)):
        alone = fitted(a[:, columns], values, code).codes
        torch.testing.assert_close(both[:, columns], alone, rtol=1e-9, atol=1e-9)


def test_an_edit_to_the_same_value_changes_nothing() -> None:
    a, values = rows()
    edited = fitted(a, values, "mse").edit(a, "S", values[:, 1], values[:, 1])
    torch.testing.assert_close(edited, a.double())


def test_a_value_without_rows_has_no_code() -> None:
    a, values = rows()
    known = values[:, 0] != 2
    dictionary = fitted(a[known], values[known], "mean")
    with pytest.raises(SaekitError, match="no row of the fit has value 2 of 'IO'"):
        dictionary.reconstruct(values)


def test_values_out_of_range_are_refused() -> None:
    a, values = rows()
    with pytest.raises(SaekitError, match="counted from 0 and below its size"):
        Design.of(a, values + 1, SIZES)
    with pytest.raises(SaekitError, match="values of 2 attributes do not fit"):
        Design.of(a, values[:, :2], SIZES)
    with pytest.raises(SaekitError, match="'S' has values 0 to 2, not 3 to 3"):
        fitted(a, values, "mean").part("S", torch.tensor([3]))


def test_activations_that_are_not_finite_are_refused() -> None:
    a, values = rows()
    a[3, 1] = torch.nan
    with pytest.raises(SaekitError, match="contain NaN or infinity"):
        Design.of(a, values, SIZES)


def test_no_rows_is_an_error_not_a_nan() -> None:
    a, values = rows()
    with pytest.raises(SaekitError, match="no rows to fit"):
        fitted(a[:0], values[:0], "mean")
