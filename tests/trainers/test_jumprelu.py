import pytest
import torch
from torch import Tensor

from saekit.errors import ConfigError
from saekit.sae import JumpReLU
from saekit.trainers._base import Batch
from saekit.trainers.jumprelu import JumpReLUConfig, JumpReLUTrainer, _Jump, _Step


def trainer(**options: object) -> tuple[JumpReLUTrainer, Tensor]:
    """One whose thresholds differ and lie where pre-activations are, and a batch."""
    cfg = JumpReLUConfig(**{"d_sae": 12, "bandwidth": 0.8, "sparsity_warmup": 0.0, **options})  # type: ignore[arg-type]
    model = JumpReLUTrainer(cfg, 6)
    x = 2 * torch.randn(300, 6) + 1
    model.initialise(x)
    with torch.no_grad():
        model.level.copy_(0.3 * torch.rand(12) / model.unit)
        model.W_enc.copy_(model.W_dec.T)
        model.b_enc.copy_(0.3 * torch.randn(12))
    return model, x


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("penalty", ["l0", "tanh"])
def test_the_thresholds_gradient_is_the_closed_form(penalty: str, dense: bool) -> None:
    """Of each term by itself, from the equations of the module's docstring."""
    model, x = trainer(penalty=penalty, l0_coef=0.7)
    model.density.fill_(float(dense))
    losses = model.losses(Batch(x))
    (by_mse,) = torch.autograd.grad(losses["mse"], model.level, retain_graph=True)
    (by_penalty,) = torch.autograd.grad(losses["sparsity"], model.level)
    with torch.no_grad():
        unit = ((x - x.mean(0)).square().sum(1).mean() / 6).sqrt()
        pre = (x - model.b_dec) @ model.W_enc + model.b_enc
        z = pre * (pre > model.threshold)
        inside = ((pre - model.threshold).abs() < 0.4 * unit).float()
        d_z = -2 * (x - model.b_dec - z @ model.W_dec) @ model.W_dec.T / len(x)
        slope = -model.threshold / (0.8 * unit)
        torch.testing.assert_close(by_mse, 10 * unit * (d_z * inside * slope).sum(0))
        if penalty == "l0":
            expected = -0.7 / (0.8 * unit) * inside.mean(0)
        else:
            tanh = (4 * z / unit).tanh()
            expected = (0.7 * 4 / unit * (1 - tanh.square()) * inside * slope).mean(0)
        assert inside.sum() > 300
        torch.testing.assert_close(by_penalty, 10 * unit * expected)


def test_the_penaltys_gradient_is_the_slope_of_the_mean_number_of_latents_that_fire() -> None:
    """The trap: from the gated value, of which nothing lies below the threshold, it is half of
    that."""
    pre = torch.randn(400_000, 1)
    threshold = torch.tensor([0.5], requires_grad=True)
    fired = _Step.apply(pre, threshold, torch.tensor(0.1)).mean()  # type: ignore[no-untyped-call]
    (slope,) = torch.autograd.grad(fired, threshold)
    density = torch.exp(torch.tensor(-(0.5**2) / 2)) / (2 * torch.pi) ** 0.5
    assert float(slope) == pytest.approx(-float(density), rel=0.03)


def test_pre_activations_get_gradient_where_they_pass_alone() -> None:
    pre = torch.tensor([[0.4, 0.6, 2.0, -1.0]], requires_grad=True)
    threshold = torch.full((4,), 0.5)
    width = torch.tensor(1.0)
    _Jump.apply(pre, threshold, width).sum().backward()  # type: ignore[no-untyped-call]
    assert pre.grad is not None and pre.grad.tolist() == [[0, 1, 1, 0]]
    out = _Step.apply(pre, threshold.requires_grad_(), width).sum()  # type: ignore[no-untyped-call]
    assert torch.autograd.grad(out, pre, allow_unused=True)[0] is None


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_bandwidth_and_thresholds_follow_the_size_of_the_input(scale: float) -> None:
    """An absolute bandwidth would let no pre-activation, or every one, move the thresholds."""
    cfg = JumpReLUConfig(d_sae=12, l0_coef=0.3, sparsity_warmup=0.0)
    x = torch.randn(300, 6)
    grads: list[Tensor] = []
    thresholds = []
    for factor in (1.0, scale):
        torch.manual_seed(0)
        model = JumpReLUTrainer(cfg, 6)
        model.initialise(factor * x)
        penalty = model.losses(Batch(factor * x))["sparsity"]
        grads += torch.autograd.grad(penalty, model.level)
        thresholds.append(model.threshold.detach() / factor)
    torch.testing.assert_close(grads[0], grads[1])
    torch.testing.assert_close(thresholds[0], thresholds[1])
    assert grads[0].count_nonzero() == 12


def test_thresholds_learn_as_much_faster_as_the_config_says() -> None:
    """In units of what a coordinate of x is like; a step of Adam has the size of lr."""
    model, x = trainer(threshold_lr=5.0)
    before = model.threshold.detach()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    model.losses(Batch(x))["sparsity"].backward()
    optimiser.step()
    moved = (model.threshold.detach() - before) / model.unit
    torch.testing.assert_close(moved, torch.full((12,), 0.05), rtol=1e-3, atol=0)


def test_a_threshold_never_falls_below_zero() -> None:
    model, _ = trainer()
    with torch.no_grad():
        model.level[:3] = torch.tensor([-0.1, 0.0, 0.2])
    model.after_step()
    torch.testing.assert_close(model.level[:3].detach(), torch.tensor([0.0, 0.0, 0.2]))
    assert model.level.requires_grad and model.level.dtype == torch.float32


def test_a_latent_at_threshold_zero_is_pushed_up_by_the_penalty() -> None:
    """At 0 nothing comes from the reconstruction, and there is nowhere to go but up."""
    model, x = trainer()
    with torch.no_grad():
        model.level.zero_()
    losses = model.losses(Batch(x))
    (by_mse,) = torch.autograd.grad(losses["mse"], model.level, retain_graph=True)
    (by_penalty,) = torch.autograd.grad(losses["sparsity"], model.level)
    assert by_mse.eq(0).all() and by_penalty.lt(0).all()


def test_export_is_the_rule_of_training() -> None:
    model, x = trainer(l0_coef=0.5)
    sae = model.export()
    assert isinstance(sae.activation, JumpReLU)
    losses = model.losses(Batch(x))
    torch.testing.assert_close(losses["mse"], (x - sae(x)).square().sum(1).mean())
    torch.testing.assert_close(losses["sparsity"], 0.5 * (sae.encode(x) > 0).sum(1).float().mean())


def test_dead_latents_alone_are_raised_and_their_thresholds_lowered() -> None:
    model, x = trainer(pre_act_coef=1.0, dead_after=200)
    with torch.no_grad():
        model.b_enc[4] = -100.0
    model.losses(Batch(x))  # by the next, latent 4 has been silent for 300 tokens
    loss = model.losses(Batch(x))["pre_act"]
    d_b, d_threshold = torch.autograd.grad(loss, (model.b_enc, model.level))
    assert float(d_b[4]) == pytest.approx(-1) and float(d_threshold[4]) == pytest.approx(
        10 * float(model.unit)
    )
    assert d_b.count_nonzero() == 1 and d_threshold.count_nonzero() == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"bandwidth": 0.0}, "bandwidth=0 must be positive"),
        ({"threshold_lr": -1.0}, "threshold_lr=-1 must be positive"),
        ({"l0_coef": -1.0}, "l0_coef=-1 may not be negative"),
        ({"threshold_init": -0.1}, "threshold_init=-0.1 may not be negative"),
    ],
)
def test_bad_values_are_refused_with_the_rule(option: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        JumpReLUConfig(**option)  # type: ignore[arg-type]


def test_thresholds_start_lower_where_nothing_would_fire() -> None:
    """Of 64 latents for each dimension none reads as much as the usual threshold off a row, and
    what does not fire has no gradient."""
    x = torch.randn(300, 8)
    wide, narrow = (JumpReLUTrainer(JumpReLUConfig(d_sae=n), 8) for n in (512, 12))
    for model in (wide, narrow):
        model.initialise(x)
    torch.testing.assert_close(narrow.threshold.detach(), (0.3 * narrow.unit).expand(12))
    threshold = wide.threshold.detach()
    assert float(threshold[0]) < 0.25 * float(wide.unit)
    pre = ((x - wide.b_dec) @ wide.W_enc + wide.b_enc).detach()
    assert not (pre > 0.3 * wide.unit).any()
    assert int((pre > threshold).any(1).sum()) == 3
    wide.losses(Batch(x))["mse"].backward()
    assert wide.W_enc.grad is not None and wide.W_enc.grad.any()
