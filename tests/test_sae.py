import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saekit import SAE, JumpReLU, ReLU, SparseCode, TopK
from saekit.errors import ConfigError
from saekit.sae import Activation

ACTIVATIONS: list[Activation] = [ReLU(), TopK(3), JumpReLU(torch.full((12,), 0.5))]
any_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: type(a).__name__)


def random_sae(activation: Activation, d_out: int = 5) -> SAE:
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
    sae.b_enc.fill_(-1e3)
    assert sae(torch.randn(4, 5)).equal(sae.b_dec.expand(4, 5))


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
