from typing import Any

import pytest
import torch
from torch import Tensor

from saekit import ActivationCache, train
from saekit.errors import ConfigError
from saekit.sae import TopK
from saekit.trainers._base import Batch
from saekit.trainers.topk import TopKConfig
from saekit.trainers.variational import VariationalConfig, VariationalTrainer

D_IN, D_SAE, K = 6, 12, 3


def trainer(**options: Any) -> VariationalTrainer:
    """One whose KL has its full weight."""
    cfg = VariationalConfig(
        **{"d_sae": D_SAE, "k": K, "kl_warmup": 0.0, "encoder_norm": 1.0, **options}
    )
    model = VariationalTrainer(cfg, D_IN)
    with torch.no_grad():
        model.b_enc.normal_(std=0.3)
        model.b_dec.normal_(std=0.3)
    return model


def gradients(model: VariationalTrainer, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def by_hand(model: VariationalTrainer, x: Tensor) -> dict[str, Tensor]:
    """The losses of the module's docstring, written out; noise as the trainer would draw it."""
    cfg = model.cfg
    centred = x - model.b_dec
    mean = (centred @ model.W_enc + model.b_enc).relu()
    log_var = torch.zeros_like(mean)
    if cfg.variance == "learned":
        log_var = (centred @ model.W_var + model.b_var).clamp(-6, 2)
    z = mean
    if cfg.variance == "learned" if cfg.sample is None else cfg.sample:
        generator = torch.Generator()
        generator.set_state(model.generator.get_state())
        z = mean + (log_var / 2).exp() * torch.randn(mean.shape, generator=generator)
    keep = torch.zeros_like(z).scatter(1, z.abs().topk(K, dim=1).indices, 1.0)
    error = centred - (z * keep) @ model.W_dec
    kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var)
    counted = kl if cfg.kl_over == "all" else kl * keep
    return {
        "mse": (error**2).sum(1).mean(),
        "kl": cfg.kl_coef * counted.sum(1).mean(),
    }


CASES: list[dict[str, Any]] = [
    {"variance": "fixed"},
    {"variance": "fixed", "kl_over": "selected"},
    {"variance": "fixed", "sample": True},
    {"variance": "fixed", "sample": True, "kl_over": "selected"},
    {"variance": "learned"},
    {"variance": "learned", "kl_over": "selected"},
    {"variance": "learned", "sample": False},
    {"variance": "learned", "sample": False, "kl_over": "selected"},
]


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_equations(case: dict[str, Any]) -> None:
    model = trainer(kl_coef=0.7, **case)
    x = 3 * torch.randn(40, D_IN)
    expected = by_hand(model, x)
    expected_gradients = gradients(model, expected)
    losses = model.losses(Batch(x))
    assert losses["auxk"] == 0
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss)
    found = gradients(model, losses)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize(
    "case", [{"variance": "none"}, {"variance": "fixed", "kl_over": "selected", "kl_coef": 0.0}]
)
def test_without_variance_or_kl_it_is_topk_bit_for_bit(
    case: dict[str, Any], planted: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the definitions, where both kinds add up in the same order."""
    monkeypatch.setenv("SAEKIT_KERNELS", "reference")
    sizes: dict[str, Any] = {"d_sae": 96, "k": 3, "n_tokens": 10_000, "batch_size": 200}
    topk = train(TopKConfig(**sizes, dead_after=1000), planted)
    ours = train(VariationalConfig(**sizes, dead_after=1000, **case), planted)
    for name, tensor in topk.tensors().items():
        assert tensor.equal(ours.tensors()[name]), name


def test_the_kl_of_a_learned_variance_is_that_of_two_gaussians() -> None:
    model = trainer(variance="learned", sample=False)
    x = torch.randn(30, D_IN)
    with torch.no_grad():
        mean = (x - model.b_dec) @ model.W_enc + model.b_enc
        log_var = ((x - model.b_dec) @ model.W_var + model.b_var).clamp(-6, 2)
    posterior = torch.distributions.Normal(mean.relu(), (log_var / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(model.losses(Batch(x))["kl"].detach(), kl.sum(1).mean())


def test_means_beyond_the_clamp_are_pressed_no_harder() -> None:
    model = trainer(kl_clamp=0.5)
    x = 5 * torch.randn(30, D_IN)
    with torch.no_grad():
        mean = ((x - model.b_dec) @ model.W_enc + model.b_enc).relu()
    losses = model.losses(Batch(x))
    expected = 0.5 * mean.clamp_max(0.5).square().sum(1).mean()
    torch.testing.assert_close(losses["kl"].detach(), expected)
    (gradient,) = torch.autograd.grad(losses["kl"], model.b_enc)
    inside = mean * (mean < 0.5)
    torch.testing.assert_close(gradient, inside.sum(0) / 30)


def test_the_weight_of_the_kl_rises_over_its_share_of_the_steps() -> None:
    model = trainer(kl_warmup=0.5, n_tokens=2000, batch_size=100)  # 20 steps
    x = torch.randn(30, D_IN)
    weights = []
    for step in (0, 4, 9, 19):
        model.step = step
        weights.append(float(model.losses(Batch(x))["kl"].detach()))
    full = weights[-1]
    assert weights == pytest.approx([0.1 * full, 0.5 * full, full, full])


@pytest.mark.parametrize(("case", "draws"), [(0, False), (2, True), (4, True), (6, False)])
def test_noise_is_drawn_only_where_latents_are_sampled(case: int, draws: bool) -> None:
    model = trainer(**CASES[case])
    before = model.generator.get_state()
    model.losses(Batch(torch.randn(10, D_IN)))
    assert before.equal(model.generator.get_state()) != draws


def test_inference_is_topk_of_the_means_whatever_training_draws() -> None:
    model = trainer(variance="learned")
    sae = model.export()
    assert sae.activation == TopK(K)
    x = torch.randn(50, D_IN)
    mean = ((x - model.b_dec) @ model.W_enc + model.b_enc).relu()
    kept = torch.zeros_like(mean).scatter(1, mean.topk(K, dim=1).indices, 1.0)
    torch.testing.assert_close(sae.encode(x), mean * kept)
    assert sae.encode(x).equal(sae.encode(x))


def test_a_latent_that_noise_alone_selects_counts_as_silent() -> None:
    model = trainer(variance="fixed", sample=True)
    with torch.no_grad():
        model.b_enc[4:] = -100.0
    x = torch.randn(200, D_IN)
    model.losses(Batch(x))
    assert (model.dead.since[4:] == 200).all()
    assert (model.dead.since[:4] == 0).all()
    with torch.no_grad():
        mean = ((x - model.b_dec) @ model.W_enc + model.b_enc).relu()
    assert model.metrics()["l0"] <= float((mean > 0).sum(1).float().mean())


def test_collapsed_latents_are_those_whose_posterior_is_the_prior() -> None:
    x = torch.randn(100, D_IN)
    for over in ("all", "selected"):
        model = trainer(variance="learned", kl_over=over)
        with torch.no_grad():
            model.W_var.zero_()
            model.b_var.zero_()  # variance 1
            model.b_enc[:3] = -100.0  # mean 0
        model.losses(Batch(x))
        assert model.metrics()["collapsed"] == pytest.approx(3 / D_SAE)
        with torch.no_grad():
            model.b_var[0] = -1.0
        model.losses(Batch(x))
        assert model.metrics()["collapsed"] == pytest.approx(2 / D_SAE)
    assert "collapsed" not in trainer(variance="none").metrics()


def test_a_resampled_latent_begins_with_the_variance_of_a_new_one() -> None:
    model = trainer(variance="learned", revive="resample", resample_every=1, dead_after=20)
    with torch.no_grad():
        model.b_enc[5] = -100.0
        model.b_var[5] = 1.0
    optimiser = torch.optim.Adam(model.parameters())
    x = torch.randn(50, D_IN)
    gradients(model, model.losses(Batch(x)))
    optimiser.step()
    others = model.W_var.detach().clone()
    replanted = model.replant(Batch(x), optimiser)
    assert replanted is not None and replanted.tolist() == [5]
    assert model.b_var[5] == -2 and (model.W_var[:, 5] == 0).all()
    assert optimiser.state[model.W_var]["exp_avg"][:, 5].abs().max() == 0
    assert optimiser.state[model.W_var]["exp_avg"][:, 4].abs().max() > 0
    others[:, 5] = 0
    assert model.W_var.detach().equal(others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample": True, "variance": "none"}, "leaves nothing to draw from"),
        ({"kl_coef": -1.0}, r"kl_coef=-1\.0 may not be negative"),
        ({"kl_warmup": 2.0}, r"kl_warmup=2\.0 is a share"),
        ({"kl_clamp": 0.0}, r"kl_clamp=0\.0 must be positive"),
        ({"k": 13}, "k=13 must lie in 1..d_sae=12"),
    ],
)
def test_bad_values_are_refused_with_the_rule(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(**options)
