"""What SAEBench asks of an object; that its own evaluation takes it, benchmarks/peers says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saekit import SAE, JumpReLU, MatchingPursuit, ReLU, TopK
from saekit.errors import ConfigError
from saekit.sae import Activation, UnitRow
from saekit.sae_bench import custom_sae

ACTIVATIONS: list[Activation] = [ReLU(), TopK(3), JumpReLU(torch.rand(12)), MatchingPursuit(4)]


def sae_of(how: Activation) -> SAE:
    if isinstance(how, MatchingPursuit):
        return SAE.of_atoms(torch.nn.functional.normalize(torch.randn(12, 5)), torch.randn(5), how)
    return SAE(torch.randn(5, 12), torch.randn(12), torch.randn(12, 5), torch.randn(5), how)


@pytest.mark.parametrize("how", ACTIVATIONS, ids=lambda a: type(a).__name__)
def test_it_reconstructs_what_the_sae_does_at_any_batch_shape(how: Activation) -> None:
    sae, x = sae_of(how), torch.randn(3, 7, 5)
    taken = custom_sae(sae, model_name="tiny", hook_layer=2)
    assert taken.encode(x).shape == (3, 7, 12)
    torch.testing.assert_close(taken(x).view(21, 5), sae(x.view(21, 5)), rtol=1e-4, atol=1e-4)
    same = (taken.encode(x).view(21, 12) != 0) == (sae.encode(x.view(21, 5)) != 0)
    assert same.float().mean() > 0.99


def test_rows_have_norm_1_where_that_changes_no_choice_among_latents() -> None:
    for how in (ReLU(), JumpReLU(torch.rand(12))):
        taken = custom_sae(sae_of(how), model_name="tiny", hook_layer=2)
        torch.testing.assert_close(taken.W_dec.norm(dim=1), torch.ones(12))
    sae = sae_of(TopK(3))
    assert custom_sae(sae, model_name="tiny", hook_layer=2).W_dec.equal(sae.W_dec)


def test_moving_it_moves_its_config_too() -> None:
    taken = custom_sae(sae_of(JumpReLU(torch.rand(12))), model_name="tiny", hook_layer=2)
    assert taken.to(dtype=torch.float64) is taken
    assert (taken.dtype, taken.cfg.dtype) == (torch.float64, "float64")
    assert taken(torch.randn(2, 5)).dtype == torch.float64
    assert taken.cfg.to_dict()["hook_name"] == "blocks.2.hook_resid_post"


def test_a_run_says_its_own_hook_point(tiny_run: Path) -> None:
    taken = custom_sae(tiny_run, model_name="tiny", hook_layer=0)
    assert taken.cfg.hook_name == "blocks.0.hook_resid_post"
    with pytest.raises(ConfigError, match=r"hook_layer=1, but the SAE is of 'blocks\.0"):
        custom_sae(tiny_run, model_name="tiny", hook_layer=1)


def test_what_decodes_from_more_than_latents_is_refused() -> None:
    plain = sae_of(ReLU())
    for sae in (replace(plain, W_skip=torch.eye(5)), replace(plain, row_norm=UnitRow())):
        with pytest.raises(ConfigError, match="decodes from latents alone"):
            custom_sae(sae, model_name="tiny", hook_layer=2)
