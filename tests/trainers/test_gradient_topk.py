from copy import deepcopy

import pytest
import torch
from torch import Tensor

from saekit import ActivationCache, train
from saekit.errors import ConfigError
from saekit.sae import TopK
from saekit.trainers._base import Batch
from saekit.trainers.gradient_topk import GradientTopKConfig, GradientTopKTrainer
from saekit.trainers.topk import TopKConfig


def trainer(**options: float) -> GradientTopKTrainer:
    cfg = GradientTopKConfig(d_sae=12, k=3, **options)  # type: ignore[arg-type]
    model = GradientTopKTrainer(cfg, 6)
    model.initialise(torch.randn(50, 6))
    return model


def test_a_latent_is_chosen_for_its_effect_and_keeps_its_activation() -> None:
    """Of two latents, along the axes, the gradient reads the weaker one."""
    model = GradientTopKTrainer(GradientTopKConfig(d_sae=2, k=1, beta=1.0), 2)
    with torch.no_grad():
        model.W_dec.copy_(torch.eye(2))
        model.W_enc.copy_(torch.eye(2))
    x, grad = torch.tensor([[3.0, 2.0]]), torch.tensor([[0.0, -5.0]])
    # The mean effect is 2.5, so the scores are 3 * (1 + 0) and 2 * (1 + 2); z is (0, 2).
    assert model.losses(Batch(x, grad))["mse"].item() == 9
    # The other way about: 3 * (1 + 2) and 2 * (1 + 0); z is (3, 0).
    assert model.losses(Batch(x, grad.flip(1)))["mse"].item() == 4


def test_the_choice_is_that_of_the_scores() -> None:
    """By hand, against the equation of the module's docstring, over two batches, for the mean of
    the effects is a moving one."""
    model = trainer(beta=2.0, gradient_rate=0.25)
    means = []
    for factor in (1.0, 4.0):
        x, grad = torch.randn(40, 6), factor * torch.randn(40, 6)
        pre = ((x - model.b_dec) @ model.W_enc + model.b_enc).detach()
        effect = (grad @ model.W_dec.T).abs().detach()
        means.append(float(effect.mean()))
        weights = [0.75, 1.0][-len(means) :]
        mean = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
        score = pre + 2 * pre * effect / mean
        keep = score >= score.topk(3, dim=1).values[:, -1:]
        by_hand = (x - model.b_dec - (pre.relu() * keep) @ model.W_dec).square().sum(1).mean()
        torch.testing.assert_close(model.losses(Batch(x, grad))["mse"], by_hand)
        same = (keep & (pre >= pre.topk(3, dim=1).values[:, -1:])).sum(1) / 3
        torch.testing.assert_close(model.overlap, same.mean())
        assert same.mean() < 1


def test_beta_zero_is_topk_bit_for_bit(
    planted: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dead latents, so that the auxiliary loss counts. By the definitions, where both kinds
    add up in the same order."""
    monkeypatch.setenv("SAEKIT_KERNELS", "reference")
    sizes = {"d_sae": 96, "k": 3, "batch_size": 200, "n_tokens": 8_000, "dead_after": 200}
    theirs = train(TopKConfig(**sizes), planted)  # type: ignore[arg-type]
    ours = train(GradientTopKConfig(**sizes, beta=0.0), planted)  # type: ignore[arg-type]
    for name, tensor in theirs.tensors().items():
        assert tensor.equal(ours.tensors()[name]), name
    other = train(GradientTopKConfig(**sizes, beta=0.1), planted)  # type: ignore[arg-type]
    assert not other.W_dec.equal(theirs.W_dec)


def chosen(model: GradientTopKTrainer, batches: list[Batch]) -> list[Tensor]:
    """A mask for each batch."""
    masks = []
    for batch in batches:
        assert batch.grad is not None
        pre = ((batch.x - model.b_dec) @ model.W_enc + model.b_enc).detach()
        mask = torch.zeros_like(pre, dtype=torch.bool)
        masks.append(mask.scatter(1, model.choose(pre, batch.grad), True))
    return masks


def test_the_scale_of_the_gradients_does_not_matter() -> None:
    """Nor therefore whether the loss is a sum over tokens or a mean."""
    model = trainer(beta=1.0)
    x, grad = torch.randn(5, 40, 6), torch.randn(5, 40, 6)
    once, *others = (
        chosen(deepcopy(model), [Batch(*each) for each in zip(x, factor * grad, strict=True)])
        for factor in (1.0, 100.0, 1e-6)
    )
    for other in others:
        for one, two in zip(once, other, strict=True):
            assert one.equal(two)


def test_without_any_gradient_the_choice_is_topks() -> None:
    model = trainer()
    pre = torch.randn(40, 12)
    assert (
        model.choose(pre, torch.zeros(40, 6)).sort().values.equal(pre.topk(3).indices.sort().values)
    )
    # Such a batch says nothing of how large gradients are.
    assert int(model.effect.count) == 0


def test_dead_latents_are_revived_without_regard_to_gradients() -> None:
    model = trainer(k_aux=2, dead_after=40)
    x = torch.randn(40, 6)
    with torch.no_grad():
        model.b_enc[6:] = -100.0
    # Orthogonal to all but the last dead latent, which a choice by gradients would take.
    grad = torch.linalg.pinv(model.W_dec[7:12]).T[-1].detach().repeat(40, 1)
    model.losses(Batch(x, grad))
    model.losses(Batch(x, grad))["auxk"].backward()
    pre = (x - model.b_dec) @ model.W_enc + model.b_enc
    best = torch.unique(pre[:, 6:].topk(2).indices) + 6
    assert model.b_enc.grad is not None
    assert model.b_enc.grad.nonzero().flatten().tolist() == best.tolist()


def test_inference_knows_no_gradients() -> None:
    sae = trainer().export()
    assert sae.activation == TopK(3)
    assert (sae.encode(5 * torch.rand(50, 6)) > 0).sum(1).max() == 3


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"beta": -1.0}, "beta=-1.0 may not be negative"),
        ({"gradient_rate": 0.0}, "gradient_rate=0.0 must lie above 0"),
        ({"k": 13}, "k=13 must lie in 1..d_sae=12"),
    ],
)
def test_bad_values_are_refused_with_the_rule(option: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GradientTopKConfig(**{"d_sae": 12, "k": 3, **option})  # type: ignore[arg-type]
