import json
from pathlib import Path

import pytest
import torch

from saekit import ActivationCache, train
from saekit.errors import ConfigError
from saekit.trainers._base import Batch
from saekit.trainers.batch_topk import BatchTopKConfig
from saekit.trainers.matryoshka import MatryoshkaConfig, MatryoshkaTrainer


def trainer(groups: tuple[float, ...] = (0.25, 0.25, 0.5)) -> MatryoshkaTrainer:
    cfg = MatryoshkaConfig(d_sae=12, k=2, dead_after=1_000_000, groups=groups)
    model = MatryoshkaTrainer(cfg, 6)
    model.initialise(torch.randn(50, 6))
    return model


def test_every_prefix_reconstructs_alone() -> None:
    """By hand, in dense matrices, with all gradients."""
    model = trainer()
    x = torch.randn(40, 6) * torch.linspace(0.1, 3, 40)[:, None]  # some rows keep nothing
    losses = model.losses(Batch(x))
    pre = (x - model.b_dec) @ model.W_enc + model.b_enc
    z = pre * (pre >= pre.flatten().topk(80).values[-1])
    assert (z > 0).sum(1).min() == 0
    by_hand = torch.stack(
        [
            (x - z[:, :width] @ model.W_dec[:width] - model.b_dec).square().sum(1).mean()
            for width in (3, 6, 12)
        ]
    )
    torch.testing.assert_close(losses["mse"], by_hand[-1])
    torch.testing.assert_close(losses["mse"] + losses["nested"], by_hand.mean())
    torch.testing.assert_close(model.prefix_mse, by_hand.detach())
    total = torch.stack(list(losses.values())).sum()
    ours = torch.autograd.grad(total, list(model.parameters()))
    theirs = torch.autograd.grad(by_hand.mean(), list(model.parameters()))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_with_one_group_it_is_batch_topk_bit_for_bit(planted: ActivationCache) -> None:
    """With dead latents, so that the auxiliary loss counts."""
    sizes = {"d_sae": 96, "k": 3, "batch_size": 200, "n_tokens": 8_000, "dead_after": 200}
    ours = train(MatryoshkaConfig(**sizes, groups=(1.0,)), planted)  # type: ignore[arg-type]
    theirs = train(BatchTopKConfig(**sizes), planted)  # type: ignore[arg-type]
    for name, tensor in theirs.tensors().items():
        assert tensor.equal(ours.tensors()[name]), name


def test_the_first_group_holds_what_helps_most() -> None:
    """Four features fire often, twelve rarely: the four come to lie in the first group of four,
    where BatchTopK has no order."""
    found = {}
    for groups in ((0.25, 0.75), (1.0,)):
        torch.manual_seed(0)
        features = torch.linalg.qr(torch.randn(16, 16)).Q
        often = torch.tensor([0.3] * 4 + [0.05] * 12)
        cfg = MatryoshkaConfig(d_sae=16, k=2, groups=groups, b_dec_init="zero", encoder_norm=1.0)
        model = MatryoshkaTrainer(cfg, 16)
        optimiser = torch.optim.Adam(model.parameters(), lr=0.03)
        for _ in range(250):
            x = ((torch.rand(200, 16) < often) * (1 + torch.rand(200, 16))) @ features
            optimiser.zero_grad()
            torch.stack(list(model.losses(Batch(x)).values())).sum().backward()
            model.before_step()
            optimiser.step()
            model.after_step()
        cosine = features[:4] @ model.W_dec.detach()[:4].T
        found[groups] = int((cosine.amax(1) > 0.95).sum())
    assert found == {(0.25, 0.75): 4, (1.0,): 1}


def test_widths_are_shares_of_the_latents() -> None:
    assert MatryoshkaConfig(d_sae=4096).widths == (256, 512, 1024, 2048, 4096)
    assert MatryoshkaConfig(d_sae=100, groups=(1 / 3, 1 / 3, 1 / 3)).widths == (33, 67, 100)


def test_the_log_tells_the_error_of_each_prefix() -> None:
    model = trainer()
    model.losses(Batch(torch.randn(40, 6)))
    figures = model.metrics()
    assert figures["mse_3"] > figures["mse_6"] > figures["mse_12"]


def test_the_exported_rule_keeps_as_many_as_training_does(
    planted: ActivationCache, tmp_path: Path
) -> None:
    cfg = MatryoshkaConfig(d_sae=96, k=3, n_tokens=60_000, batch_size=200, lr=1e-2)
    sae = train(cfg, planted, out=tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["l0"] == 3
    fresh = next(planted.batches("resid_post.0", 5000, seed=7))
    assert float((sae.encode(fresh) > 0).sum(1).float().mean()) == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((0.5, 0.25), r"groups=\(0.5, 0.25\) add up to 0.75, and must to 1"),
        ((0.01, 0.99), r"groups=\(0.01, 0.99\) leave a group empty at d_sae=12"),
        ((1.5, -0.5), "leave a group empty"),
        ((), "add up to 0"),
    ],
)
def test_bad_values_are_refused_with_the_rule(groups: tuple[float, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(groups)
