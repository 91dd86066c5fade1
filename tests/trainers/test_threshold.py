import pytest
import torch

from saekit.trainers._threshold import RunningMean, smallest, smallest_by_latent


def test_a_running_mean_weighs_each_value_by_its_age_and_nothing_else() -> None:
    mean = RunningMean(0.1)
    values = [5.0, 1.0, 4.0, 2.0]
    for i, value in enumerate(values):
        mean.update(torch.tensor(value))
        weights = [0.9 ** (i - j) for j in range(i + 1)]
        by_hand = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert float(mean.value) == pytest.approx(by_hand)


def test_a_running_mean_does_not_start_at_zero() -> None:
    mean = RunningMean(0.01)
    for _ in range(20):
        mean.update(torch.tensor(3.0))
        assert float(mean.value) == pytest.approx(3.0)


def test_means_without_a_value_stay_and_count_for_themselves() -> None:
    mean = RunningMean(0.5, (2,))
    mean.update(torch.tensor([4.0, torch.inf]), torch.tensor([True, False]))
    assert mean.value.tolist() == [4.0, 0.0]
    mean.update(torch.tensor([1.0, 7.0]), torch.tensor([True, True]))
    assert mean.value.tolist() == [pytest.approx(2.0), 7.0]


def test_the_smallest_of_nothing_is_no_value() -> None:
    assert [float(t) for t in smallest(torch.tensor([3.0, 2.0]))] == [2, True]
    assert not smallest(torch.zeros(0))[1]


def test_the_smallest_of_each_latent_that_kept_something() -> None:
    values, indices = torch.tensor([3.0, 2.0, 5.0]), torch.tensor([2, 2, 0])
    found, where = smallest_by_latent(values, indices, 4)
    assert where.tolist() == [True, False, True, False]
    assert found[where].tolist() == [5, 2]
