from typing import Any

import pytest
import torch
from torch import Tensor

from saekit import ActivationCache, train
from saekit.errors import ConfigError
from saekit.sae import JumpReLU
from saekit.trainers._base import Batch
from saekit.trainers.group_bias import GroupBiasConfig, GroupBiasTrainer

D_IN, D_SAE = 6, 12


def trainer(d_sae: int = D_SAE, **options: Any) -> GroupBiasTrainer:
    options = {"n_groups": 3, "cap_high": 0.4, "cap_low": 0.1, **options}
    return GroupBiasTrainer(GroupBiasConfig(d_sae=d_sae, **options), D_IN)


def saw(model: GroupBiasTrainer, often: list[int], peak: list[float], rows: int) -> None:
    """As if so many rows had been seen since the last adaptation."""
    model.often.copy_(torch.tensor(often))
    model.peak.copy_(torch.tensor(peak))
    model.seen.fill_(rows)


def test_the_bias_says_when_a_latent_fires_and_not_how_much() -> None:
    model = trainer(d_sae=1, n_groups=1)
    with torch.no_grad():
        model.W_dec.copy_(torch.eye(D_IN)[:1])
    model.bias.fill_(-0.5)
    x = torch.zeros(3, D_IN)
    x[:, 0] = torch.tensor([0.4, 0.8, -2.0])
    loss = model.losses(Batch(x))["mse"]
    assert float(loss.detach()) == pytest.approx((0.4**2 + 0 + 2.0**2) / 3)
    sae = model.export()
    assert isinstance(sae.activation, JumpReLU)
    assert sae.activation.threshold.tolist() == [0.5]
    torch.testing.assert_close(sae.encode(x).flatten(), torch.tensor([0.0, 0.8, 0.0]))


def test_no_gradient_moves_a_bias() -> None:
    model = trainer(scale="learned")
    x = torch.randn(50, D_IN)
    model.losses(Batch(x))["mse"].backward()
    assert {name for name, _ in model.named_parameters()} == {"W_dec", "b_dec", "scale"}
    assert not model.bias.requires_grad and model.bias.grad is None
    assert "bias" in model.state_dict()


def test_one_adaptation_by_hand() -> None:
    """Of one group with a cap of 0.4: too often, within bounds, rarely, never; and at the ends."""
    model = trainer(d_sae=6, n_groups=1, cap_high=0.4, gamma_minus=0.1, gamma_plus=0.2, eps=1e-3)
    model.bias.copy_(torch.tensor([-0.3, -0.3, -0.3, -0.3, -0.99, -0.05]))
    saw(model, [41, 40, 1, 0, 100, 0], [0.5, 0.9, 0.1, 0.0, 0.7, 0.0], rows=100)
    model.adapt()
    mean_peak = (0.5 + 0.9 + 0.1 + 0.7) / 4
    expected = torch.tensor([-0.35, -0.3, -0.3, -0.3 + 0.2 * mean_peak, -1.0, 0.0])
    torch.testing.assert_close(model.bias, expected)
    assert model.seen == 0 and (model.often == 0).all() and (model.peak == 0).all()


def test_adaptation_is_that_of_a_plain_loop() -> None:
    model = trainer(d_sae=11, gamma_minus=0.3, gamma_plus=0.2)
    cfg = model.cfg
    for _ in range(20):
        model.bias.copy_(-torch.rand(11))
        often = torch.randint(0, 60, (11,)) * torch.randint(0, 2, (11,))
        peak = torch.rand(11) * (often > 0)
        saw(model, often.tolist(), peak.tolist(), rows=100)
        before = model.bias.clone()
        groups = model.group.tolist()
        expected = []
        for m, g in enumerate(groups):
            cap = [0.4, 0.2, 0.1][g]
            positive = [float(peak[i]) for i in range(11) if groups[i] == g and peak[i] > 0]
            p, b = int(often[m]) / 100, float(before[m])
            if p > cap:
                b = max(b - cfg.gamma_minus * float(peak[m]), -1)
            elif p < cfg.eps:
                mean = sum(positive) / len(positive) if positive else 1.0
                b = min(b + cfg.gamma_plus * mean, 0)
            expected.append(b)
        model.adapt()
        torch.testing.assert_close(model.bias, torch.tensor(expected))


def test_a_latent_between_dead_and_its_cap_is_left_alone_however_long() -> None:
    """The cap is no target: a latent that fires at all is never raised."""
    model = trainer(d_sae=3, n_groups=1, cap_high=0.4)
    model.bias.fill_(-0.6)
    for _ in range(50):
        saw(model, [1, 20, 40], [0.01, 0.2, 0.9], rows=100)
        model.adapt()
    assert (model.bias == torch.tensor(-0.6)).all()


def test_a_group_of_which_none_fires_comes_back() -> None:
    model = trainer(d_sae=2, n_groups=1)
    model.bias.fill_(-0.9)
    x = torch.nn.functional.normalize(torch.randn(100, D_IN)) * 0.5
    for _ in range(50):
        model.losses(Batch(x))
        model.adapt()
    assert (model.bias > -0.5).all()
    assert (model.export().encode(x) > 0).any()


def test_groups_are_equal_and_their_caps_geometric() -> None:
    model = trainer(d_sae=10, n_groups=3, cap_high=0.9, cap_low=0.1)
    assert model.group.bincount().tolist() == [4, 3, 3]
    torch.testing.assert_close(model.cap[[0, 4, 7]], torch.tensor([0.9, 0.3, 0.1]))
    assert trainer(n_groups=1, cap_high=0.25).cap.unique().tolist() == [0.25]


@pytest.mark.parametrize("scale", ["fixed", "learned"])
def test_both_ways_of_working_give_the_same_losses_gradients_and_statistics(scale: str) -> None:
    model = trainer(scale=scale)
    model.bias.copy_(-0.5 * torch.rand(D_SAE))
    if model.scale is not None:
        with torch.no_grad():
            model.scale.uniform_(0.5, 2)
    batches = [torch.randn(40, D_IN), torch.randn(40, D_IN)]
    found: list[dict[str, Tensor]] = []
    for density in (0.0, 1.0):
        saw(model, [0] * D_SAE, [0.0] * D_SAE, rows=0)
        model.zero_grad()
        total = torch.zeros(())
        for x in batches:
            model.density.fill_(density)
            loss = model.losses(Batch(x))["mse"]
            loss.backward()
            total += loss.detach()
        seen = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append(
            {**seen, "loss": total, "often": model.often.clone(), "peak": model.peak.clone()}
        )
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor)
    y = (torch.cat(batches) - model.b_dec) @ model.W_dec.T + model.bias
    assert found[0]["often"].equal((y > 0).sum(0))
    torch.testing.assert_close(found[0]["peak"], y.amax(0).clamp_min(0).detach())
    z = (y - model.bias) * (y > 0)
    if model.scale is not None:
        z = z * model.scale
    error = torch.cat(batches) - model.b_dec - z @ model.W_dec
    torch.testing.assert_close(found[0]["loss"] / 2, error.square().sum(1).mean().detach())


def test_biases_are_adapted_once_per_interval_by_what_was_seen_in_it() -> None:
    model = trainer(adapt_every=40, batch_size=10)  # four steps
    moved = []
    for step in range(9):
        model.step = step
        before = model.bias.clone()
        model.losses(Batch(torch.randn(10, D_IN)))["mse"].backward()
        assert model.seen == 10 * (step % 4 + 1)
        model.after_step()
        moved.append(not before.equal(model.bias))
    assert moved == [False, False, False, True, False, False, False, True, False]


def test_biases_stay_in_bounds_and_caps_bound_l0(planted: ActivationCache) -> None:
    cfg = GroupBiasConfig(
        d_sae=96,
        n_groups=4,
        cap_high=0.08,
        cap_low=0.02,
        adapt_every=400,
        n_tokens=80_000,
        batch_size=200,
    )
    sae = train(cfg, planted)
    x = next(planted.batches("resid_post.0", 5000))
    fired = (sae.encode(x) > 0).float()
    caps = GroupBiasTrainer(cfg, 32).cap
    assert 0 < float(fired.sum(1).mean()) < float(caps.sum())
    # Each latent keeps to its own cap, too, but for the noise of the last interval.
    assert (fired.mean(0) < 1.25 * caps).float().mean() > 0.95
    assert isinstance(sae.activation, JumpReLU)
    # Mean norm 1 in training, where biases lie in -1..0.
    threshold = sae.activation.threshold / float(x.norm(dim=1).mean())
    assert threshold.min() >= 0 and threshold.max() <= 1.05


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_learned_scale_goes_into_the_latent_at_export(sign: float) -> None:
    model = trainer(scale="learned")
    assert model.scale is not None
    with torch.no_grad():
        model.scale.uniform_(0.5, 2).mul_(sign)
        model.b_dec.normal_()
    model.bias.copy_(-torch.rand(D_SAE))
    x = torch.randn(60, D_IN)
    sae = model.export()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert sae.encode(x).min() >= 0
    loss = model.losses(Batch(x))["mse"]
    torch.testing.assert_close((x - sae(x)).square().sum(1).mean(), loss)


def test_a_soft_decoder_stays_near_where_it_began() -> None:
    model = trainer(freeze="soft_decoder:0.9", batch_size=50)
    began = model.W_dec.detach().clone()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.3)
    for _ in range(20):
        optimiser.zero_grad()
        model.losses(Batch(torch.randn(50, D_IN)))["mse"].backward()
        model.before_step()
        optimiser.step()
        model.after_step()
    cosine = (model.W_dec * began).sum(1)
    assert cosine.min() > 0.899 and cosine.min() < 0.95
    with pytest.raises(ConfigError, match="no encoder of its own to freeze"):
        trainer(freeze="encoder").frozen()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_groups": 13}, "n_groups=13 must lie in 1..d_sae=12"),
        ({"cap_low": 0.5}, r"cap_low=0\.5 and cap_high=0\.4 are shares"),
        ({"adapt_every": 0}, "adapt_every=0"),
        ({"gamma_plus": -0.1}, r"gamma_plus=-0\.1"),
        ({"bias_init": 0.1}, r"bias_init=0\.1 must lie in -1\.\.0"),
    ],
)
def test_bad_values_are_refused_with_the_rule(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(**options)
