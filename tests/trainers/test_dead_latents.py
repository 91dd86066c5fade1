import pytest
import torch

from saekit.trainers._dead_latents import DeadLatents

# Three rows of two latents each; a value of 0 is no firing, whatever its index says.
VALUES = torch.tensor([[1.0, 2.0], [0.0, 3.0], [0.5, 0.0]])
INDICES = torch.tensor([[4, 1], [2, 1], [0, 3]])
FIRED = [1, 2, 0, 0, 1]


def test_a_latent_is_dead_after_so_many_tokens_without_firing_and_not_before() -> None:
    dead = DeadLatents(5, 6)
    dead.saw(VALUES, INDICES, 3)
    assert dead.since.tolist() == [0, 0, 3, 3, 0] and not dead.mask.any()
    dead.saw(VALUES, INDICES, 3)
    assert dead.since.tolist() == [0, 0, 6, 6, 0]
    assert dead.mask.tolist() == [False, False, True, True, False]
    assert dead.share == pytest.approx(2 / 5)
    dead.saw(torch.ones(1, 1), torch.tensor([[2]]), 1)
    assert dead.since.tolist() == [1, 1, 0, 7, 1]
    assert dead.mask.tolist() == [False, False, False, True, False]


def test_codes_with_offsets_and_dense_latents_count_alike() -> None:
    counted = [DeadLatents(5, 6) for _ in range(3)]
    counted[0].saw(VALUES, INDICES, 3)
    counted[1].saw(VALUES.flatten(), INDICES.flatten(), 3)
    counted[2].saw_dense(torch.zeros(3, 5).scatter_(1, INDICES, VALUES))
    for dead in counted:
        assert dead.fired.tolist() == FIRED
        assert dead.since.tolist() == [0, 0, 3, 3, 0]


def test_negative_latents_fire_too() -> None:
    dead = DeadLatents(2, 6)
    dead.saw_dense(torch.tensor([[-1.0, 0.0]]))
    dead.saw(torch.tensor([[-1.0]]), torch.tensor([[0]]), 1)
    assert dead.fired.tolist() == [2, 0] and dead.since.tolist() == [0, 2]


def test_what_fired_is_taken_once() -> None:
    dead = DeadLatents(5, 6)
    dead.saw(VALUES, INDICES, 3)
    dead.saw(VALUES, INDICES, 3)
    taken = dead.take_fired()
    assert taken.tolist() == [2 * n for n in FIRED]
    dead.saw(VALUES, INDICES, 3)
    assert taken.tolist() == [2 * n for n in FIRED]  # it is no view of what goes on
    assert dead.take_fired().tolist() == FIRED


def test_all_of_it_is_kept_with_a_run() -> None:
    dead, other = DeadLatents(5, 6), DeadLatents(5, 6)
    dead.saw(VALUES, INDICES, 3)
    other.load_state_dict(dead.state_dict())
    assert other.fired.tolist() == FIRED and other.since.equal(dead.since)
