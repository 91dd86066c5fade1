import pytest
import torch

from saekit.kernels.auxk import EVERY, DeadCount, room_for

BATCH = 10


@pytest.mark.parametrize(("after", "every"), [(1_000, EVERY), (100, 2), (20, 1)])
def test_the_bound_covers_whatever_dies(after: int, every: int) -> None:
    """Latents that fire on none, on some or on all steps: never are more dead than the bound."""
    since = torch.zeros(30, dtype=torch.int64)
    count = DeadCount(since, after, BATCH)
    assert count.every == every
    seen = []
    for _ in range(150):
        bound = count.bound()
        since += BATCH
        since[torch.rand(30) < torch.linspace(0, 1, 30) ** 4] = 0
        dead = int((since >= after).sum())
        assert dead <= bound
        seen.append((dead, bound))
    assert any(dead for dead, _ in seen)
    if after > 20:
        assert any(bound < 30 for _, bound in seen)


def test_what_is_asked_anew_depends_on_the_steps_since_then_alone() -> None:
    since = torch.arange(0, 3_000, 100)
    begun, resumed = DeadCount(since, 1_000, BATCH), DeadCount(since, 1_000, BATCH)
    for _ in range(5):
        begun.bound()
    begun.forget()
    for _ in range(20):
        assert begun.bound() == resumed.bound()
        since += BATCH


def test_there_are_few_numbers_of_places() -> None:
    assert [room_for(n, 5_000) for n in (0, 1, 256, 257, 4_000, 5_000)] == [
        0,
        256,
        256,
        512,
        4_096,
        5_000,
    ]
