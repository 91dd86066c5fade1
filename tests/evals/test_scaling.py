import pytest
import torch

from saekit.errors import SaekitError
from saekit.evals._scaling import EXPONENTS, power_law

WIDTHS = [512, 1024, 2048, 4096, 8192, 16384]


def law(floor: float, scale: float, exponent: float) -> list[float]:
    reference = (512 * 16384) ** 0.5
    return [floor + scale * (width / reference) ** -exponent for width in WIDTHS]


@pytest.mark.parametrize(
    ("floor", "scale", "exponent"),
    [(0.1, 0.2, 0.5), (0.0, 0.3, 0.25), (0.05, 0.02, 1.5), (1e-3, 0.1, 0.9)],
)
def test_a_law_is_found_again(floor: float, scale: float, exponent: float) -> None:
    fit = power_law(WIDTHS, torch.tensor([law(floor, scale, exponent)]).double())
    assert float(fit.floor) == pytest.approx(floor, abs=1e-6)
    assert float(fit.scale) == pytest.approx(scale, abs=1e-6)
    assert float(fit.exponent) == pytest.approx(exponent, abs=1e-5)
    assert not fit.at_edge
    assert float(fit(1024.0)) == pytest.approx(law(floor, scale, exponent)[1], abs=1e-7)


def test_no_other_law_near_leaves_less() -> None:
    noise = 0.01 * torch.randn(len(WIDTHS), generator=torch.Generator().manual_seed(1)).double()
    y = torch.tensor(law(0.1, 0.2, 0.5)).double() + noise
    fit = power_law(WIDTHS, y[None])

    def left(floor: float, scale: float, exponent: float) -> float:
        guess = torch.tensor(law(floor, scale, exponent)).double()
        return float((y - guess).square().sum())

    best = [float(number) for number in (fit.floor, fit.scale, fit.exponent)]
    assert min(best) > 0
    for i in range(3):
        for step in (-1e-3, 1e-3):
            moved = [b + step * (j == i) for j, b in enumerate(best)]
            assert left(*moved) > left(*best)


def test_each_sample_has_a_fit_of_its_own() -> None:
    y = torch.tensor([law(0.1, 0.2, 0.5), law(0.3, 0.1, 1.0)]).double()
    both = power_law(WIDTHS, y)
    for i in range(2):
        alone = power_law(WIDTHS, y[i : i + 1])
        assert float(both.exponent[i]) == pytest.approx(float(alone.exponent[0]), abs=1e-12)


def test_a_floor_below_0_is_taken_as_0() -> None:
    fit = power_law(WIDTHS, torch.tensor([[0.6, 0.5, 0.4, 0.28, 0.15, 0.01]]).double())
    assert float(fit.floor) == 0 and float(fit.scale) > 0


def test_an_error_that_does_not_fall_has_a_floor_alone() -> None:
    fit = power_law(WIDTHS, torch.linspace(0.2, 0.3, len(WIDTHS)).double()[None])
    assert float(fit.floor) == pytest.approx(0.25) and float(fit.scale) == 0
    assert fit.at_edge


def test_a_fall_steeper_than_any_exponent_looked_at_is_at_the_edge() -> None:
    fit = power_law(WIDTHS, torch.tensor([law(0.1, 1e-3, 5)]).double())
    assert fit.at_edge and float(fit.exponent) == pytest.approx(EXPONENTS[1], rel=1e-3)


def test_three_widths_are_refused() -> None:
    with pytest.raises(SaekitError, match="3 widths do not test a power law.*four widths or more"):
        power_law(WIDTHS[:3], torch.ones(1, 3))
