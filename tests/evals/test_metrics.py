import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saekit.errors import SaekitError, Undefined
from saekit.evals._metrics import (
    Firing,
    Mean,
    Reconstruction,
    ce_recovered,
    cross_entropy,
    kl_divergence,
)
from saekit.sae import SparseCode

X = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 10.0]])
X_HAT = torch.tensor([[1.0, 1.0], [3.0, 5.0], [4.0, 6.0], [8.0, 9.0]])

NUMBERS = ("ev", "fvu", "mse", "cosine", "l2_ratio", "relative_reconstruction_bias")


def in_pieces(x: Tensor, x_hat: Tensor, size: int) -> Reconstruction:
    pieces = zip(torch.split(x, size), torch.split(x_hat, size), strict=True)
    whole = Reconstruction.of(x[:0], x_hat[:0])
    for piece in pieces:
        whole = whole + Reconstruction.of(*piece)
    return whole


def random_pair(n: int = 50, d: int = 7) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, d) * 2 + 3
    return x, x + 0.3 * torch.randn(n, d)


def random_code(n: int, k: int, d_sae: int) -> SparseCode:
    indices = torch.rand(n, d_sae).topk(k).indices
    return SparseCode(torch.rand(n, k) * (torch.rand(n, k) > 0.3), indices)


def test_four_rows_worked_by_hand() -> None:
    """Sum of squared errors 5, scatter about the mean (4, 5.5) 55, four rows."""
    quality = Reconstruction.of(X, X_HAT)
    assert quality.error == 5
    assert quality.scatter == 55
    assert quality.ev == pytest.approx(0.909091, abs=5e-7)
    assert quality.fvu == pytest.approx(5 / 55)
    assert quality.mse == 1.25
    assert quality.cosine == pytest.approx(0.982743, abs=5e-7)
    assert quality.l2_ratio == pytest.approx(0.927105, abs=5e-7)
    assert quality.relative_reconstruction_bias == pytest.approx(0.995726, abs=5e-7)


def test_sums_agree_with_a_plain_loop() -> None:
    x, x_hat = random_pair()
    rows = list(zip(x.double().tolist(), x_hat.double().tolist(), strict=True))
    mean = [sum(a[j] for a, _ in rows) / len(rows) for j in range(7)]

    def dot(a: list[float], b: list[float]) -> float:
        return sum(p * q for p, q in zip(a, b, strict=True))

    def apart(a: list[float], b: list[float]) -> float:
        return sum((p - q) ** 2 for p, q in zip(a, b, strict=True))

    error = sum(apart(a, b) for a, b in rows)
    expected = {
        "ev": 1 - error / sum(apart(a, mean) for a, _ in rows),
        "fvu": error / sum(apart(a, mean) for a, _ in rows),
        "mse": error / len(rows),
        "cosine": sum(dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) for a, b in rows) / len(rows),
        "l2_ratio": sum(math.sqrt(dot(b, b) / dot(a, a)) for a, b in rows) / len(rows),
        "relative_reconstruction_bias": sum(dot(b, b) for _, b in rows)
        / sum(dot(a, b) for a, b in rows),
    }
    quality = in_pieces(x, x_hat, 8)
    assert {name: getattr(quality, name) for name in NUMBERS} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [1, 7, 13, 50])
def test_batch_size_changes_no_number(size: int) -> None:
    x, x_hat = random_pair()
    whole, pieces = Reconstruction.of(x, x_hat), in_pieces(x, x_hat, size)
    for name in NUMBERS:
        assert getattr(pieces, name) == pytest.approx(getattr(whole, name), rel=1e-12)


def test_joining_does_not_depend_on_the_grouping() -> None:
    a, b, c = (Reconstruction.of(*random_pair(n)) for n in (3, 20, 1))
    assert ((a + b) + c).ev == pytest.approx((a + (b + c)).ev, rel=1e-12)
    assert (a + b).ev == pytest.approx((b + a).ev, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(shift=st.floats(-100, 100), scale=st.floats(0.01, 100))
def test_explained_variance_is_unmoved_by_shift_and_scale(shift: float, scale: float) -> None:
    x, x_hat = X.double(), X_HAT.double()
    moved = Reconstruction.of(x * scale + shift, x_hat * scale + shift)
    assert moved.ev == pytest.approx(10 / 11, rel=1e-6)


def test_a_large_mean_costs_no_digits() -> None:
    x, x_hat = random_pair(200)
    x, x_hat = x.double(), x_hat.double()
    far = in_pieces(x + 1e6, x_hat + 1e6, 9)
    assert far.ev == pytest.approx(Reconstruction.of(x, x_hat).ev, rel=1e-8)


def test_perfect_is_one_and_the_mean_is_zero() -> None:
    assert Reconstruction.of(X, X).ev == 1
    assert Reconstruction.of(X, X.mean(0).expand_as(X)).ev == pytest.approx(0, abs=1e-12)


def test_a_zero_row_has_no_direction_and_is_left_out_of_cosine_and_length() -> None:
    x, x_hat = torch.cat([X, torch.zeros(1, 2)]), torch.cat([X_HAT, torch.ones(1, 2)])
    quality = Reconstruction.of(x, x_hat)
    assert (quality.n, quality.n_nonzero) == (5, 4)
    assert quality.cosine == pytest.approx(0.982743, abs=5e-7)
    assert quality.l2_ratio == pytest.approx(0.927105, abs=5e-7)
    assert quality.error == 7


def test_a_reconstruction_of_zero_has_cosine_zero_and_no_bias() -> None:
    quality = Reconstruction.of(X, torch.zeros_like(X))
    assert (quality.cosine, quality.l2_ratio) == (0, 0)
    with pytest.raises(Undefined, match="sum.x . x_hat. = 0, which is not positive"):
        _ = quality.relative_reconstruction_bias


def test_equal_rows_have_no_variance_to_explain() -> None:
    row = torch.full((3, 4), 0.1)
    with pytest.raises(Undefined, match="the 6 activations are all the same"):
        _ = (Reconstruction.of(row, row) + Reconstruction.of(row, row)).ev


@pytest.mark.parametrize("name", NUMBERS)
def test_no_rows_is_an_error_not_a_nan(name: str) -> None:
    with pytest.raises(SaekitError, match="there are no rows"):
        getattr(Reconstruction.of(X[:0], X[:0]), name)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused_where_it_enters(bad: float) -> None:
    spoilt = X.clone()
    spoilt[2, 1] = bad
    with pytest.raises(SaekitError, match="the activations contain NaN or infinity"):
        Reconstruction.of(spoilt, X)
    with pytest.raises(SaekitError, match="the reconstructions contain NaN or infinity"):
        Reconstruction.of(X, spoilt)
    with pytest.raises(SaekitError, match="latents contain NaN or infinity"):
        Firing.of(SparseCode(spoilt, torch.zeros(4, 2, dtype=torch.long)), 3)
    with pytest.raises(SaekitError, match="loss is NaN or infinite"):
        Mean.of(spoilt[:, 1])


def test_firing_worked_by_hand() -> None:
    """Rows fire 2, 1, 0 and 1 latents; the index beside a 0 counts for nothing."""
    code = SparseCode(
        torch.tensor([[1.0, 2.0], [0.0, 3.0], [0.0, 0.0], [0.5, 0.0]]),
        torch.tensor([[0, 2], [1, 2], [0, 1], [2, 2]]),
    )
    firing = Firing.of(code, 4)
    assert firing.density.tolist() == [0.25, 0, 0.75, 0]
    assert firing.l0_mean == 1
    assert [firing.l0_quantile(q) for q in (0.05, 0.25, 0.5, 0.75, 0.95)] == [0, 0, 1, 1, 2]
    assert firing.dead_share == 0.5
    assert firing.dense_share == 0.5


def test_firing_agrees_with_the_dense_matrix_for_any_batch_size() -> None:
    code = random_code(60, 5, 30)
    z = code.dense(30)
    for size in (1, 7, 60):
        parts = zip(torch.split(code.values, size), torch.split(code.indices, size), strict=True)
        firing, *rest = (Firing.of(SparseCode(*part), 30) for part in parts)
        for part in rest:
            firing = firing + part
        torch.testing.assert_close(firing.density, (z != 0).double().mean(0))
        l0 = sorted((z != 0).sum(1).tolist())
        assert firing.l0_mean == pytest.approx(sum(l0) / 60)
        for q in (0.05, 0.5, 0.95):
            assert firing.l0_quantile(q) == l0[math.ceil(q * 60) - 1]


def test_loss_recovered_worked_by_hand() -> None:
    assert ce_recovered(3.2, 3.5, 9.2) == pytest.approx(0.95)
    assert ce_recovered(3.2, 3.5, 6.2) == pytest.approx(0.90)


@pytest.mark.parametrize("ablated", [3.2, 3.0, 3.2 + 1e-7])
def test_an_ablation_that_does_not_hurt_gives_no_share(ablated: float) -> None:
    with pytest.raises(Undefined, match="there is nothing to win back"):
        ce_recovered(3.2, 3.5, ablated)


def test_kl_and_cross_entropy_agree_with_their_sums() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    assert kl_divergence(p.log(), q.log()).item() == pytest.approx(0.25 * math.log(2))
    assert cross_entropy(p.log(), torch.tensor([1])).item() == pytest.approx(math.log(4))


def test_kl_survives_probabilities_below_the_smallest_float() -> None:
    log_p = torch.tensor([[0.0, -300.0]]).log_softmax(1)
    log_q = torch.tensor([[-300.0, 0.0]]).log_softmax(1)
    assert kl_divergence(log_p, log_q).item() == pytest.approx(300)
