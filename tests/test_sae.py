from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saekit import SAE, JumpReLU, MatchingPursuit, ReLU, SparseCode, TopK
from saekit.errors import ConfigError
from saekit.sae import Activation, LayerNorm, UnitRow

ACTIVATIONS: list[Activation] = [
    ReLU(),
    TopK(3),
    JumpReLU(torch.full((12,), 0.5)),
    MatchingPursuit(9),
    MatchingPursuit(9, residual=0.2, signed=True),
]
any_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: type(a).__name__)


def random_sae(activation: Activation, d_out: int = 5) -> SAE:
    if isinstance(activation, MatchingPursuit):
        atoms = torch.nn.functional.normalize(torch.randn(12, 5))
        return SAE.of_atoms(atoms, torch.randn(5), activation)
    return SAE(
        W_enc=torch.randn(5, 12),
        b_enc=torch.randn(12),
        W_dec=torch.randn(12, d_out),
        b_dec=torch.randn(d_out),
        activation=activation,
    )


def test_one_token_by_hand() -> None:
    """x = (1, 2): pre = (1, -2, 3.5), of which k = 1 keeps the last."""
    sae = SAE(
        W_enc=torch.tensor([[1.0, 0.0, 1.0], [0.0, -1.0, 1.0]]),
        b_enc=torch.tensor([0.0, 0.0, 0.5]),
        W_dec=torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]]),
        b_dec=torch.tensor([0.25, 0.0]),
        activation=TopK(1),
    )
    x = torch.tensor([[1.0, 2.0]])
    assert sae.encode(x).tolist() == [[0.0, 0.0, 3.5]]
    assert sae(x).tolist() == [[7.25, -3.5]]


@any_activation
def test_sparse_and_dense_codes_agree(activation: Activation) -> None:
    sae, x = random_sae(activation), torch.randn(40, 5)
    z, code = sae.encode(x), sae.encode_sparse(x)
    assert code.dense(12).equal(z)
    torch.testing.assert_close(sae.decode(code), sae.decode(z))
    torch.testing.assert_close(sae(x), sae.decode(z))


@any_activation
def test_a_batch_on_which_nothing_fires_is_reconstructed_by_the_bias(
    activation: Activation,
) -> None:
    sae = random_sae(activation)
    if not isinstance(activation, MatchingPursuit):
        sae.b_enc.fill_(-1e3)
    x = sae.b_dec.expand(4, 5)  # of which there is nothing to take apart
    assert sae(x).equal(x)
    assert not sae.encode_sparse(x).values.any()


@settings(max_examples=50, deadline=None)
@given(k=st.integers(1, 12))
def test_topk_keeps_the_k_largest_and_of_those_the_positive_ones(k: int) -> None:
    sae, x = random_sae(TopK(k)), torch.randn(20, 5)
    pre, z = sae.pre(x), sae.encode(x)
    for row, kept in zip(pre, z, strict=True):
        largest = row.sort(descending=True).values[:k].clamp_min(0)
        assert kept.sort(descending=True).values[:k].allclose(largest)
        assert (kept > 0).sum() <= k


def test_jumprelu_keeps_values_above_the_threshold_unchanged() -> None:
    sae, x = random_sae(ACTIVATIONS[2]), torch.randn(20, 5)
    pre = sae.pre(x)
    assert sae.encode(x).equal(torch.where(pre > 0.5, pre, 0.0))


def test_a_skip_path_needs_its_input() -> None:
    sae = random_sae(TopK(3), d_out=4)
    skip = SAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, TopK(3), W_skip=torch.ones(5, 4))
    x = torch.randn(6, 5)
    torch.testing.assert_close(skip(x), sae(x) + x @ torch.ones(5, 4))
    with pytest.raises(ConfigError, match="skip path"):
        skip.decode(skip.encode(x))


@pytest.mark.parametrize("name", ["b_enc", "W_dec", "b_dec"])
def test_shapes_that_do_not_fit_are_refused_by_name(name: str) -> None:
    tensors: dict[str, Tensor] = random_sae(ReLU()).tensors()
    tensors[name] = torch.zeros(*tensors[name].shape[:-1], tensors[name].shape[-1] + 1)
    # The run-time type checker of the tests refuses what the class itself would.
    with pytest.raises(Exception, match=name):
        SAE(**tensors, activation=ReLU())  # type: ignore[arg-type]


def test_k_beyond_the_latents_is_refused() -> None:
    with pytest.raises(ConfigError, match="k=13 exceeds d_sae=12"):
        random_sae(TopK(13))
    with pytest.raises(ConfigError, match="k=0 must be at least 1"):
        TopK(0)


def test_moving_keeps_everything() -> None:
    sae = random_sae(ACTIVATIONS[2]).to(torch.float64)
    assert {t.dtype for t in sae.tensors().values()} == {torch.float64}
    assert isinstance(sae.activation, JumpReLU)
    assert sae.activation.threshold.dtype == torch.float64


def test_repeated_indices_add_up_in_a_sparse_code() -> None:
    code = SparseCode(torch.tensor([[1.0, 2.0]]), torch.tensor([[3, 3]]))
    assert code.dense(4).tolist() == [[0.0, 0.0, 0.0, 3.0]]


def pursuit(*atoms: list[float], b_dec: list[float] | None = None, steps: int = 3) -> SAE:
    b_dec = b_dec or [0.0] * len(atoms[0])
    return SAE.of_atoms(torch.tensor(atoms), torch.tensor(b_dec), MatchingPursuit(steps))


def test_a_pursuit_by_hand() -> None:
    """x - b_dec = (4, 3). The second atom takes 4.8 and leaves (1.12, -0.84); of that the first
    takes 1.12 and leaves (0, -0.84), in which none has a positive part."""
    sae = pursuit([1.0, 0.0], [0.6, 0.8], b_dec=[1.0, 1.0])
    x = torch.tensor([[5.0, 4.0]])
    assert sae.pre(x).tolist() == [pytest.approx([4.0, 4.8])]
    assert sae.encode(x).tolist() == [pytest.approx([1.12, 4.8])]
    assert sae(x).tolist() == [pytest.approx([5.0, 4.84])]


def test_an_atom_that_is_taken_again_is_one_latent() -> None:
    """Two atoms 60 degrees apart take turns, each with half of what the other left."""
    sae = pursuit([1.0, 0.0], [0.5, 0.75**0.5], steps=4)
    code = sae.encode_sparse(torch.tensor([[1.0, 0.9]]))
    assert code.values.count_nonzero() == 2
    assert len(code.indices[code.values != 0].unique()) == 2


def test_a_signed_pursuit_takes_what_points_the_other_way() -> None:
    sae = pursuit([1.0, 0.0], [0.0, 1.0])
    x = torch.tensor([[-2.0, 1.0]])
    assert sae.encode(x).tolist() == [[0.0, 1.0]]
    both = replace(sae, activation=MatchingPursuit(3, signed=True))
    assert both.encode(x).tolist() == [[-2.0, 1.0]]


def test_more_steps_leave_less_and_never_more() -> None:
    sae, x = random_sae(MatchingPursuit(1)), torch.randn(50, 5)
    left = [
        (x - replace(sae, activation=MatchingPursuit(steps))(x)).norm(dim=1)
        for steps in (1, 2, 3, 5, 8, 20)
    ]
    for before, after in zip(left, left[1:], strict=False):
        assert (after <= before + 1e-6).all()
        assert after.mean() < before.mean()


def test_a_pursuit_of_one_step_is_the_projection_on_the_nearest_atom() -> None:
    sae, x = random_sae(MatchingPursuit(1)), torch.randn(50, 5)
    value, latent = sae.pre(x).max(1)
    z = torch.zeros(50, 12).scatter(1, latent[:, None], value.clamp_min(0)[:, None])
    torch.testing.assert_close(sae.encode(x), z)


def test_a_pursuit_stops_at_its_share_of_the_length_whatever_the_scale() -> None:
    sae, x = random_sae(MatchingPursuit(200, residual=0.3)), torch.randn(50, 5)
    centred = x - sae.b_dec
    left = (x - sae(x)).norm(dim=1) / centred.norm(dim=1)
    assert (left <= 0.3).any()
    fewer = (sae.encode(x) != 0).sum()
    assert 0 < fewer < (replace(sae, activation=MatchingPursuit(200)).encode(x) != 0).sum()
    torch.testing.assert_close(
        sae.encode(sae.b_dec + 1000 * centred), 1000 * sae.encode(x), rtol=1e-3, atol=1e-1
    )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("W_enc", 2.0, "W_enc is not W_dec's transpose"),
        ("b_enc", 1.01, "b_enc is not -b_dec @ W_enc"),
    ],
)
def test_a_pursuit_with_an_encoder_of_its_own_is_refused(
    name: str, change: float, message: str
) -> None:
    sae = random_sae(MatchingPursuit(2))
    with pytest.raises(ConfigError, match=message):
        replace(sae, **{name: sae.tensors()[name] * change})  # type: ignore[arg-type]


def test_a_pursuit_over_rows_that_are_no_unit_vectors_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"W_dec's row 1 has norm 1\.5"):
        pursuit([1.0, 0.0], [0.0, 1.5])


def test_a_pursuit_has_no_skip_path() -> None:
    with pytest.raises(ConfigError, match="there can be no W_skip"):
        replace(random_sae(MatchingPursuit(2)), W_skip=torch.zeros(5, 5))


def test_a_pursuit_stays_one_in_half_precision() -> None:
    sae, x = random_sae(MatchingPursuit(2)), torch.randn(50, 5)
    for dtype in (torch.bfloat16, torch.float16):
        moved = sae.to(dtype)
        assert moved.activation == MatchingPursuit(2)
        apart = (moved(x.to(dtype)) - sae(x)).norm(dim=1) / sae(x).norm(dim=1)
        # Where two atoms are nearly as good, rounding may choose.
        assert apart.median() < 0.01


@pytest.mark.parametrize(
    ("steps", "residual", "message"),
    [(0, 0.0, "steps=0 must be at least 1"), (3, 1.0, r"residual=1\.0 must lie in 0\.\.1")],
)
def test_a_pursuit_that_takes_nothing_is_refused(steps: int, residual: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MatchingPursuit(steps, residual)


def test_a_pursuit_that_stops_takes_what_it_took_until_then() -> None:
    """Two atoms 60 degrees apart take turns: (1, 0.9) gives 1.279, 0.360, then the second again."""
    atoms = ([1.0, 0.0], [0.5, 0.75**0.5])
    sae, x = pursuit(*atoms, steps=9), torch.tensor([[1.0, 0.9]])
    once = replace(sae, activation=MatchingPursuit(9, once=True))
    three = replace(sae, activation=MatchingPursuit(3))
    torch.testing.assert_close(once.encode(x), three.encode(x))
    left = (x - replace(sae, activation=MatchingPursuit(2))(x)).norm()
    stopped = replace(sae, activation=MatchingPursuit(9, rest=float(left) + 1e-3))
    two = replace(sae, activation=MatchingPursuit(2))
    torch.testing.assert_close(stopped.encode(x), two.encode(x))
    with pytest.raises(ConfigError, match=r"rest=-1\.0 must be 0 or more"):
        MatchingPursuit(3, rest=-1.0)


@pytest.mark.parametrize("norm", [LayerNorm(), UnitRow()], ids=lambda n: type(n).__name__)
@any_activation
def test_an_sae_that_normalises_rows_is_one_of_the_normalised_rows(
    norm: LayerNorm | UnitRow, activation: Activation
) -> None:
    inner, x = random_sae(activation), 10 * torch.randn(20, 5) + 3
    sae = replace(inner, row_norm=norm)
    rows = torch.stack([_by_hand(norm, row) for row in x])
    torch.testing.assert_close(sae.encode(x), inner.encode(rows))
    back = inner(rows)
    if isinstance(norm, LayerNorm):
        expected = back * x.std(1, keepdim=True) + x.mean(1, keepdim=True)
    else:
        expected = back * x.norm(dim=1, keepdim=True) / 5**0.5
    torch.testing.assert_close(sae(x), expected)
    torch.testing.assert_close(sae.decode(sae.encode(x), x), expected)
    with pytest.raises(ConfigError, match="normalises each row: decode needs the input x"):
        sae.decode(sae.encode(x))


def _by_hand(norm: LayerNorm | UnitRow, row: Tensor) -> Tensor:
    values = row.tolist()
    if isinstance(norm, UnitRow):
        length = sum(v * v for v in values) ** 0.5
        return torch.tensor([v * 5**0.5 / length for v in values])
    mean = sum(values) / 5
    deviation = (sum((v - mean) ** 2 for v in values) / 4) ** 0.5
    return torch.tensor([(v - mean) / (deviation + 1e-5) for v in values])


def test_a_row_of_zeros_is_normalised_to_zeros() -> None:
    sae = replace(random_sae(ReLU()), row_norm=UnitRow())
    assert sae(torch.zeros(2, 5)).equal(torch.zeros(2, 5))
    assert sae.encode(torch.zeros(2, 5)).isfinite().all()


def test_a_skip_path_and_normalised_rows_are_not_both_there() -> None:
    with pytest.raises(ConfigError, match="a W_skip or a row_norm"):
        replace(random_sae(ReLU()), W_skip=torch.zeros(5, 5), row_norm=UnitRow())
