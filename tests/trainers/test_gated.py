import pytest
import torch
from torch import Tensor

from saekit.errors import ConfigError
from saekit.trainers._base import Batch
from saekit.trainers.gated import GatedConfig, GatedTrainer


def trainer(**options: object) -> tuple[GatedTrainer, Tensor]:
    """One whose gates and magnitudes disagree, and a batch."""
    cfg = GatedConfig(**{"d_sae": 12, "l1_coef": 0.7, "sparsity_warmup": 0.0, **options})  # type: ignore[arg-type]
    model = GatedTrainer(cfg, 6)
    x = 2 * torch.randn(300, 6) + 1
    model.initialise(x)
    with torch.no_grad():
        for parameter in (model.b_enc, model.b_mag, model.r_mag):
            parameter.copy_(0.5 * torch.randn(12))
        model.W_dec.copy_(torch.nn.functional.normalize(torch.randn(12, 6)))
    return model, x


def by_the_book(model: GatedTrainer, x: Tensor) -> dict[str, Tensor]:
    """The equations of the module's docstring, written out."""
    gate = (x - model.b_dec) @ model.W_enc + model.b_enc
    mag = (x - model.b_dec) @ (model.W_enc * model.r_mag.exp()) + model.b_mag
    x_hat = (gate > 0) * mag.relu() @ model.W_dec + model.b_dec
    b_dec, W_dec = model.b_dec.detach(), model.W_dec.detach()
    alone = ((x - b_dec) @ model.W_enc + model.b_enc).relu() @ W_dec + b_dec
    return {
        "mse": (x - x_hat).square().sum(1).mean(),
        "sparsity": 0.7 * gate.relu().sum(1).mean(),
        "aux": (x - alone).square().sum(1).mean(),
    }


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("term", ["mse", "sparsity", "aux"])
def test_each_term_and_its_gradients_are_the_equations(term: str, dense: bool) -> None:
    model, x = trainer()
    model.density.fill_(float(dense))
    parameters = dict(model.named_parameters())
    results = []
    for losses in (model.losses(Batch(x)), by_the_book(model, x)):
        grads = torch.autograd.grad(losses[term], list(parameters.values()), allow_unused=True)
        some = [torch.zeros_like(p) for p in parameters.values()]
        some = [zero if grad is None else grad for zero, grad in zip(some, grads, strict=True)]
        results.append({"loss": losses[term], **dict(zip(parameters, some, strict=True))})
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_the_auxiliary_term_does_not_touch_the_decoder() -> None:
    model, x = trainer()
    model.losses(Batch(x))["aux"].backward()
    for parameter in (model.W_dec, model.b_dec):
        assert parameter.grad is None or parameter.grad.eq(0).all()
    assert model.W_enc.grad is not None and model.W_enc.grad.norm() > 0


def test_the_exported_jumprelu_is_the_gated_sae() -> None:
    """Also where a gate is open and the magnitude 0, and the other way round."""
    model, x = trainer()
    with torch.no_grad():
        gate = (x - model.b_dec) @ model.W_enc + model.b_enc
        mag = (x - model.b_dec) @ (model.W_enc * model.r_mag.exp()) + model.b_mag
        assert ((gate > 0) & (mag < 0)).any() and ((gate < 0) & (mag > 0)).any()
        z = (gate > 0) * mag.relu()
        sae = model.export()
        torch.testing.assert_close(sae.encode(x), z, rtol=1e-4, atol=1e-5)
        assert (sae.encode(x) > 0).equal(z > 0)
        torch.testing.assert_close(sae(x), z @ model.W_dec + model.b_dec, rtol=1e-4, atol=1e-5)


def test_a_negative_coefficient_is_refused() -> None:
    with pytest.raises(ConfigError, match="l1_coef=-2 may not be negative"):
        GatedConfig(l1_coef=-2.0)
