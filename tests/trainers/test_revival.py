"""Each way to revive dead latents against its own definition, on TopK, whose code they revive."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from saekit.errors import ConfigError
from saekit.trainers._autoencoder import forget
from saekit.trainers._base import Batch, variance_of
from saekit.trainers.topk import TopKConfig, TopKTrainer

Revive = Literal["none", "auxk", "resample", "ghost"]

D_IN, D_SAE = 6, 12
DEAD = torch.arange(6, 12)


def trainer(**options: object) -> TopKTrainer:
    cfg = TopKConfig(d_sae=D_SAE, k=2, dead_after=10, **options)  # type: ignore[arg-type]
    model = TopKTrainer(cfg, D_IN)
    model.generator.manual_seed(0)
    return model


def half_dead(**options: object) -> tuple[TopKTrainer, Tensor]:
    """A trainer that has seen thirty rows on which its second half stayed below zero, and these."""
    model, x = trainer(**options), torch.randn(30, D_IN)
    model.initialise(x)
    with torch.no_grad():
        model.b_enc[DEAD] = -100
    model.losses(Batch(x))
    assert model.dead.mask.nonzero().flatten().equal(DEAD)
    return model, x


def pushed_below_zero(revive: Revive) -> tuple[int, float]:
    """How many of twelve such latents fire at the end, and the error that is left, where there are
    twelve features and one latent that lives."""
    torch.manual_seed(0)
    cfg = TopKConfig(
        d_sae=13,
        k=2,
        dead_after=2_000,
        n_tokens=200 * 300,
        batch_size=200,
        revive=revive,
        auxk_coef=1.0,
        resample_every=50,
        b_dec_init="mean",
        encoder_norm=1.0,
    )
    model = TopKTrainer(cfg, 12)
    x = 3 * torch.eye(12)[torch.randint(12, (200,))] + 0.1 * torch.randn(200, 12)
    model.initialise(x)
    with torch.no_grad():
        model.b_enc[1:] = -4.0
    optimiser = torch.optim.Adam(model.parameters(), lr=0.03)
    losses = {}
    for step in range(cfg.n_steps):
        optimiser.zero_grad()
        losses = model.losses(Batch(x))
        torch.stack(list(losses.values())).sum().backward()
        model.before_step()
        optimiser.step()
        model.after_step()
        model.step = step + 1
        model.replant(Batch(x), optimiser)
    fired = (model.export().encode(x) > 0).any(0)
    return int(fired[1:].sum()), float(losses["mse"].detach())


@pytest.mark.parametrize("revive", ["auxk", "resample", "ghost"])
def test_dead_latents_come_back_to_life_and_are_of_use(revive: Revive) -> None:
    fired, error = pushed_below_zero(revive)
    assert fired >= 8
    assert error < 2


def test_without_help_they_stay_dead() -> None:
    fired, error = pushed_below_zero("none")
    assert fired == 0
    assert error > 5


@pytest.mark.parametrize("revive", ["none", "auxk", "resample", "ghost"])
def test_nothing_is_added_while_none_is_dead(revive: Revive) -> None:
    model, x = trainer(revive=revive), torch.randn(5, D_IN)
    model.initialise(x)
    losses = model.losses(Batch(x))
    assert sum(losses[name] for name in losses.keys() - {"mse"}) == 0


@pytest.mark.parametrize("revive", ["auxk", "ghost"])
def test_the_term_teaches_the_dead_and_no_others(revive: Revive) -> None:
    model, x = half_dead(revive=revive)
    model.losses(Batch(x))[revive].backward()
    assert model.b_dec.grad is None
    for parameter, axis in ((model.W_dec, 1), (model.W_enc, 0), (model.b_enc, None)):
        assert parameter.grad is not None
        size = parameter.grad.abs() if axis is None else parameter.grad.norm(dim=axis)
        assert size[DEAD].min() > 0 and size[: DEAD[0]].eq(0).all()


@pytest.mark.parametrize(("k_aux", "used"), [(None, 3), (2, 2), (50, 6)])
def test_auxk_is_the_share_of_the_error_that_dead_latents_miss(
    k_aux: int | None, used: int
) -> None:
    """By hand, against the equation of its docstring; d_in / 2 dead latents a row by default, and
    never more than there are."""
    model, x = half_dead(revive="auxk", k_aux=k_aux, auxk_coef=0.25)
    with torch.no_grad():
        loss = model.losses(Batch(x))["auxk"]
        error = x - model.export()(x)
        expected = 0.0
        for row, missed in zip(x, error, strict=True):
            pre = (row - model.b_dec) @ model.W_enc + model.b_enc
            best = sorted(DEAD.tolist(), key=lambda i: -float(pre[i]))[:used]
            e_hat = torch.stack([pre[i] * model.W_dec[i] for i in best]).sum(0)
            expected += float((missed - e_hat).square().sum()) / 30
        expected *= 0.25 * float(variance_of(x)) / float(variance_of(error))
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_auxk_with_a_weight_of_0_is_off() -> None:
    model, x = half_dead(revive="auxk", auxk_coef=0.0)
    assert model.losses(Batch(x)).keys() == {"mse"}


@pytest.mark.parametrize("below", [-1.0, -50.0, -1000.0, 200.0])
def test_ghosts_follow_their_five_steps(below: float) -> None:
    """In float64 and by hand, value and gradient, however far from zero the pre-activations are:
    exp alone would give nothing or infinity."""
    model, x = half_dead(revive="ghost")
    model, x = model.double(), x.double()
    with torch.no_grad():
        model.b_enc[DEAD] = below
    centred = x - model.b_dec.detach()
    error = torch.randn(30, D_IN, dtype=torch.float64)
    loss = model._ghost(centred, error)
    names = ("W_enc", "b_enc", "W_dec")
    ours = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])

    pre = centred @ model.W_enc[:, DEAD] + model.b_enc[DEAD]
    exp = (pre - below).exp()  # a factor for all, which the scaling to half the error takes away
    out = exp @ model.W_dec[DEAD]
    out = out * (error.norm(dim=1) / 2 / out.norm(dim=1)).detach()[:, None]
    torch.testing.assert_close(out.norm(dim=1), error.norm(dim=1) / 2)
    by_hand = (error - out).square().sum(1).mean()
    normal = error.square().sum(1).mean()
    by_hand = by_hand * (normal / by_hand).detach()
    theirs = torch.autograd.grad(by_hand, [model.get_parameter(name) for name in names])
    torch.testing.assert_close(loss, normal)
    for one, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 1e-6
        torch.testing.assert_close(one, other)


def replanted(**options: object) -> tuple[TopKTrainer, Tensor, torch.optim.Optimizer]:
    """A trainer that has just given half its latents new weights, in its fourth step."""
    model, x = half_dead(revive="resample", resample_every=4, **options)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.losses(Batch(x))["mse"].backward()
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            parameter.grad += 1.0  # so that each latent has moments to forget
    optimiser.step()
    model.after_step()
    model.step = 4
    return model, x, optimiser


def test_resampled_latents_take_the_direction_of_a_row() -> None:
    model, x, optimiser = replanted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = model.replant(Batch(x), optimiser)
    assert found is not None and found.equal(DEAD)
    centred = torch.nn.functional.normalize(x - model.b_dec)
    norm = before["W_enc"][:, : DEAD[0]].norm(dim=0).mean()
    for latent in DEAD.tolist():
        row = int((centred @ model.W_dec[latent]).argmax())
        torch.testing.assert_close(model.W_dec[latent], centred[row])
        torch.testing.assert_close(model.W_enc[:, latent], 0.2 * norm * centred[row])
        assert model.b_enc[latent] == 0
    assert not model.dead.mask[DEAD].any()
    living = slice(0, int(DEAD[0]))
    assert model.W_dec[living].equal(before["W_dec"][living])
    assert model.W_enc[:, living].equal(before["W_enc"][:, living])
    assert model.b_enc[living].equal(before["b_enc"][living])


def test_resampled_latents_forget_their_moments_and_the_others_do_not() -> None:
    model, x, optimiser = replanted()
    model.replant(Batch(x), optimiser)
    for parameter, axis in ((model.W_dec, 0), (model.W_enc, 1), (model.b_enc, 0)):
        for name in ("exp_avg", "exp_avg_sq"):
            moment = optimiser.state[parameter][name]
            assert not moment.index_select(axis, DEAD).any()
            assert moment.index_select(axis, torch.arange(6)).ne(0).all()
    assert optimiser.state[model.b_dec]["exp_avg"].ne(0).all()


def test_forgetting_before_the_first_step_is_nothing() -> None:
    model = trainer()
    forget(torch.optim.Adam(model.parameters()), model.W_dec, DEAD, 0)


def test_rows_are_drawn_by_their_squared_loss() -> None:
    """Of two rows that lose 1 and 3 (as squared errors), the second is drawn 9 times in 10."""
    cfg = TopKConfig(d_sae=2_000, k=1, dead_after=1, revive="resample", resample_every=1)
    model = TopKTrainer(cfg, 2)
    with torch.no_grad():
        model.b_enc.fill_(-100)
    x = torch.tensor([[1.0, 0.0], [0.0, 3**0.5]])
    model.losses(Batch(x))
    model.replant(Batch(x), torch.optim.Adam(model.parameters()))
    share = float((model.W_dec[:, 1] > 0.5).float().mean())
    assert share == pytest.approx(0.9, abs=0.03)


def test_what_is_drawn_depends_on_the_runs_own_seed_alone() -> None:
    drawn: list[Tensor] = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        model, x, optimiser = replanted()
        model.generator.manual_seed(seed)
        torch.manual_seed(len(drawn))
        model.replant(Batch(x), optimiser)
        drawn.append(model.W_dec.detach().clone())
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])


@pytest.mark.parametrize(
    ("step", "options", "due"),
    [
        (3, {}, False),
        (4, {}, True),
        (8, {}, True),
        (8, {"n_tokens": 8 * 30, "batch_size": 30}, False),  # the last: nothing would train them
    ],
)
def test_weights_are_given_when_it_is_time(step: int, options: dict[str, int], due: bool) -> None:
    model, x, optimiser = replanted(**options)
    before = model.W_dec.detach().clone()
    model.step = step
    found = model.replant(Batch(x), optimiser)
    assert (found is not None) == due
    assert model.W_dec.equal(before) != due


@pytest.mark.parametrize("rows", [torch.nan, torch.inf, 1e30])
def test_a_run_that_diverges_is_not_brought_down_by_resampling(rows: float) -> None:
    """The loop says what happened; a draw by weights that are no numbers would say something
    else."""
    model, x, optimiser = replanted()
    before = model.W_dec.detach().clone()
    x[3] = rows
    found = model.replant(Batch(x), optimiser)
    assert found is not None and len(found) == 0
    assert model.W_dec.equal(before)


@pytest.mark.parametrize("freeze", ["encoder", "decoder", "all", "soft_decoder:0.9"])
def test_resampling_what_is_frozen_is_refused(freeze: str) -> None:
    with pytest.raises(ConfigError, match=f"gives new weights to what freeze='{freeze}' keeps"):
        TopKConfig(revive="resample", freeze=freeze)
