import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from saekit.kernels import matching_pursuit, reference

DEVICE = runpy.run_path(str(Path(__file__).with_name("_interpret.py")))["DEVICE"]
triton_index = pytest.importorskip("saekit.kernels.triton_index")
triton_pursuit = pytest.importorskip("saekit.kernels.triton_pursuit")

# float32 against float64, over some steps.
close = partial(torch.testing.assert_close, rtol=2e-5, atol=2e-5)

NORMS = 2e-4
"""What is left of all rows may be longer or shorter by such a share than with exact scores."""
SCORE_ERROR = {
    (torch.float32, False): 1e-5,
    (torch.float32, True): 1e-5,
    (torch.bfloat16, False): 2**-6,
    (torch.bfloat16, True): 2**-4,
}
"""Of a row's largest score, by how much an atom that is taken may be worse than the best. bfloat16:
two scores are rounded to 8 bits; with the Gram matrix in each of 32 steps, up and down."""


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEKIT_KERNELS", "triton")


@pytest.fixture(params=[True, False], ids=["gram", "products"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Either way to find scores, whatever would pay at these sizes; several turns a row."""
    small = triton_pursuit.PursuitConfig(64, 4, 1)
    monkeypatch.setattr(triton_pursuit, "gram_pays", lambda *_: request.param)
    monkeypatch.setattr(triton_pursuit, "pursuit_config", lambda *_: small)
    return bool(request.param)


def unit_rows(n: int, d: int) -> Tensor:
    return normalize(torch.randn(n, d, device=DEVICE))


def matches(
    x: Tensor, W_dec: Tensor, steps: int, residual: float = 0.0, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """Holds what is found and all gradients to the reference in float64; returns the values and the
    atoms."""
    found = []
    for op, dtype in ((matching_pursuit, None), (reference.matching_pursuit, torch.double)):
        inputs = [t.to(dtype or t.dtype).detach().requires_grad_() for t in (x, W_dec)]
        found.append((inputs, *op(inputs[0], inputs[1], steps, residual, signed)))
    (inputs, values, indices, rest), (inputs_64, *theirs) = found
    # Where two atoms are as good, rounding chooses.
    same = (indices == theirs[1]).all(1)
    assert same.double().mean() >= 0.9
    close(values.double()[same], theirs[0][same])
    close(rest.double()[same], theirs[2][same])
    upstream = [torch.randn_like(t) * same[:, None] for t in (values, rest)]
    ours = torch.autograd.grad((values, rest), inputs, upstream)
    wanted = torch.autograd.grad(
        (theirs[0], theirs[2]), inputs_64, [grad.double() for grad in upstream]
    )
    for one, other in zip(ours, wanted, strict=True):
        close(one.double(), other)
    return values, indices


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("residual", [0.0, 0.6])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("d_sae", "d", "steps"), [(1, 1, 2), (150, 24, 5), (64, 32, 1)])
def test_matches_the_reference_with_all_gradients(
    d_sae: int, d: int, steps: int, signed: bool, residual: float
) -> None:
    x = torch.randn(8, d, device=DEVICE)
    x[4] = 0  # stops before its first step
    values, indices = matches(x, unit_rows(d_sae, d), steps, residual, signed)
    assert not values[4].any()
    assert not indices[values == 0].any()
    if residual and steps == 5:
        assert len((values != 0).sum(1).unique()) > 2, "rows stop at different steps"


@pytest.mark.usefixtures("route")
def test_an_atom_that_comes_twice_is_taken_twice() -> None:
    _, indices = matches(torch.randn(5, 4, device=DEVICE), unit_rows(7, 4), 8, 0.0, True)
    assert any(len(row.unique()) < 8 for row in indices)


@pytest.mark.usefixtures("route")
def test_atoms_beyond_a_panel_of_the_gram_matrix_match_the_reference() -> None:
    matches(torch.randn(3, 65, device=DEVICE), unit_rows(301, 65), 3)


def test_the_gram_matrix_is_whole() -> None:
    W_dec = unit_rows(1_000, 3)
    torch.testing.assert_close(triton_pursuit.gram_matrix(W_dec), W_dec @ W_dec.T)


def test_scores_that_are_made_anew_on_the_way_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_pursuit, "gram_pays", lambda *_: True)
    monkeypatch.setattr(triton_pursuit, "REFRESH", 2)
    matches(torch.randn(6, 12, device=DEVICE), unit_rows(40, 12), 5, 0.6)


@pytest.mark.usefixtures("route")
def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_pursuit, "_SCORE_BYTES", 4 * 40 * 4)
    monkeypatch.setattr(triton_pursuit, "_ENTRY_BYTES", 3 * 4 * 5 * 12)
    # The last block of either kind is smaller.
    matches(torch.randn(7, 12, device=DEVICE), unit_rows(40, 12), 5, 0.5)


@pytest.mark.parametrize("deterministic", [False, True])
def test_atoms_that_many_rows_take_are_shared_among_programs(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_index, "HEAVY", 4)
    monkeypatch.setattr(triton_pursuit, "_ENTRY_BYTES", 12 * 4 * 3 * 6)
    gradients = partial(triton_pursuit.gradients, deterministic=deterministic)
    monkeypatch.setattr(triton_pursuit, "gradients", gradients)
    W_dec = unit_rows(9, 6)
    matches(3 * W_dec[2] + torch.randn(20, 6, device=DEVICE), W_dec, 3, 0.4)


def test_the_gradient_of_x_alone_is_the_same() -> None:
    x, W_dec = torch.randn(5, 12, device=DEVICE, requires_grad=True), unit_rows(20, 12)
    grads: list[Tensor] = []
    for atoms in (W_dec, W_dec.clone().requires_grad_()):
        values, _, rest = matching_pursuit(x, atoms, 4)
        grads += torch.autograd.grad(values.sum() + rest.square().sum(), x)
    close(grads[0], grads[1])


@pytest.mark.usefixtures("route")
def test_an_empty_batch_is_taken_apart() -> None:
    x = torch.empty(0, 3, device=DEVICE, requires_grad=True)
    W_dec = unit_rows(5, 3).requires_grad_()
    values, indices, rest = matching_pursuit(x, W_dec, 2)
    assert values.shape == indices.shape == (0, 2)
    d_x, d_W = torch.autograd.grad(values.sum() + rest.sum(), (x, W_dec))
    assert d_x.shape == x.shape
    assert not d_W.any()


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("signed", [False, True])
def test_what_is_not_finite_is_left_so(signed: bool) -> None:
    """A loss of it is then no number, and training says that it diverged."""
    x = torch.ones(3, 4, device=DEVICE)
    x[1, 2] = torch.nan
    W_dec = unit_rows(40, 4)
    _, _, rest = matching_pursuit(x, W_dec, 3, 0.1, signed)
    assert rest.isfinite().all(1).tolist() == [True, False, True]
    W_dec[35, 1] = torch.nan
    _, _, rest = matching_pursuit(x, W_dec, 3, 0.1, signed)
    assert not rest.isfinite().any()


def test_of_atoms_that_are_as_good_the_first_is_taken() -> None:
    W_dec = torch.eye(4, device=DEVICE).repeat(30, 1)
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0]], device=DEVICE)
    for gram in (False, True):
        _, indices, _ = triton_pursuit.matching_pursuit(x, W_dec, 4, gram=gram)
        assert indices.tolist() == [[1, 2, 3, 0]]


@pytest.mark.usefixtures("route")
def test_scores_in_bfloat16_choose_atoms_and_values_stay_exact() -> None:
    x, W_dec = torch.randn(6, 33, device=DEVICE), unit_rows(50, 33).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        values, indices, rest = matching_pursuit(x, W_dec, 4)
    assert values.dtype == rest.dtype == torch.float32
    left = x.clone()
    for step in range(4):
        atoms = W_dec[indices[:, step]]
        value = (left * atoms).sum(1)
        close(values[:, step], value)
        left = left - value[:, None] * atoms
    close(rest, left)
    ours = torch.autograd.grad(rest.square().sum(), W_dec)
    close(ours, torch.autograd.grad(left.square().sum(), W_dec))


def test_bfloat16_weights_give_bfloat16() -> None:
    x, W_dec = torch.randn(6, 33, device=DEVICE).bfloat16(), unit_rows(50, 33).bfloat16()
    x.requires_grad_()
    W_dec.requires_grad_()
    values, _, rest = matching_pursuit(x, W_dec, 3)
    grads = torch.autograd.grad(rest.float().square().sum(), (x, W_dec))
    assert {t.dtype for t in (values, rest, *grads)} == {torch.bfloat16}
    assert (rest.float().norm(dim=1) < x.float().norm(dim=1)).all()


def test_the_gram_matrix_is_made_where_it_fits_and_pays() -> None:
    pays, cpu = triton_pursuit.gram_pays, torch.device("cpu")
    assert pays(4_096, 4_096, 32, torch.float32, cpu)
    assert not pays(4_096, 4_096, 1, torch.float32, cpu), "it serves from the second step on"
    assert not pays(16, 4_096, 32, torch.float32, cpu), "too few rows share the cost"
    assert not pays(2**20, 2**17, 32, torch.bfloat16, cpu), "32 GiB"


@pytest.mark.parametrize("d_sae", [1, 100, 24_576, 65_536, 100_003])
@pytest.mark.parametrize("gram", [False, True])
def test_the_usual_configuration_is_among_the_candidates(d_sae: int, gram: bool) -> None:
    for d in (1, 768, 16_384):
        usual = triton_pursuit.pursuit_config(d_sae, d, gram)
        assert usual in triton_pursuit.pursuit_candidates(d_sae, d, gram)
        assert usual.chunk <= 2 * d_sae
        assert usual.n_warps * usual.programs <= 32


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_another_form_that_is_forced_runs_no_kernel(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEKIT_KERNELS", backend)
    monkeypatch.setattr(triton_pursuit, "matching_pursuit", None)
    x, W_dec = torch.randn(3, 4, device=DEVICE), unit_rows(5, 4)
    *_, rest = reference.matching_pursuit(x, W_dec, 2)
    close(matching_pursuit(x, W_dec, 2)[2], rest)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("d_sae", "d"), [(8_192, 2_048), (5_001, 1_500)])
def test_large_pursuits_take_the_best_atoms(
    d_sae: int, d: int, signed: bool, gram: bool, dtype: torch.dtype
) -> None:
    x, W_dec = torch.randn(1_000, d, device=DEVICE), unit_rows(d_sae, d)
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        values, indices, rest = triton_pursuit.matching_pursuit(
            x, W_dec, 32, signed=signed, gram=gram
        )
    *_, exact = reference.matching_pursuit(x, W_dec, 32, 0.0, signed)
    assert abs(rest.norm() / exact.norm() - 1) < NORMS
    left, table = x.double(), W_dec.double()
    limit = SCORE_ERROR[dtype, gram] * (left @ table.T).abs().amax(1)
    for step in range(32):
        scores = left @ table.T
        value = scores.gather(1, indices[:, step, None])
        best = (scores.abs() if signed else scores).amax(1)
        # So the atom is the reference's, wherever the next best is worse by more.
        assert (best - (value.abs() if signed else value)[:, 0] <= limit).all()
        close(values[:, step].double(), value[:, 0])
        left = left - value * table[indices[:, step]]
    close(rest.double(), left)


@pytest.mark.gpu
@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("residual", [0.0, 0.8])
@pytest.mark.parametrize("d", [768, 2_048, 5_000])
def test_large_gradients_match_float64(d: int, residual: float, gram: bool) -> None:
    x = torch.randn(500, d, device=DEVICE, requires_grad=True)
    W_dec = unit_rows(4_096, d)
    W_dec[:2] = normalize(W_dec[:2] + x[:2].detach())
    W_dec.requires_grad_()
    values, indices, rest = triton_pursuit.matching_pursuit(x, W_dec, 32, residual, gram=gram)
    upstream = [torch.randn_like(t) for t in (values, rest)]
    ours = torch.autograd.grad((values, rest), (x, W_dec), upstream)
    x_64, W_64 = (t.detach().double().requires_grad_() for t in (x, W_dec))
    left, taken = x_64, []
    for step in range(32):
        atoms = W_64[indices[:, step]]
        taken.append((left * atoms).sum(1) * (values[:, step] != 0))
        left = left - taken[-1][:, None] * atoms
    wanted = torch.autograd.grad(
        (torch.stack(taken, 1), left), (x_64, W_64), [grad.double() for grad in upstream]
    )
    for one, other in zip(ours, wanted, strict=True):
        assert (one.double() - other).norm() < 1e-5 * other.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("gram", [True, False])
def test_a_pursuit_and_its_gradients_are_the_same_bits_each_time(gram: bool) -> None:
    W_dec = unit_rows(4_096, 768).requires_grad_()
    # One atom in every row, and more than are summed up by one program.
    x = (torch.randn(3_000, 768, device=DEVICE) + 30 * W_dec[7].detach()).requires_grad_()
    found = []
    for _ in range(4):
        with torch.autocast(DEVICE, torch.bfloat16):
            values, indices, rest = triton_pursuit.matching_pursuit(x, W_dec, 16, gram=gram)
        grads = torch.autograd.grad(values.sum() + rest.square().sum(), (x, W_dec))
        found.append((values, indices, rest, *grads))
    for again in found[1:]:
        assert all(one.equal(other) for one, other in zip(found[0], again, strict=True))
