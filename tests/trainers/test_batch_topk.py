import json
from pathlib import Path

import pytest
import torch

from saekit import ActivationCache, train
from saekit.errors import ConfigError
from saekit.sae import JumpReLU
from saekit.trainers._base import Batch, fold_input_scale
from saekit.trainers.batch_topk import BatchTopKConfig, BatchTopKTrainer


def trainer(**options: float) -> BatchTopKTrainer:
    cfg = BatchTopKConfig(d_sae=12, k=2, dead_after=10, **options)  # type: ignore[arg-type]
    model = BatchTopKTrainer(cfg, 6)
    model.initialise(torch.randn(50, 6))
    return model


def test_the_batch_keeps_k_times_its_rows_wherever_they_are_largest() -> None:
    """By hand, in dense matrices."""
    model = trainer()
    x = torch.randn(40, 6) * torch.linspace(0.1, 3, 40)[:, None]
    losses = model.losses(Batch(x))
    pre = (x - model.b_dec) @ model.W_enc + model.b_enc
    z = pre * (pre >= pre.flatten().topk(80).values[-1])
    assert (z > 0).sum(1).unique().numel() > 2  # a token that has more to say gets more
    by_hand = (x - z @ model.W_dec - model.b_dec).square().sum(1).mean()
    torch.testing.assert_close(losses["mse"], by_hand)
    assert float(model.l0) == 2
    ours = torch.autograd.grad(losses["mse"], list(model.parameters()))
    theirs = torch.autograd.grad(by_hand, list(model.parameters()))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_the_threshold_follows_the_smallest_entry_kept() -> None:
    model = trainer(threshold_rate=0.25)
    found, batches = [], torch.randn(3, 40, 6)
    for x in batches:
        with torch.no_grad():
            pre = (x - model.b_dec) @ model.W_enc + model.b_enc
        found.append(float(pre.flatten().topk(80).values[-1]))
        model.losses(Batch(x))
    weights = [0.75**2, 0.75, 1]
    expected = sum(w * f for w, f in zip(weights, found, strict=True)) / sum(weights)
    activation = model.export().activation
    assert isinstance(activation, JumpReLU)
    torch.testing.assert_close(activation.threshold, torch.full((12,), expected))
    with torch.no_grad():
        pre = (batches[0] - model.b_dec) @ model.W_enc + model.b_enc
        torch.testing.assert_close(model.export().encode(batches[0]), pre * (pre > expected))


def test_the_threshold_shrinks_with_the_input() -> None:
    """Else the exported SAE would keep another number of latents than the trained one."""
    model = trainer()
    x = torch.randn(40, 6)
    model.losses(Batch(x))
    sae = model.export()
    folded = fold_input_scale(sae, 8.0)
    assert (sae.encode(x) > 0).any()
    torch.testing.assert_close(8 * folded.encode(x / 8), sae.encode(x))


def test_a_batch_on_which_nothing_fires_has_a_loss_and_moves_no_threshold() -> None:
    model = trainer()
    x = torch.randn(40, 6)
    model.losses(Batch(x))
    before = float(model.threshold.value)
    with torch.no_grad():
        model.b_enc.fill_(-100)
    losses = model.losses(Batch(x))
    torch.stack(list(losses.values())).sum().backward()
    torch.testing.assert_close(losses["mse"], (x - model.b_dec).square().sum(1).mean())
    assert float(model.threshold.value) == before


def test_the_exported_rule_keeps_as_many_as_training_does(
    planted: ActivationCache, tmp_path: Path
) -> None:
    cfg = BatchTopKConfig(d_sae=96, k=3, n_tokens=60_000, batch_size=200, lr=1e-2)
    sae = train(cfg, planted, out=tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["l0"] == 3
    fresh = next(planted.batches("resid_post.0", 5000, seed=7))
    l0 = (sae.encode(fresh) > 0).sum(1).float().mean()
    assert float(l0) == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"k": 13}, "k=13 must lie in 1..d_sae=12"),
        ({"threshold_rate": 0.0}, "threshold_rate=0.0 must lie above 0"),
    ],
)
def test_bad_values_are_refused_with_the_rule(option: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchTopKConfig(**{"d_sae": 12, "k": 2, **option})  # type: ignore[arg-type]
