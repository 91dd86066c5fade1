from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from saekit import SAE, MatchingPursuit
from saekit.errors import ConfigError
from saekit.synthetic import hierarchical_tree, recovery
from saekit.trainers._base import Batch
from saekit.trainers._life import pre_activations
from saekit.trainers.matching_pursuit import MatchingPursuitConfig, MatchingPursuitTrainer


def trainer(**options: Any) -> MatchingPursuitTrainer:
    cfg = MatchingPursuitConfig(**{"d_sae": 12, "steps": 4, "dead_after": 10, **options})
    return MatchingPursuitTrainer(cfg, 6)


def fit(model: MatchingPursuitTrainer, batches: Iterable[Tensor], lr: float) -> None:
    """With the moments of the paper's toy runs."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(learning, lr, betas=(0.5, 0.9375))
    for x in batches:
        optimiser.zero_grad()
        model.losses(Batch(x))["mse"].backward()
        model.before_step()
        optimiser.step()
        model.after_step()


def by_hand(x: Tensor, atoms: Tensor, steps: int) -> Tensor:
    """overcomplete 0.3.0, module sae/mp_sae.py, row by row."""
    codes = torch.zeros(len(x), len(atoms))
    for row, code in zip(x, codes, strict=True):
        rest = row.clone()
        for _ in range(steps):
            products = atoms @ rest
            best = int(products.argmax())
            code[best] += products[best]
            rest = rest - products[best] * atoms[best]
    return codes


def test_codes_are_those_of_the_published_loop() -> None:
    model, x = trainer(steps=10), torch.randn(30, 6)
    model.initialise(x)
    sae = model.export()
    expected = by_hand(x - model.b_dec.detach(), model.W_dec.detach(), 10)
    # Where no atom points along the rest, the published loop takes the least bad one.
    positive = (expected >= 0).all(1)
    assert positive.sum() > 10
    with torch.no_grad():
        torch.testing.assert_close(
            sae.encode(x)[positive], expected[positive], rtol=1e-5, atol=1e-5
        )


def test_the_gradient_is_that_of_the_whole_pursuit() -> None:
    """Against differences of the loss; and codes that are held fixed give another."""
    model = trainer().double()
    x = torch.randn(20, 6, dtype=torch.float64)
    model.initialise(x)
    model.losses(Batch(x))["mse"].backward()
    for parameter in (model.W_dec, model.b_dec):
        assert parameter.grad is not None
        direction = torch.randn_like(parameter)
        losses = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                losses.append(model.losses(Batch(x))["mse"])
                parameter.sub_(direction, alpha=step)
        slope = (losses[0] - losses[1]) / 2e-6
        torch.testing.assert_close((parameter.grad * direction).sum(), slope, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        code = model.export().encode(x)
    held = (x - model.b_dec - code @ model.W_dec).square().sum(1).mean()
    (fixed,) = torch.autograd.grad(held, model.W_dec)
    assert model.W_dec.grad is not None
    assert torch.cosine_similarity(fixed.flatten(), model.W_dec.grad.flatten(), dim=0) < 0.999


def test_rows_stay_unit_vectors_and_what_is_left_never_grows() -> None:
    """The trap of norms that drift: past sqrt(2) a pursuit diverges."""
    model, x = trainer(), torch.randn(200, 6)
    model.initialise(x)
    fit(model, [x] * 50, lr=0.5)
    torch.testing.assert_close(model.W_dec.norm(dim=1), torch.ones(12))
    sae = model.export()
    left = (x - sae.b_dec).norm(dim=1)
    for steps in range(1, 30):
        now = (x - SAE.of_atoms(sae.W_dec, sae.b_dec, MatchingPursuit(steps))(x)).norm(dim=1)
        assert (now <= left + 1e-5).all()
        left = now


def test_the_decoders_gradient_has_no_part_along_its_rows() -> None:
    model, x = trainer(), torch.randn(20, 6)
    model.initialise(x)
    model.losses(Batch(x))["mse"].backward()
    assert model.W_dec.grad is not None
    assert (model.W_dec.grad * model.W_dec).sum(1).abs().max() > 0.01
    model.before_step()
    along = (model.W_dec.grad * model.W_dec).sum(1)
    torch.testing.assert_close(along, torch.zeros(12), atol=1e-5, rtol=0)


def test_more_steps_at_inference_leave_less() -> None:
    model, x = trainer(d_sae=24), torch.randn(400, 6)
    model.initialise(x)
    fit(model, [x] * 100, lr=0.02)
    errors = []
    with torch.no_grad():
        for steps in (1, 2, 4, 8, 16):
            sae = SAE.of_atoms(model.W_dec, model.b_dec, MatchingPursuit(steps))
            errors.append(float((x - sae(x)).square().sum(1).mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * errors[0]


def test_latents_that_fire_are_counted_once_a_row() -> None:
    """Of two atoms 60 degrees apart a row of four steps takes each twice."""
    model = trainer(d_sae=2, b_dec_init="zero")
    with torch.no_grad():
        model.W_dec.copy_(torch.tensor([[1.0, 0, 0, 0, 0, 0], [0.5, 0.75**0.5, 0, 0, 0, 0]]))
    x = torch.tensor([[1.0, 0.9, 0, 0, 0, 0]]).expand(7, 6)
    model.losses(Batch(x))
    assert model.metrics()["l0"] == 2
    assert model.dead.fired.tolist() == [7, 7]


def test_a_pursuit_over_the_papers_tree_has_its_codes() -> None:
    """Siblings without anything in common: 1.36 of 20 features on the mean."""
    tree = hierarchical_tree(0)
    x, codes = tree.rows(0, 20_000)
    z = SAE.of_atoms(tree.directions, tree.bias, MatchingPursuit(20, residual=1e-3)).encode(x)
    torch.testing.assert_close(z, codes, atol=1e-2, rtol=1e-3)
    assert (z != 0).sum(1).float().mean() == pytest.approx(1.36, abs=0.03)


def test_training_finds_the_papers_tree() -> None:
    tree = hierarchical_tree(0)
    options = {"d_sae": 20, "steps": 5, "residual": 0.05, "learn_b_dec": False}
    model = MatchingPursuitTrainer(MatchingPursuitConfig(**options, b_dec_init="zero"), 20)  # type: ignore[arg-type]
    fit(model, tree.rows(0, 60_000)[0].split(200), lr=0.03)
    fit(model, tree.rows(60_000, 80_000)[0].split(200), lr=0.003)
    assert recovery(model.W_dec, tree.directions, signed=True).cosine.min() > 0.99


def test_a_frozen_decoder_stays_and_an_encoder_is_refused_by_name() -> None:
    assert trainer(freeze="decoder").frozen() == ["W_dec"]
    for freeze in ("encoder", "all"):
        with pytest.raises(ConfigError, match=r"has no encoder of its own to freeze .*: decoder\)"):
            trainer(freeze=freeze).frozen()


def test_a_softly_frozen_decoder_keeps_its_cosine() -> None:
    model, x = trainer(freeze="soft_decoder:0.9"), torch.randn(100, 6)
    start = model.W_dec.detach().clone()
    fit(model, [x] * 50, lr=0.1)
    cosine = (model.W_dec.detach() * start).sum(1)
    assert cosine.min() == pytest.approx(0.9, abs=1e-4)


def test_a_bias_that_is_not_learned_stays_where_it_started() -> None:
    model, x = trainer(learn_b_dec=False, b_dec_init="mean"), torch.randn(100, 6) + 3
    model.initialise(x)
    fit(model, [x] * 5, lr=0.1)
    torch.testing.assert_close(model.b_dec, x.mean(0))


def test_dead_latents_take_the_directions_that_rows_lack() -> None:
    """Half the atoms point away from all data, which the others explain but for one direction."""
    axes = torch.eye(6)
    model = trainer(
        d_sae=8, b_dec_init="zero", revive="resample", resample_every=1, steps=2, seed=1
    )
    with torch.no_grad():
        model.W_dec.copy_(torch.cat([axes[:4], -axes[:4]]))
    x = axes[torch.arange(40) % 4] * 3
    x[3] += axes[5]
    x[7] += 2 * axes[5]
    optimiser = torch.optim.Adam(model.parameters())
    model.losses(Batch(x))["mse"].backward()
    optimiser.step()
    with torch.no_grad():
        model.W_dec.copy_(torch.cat([axes[:4], -axes[:4]]))
        model.b_dec.zero_()
    assert model.dead.mask.tolist() == [False] * 4 + [True] * 4
    model.step = 1
    replanted = model.replant(Batch(x), optimiser)
    # Two rows lack anything, so no more than two atoms can be given new weights.
    assert replanted is not None and replanted.tolist() == [4, 5]
    torch.testing.assert_close(model.W_dec[4:6], axes[5].expand(2, 6))
    torch.testing.assert_close(model.W_dec[6:], -axes[2:4])
    moments = optimiser.state[model.W_dec]["exp_avg"]
    assert not moments[4:6].any() and moments[:4].any()
    assert not model.dead.mask[4:6].any()


def test_nothing_is_replanted_out_of_turn() -> None:
    model, x = trainer(revive="resample", resample_every=7), torch.randn(20, 6)
    optimiser = torch.optim.Adam(model.parameters())
    model.step = 6
    assert model.replant(Batch(x), optimiser) is None
    assert trainer().replant(Batch(x), optimiser) is None


@pytest.mark.parametrize("signed", [False, True])
def test_the_margin_is_0_for_what_fired_and_below_for_what_did_not(signed: bool) -> None:
    atoms = torch.nn.functional.normalize(torch.randn(40, 6))
    sae = SAE.of_atoms(atoms, torch.randn(6), MatchingPursuit(3, residual=0.1, signed=signed))
    x = torch.randn(10, 6)
    fired = (sae.encode(x) != 0).any(0)
    margin = pre_activations(sae, x)["margin"]
    assert 5 < fired.sum() < 35
    torch.testing.assert_close(margin[fired], torch.zeros(int(fired.sum())), atol=1e-5, rtol=0)
    assert (margin[~fired] < 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"residual": 1.0}, r"residual=1\.0 must lie in 0\.\.1"),
        ({"resample_every": 0}, "resample_every=0 must be at least 1 step"),
        ({"revive": "resample", "freeze": "decoder"}, "set revive to none"),
    ],
)
def test_bad_values_are_refused_with_the_rule(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(**options)
