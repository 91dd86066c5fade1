import pytest
import torch
from torch import Tensor

from saekit import ActivationCache, train
from saekit.errors import ConfigError
from saekit.trainers._base import Batch
from saekit.trainers.batch_topk import BatchTopKConfig
from saekit.trainers.mutual_choice import MutualChoiceConfig, MutualChoiceTrainer


def trainer(**options: float | None) -> MutualChoiceTrainer:
    sizes = {"d_sae": 12, "k": 2, "batch_size": 40, "dead_after": 1_000_000, "encoder_norm": 1.0}
    cfg = MutualChoiceConfig(**{**sizes, **options})  # type: ignore[arg-type]
    model = MutualChoiceTrainer(cfg, 6)
    model.initialise(torch.randn(50, 6))
    return model


def test_with_the_budget_of_k_it_is_batch_topk_bit_for_bit(planted: ActivationCache) -> None:
    """With dead latents, so that the auxiliary loss counts."""
    sizes = {"d_sae": 96, "k": 3, "batch_size": 200, "n_tokens": 8_000, "dead_after": 200}
    theirs = train(BatchTopKConfig(**sizes), planted)  # type: ignore[arg-type]
    for options in (
        {"zipf": False},
        {"zipf": False, "k": 5, "budget": 600},
        # Nothing is judged within the run, so that u is 1 for the dead and 0 for the others.
        {"density_rate": 0.001},
    ):
        ours = train(MutualChoiceConfig(**{**sizes, **options}), planted)  # type: ignore[arg-type]
        for name, tensor in theirs.tensors().items():
            assert tensor.equal(ours.tensors()[name]), (options, name)
    without = train(BatchTopKConfig(**sizes, auxk_coef=0.0), planted)  # type: ignore[arg-type]
    assert not without.W_dec.equal(theirs.W_dec)


def test_a_budget_is_what_a_batch_keeps_in_all() -> None:
    model = trainer(budget=57)
    model.losses(Batch(torch.randn(40, 6)))
    assert int(model.dead.fired.sum()) == 57


def silent(model: MutualChoiceTrainer, x: Tensor) -> Tensor:
    """Latents 5 to 8 fire on fewer tokens than others, and the last three on none."""
    with torch.no_grad():
        model.b_enc[5] = -2.5
        model.b_enc[6:9] = -4.0
        model.b_enc[9:] = -100.0
    model.losses(Batch(x))
    fired: Tensor = model.dead.fired / len(x)
    return fired


def test_the_deficit_is_what_is_missing_of_the_expected_density() -> None:
    model = trainer(density_rate=1.0, zipf_exponent=0.0, zipf_offset=0.0)
    x = 3 * torch.randn(400, 6)
    density = silent(model, x)
    torch.testing.assert_close(model.deficit(), (1 - density / (2 / 12)).clamp_min(0))
    assert model.deficit()[9:].tolist() == [1, 1, 1]


def test_until_densities_are_known_the_dead_alone_are_revived() -> None:
    model = trainer(density_rate=0.5, dead_after=400)
    x = 3 * torch.randn(400, 6)
    silent(model, x)
    assert model.deficit().nonzero().flatten().tolist() == [9, 10, 11]
    silent(model, x)
    assert len(model.deficit().nonzero()) > 3


def test_aux_zipf_is_the_share_of_the_error_that_weighted_under_used_latents_miss() -> None:
    """By hand, against the equations of the module's docstring."""
    model = trainer(density_rate=1.0, zipf_exponent=0.0, zipf_offset=0.0, k_aux=2)
    x = 3 * torch.randn(400, 6)
    silent(model, x)
    loss = model.losses(Batch(x))["aux_zipf"]
    with torch.no_grad():
        u = (1 - (model.dead.fired / 800) * 6).clamp_min(0)  # both batches were alike
        assert ((u > 0.5) & (u < 1)).any() and ((u > 0) & (u < 0.5)).any()
        pre = (x - model.b_dec) @ model.W_enc + model.b_enc
        z = pre * (pre >= pre.flatten().topk(800).values[-1])
        error = x - model.b_dec - z @ model.W_dec
        weighted = torch.where(u > 0.5, u * pre, -torch.inf)
        keep = weighted >= weighted.topk(2, dim=1).values[:, -1:]
        # What is above 0 on some row goes through the ReLU.
        kept = torch.where(keep, weighted, 0)
        missed = error - torch.where(pre.amax(0) > 0, kept.relu(), kept) @ model.W_dec
        error_variance = (error - error.mean(0)).square().sum(1).mean()
        share = missed.square().sum(1).mean() / error_variance
    torch.testing.assert_close(loss, model.variance / 32 * share)
    assert float(model.revived) == pytest.approx(float((u > 0.5).float().mean()))


def test_a_latent_that_is_under_used_but_not_dead_gets_gradient() -> None:
    model = trainer(density_rate=1.0, zipf_exponent=0.0)
    x = 3 * torch.randn(400, 6)
    density = silent(model, x)
    rare = int(density[6:9].argmin()) + 6
    assert 0 < density[rare] < 1 / 12
    assert not model.dead.mask.any()
    model.losses(Batch(x))["aux_zipf"].backward()
    assert model.W_enc.grad is not None and model.W_enc.grad[:, rare].norm() > 0
    assert model.W_enc.grad[:, density.argmax()].norm() == 0


def test_under_used_latents_find_what_batch_topk_misses(
    planted: ActivationCache, directions: Tensor
) -> None:
    """Of the planted directions BatchTopK, whose dead latents are not yet dead for it, leaves some
    without a latent."""
    sizes = {"d_sae": 96, "k": 3, "n_tokens": 50_000, "batch_size": 200, "lr": 2e-2}
    found = {}
    for zipf in (False, True):
        cfg = MutualChoiceConfig(**sizes, k_aux=3, density_rate=0.05, zipf=zipf)  # type: ignore[arg-type]
        found[zipf] = int(((directions @ train(cfg, planted).W_dec.T).amax(1) > 0.95).sum())
    assert found[True] == 48 > found[False]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"budget": 481}, "budget=481 must lie in 1..d_sae . batch_size=480"),
        ({"under_used": 1.0}, "under_used=1.0 must lie"),
        ({"zipf_exponent": -0.5}, "may not be negative"),
        ({"zipf_mass": 0.0}, "zipf_mass=0.0 must lie above 0"),
        ({"density_rate": 2.0}, "density_rate=2.0 must lie"),
    ],
)
def test_bad_values_are_refused_with_the_rule(option: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(**option)
