import pytest
import torch
from torch import Tensor

from saekit import ActivationCache, train
from saekit.errors import ConfigError
from saekit.sae import ReLU
from saekit.trainers._base import Batch
from saekit.trainers.relu import ReLUConfig, ReLUTrainer


def trainer(recipe: str, **options: object) -> tuple[ReLUTrainer, Tensor]:
    """One whose rows have different norms where the recipe allows it, and a batch."""
    given = {"d_sae": 12, "l1_coef": 0.7, "sparsity_warmup": 0.0, "recipe": recipe, **options}
    model = ReLUTrainer(ReLUConfig(**given), 6)  # type: ignore[arg-type]
    x = 2 * torch.randn(300, 6) + 1
    model.initialise(x)
    with torch.no_grad():
        model.b_enc.copy_(torch.randn(12))
        model.W_enc.copy_(torch.randn(6, 12))
        if recipe == "april":
            model.W_dec.mul_(torch.linspace(0.5, 3, 12)[:, None])
    return model, x


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("recipe", ["april", "unit_norm"])
def test_losses_and_gradients_are_the_equations(recipe: str, dense: bool) -> None:
    """Of the module's docstring, written out."""
    model, x = trainer(recipe)
    model.density.fill_(float(dense))
    losses = model.losses(Batch(x))
    if recipe == "april":
        z = (x @ model.W_enc + model.b_enc).relu()
        size = z * model.W_dec.norm(dim=1)
    else:
        z = size = ((x - model.b_dec) @ model.W_enc + model.b_enc).relu()
    mse = (x - z @ model.W_dec - model.b_dec).square().sum(1).mean()
    sparsity = 0.7 * size.sum(1).mean()
    torch.testing.assert_close(losses, {"mse": mse, "sparsity": sparsity})
    parameters = dict(model.named_parameters())
    ours = torch.autograd.grad(losses["mse"] + losses["sparsity"], list(parameters.values()))
    theirs = torch.autograd.grad(mse + sparsity, list(parameters.values()))
    named = (dict(zip(parameters, grads, strict=True)) for grads in (ours, theirs))
    torch.testing.assert_close(*named, rtol=1e-4, atol=1e-5)


def test_longer_rows_do_not_make_the_april_penalty_smaller() -> None:
    """The trap: with free norms and a plain L1, growing W_dec and shrinking z costs nothing."""
    model, x = trainer("april")
    before = {name: loss.detach() for name, loss in model.losses(Batch(x)).items()}
    with torch.no_grad():
        model.W_dec.mul_(10)
        model.W_enc.div_(10)
        model.b_enc.div_(10)
    torch.testing.assert_close(dict(model.losses(Batch(x))), before)


@pytest.mark.parametrize("recipe", ["april", "unit_norm"])
def test_export_folds_the_norms_and_the_decoder_bias(recipe: str) -> None:
    model, x = trainer(recipe)
    sae = model.export()
    assert sae.activation == ReLU()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(12))
    losses = model.losses(Batch(x))
    torch.testing.assert_close(losses["mse"], (x - sae(x)).square().sum(1).mean())
    torch.testing.assert_close(losses["sparsity"], 0.7 * sae.encode(x).sum(1).mean())


def test_april_leaves_norms_free_and_unit_norm_holds_them() -> None:
    for recipe, held in (("april", False), ("unit_norm", True)):
        model, x = trainer(recipe)
        optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
        before = model.W_dec.detach().norm(dim=1)
        for _ in range(5):
            optimiser.zero_grad()
            torch.stack(list(model.losses(Batch(x)).values())).sum().backward()
            model.before_step()
            optimiser.step()
            model.after_step()
        after = model.W_dec.detach().norm(dim=1)
        assert torch.allclose(after, before, atol=1e-5) == held


def test_april_begins_with_the_pre_activations_of_centred_activations() -> None:
    """And with all biases at 0, as published, where b_dec_init asks for it."""
    cfg = {"d_sae": 12, "recipe": "april"}
    x = torch.randn(300, 6) + 5
    model = ReLUTrainer(ReLUConfig(**cfg), 6)  # type: ignore[arg-type]
    model.initialise(x)
    pre = x @ model.W_enc + model.b_enc
    torch.testing.assert_close(pre, (x - model.b_dec) @ model.W_enc, rtol=1e-4, atol=1e-4)
    assert model.b_dec.norm() > 5
    model = ReLUTrainer(ReLUConfig(**cfg, b_dec_init="zero"), 6)  # type: ignore[arg-type]
    model.initialise(x)
    assert model.b_enc.eq(0).all() and model.b_dec.eq(0).all()


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ({"recipe": "april"}, "none"),
        ({"recipe": "unit_norm"}, "resample"),
        ({"recipe": "april", "revive": "auxk"}, "auxk"),
        ({"recipe": "unit_norm", "revive": "none"}, "none"),
        ({"recipe": "unit_norm", "freeze": "decoder"}, "none"),
    ],
)
def test_dead_latents_are_revived_as_the_recipe_has_it_unless_told_otherwise(
    options: dict[str, str], policy: str
) -> None:
    assert ReLUTrainer(ReLUConfig(d_sae=12, **options), 6).cfg.revive == policy  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", ["april", "unit_norm"])
def test_a_resampled_latent_fires_and_is_as_long_as_the_others(recipe: str) -> None:
    """Pre-activations of "april" are of x itself, far from 0 here; its rows are not of norm 1."""
    model, x = trainer(recipe, revive="resample", resample_every=1, dead_after=200)
    x = x + 20
    model.initialise(x)
    with torch.no_grad():
        model.b_enc[4] = -1000.0
    for _ in range(2):  # by then latent 4 has been silent for 600 tokens
        model.losses(Batch(x))
    others = model.W_dec[torch.arange(12) != 4].norm(dim=1).mean()
    model.step = 1
    planted = model.replant(Batch(x), torch.optim.Adam(model.parameters()))
    assert planted is not None and 4 in planted.tolist()
    if len(planted) == 1:
        torch.testing.assert_close(model.W_dec[4].norm(), others)
    share = (model.export().encode(x)[:, 4] > 0).float().mean()
    assert 0 < share < 0.9


def test_a_softly_frozen_decoder_with_free_norms_keeps_its_directions(
    planted: ActivationCache,
) -> None:
    cfg = ReLUConfig(
        d_sae=96, n_tokens=20_000, batch_size=200, lr=0.01, freeze="soft_decoder:0.95", seed=3
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        start = torch.nn.functional.normalize(ReLUTrainer(cfg, 32).W_dec.detach())
    cosines = (train(cfg, planted).W_dec * start).sum(1)
    assert cosines.min() > 0.949
    assert cosines.min() < 0.951  # it wants to go further


def test_a_negative_coefficient_is_refused() -> None:
    with pytest.raises(ConfigError, match="l1_coef=-1 may not be negative"):
        ReLUConfig(l1_coef=-1.0)
