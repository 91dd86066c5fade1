import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saekit import ActivationCache, train
from saekit.errors import ConfigError
from saekit.sae import JumpReLU
from saekit.trainers._base import Batch
from saekit.trainers.feature_choice import FeatureChoiceConfig, FeatureChoiceTrainer
from saekit.trainers.mutual_choice import MutualChoiceConfig, MutualChoiceTrainer

SIZES = {
    "d_sae": 12,
    "k": 2,
    "batch_size": 40,
    "n_tokens": 4_000,
    "zipf": False,
    "encoder_norm": 1.0,
}


def trainer(**options: float) -> FeatureChoiceTrainer:
    cfg = FeatureChoiceConfig(**{**SIZES, **options})  # type: ignore[arg-type]
    model = FeatureChoiceTrainer(cfg, 6)
    model.initialise(torch.randn(50, 6))
    return model


def choosing(**options: float) -> FeatureChoiceTrainer:
    """One whose latents have begun to choose, after 20 steps of mutual choice."""
    model = trainer(**options)
    with torch.no_grad():
        model.b_enc.copy_(torch.linspace(-1, 1, 12))
    for model.step in range(21):
        model.losses(Batch(torch.randn(40, 6)))
    return model


def test_the_first_steps_choose_as_mutual_choice_does() -> None:
    ours = trainer()
    theirs = MutualChoiceTrainer(MutualChoiceConfig(**SIZES), 6)  # type: ignore[arg-type]
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for ours.step in range(20):
        batch = Batch(torch.randn(40, 6))
        assert ours.losses(batch)["mse"].equal(theirs.losses(batch)["mse"])
    assert ours.export().tensors()["threshold"].equal(theirs.export().tensors()["threshold"])
    ours.step = 20
    batch = Batch(torch.randn(40, 6))
    assert not ours.losses(batch)["mse"].equal(theirs.losses(batch)["mse"])


def test_each_latent_takes_its_quota_of_the_tokens_it_likes_best() -> None:
    """By hand, column by column; with pre-activations all positive, the budget is met exactly."""
    model = choosing()
    with torch.no_grad():
        model.b_enc.add_(100)
    for model.step in range(21, 30):
        x = torch.randn(40, 6)
        quotas = model.quotas(40)
        assert quotas.sum() == 80
        assert ((quotas - 40 * model.expected).abs() < 1).all()
        pre = ((x - model.b_dec) @ model.W_enc + model.b_enc).detach()
        z = torch.zeros_like(pre)
        for i, quota in enumerate(quotas.tolist()):
            best = pre[:, i].topk(quota)
            z[best.indices, i] = best.values
        losses = model.losses(Batch(x))
        by_hand = (x - model.b_dec - z @ model.W_dec).square().sum(1).mean()
        torch.testing.assert_close(losses["mse"], by_hand)


def test_a_column_with_few_positive_entries_keeps_those_alone() -> None:
    model = choosing()
    with torch.no_grad():
        model.b_enc[3] = -100
    model.dead.take_fired()
    quotas = model.quotas(40)
    model.losses(Batch(torch.randn(40, 6)))
    assert quotas[3] > 0
    assert model.dead.fired[3] == 0
    assert (model.dead.fired <= quotas).all()


def test_the_law_ranks_latents_by_what_mutual_choice_gave_them() -> None:
    model = choosing(zipf_exponent=1.0, zipf_offset=0.0, cap_share=1.0)
    order = model.demand.value.argsort(descending=True)
    by_rank = 1 / torch.arange(1, 13)
    torch.testing.assert_close(model.expected[order], 2 * by_rank / by_rank.sum())


def test_no_latent_may_choose_more_than_the_cap() -> None:
    model = choosing(zipf_exponent=3.0, zipf_offset=0.0, cap_share=0.4)
    assert float(model.expected.max()) == pytest.approx(0.4)
    assert float(model.expected.sum()) == pytest.approx(2)


def test_a_rare_latent_has_its_share_over_a_thousand_batches() -> None:
    """Conformance test of a quota below one entry a batch."""
    model = choosing(zipf_exponent=4.0, zipf_offset=0.0)
    assert float(model.expected.min()) * 40 < 0.5
    total = torch.zeros(12, dtype=torch.int64)
    for model.step in range(1000, 2000):
        quotas = model.quotas(40)
        assert quotas.sum() == 80
        total += quotas
    assert total.min() > 0
    torch.testing.assert_close(total.float(), 40_000 * model.expected, atol=4, rtol=0)


def test_ranks_are_renewed_only_when_it_is_time() -> None:
    """From what Mutual Choice would give, not from what the ranks themselves made of densities."""
    model = choosing(rank_every=30, density_rate=0.5, zipf=True)
    before = model.expected.clone()
    with torch.no_grad():
        model.b_enc.copy_(model.b_enc.flip(0))
    for model.step in range(21, 50):
        model.losses(Batch(torch.randn(40, 6)))
        assert model.expected.equal(before)
    model.step = 50
    model.losses(Batch(torch.randn(40, 6)))
    assert before.argmax() > 6 > model.expected.argmax()


def test_a_threshold_follows_the_smallest_entry_that_its_own_column_kept() -> None:
    model = choosing(threshold_rate=1.0)
    with torch.no_grad():
        model.b_enc[3] = -100
    scalar, before = float(model.threshold.value), model.thresholds()
    x = torch.randn(40, 6)
    model.losses(Batch(x))
    pre = ((x - model.b_dec) @ model.W_enc + model.b_enc).detach()
    activation = model.export().activation
    assert isinstance(activation, JumpReLU)
    for i, quota in enumerate(model.quotas(40).tolist()):
        expected = before[i] if i == 3 else pre[:, i].topk(quota).values[-1]
        torch.testing.assert_close(activation.threshold[i], expected.clamp_min(0))
    assert float(model.threshold.value) == scalar
    assert activation.threshold.unique().numel() > 6


def test_a_latent_that_has_chosen_nothing_yet_has_mutual_choices_threshold() -> None:
    model = trainer()
    with torch.no_grad():
        model.b_enc[3] = -100
    for model.step in range(21):
        model.losses(Batch(torch.randn(40, 6)))
    assert model.thresholds()[3] == model.threshold.value > 0
    assert model.thresholds()[4] != model.threshold.value


def test_no_latent_is_dead_under_the_exported_thresholds(
    planted: ActivationCache, tmp_path: Path
) -> None:
    """Where Mutual Choice leaves half of them dead, for there are twice as many as features."""
    sizes = {"d_sae": 96, "k": 3, "n_tokens": 60_000, "batch_size": 500, "lr": 2e-2}
    x = next(planted.batches("resid_post.0", 5000, seed=7))

    def fired(cfg: MutualChoiceConfig) -> Tensor:
        z = train(cfg, planted, out=tmp_path / type(cfg).__name__).encode(x)
        return (z > 0).float()

    ours = fired(FeatureChoiceConfig(**sizes))  # type: ignore[arg-type]
    lines = (tmp_path / "FeatureChoiceConfig" / "metrics.jsonl").read_text().splitlines()
    trained = json.loads(lines[-1])["l0"]
    assert (ours.sum(0) == 0).float().mean() < 0.05
    assert float(ours.sum(1).mean()) == pytest.approx(trained, rel=0.1)
    theirs = fired(MutualChoiceConfig(**sizes, zipf=False))  # type: ignore[arg-type]
    assert (theirs.sum(0) == 0).float().mean() > 0.2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"mutual_share": 1.0}, "mutual_share=1.0 must lie between 0 and 1"),
        ({"rank_every": 0}, "rank_every=0 must be at least 1 step"),
        ({"cap_share": 0.0}, "cap_share=0.0 must lie above 0"),
        ({"cap_share": 0.1}, "cap_share=0.1 of each token's d_sae=12 latents is less than the 2"),
    ],
)
def test_bad_values_are_refused_with_the_rule(option: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(**option)
