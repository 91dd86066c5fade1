import pytest
import torch

from saekit.errors import ConfigError
from saekit.sae import TopK
from saekit.trainers._base import Batch
from saekit.trainers.topk import TopKConfig, TopKTrainer


def trainer(**options: float) -> TopKTrainer:
    cfg = TopKConfig(d_sae=12, k=2, dead_after=10, **options)  # type: ignore[arg-type]
    return TopKTrainer(cfg, 6)


def test_a_latent_that_is_negative_on_every_token_gets_gradient_from_auxk() -> None:
    """The trap of AuxK on post-ReLU values: no value, no gradient, dead for ever."""
    model = trainer()
    x = torch.randn(20, 6)
    model.initialise(x)
    with torch.no_grad():
        model.b_enc[5] = -100.0
    for _ in range(2):  # by then latent 5 has been silent for more than 10 tokens
        model.zero_grad()
        losses = model.losses(Batch(x))
        losses["auxk"].backward() if losses["auxk"].requires_grad else None
    assert model.dead.mask[5]
    assert model.W_enc.grad is not None and model.W_enc.grad[:, 5].norm() > 0
    assert model.b_enc.grad is not None and model.b_enc.grad[5] != 0


def test_auxk_takes_dead_latents_above_0_and_with_its_sign_what_is_never_above() -> None:
    """By hand, against the equation of its docstring."""
    model = trainer(k_aux=3)
    x = torch.randn(20, 6)
    model.initialise(x)
    with torch.no_grad():
        model.b_enc[2] = -100.0
    dead = [2, 5, 7]
    model.dead.since[dead] = 1_000
    centred, error = x - model.b_dec, torch.randn(20, 6)
    with torch.no_grad():
        values = (centred @ model.W_enc + model.b_enc)[:, dead]
        assert (values[:, 0] < 0).all() and (values[:, 1:] < 0).any() and (values[:, 1:] > 0).any()
        values[:, 1:] = values[:, 1:].relu()
        missed = (error - values @ model.W_dec[dead]).square().sum(1).mean()
        wanted = model.variance / 32 * missed / (error - error.mean(0)).square().sum(1).mean()
    torch.testing.assert_close(model.revival(centred, error)["auxk"], wanted)


def test_the_decoders_gradient_has_no_part_along_its_rows() -> None:
    model = trainer()
    x = torch.randn(20, 6)
    model.initialise(x)
    model.losses(Batch(x))["mse"].backward()
    model.before_step()
    assert model.W_dec.grad is not None
    along = (model.W_dec.grad * model.W_dec).sum(1)
    torch.testing.assert_close(along, torch.zeros(12), atol=1e-4, rtol=0)


def test_export_keeps_exactly_k_latents_at_most() -> None:
    sae = trainer().export()
    assert sae.activation == TopK(2)
    assert (sae.encode(torch.randn(50, 6)) > 0).sum(1).max() <= 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"k": 13}, "k=13 must lie in 1..d_sae=12"),
        ({"k": 1, "batch_size": 1}, "batch_size=1 must be at least 2 with revive='auxk'"),
    ],
)
def test_bad_values_are_refused_with_the_rule(option: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TopKConfig(d_sae=12, **option)  # type: ignore[arg-type]


@pytest.mark.parametrize("init", ["geometric_median", "mean", "zero"])
def test_the_decoder_bias_starts_where_the_config_says(init: str) -> None:
    model = trainer(b_dec_init=init)  # type: ignore[arg-type]
    x = torch.randn(1001, 6) + 5
    x[0] = 1e6  # the mean follows an outlier, the geometric median does not
    model.initialise(x)
    distance = {"geometric_median": 5.0, "mean": 1e6 / 1001 + 5, "zero": 0.0}[init]
    assert float(model.b_dec.detach().mean()) == pytest.approx(distance, rel=0.05)
