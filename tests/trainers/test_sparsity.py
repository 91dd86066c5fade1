"""The coefficient of a sparsity penalty, and the two ways to work on what fires."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from saekit import ActivationCache, train
from saekit.errors import ConfigError
from saekit.trainers import _kinds
from saekit.trainers._base import Batch
from saekit.trainers._log import FILE as LOG
from saekit.trainers._sparsity import Coefficient, Penalised
from saekit.trainers.relu import ReLUConfig

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "april": ("relu", {}),
    "unit_norm": ("relu", {"recipe": "unit_norm"}),
    "gated": ("gated", {}),
    "jumprelu": ("jumprelu", {}),
    "tanh": ("jumprelu", {"penalty": "tanh", "pre_act_coef": 1e-3}),
}


@pytest.fixture(params=KINDS)
def penalised(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return KINDS[request.param]


def search(target: float, n_steps: int, **options: Any) -> Coefficient:
    cfg = ReLUConfig(d_sae=400, n_tokens=n_steps * 10, batch_size=10, target_l0=target, **options)
    found = Coefficient(cfg, "l1_coef")
    found.begin(3.0)
    return found


def follow(found: Coefficient, n_steps: int, *, sluggish: float, power: float = 0.7) -> list[float]:
    """L0 over a run of something that answers to its coefficient as SAEs do: L0 goes to a power of
    it, some of the way each step, and begins with half of all latents."""
    l0 = torch.tensor(200.0)
    path = []
    for step in range(n_steps):
        value = found.weigh(l0, step)
        l0 = l0 * (40 * value**-power / l0) ** (1 / sluggish)
        path.append(float(l0))
    return path


def test_a_fixed_coefficient_rises_from_zero_and_stays() -> None:
    cfg = ReLUConfig(n_tokens=1000, batch_size=10, l1_coef=2.0, sparsity_warmup=0.1)
    found = Coefficient(cfg, "l1_coef")
    values = [float(found.weigh(torch.tensor(50.0), step)) for step in range(100)]
    assert values[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert set(values[10:]) == {2.0}


@pytest.mark.parametrize("n_steps", [300, 3_000])
@pytest.mark.parametrize("target", [4.0, 60.0])
def test_a_search_comes_to_its_target_in_short_and_long_runs(n_steps: int, target: float) -> None:
    """And does not fall far below it on the way, which would kill latents."""
    for sluggish in (10, 40):
        path = follow(search(target, n_steps), n_steps, sluggish=sluggish)
        assert path[-1] == pytest.approx(target, rel=0.05)
        assert min(path) > 0.95 * target


def test_l0_is_led_down_over_the_share_of_the_steps_that_the_config_says() -> None:
    for share in (0.3, 0.9):
        path = follow(search(4.0, 1000, target_by=share), 1000, sluggish=10)
        there = next(step for step, l0 in enumerate(path) if l0 < 4.4)
        assert 0.8 * share < there / 1000 < 1.25 * share


def test_a_search_begins_anywhere() -> None:
    """The guess may be wrong by a factor of 30 either way."""
    for guess in (0.1, 100.0):
        found = search(4.0, 1000)
        found.begin(guess)
        assert follow(found, 1000, sluggish=20)[-1] == pytest.approx(4.0, rel=0.03)


def test_a_batch_on_which_nothing_fires_does_no_harm() -> None:
    found = search(4.0, 100)
    for step in range(100):
        value = found.weigh(torch.tensor(0.0 if step == 50 else 4.0), step)
        assert value.isfinite()


def test_a_missed_target_is_told_with_what_was_reached(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        follow(search(4.0, 300), 300, sluggish=20)
    assert not caplog.records
    found = search(4.0, 300)
    for step in range(300):
        found.weigh(torch.tensor(9.0), step)
    (record,) = caplog.records
    assert "L0 came to 9, not within 10 % of target_l0=4 (l1_coef was" in record.getMessage()
    assert "--n-tokens" in record.getMessage() and "--l1-coef" in record.getMessage()


@pytest.mark.parametrize("name", ["gated", "jumprelu", "relu"])
def test_l0_meets_the_target(name: str, planted: ActivationCache, tmp_path: Path) -> None:
    """In three hundred steps; the path of the coefficient is in the log."""
    kind = _kinds.kind(name)
    given: dict[str, Any] = {
        "d_sae": 96,
        "n_tokens": 60_000,
        "batch_size": 200,
        "lr": 3e-3,
        "target_l0": 3.0,
    }
    sae = train(kind.Config(**given), planted, out=tmp_path / "run")
    x = next(planted.batches("resid_post.0", 5000))
    assert float((sae.encode(x) > 0).sum(1).float().mean()) == pytest.approx(3, rel=0.05)
    lines = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    values = [line["l0_coef" if name == "jumprelu" else "l1_coef"] for line in lines]
    assert len(set(values)) == len(values) and min(values) > 0
    assert min(line["l0"] for line in lines[len(lines) // 5 :]) > 0.8 * 3


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"target_l0": 0.0}, "target_l0=0 must lie above 0 and not above d_sae=4096"),
        ({"target_l0": -3.0}, "target_l0=-3 must lie above 0"),
        ({"target_l0": 5000.0}, "target_l0=5000 must lie above 0 and not above d_sae=4096"),
        ({"target_by": 0.0}, "target_by=0 must lie above 0 and not above 1"),
        ({"sparsity_warmup": 1.5}, r"sparsity_warmup=1.5 must lie in 0\.\.1"),
        ({"encoder_norm": 0.0}, "encoder_norm=0 must be positive"),
    ],
)
def test_bad_values_are_refused_with_the_rule(option: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReLUConfig(**option)  # type: ignore[arg-type]


def test_few_latents_or_all_give_the_same_losses_and_gradients(
    penalised: tuple[str, dict[str, Any]],
) -> None:
    name, options = penalised
    kind = _kinds.kind(name)
    results = []
    for density in (1.0, 0.0):
        torch.manual_seed(0)
        given = {"d_sae": 40, "dead_after": 100, "sparsity_warmup": 0.0, **options}
        cfg = kind.Config(**given)
        model = kind(cfg, 8)
        assert isinstance(model, Penalised)
        x = torch.randn(200, 8) + 1
        model.initialise(x)
        with torch.no_grad():
            model.W_enc.copy_(torch.randn(8, 40))
            model.b_enc.copy_(torch.randn(40)).view(-1)[:3] = -100  # three dead
        model.losses(Batch(x))
        model.density.fill_(density)
        losses = model.losses(Batch(x))
        total = torch.stack(list(losses.values())).sum()
        grads = torch.autograd.grad(total, list(model.parameters()))
        results.append((losses, grads, model.l0, model.dead.since, model.density))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert 0 < float(results[0][2]) < 40


def test_what_fired_in_the_last_batch_decides_how_the_next_is_worked_on() -> None:
    cfg = ReLUConfig(d_sae=40)
    model = _kinds.kind("relu")(cfg, 8)
    assert isinstance(model, Penalised)
    x = torch.randn(200, 8)
    model.initialise(x)
    assert model.keep(x).indices is None  # half of them fire
    with torch.no_grad():
        model.b_enc.sub_(0.4)
    assert model.keep(x).indices is None  # as many did
    assert model.density < 0.05
    kept = model.keep(x)
    assert kept.indices is not None and len(kept.pre) == (x @ model.W_enc + model.b_enc > 0).sum()
    assert "density" in model.state_dict()  # or a resumed run would round differently


def test_a_batch_on_which_nothing_is_kept_has_losses_and_gradients(
    penalised: tuple[str, dict[str, Any]],
) -> None:
    name, options = penalised
    kind = _kinds.kind(name)
    model = kind(kind.Config(d_sae=40, **options), 8)
    assert isinstance(model, Penalised)
    x = torch.randn(50, 8)
    model.initialise(x)
    with torch.no_grad():
        model.b_enc.fill_(-100)
    model.density.zero_()
    losses = model.losses(Batch(x))
    torch.stack(list(losses.values())).sum().backward()
    centred = (x - model.b_dec).square().sum(1).mean()
    torch.testing.assert_close(losses["mse"], centred)
    assert model.b_dec.grad is not None and model.b_dec.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "norm"),
    [({}, 0.25), ({"encoder_norm": 0.6}, 0.6), ({"freeze": "encoder"}, 1.0), ({"d_sae": 4}, 1.0)],
)
def test_the_encoder_begins_as_long_as_the_config_says(
    options: dict[str, Any], norm: float
) -> None:
    model = _kinds.kind("gated")(_kinds.kind("gated").Config(**{"d_sae": 32, **options}), 8)
    assert isinstance(model, Penalised)
    norms = model.W_enc.norm(dim=0)
    torch.testing.assert_close(norms, torch.full_like(norms, norm))
