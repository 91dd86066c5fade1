import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saekit.evals import _pursuit
from saekit.evals._pursuit import gradient_pursuit
from saekit.sae import SAE, TopK

ROWS, D, D_SAE = 12, 6, 15


def sae_of(W_dec: Tensor, b_dec: Tensor | None = None) -> SAE:
    d_sae, d = W_dec.shape
    b_dec = torch.zeros(d) if b_dec is None else b_dec
    return SAE(W_dec.T.contiguous(), torch.zeros(d_sae), W_dec, b_dec, TopK(1))


def random_sae() -> SAE:
    return sae_of(torch.randn(D_SAE, D) * torch.rand(D_SAE, 1) * 3, torch.randn(D))


def test_each_row_agrees_with_the_equations_over_the_whole_dictionary(
    pursued: Callable[[SAE, Tensor, int], Tensor],
) -> None:
    sae, x = random_sae(), torch.randn(ROWS, D)
    steps = torch.arange(ROWS) % 9
    code = gradient_pursuit(sae, x, steps)
    z = code.dense(D_SAE)
    for row in range(ROWS):
        expected = pursued(sae, x[row], int(steps[row]))
        torch.testing.assert_close(z[row].double(), expected, rtol=1e-4, atol=1e-5)
    assert ((z != 0).sum(1) <= steps).all()
    assert (z >= 0).all()


def test_how_rows_are_blocked_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x, steps = random_sae(), torch.randn(ROWS, D), torch.arange(ROWS) % 5
    whole = gradient_pursuit(sae, x, steps).dense(D_SAE)
    monkeypatch.setattr(_pursuit, "_SCORES_AT_ONCE", 1)
    torch.testing.assert_close(gradient_pursuit(sae, x, steps).dense(D_SAE), whole)


def test_orthogonal_atoms_of_any_length_are_found_exactly() -> None:
    """x = 3 (2 e_0) + 1 (e_2 / 2), of rows 2 e_0, e_1 and e_2 / 2."""
    W_dec = torch.diag(torch.tensor([2.0, 1.0, 0.5]))
    sae, x = sae_of(W_dec), torch.tensor([[6.0, 0.0, 0.5]])
    # One step takes the longest part, two reach the point up to the last gradient step.
    one = gradient_pursuit(sae, x, torch.tensor([1])).dense(3)
    assert one[0].tolist() == pytest.approx([3, 0, 0])
    two = gradient_pursuit(sae, x, torch.tensor([2])).dense(3)
    assert two[0].tolist() == pytest.approx([3, 0, 1])


def test_what_is_already_explained_stays_and_gives_no_nan() -> None:
    """After one step nothing is left: c = 0 from then on, and the atom is in the support."""
    sae, x = sae_of(torch.eye(3)), torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    z = gradient_pursuit(sae, x, torch.tensor([3, 3])).dense(3)
    assert z.tolist() == [[2, 0, 0], [0, 0, 0]]


def test_a_row_that_points_away_from_every_atom_gets_nothing() -> None:
    z = gradient_pursuit(sae_of(torch.eye(3)), -torch.ones(1, 3), torch.tensor([2])).dense(3)
    assert not z.any()


def test_an_atom_of_length_zero_is_of_no_use() -> None:
    W_dec = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    z = gradient_pursuit(sae_of(W_dec), torch.tensor([[1.0, 1.0]]), torch.tensor([2])).dense(2)
    assert z[0].tolist() == [0, 1]


def test_no_steps_and_no_rows_give_an_empty_code() -> None:
    sae = random_sae()
    assert not gradient_pursuit(sae, torch.randn(4, D), torch.zeros(4).long()).values.any()
    assert gradient_pursuit(sae, torch.randn(0, D), torch.zeros(0).long()).values.shape == (0, 1)


def test_the_skip_path_is_taken_off_first() -> None:
    W_skip = torch.randn(D, D)
    sae = dataclasses.replace(random_sae(), W_skip=W_skip)
    x, steps = torch.randn(ROWS, D), torch.full((ROWS,), 3)
    without = dataclasses.replace(sae, W_skip=None)
    torch.testing.assert_close(
        gradient_pursuit(sae, x, steps).dense(D_SAE),
        gradient_pursuit(without, x - x @ W_skip, steps).dense(D_SAE),
    )
