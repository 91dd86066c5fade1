import pytest

from saekit.trainers._schedules import warm_then_decay


def test_rises_stays_and_falls_and_is_never_zero() -> None:
    factors = [warm_then_decay(step, 100, 0.1, 0.2) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == 1.0
    assert set(factors[9:80]) == {1.0}
    assert factors[80] == 1.0 and factors[-1] == 0.05
    assert min(factors) > 0


def test_no_warmup_and_no_decay_is_constant() -> None:
    assert {warm_then_decay(step, 10, 0.0, 0.0) for step in range(10)} == {1.0}


def test_a_cosine_falls_slowly_first_and_last() -> None:
    factors = [warm_then_decay(step, 100, 0.0, 0.5, "cosine") for step in range(100)]
    assert factors[50] == 1.0 and factors[75] == pytest.approx(0.5)
    falls = [a - b for a, b in zip(factors[50:], factors[51:], strict=False)]
    assert falls[0] < falls[12] < falls[24] and falls[-1] < falls[24]
    assert min(factors) > 0
