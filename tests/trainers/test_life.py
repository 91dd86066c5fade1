"""The history is held up against a record of every step."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from saekit import ActivationCache, train
from saekit.sae import SAE, JumpReLU, MatchingPursuit, ReLU, TopK
from saekit.trainers import _life
from saekit.trainers._dead_latents import DeadLatents
from saekit.trainers._life import LifeHistory, pre_activations
from saekit.trainers._run import Columns, Run
from saekit.trainers.topk import TopKConfig


def config(**options: object) -> TopKConfig:
    """Of 20 steps with 100 rows."""
    usual = {"d_sae": 96, "k": 3, "n_tokens": 2_000, "batch_size": 100, "lr": 3e-3}
    return TopKConfig(**{**usual, "checkpoint_every": 1000, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n_steps", "windows", "ends"),
    [
        (20, 4, [5, 10, 15, 20]),
        (20, 3, [7, 14, 20]),  # not all of one length
        (20, 20, list(range(1, 21))),
        (5, 32, [1, 2, 3, 4, 5]),  # more windows than steps
        (1, 32, [1]),
        (20, 1, [20]),
    ],
)
def test_each_window_holds_its_own_steps(
    n_steps: int,
    windows: int,
    ends: list[int],
    planted: ActivationCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_step: list[Tensor] = []
    since: list[Tensor] = []
    count = DeadLatents.count

    def noted(self: DeadLatents, fired: Tensor, rows: int) -> None:
        count(self, fired, rows)
        by_step.append(fired.clone())
        since.append(self.since.clone())

    monkeypatch.setattr(DeadLatents, "count", noted)
    cfg = config(n_tokens=100 * n_steps, life_windows=windows)
    train(cfg, planted, out=tmp_path / "run")
    life = load_file(tmp_path / "run" / _life.FILE)
    assert life["step"].tolist() == [0, *ends]
    for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False), 1):
        assert int(life["rows"][i]) == 100 * (end - start)
        assert life["fired"][i].equal(torch.stack(by_step[start:end]).sum(0))
        assert life["since"][i].equal(since[end - 1])


def test_no_window_means_no_history(planted: ActivationCache, tmp_path: Path) -> None:
    cfg = config(life_windows=0, revive="resample", resample_every=5, dead_after=100)
    train(cfg, planted, out=tmp_path / "run")
    assert not (tmp_path / "run" / _life.FILE).exists()


def test_the_first_record_is_of_the_initial_weights(
    planted: ActivationCache, tmp_path: Path
) -> None:
    sae = train(config(), planted, out=tmp_path / "run")
    life = load_file(tmp_path / "run" / _life.FILE)
    assert int(life["rows"][0]) == 0 and not life["fired"][0].any() and not life["since"][0].any()
    torch.testing.assert_close(life["enc_norm"][0], torch.full((96,), 0.25))
    torch.testing.assert_close(life["enc_norm"][-1], sae.W_enc.norm(dim=0))
    assert not life["enc_norm"][1].equal(life["enc_norm"][0])


class Killed(Exception):
    pass


@pytest.mark.parametrize("checkpoint", [3, 7, 8, 13])
def test_a_resumed_run_has_the_same_history(
    checkpoint: int, planted: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the first window, right behind its end, and between new weights (after 8 and 12
    steps) and the end of the window that tells of them."""
    options = {"life_windows": 3, "revive": "resample", "resample_every": 4, "dead_after": 100}
    train(config(**options), planted, out=tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / _life.FILE)
    assert whole["replanted"].any(1).tolist() == [False, True, True, True]
    advance = Run.advance

    def until_killed(self: Run, columns: Columns) -> dict[str, float]:
        if self.step == checkpoint + 1:
            raise Killed
        return advance(self, columns)

    options["checkpoint_every"] = checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", until_killed)
        with pytest.raises(Killed):
            train(config(**options), planted, out=tmp_path / "run")
    train(config(**options), planted, out=tmp_path / "run")
    resumed = load_file(tmp_path / "run" / _life.FILE)
    assert resumed.keys() == whole.keys()
    for name, tensor in whole.items():
        assert tensor.equal(resumed[name]), name


def some_sae(activation: ReLU | TopK | JumpReLU) -> SAE:
    W = torch.randn(7, 40) / 7**0.5
    return SAE(W, -4 * torch.rand(40), W.T, torch.zeros(7), activation)


@pytest.mark.parametrize("activation", [ReLU(), TopK(5), JumpReLU(torch.rand(40))])
def test_the_margin_says_who_fires_and_by_how_much(activation: ReLU | TopK | JumpReLU) -> None:
    sae, x = some_sae(activation), torch.randn(600, 7)
    found = pre_activations(sae, x)["margin"]
    fires = (sae.encode(x) > 0).any(0)
    assert 0 < fires.sum() < 40
    at_least = found >= 0 if isinstance(activation, TopK) else found > 0
    assert at_least.equal(fires)
    # Raising a silent latent by what it lacks makes it fire, and by a little less does not.
    for latent in (~fires).nonzero().flatten().tolist():
        for share, expected in ((0.99, False), (1.01, True)):
            b_enc = sae.b_enc.clone()
            b_enc[latent] -= share * found[latent]
            other = SAE(sae.W_enc, b_enc, sae.W_dec, sae.b_dec, activation)
            assert bool((other.encode(x)[:, latent] > 0).any()) == expected


def test_the_margin_of_a_matching_pursuit_is_that_of_its_first_step() -> None:
    atoms = torch.nn.functional.normalize(torch.randn(40, 7), dim=1)
    x = torch.randn(20, 7)
    for signed in (False, True):
        sae = SAE.of_atoms(atoms, torch.zeros(7), MatchingPursuit(1, signed=signed))
        taken = (sae.encode(x) != 0).any(0)
        assert (pre_activations(sae, x)["margin"] >= 0).equal(taken)


def test_mean_and_spread_are_exact_however_far_from_zero() -> None:
    sae, x = some_sae(TopK(5)), torch.randn(700, 7)
    sae.b_enc[:5] = -1000  # where squares less the square of the mean would leave nothing
    found = pre_activations(sae, x)
    pre = sae.to(torch.float64).pre(x.double())
    expected = {"top": pre.amax(0), "mean": pre.mean(0), "spread": pre.std(0, correction=0)}
    for name, values in expected.items():
        torch.testing.assert_close(found[name].double(), values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("window", "rows"), [(10, 128), (30_000, 300), (10**9, 512)])
def test_a_record_takes_what_it_says_and_looks_at_so_many_rows(
    window: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    pre = SAE.pre

    def noted(self: SAE, x: Tensor) -> Tensor:
        seen.append(len(x))
        return pre(self, x)

    monkeypatch.setattr(SAE, "pre", noted)
    life, dead = LifeHistory(window), DeadLatents(40, 10)
    for step in range(3):
        life.end_window(step, window, some_sae(TopK(5)), dead, torch.randn(5000, 7))
    assert sum(seen) == 3 * (rows + 1)  # and the mean of the rows
    assert max(seen) <= 256  # at a time
    per_latent = [t for t in life.tensors().values() if t.ndim == 2]
    assert sum(t.nbytes for t in per_latent) == 3 * 40 * 41


def test_new_weights_belong_to_the_window_in_which_they_were_given() -> None:
    life, dead, x = LifeHistory(10), DeadLatents(40, 10), torch.randn(5, 7)
    life.replanted(torch.tensor([3]), 40)
    life.replanted(torch.tensor([5]), 40)
    other = LifeHistory(10)
    other.restore(life.tensors())  # before its first record
    for one in (life, other):
        one.end_window(1, 5, some_sae(ReLU()), dead, x)
        one.end_window(2, 5, some_sae(ReLU()), dead, x)
        replanted = one.tensors()["replanted"]
        assert replanted[0].nonzero().flatten().tolist() == [3, 5] and not replanted[1].any()
