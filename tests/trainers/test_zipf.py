import pytest
import torch
from torch import Tensor

from saekit.trainers._zipf import law, water_fill, whole


def zipf(count: int, exponent: float, offset: float) -> Tensor:
    share = (torch.arange(1, count + 1) + offset) ** -exponent
    return share / share.sum()


def fitted(density: Tensor, mass: float = 0.9) -> Tensor:
    return law(density, exponent=None, offset=None, mass=mass)


@pytest.mark.parametrize(("exponent", "offset"), [(1.0, 0.0), (0.7, 10.0), (0.0, 0.0)])
def test_densities_that_follow_the_law_are_what_it_gives_back(
    exponent: float, offset: float
) -> None:
    density = zipf(500, exponent, offset)
    # Offsets are tried, not solved for.
    torch.testing.assert_close(fitted(density), density, rtol=0.05, atol=0)


def test_a_latents_share_goes_by_its_rank() -> None:
    density = zipf(50, 1.0, 0.0)
    order = torch.randperm(50)
    torch.testing.assert_close(fitted(density[order]), fitted(density)[order])


def test_a_rare_tail_that_drops_away_is_given_what_the_others_foretell() -> None:
    expected = zipf(500, 1.0, 0.0)
    density = expected.clone()
    density[400:] /= 100
    density[450:] = 0
    torch.testing.assert_close(fitted(density), expected, rtol=0.05, atol=0)


def test_an_exponent_and_an_offset_that_are_given_are_used() -> None:
    given = law(zipf(50, 2.0, 0.0), exponent=0.5, offset=3.0, mass=0.9)
    torch.testing.assert_close(given, zipf(50, 0.5, 3.0))
    given = law(zipf(50, 2.0, 0.0), exponent=0.5, offset=None, mass=0.9)
    slopes = (given.log().diff() / (torch.arange(1, 51) + 0.0).log().diff()).neg()
    assert slopes.max() <= 0.5 + 1e-3


@pytest.mark.parametrize("density", [torch.zeros(5), torch.tensor([0, 0.3, 0, 0, 0])])
def test_without_densities_to_fit_all_are_alike(density: Tensor) -> None:
    torch.testing.assert_close(fitted(density), torch.full((5,), 0.2))


def test_what_exceeds_the_cap_goes_to_the_others_in_proportion() -> None:
    # 8 are given out. Of 4, 2, 1, 1 the first may take 3; then 2.5, 1.25, 1.25, of which ...
    share = torch.tensor([4.0, 2.0, 1.0, 1.0])
    assert water_fill(share, 8.0, cap=3.0).tolist() == [3, 2.5, 1.25, 1.25]
    # ... the second may take 2 only where the cap is 2: all are full.
    assert water_fill(share, 8.0, cap=2.0).tolist() == [2, 2, 2, 2]
    assert water_fill(share, 8.0, cap=9.0).tolist() == [4, 2, 1, 1]


def test_pure_zipf_at_a_real_size_needs_the_cap() -> None:
    """d_sae = 16384, k = 32: the first three latents would fire more than every token."""
    share = zipf(16_384, 1.0, 0.0)
    assert (share * 32 > 1).sum() == 3
    given = water_fill(share, 32.0, cap=0.5)
    assert given.max() == 0.5
    assert float(given.sum()) == pytest.approx(32)


def test_amounts_are_rounded_either_way_and_keep_their_sum() -> None:
    amounts = water_fill(torch.rand(300) ** 4, 1000.0, cap=50.0)
    for phase in (0.0, 0.3, 0.999):
        rounded = whole(amounts, 1000, phase)
        assert rounded.sum() == 1000
        assert ((rounded - amounts).abs() < 1).all()


def test_fractions_are_paid_out_over_a_thousand_batches() -> None:
    amounts = torch.tensor([0.34, 0.01, 2.5, 0.15])
    total = sum(whole(amounts, 3, i * 0.6180339887498949 % 1) for i in range(1000))
    assert isinstance(total, Tensor)
    torch.testing.assert_close(total.float(), 1000 * amounts, atol=3, rtol=0)
