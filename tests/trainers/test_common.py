"""What every kind of SAE must do. A new kind is tested here by being there."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saekit import ActivationCache, checkpoint, train
from saekit.config import TrainConfig
from saekit.errors import ConfigError, SaekitError
from saekit.trainers import _kinds, _loop
from saekit.trainers._base import Trainer, fold_input_scale
from saekit.trainers._log import FILE as LOG

# How each kind is told how many of its latents shall fire.
SPARSITY: dict[str, dict[str, Any]] = {"topk": {"k": 3}}


def config(kind: str, **options: Any) -> TrainConfig:
    sizes = {"d_sae": 96, "n_tokens": 40_000, "batch_size": 200, "checkpoint_every": 40, "lr": 3e-3}
    return _kinds.kind(kind).Config(**{**sizes, **SPARSITY[kind], **options})


def started(kind: str, cache: ActivationCache, **options: Any) -> tuple[Trainer, Tensor]:
    """A trainer that has seen its sample, and a batch."""
    trainer = _kinds.kind(kind)(config(kind, **options), 32)
    x = next(cache.batches("resid_post.0", 500))
    trainer.initialise(x)
    return trainer, x


def logged(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / LOG).read_text().splitlines()]
    return [{key: line[key] for key in line if key != "tokens_per_s"} for line in lines]


def test_losses_fall_and_the_planted_dictionary_is_recovered(
    any_kind: str, planted: ActivationCache, directions: Tensor, tmp_path: Path
) -> None:
    cfg = config(any_kind, n_tokens=400_000)
    sae = train(cfg, planted, out=tmp_path / "run")
    lines = logged(tmp_path / "run")
    assert lines[-1]["mse"] < 0.05 * lines[0]["mse"]
    best = (directions @ (sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)).T).amax(1)
    # By chance, the best of 96 random directions in 32 dimensions is at about 0.4.
    assert (best > 0.95).float().mean() > 0.9


def test_gradients_reach_every_parameter(any_kind: str, planted: ActivationCache) -> None:
    trainer, x = started(any_kind, planted)
    torch.stack(list(trainer.losses(x).values())).sum().backward()
    for name, parameter in trainer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_losses_are_sums_over_the_width_and_means_over_rows(
    any_kind: str, planted: ActivationCache
) -> None:
    """The reconstruction loss of a batch is that of its rows, on the mean."""
    trainer, x = started(any_kind, planted)
    whole = trainer.losses(x)["mse"]
    parts = torch.stack([trainer.losses(row[None])["mse"] for row in x])
    assert whole.isclose(parts.mean(), rtol=1e-4)
    with torch.no_grad():
        by_hand = (x - trainer.export()(x)).square().sum(1).mean()
    if any_kind == "topk":  # trains with the very rule that it exports
        assert whole.isclose(by_hand, rtol=1e-4)


def test_export_folds_the_input_scale(any_kind: str, planted: ActivationCache) -> None:
    trainer, x = started(any_kind, planted)
    sae = trainer.export()
    folded = fold_input_scale(sae, 4.0)
    torch.testing.assert_close(4 * folded(x / 4), sae(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(4 * folded.encode(x / 4), sae.encode(x), rtol=1e-4, atol=1e-5)


def test_decoder_rows_have_norm_one_after_export(any_kind: str, planted: ActivationCache) -> None:
    sae = train(config(any_kind), planted)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(96))


def test_an_exported_sae_survives_the_disk(
    any_kind: str, planted: ActivationCache, tmp_path: Path
) -> None:
    sae = train(config(any_kind), planted, out=tmp_path / "run")
    read = checkpoint.load(tmp_path / "run")
    x = next(planted.batches("resid_post.0", 50))
    torch.testing.assert_close(read(x), sae(x))
    assert read.provenance == sae.provenance
    assert read.provenance is not None and read.provenance.kind == any_kind


def test_a_second_run_with_the_seed_is_identical(any_kind: str, planted: ActivationCache) -> None:
    first, again, other = (train(config(any_kind, seed=s), planted) for s in (0, 0, 1))
    for name, tensor in first.tensors().items():
        assert tensor.equal(again.tensors()[name]), name
    assert not first.W_dec.equal(other.W_dec)


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [10, 40, 133])
def test_a_run_killed_anywhere_and_resumed_equals_the_uninterrupted_one(
    after: int,
    any_kind: str,
    planted: ActivationCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed after 10 (before any checkpoint), 40 (right behind one) and 133 of 200 steps."""
    whole = train(config(any_kind), planted, out=tmp_path / "whole")
    batches = _loop._Run._batches

    def some(self: _loop._Run, start: int) -> Iterator[Tensor]:
        for number, x in enumerate(batches(self, start)):
            # The sample for the initial values is read before training begins.
            if number == after and (tmp_path / "killed" / LOG).exists():
                raise Killed
            yield x

    with monkeypatch.context() as patch:
        patch.setattr(_loop._Run, "_batches", some)
        with pytest.raises(Killed):
            train(config(any_kind), planted, out=tmp_path / "killed")
    with pytest.raises(SaekitError, match="holds no finished SAE"):
        checkpoint.load(tmp_path / "killed")
    resumed = train(config(any_kind), planted, out=tmp_path / "killed")
    for name, tensor in whole.tensors().items():
        assert tensor.equal(resumed.tensors()[name]), name
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    assert not (tmp_path / "killed" / "train_state").exists()


def test_a_finished_run_is_read_back_not_trained_again(
    any_kind: str, planted: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(config(any_kind), planted, out=tmp_path / "run")
    monkeypatch.delattr(_loop._Run, "_batches")
    assert train(config(any_kind), planted, out=tmp_path / "run").W_dec.equal(first.W_dec)


def test_a_run_of_another_config_is_refused_with_the_difference(
    any_kind: str, planted: ActivationCache, tmp_path: Path
) -> None:
    train(config(any_kind), planted, out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"lr: 0\.003 there, 0\.004 here"):
        train(config(any_kind, lr=0.004), planted, out=tmp_path / "run")


def test_a_folder_of_something_else_is_refused_and_left_alone(
    any_kind: str, planted: ActivationCache, tmp_path: Path
) -> None:
    (tmp_path / "thesis").write_text("mine")
    with pytest.raises(ConfigError, match="is no run of saekit"):
        train(config(any_kind), planted, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


@pytest.mark.filterwarnings("ignore:overflow")
def test_divergence_stops_the_run_and_says_so(any_kind: str, planted: ActivationCache) -> None:
    with pytest.raises(SaekitError, match="training diverged"):
        train(config(any_kind, lr=1e30, lr_warmup=0.0), planted)
