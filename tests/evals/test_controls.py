import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saekit import ActivationCache, checkpoint, evaluate
from saekit.errors import CacheError, ConfigError
from saekit.evals import _controls
from saekit.evals._controls import (
    controls,
    l0_of,
    misfits,
    neuron_sae,
    pca_sae,
    random_sae,
)
from saekit.evals._controls import random_pursuit_sae as pursuit_sae
from saekit.evals._linear import Moments
from saekit.evals.core import CoreConfig
from saekit.sae import SAE, JumpReLU, MatchingPursuit, ReLU, TopK

HOOK = "resid_post.0"


def unit_rows(n: int, d: int = 16) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d))


def of(activation: ReLU | TopK | JumpReLU) -> SAE:
    """An SAE of 40 latents, few of which fire on a row."""
    W_dec = unit_rows(40)
    return SAE(W_dec.T, torch.full((40,), -2.0), W_dec, torch.zeros(16), activation)


KINDS: dict[str, Callable[[], SAE]] = {
    "relu": lambda: of(ReLU()),
    "topk": lambda: of(TopK(5)),
    "jumprelu": lambda: of(JumpReLU(torch.rand(40))),
    "matching_pursuit": lambda: SAE.of_atoms(unit_rows(40), torch.zeros(16), MatchingPursuit(4)),
    "signed": lambda: SAE.of_atoms(
        unit_rows(40), torch.zeros(16), MatchingPursuit(4, residual=0.5, signed=True)
    ),
}


@pytest.fixture(params=KINDS)
def like(request: pytest.FixtureRequest) -> SAE:
    return KINDS[request.param]()


@pytest.fixture
def train(tiny_cache: ActivationCache) -> Tensor:
    return tiny_cache.rows(HOOK, tiny_cache.indices("train"))


def core(sae: SAE, cache: ActivationCache, split: str = "train") -> dict[str, float]:
    config = CoreConfig.from_dict({"ce_tokens": 0, "split": split})
    metrics = evaluate("core", sae, cache, hook=HOOK, config=config).metrics
    return {name: metric.value for name, metric in metrics.items()}


@pytest.mark.parametrize("l0", [1, 5, 16])
def test_pca_leaves_the_variance_of_the_other_eigenvalues(
    l0: int, tiny_cache: ActivationCache, train: Tensor
) -> None:
    found = core(pca_sae(tiny_cache, HOOK, l0), tiny_cache)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(train.double().T))
    left = eigenvalues[: 16 - l0].sum() / eigenvalues.sum()
    assert found["ev"] == pytest.approx(1 - float(left), abs=1e-6)
    assert found["l0_mean"] == found["l0_p5"] == found["l0_p95"] == l0


@pytest.mark.parametrize("k", [1, 3, 16])
def test_neurons_agree_with_a_plain_loop(
    k: int, tiny_cache: ActivationCache, train: Tensor
) -> None:
    found = core(neuron_sae(tiny_cache, HOOK, k), tiny_cache)
    rows = train.double().tolist()
    mean = [sum(row[j] for row in rows) / len(rows) for j in range(16)]
    error = total = 0.0
    for row in rows:
        apart = sorted(((a - m) ** 2 for a, m in zip(row, mean, strict=True)), reverse=True)
        error += sum(apart[k:])
        total += sum(apart)
    assert found["ev"] == pytest.approx(1 - error / total, abs=1e-6)
    assert found["l0_mean"] == found["l0_p5"] == found["l0_p95"] == k


def test_two_neurons_worked_by_hand(
    tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About the mean (1, 2) the rows are (-4, 1) and (4, -1)."""
    rows = torch.tensor([[-3.0, 3.0], [5.0, 1.0]])
    monkeypatch.setattr(ActivationCache, "indices", lambda *_: torch.arange(2))
    monkeypatch.setattr(ActivationCache, "rows", lambda _, hook, index: rows[index])
    monkeypatch.setattr(ActivationCache, "width", lambda *_: 2)
    sae = neuron_sae(tiny_cache, HOOK, 1)
    assert sae.encode(rows).tolist() == [[0, 0, 4, 0], [4, 0, 0, 0]]
    assert sae(rows).tolist() == [[-3, 2], [5, 2]]
    one = pca_sae(tiny_cache, HOOK, 1)
    torch.testing.assert_close(one(rows), rows)
    assert one.W_dec[0, 0] > 0


def test_a_pair_of_latents_expresses_both_signs(tiny_cache: ActivationCache, train: Tensor) -> None:
    sae = pca_sae(tiny_cache, HOOK, 3)
    z = sae.encode(train)
    scores = (train - sae.b_dec) @ sae.W_dec[:3].T
    torch.testing.assert_close(z[:, :3] - z[:, 3:], scores, rtol=1e-4, atol=1e-5)
    assert ((z[:, :3] > 0) ^ (z[:, 3:] > 0)).all()


def test_moments_do_not_depend_on_how_rows_are_cut() -> None:
    x = torch.randn(50, 4) + 1e4
    whole = Moments.of(x)
    for size in (1, 7):
        total, *rest = (Moments.of(part) for part in torch.split(x, size))
        for part in rest:
            total = total + part
        assert total.n == 50
        torch.testing.assert_close(total.x_mean, whole.x_mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(total.xx, whole.xx, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(whole.xx / 49, torch.cov(x.double().T))


def test_batch_size_changes_no_control(tiny_cache: ActivationCache) -> None:
    for make in (pca_sae, neuron_sae):
        whole, parts = make(tiny_cache, HOOK, 4), make(tiny_cache, HOOK, 4, batch_size=7)
        for name, tensor in whole.tensors().items():
            torch.testing.assert_close(parts.tensors()[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_random_sae_fires_as_many_latents_on_the_rows_it_is_matched_on(
    like: SAE, tiny_cache: ActivationCache
) -> None:
    sae = random_sae(like, tiny_cache, HOOK)
    wanted, found = core(like, tiny_cache)["l0_mean"], core(sae, tiny_cache)["l0_mean"]
    assert type(sae.activation) is type(like.activation)
    if isinstance(like.activation, ReLU | JumpReLU):
        # Rows of equal contexts, of which the tiny corpus has many, are kept or left together.
        assert found == pytest.approx(wanted, abs=3 / 500)
    elif isinstance(like.activation, TopK):
        assert found == round(wanted)
    else:
        # A pursuit that takes a latent twice has one fewer.
        assert round(wanted) - 0.5 < found <= round(wanted)


def test_a_random_sae_has_random_unit_rows_about_the_mean_and_its_transpose_to_encode(
    like: SAE, tiny_cache: ActivationCache, train: Tensor
) -> None:
    sae = random_sae(like, tiny_cache, HOOK)
    assert sae.W_dec.shape == like.W_dec.shape
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    torch.testing.assert_close(sae.b_dec, train.mean(0), rtol=1e-5, atol=1e-6)
    gain = sae.W_enc.norm(dim=0)
    torch.testing.assert_close(sae.W_enc, sae.W_dec.T * gain[0], rtol=1e-4, atol=1e-6)
    if isinstance(like.activation, MatchingPursuit):
        assert sae.activation == MatchingPursuit(
            round(l0_of(like, tiny_cache, HOOK)), signed=like.activation.signed
        )
    else:
        plain = random_sae(like, tiny_cache, HOOK, fit_gain=False)
        torch.testing.assert_close(plain.W_enc, plain.W_dec.T)
        z, plain_z = sae.encode(train), plain.encode(train)
        torch.testing.assert_close(z, plain_z * gain[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu"])
def test_the_gain_leaves_the_least_error(
    kind: str, tiny_cache: ActivationCache, train: Tensor
) -> None:
    like = KINDS[kind]()
    sae = random_sae(like, tiny_cache, HOOK)
    part = (sae(train) - sae.b_dec).double()
    errors = [float((train - sae.b_dec - g * part).square().sum()) for g in (0.99, 1, 1.01)]
    assert errors[1] == min(errors)
    plain = random_sae(like, tiny_cache, HOOK, fit_gain=False)
    assert core(sae, tiny_cache)["ev"] > core(plain, tiny_cache)["ev"]


def test_thresholds_do_not_depend_on_how_many_rows_are_looked_at_at_once(
    tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    like = KINDS["jumprelu"]()
    whole = random_sae(like, tiny_cache, HOOK)
    monkeypatch.setattr(_controls, "_PRE_AT_ONCE", 40 * 7)
    parts = random_sae(like, tiny_cache, HOOK)
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(parts.tensors()[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_seed_says_which_directions(tiny_cache: ActivationCache) -> None:
    like = KINDS["topk"]()
    first, again, other = (random_sae(like, tiny_cache, HOOK, seed=seed) for seed in (0, 0, 1))
    assert checkpoint.fingerprint(first) == checkpoint.fingerprint(again)
    assert checkpoint.fingerprint(first) != checkpoint.fingerprint(other)


def test_a_trained_sae_is_better_than_its_random_control(
    tiny_run: Path, tiny_cache: ActivationCache
) -> None:
    trained = checkpoint.load(tiny_run)
    made = controls(trained, tiny_cache)
    assert list(made) == ["random", "random_pursuit", "pca", "neuron"]
    found = {name: core(sae, tiny_cache, "test") for name, sae in made.items()}
    ours = core(trained, tiny_cache, "test")
    pursuit = found.pop("random_pursuit")
    assert {control["l0_mean"] for control in found.values()} == {ours["l0_mean"]}
    assert pursuit["l0_mean"] <= ours["l0_mean"]
    assert ours["ev"] > found["random"]["ev"] and pursuit["ev"] > found["random"]["ev"]


def test_a_random_pursuit_has_the_directions_of_the_random_sae_and_another_encoder(
    tiny_cache: ActivationCache, train: Tensor
) -> None:
    like = KINDS["topk"]()
    plain, pursuit = (make(like, tiny_cache, HOOK, seed=2) for make in (random_sae, pursuit_sae))
    assert torch.equal(pursuit.W_dec, plain.W_dec) and torch.equal(pursuit.b_dec, plain.b_dec)
    assert isinstance(pursuit.activation, MatchingPursuit)
    assert pursuit.activation.steps == round(l0_of(like, tiny_cache, HOOK)) > 1
    left = (train[0] - pursuit.b_dec).double()
    for _ in range(pursuit.activation.steps):
        atom = int((pursuit.W_dec.double() @ left).argmax())
        left -= (pursuit.W_dec[atom].double() @ left) * pursuit.W_dec[atom].double()
    torch.testing.assert_close(train[0] - pursuit(train[:1])[0], left.float(), rtol=0, atol=1e-5)


def test_a_matching_pursuit_has_one_random_control(tiny_cache: ActivationCache) -> None:
    like = KINDS["matching_pursuit"]()
    assert "random_pursuit" not in controls(like, tiny_cache, HOOK)
    with pytest.raises(ConfigError, match="no random_pursuit control: the SAE is a matching purs"):
        pursuit_sae(like, tiny_cache, HOOK)


def test_controls_are_ordinary_saes_of_the_same_hook(
    tiny_run: Path, tiny_cache: ActivationCache
) -> None:
    for name, sae in controls(checkpoint.load(tiny_run), tiny_cache).items():
        result = evaluate("core", sae, tiny_cache, config=CoreConfig(ce_tokens=20))
        assert result.hook == HOOK
        assert sae.provenance is not None and sae.provenance.kind == f"{name} control"


def test_a_control_survives_the_disk(
    like: SAE, tiny_cache: ActivationCache, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("control")
    sae = random_sae(like, tiny_cache, HOOK)
    checkpoint.save(sae, folder)
    read = checkpoint.load(folder)
    assert read.provenance == sae.provenance
    assert read.tensors().keys() == sae.tensors().keys()
    assert all(tensor.equal(sae.tensors()[name]) for name, tensor in read.tensors().items())


def test_what_cannot_be_compared_is_left_out_and_the_log_says_why(
    exact: SAE, silent: SAE, tiny_cache: ActivationCache, caplog: pytest.LogCaptureFixture
) -> None:
    eye = torch.eye(16)
    skip = dataclasses.replace(exact, W_skip=eye)
    dense = SAE(eye, torch.full((16,), 50.0), eye, torch.zeros(16), JumpReLU(torch.zeros(16)))
    wide = SAE(exact.W_enc, exact.b_enc + 50, exact.W_dec, exact.b_dec, ReLU())
    assert misfits(exact, l0_of(exact, tiny_cache, HOOK)) == {}
    for sae, left, reason in (
        (silent, [], "L0 is 0, and a control's is at least 1"),
        (skip, [], "has a skip path"),
        (dense, ["random_pursuit", "pca", "neuron"], "L0 is 16 of 16 latents"),
        (wide, ["random", "random_pursuit"], "L0 is 32, and there are 16 directions"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert list(controls(sae, tiny_cache, HOOK)) == left
        assert reason in caplog.text
    with pytest.raises(ConfigError, match="there is no random control: the SAE's L0 is 16 of 16"):
        random_sae(dense, tiny_cache, HOOK)


def test_every_latent_of_every_row_can_be_asked_for(tiny_cache: ActivationCache) -> None:
    eye = torch.eye(16)
    dense = SAE(eye, torch.full((16,), 50.0), eye, torch.zeros(16), ReLU())
    assert core(random_sae(dense, tiny_cache, HOOK), tiny_cache)["l0_mean"] == 16


@pytest.mark.parametrize(("make", "name"), [(pca_sae, "l0"), (neuron_sae, "k")])
@pytest.mark.parametrize("value", [0, 17])
def test_a_count_beyond_the_width_is_refused(
    make: Callable[..., SAE], name: str, value: int, tiny_cache: ActivationCache
) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value} must lie in 1..16"):
        make(tiny_cache, HOOK, value)


def test_a_cache_without_rows_to_fit_on_is_refused(tiny_cache: ActivationCache) -> None:
    config = {**tiny_cache.manifest.config, "holdout": 1.0}
    cache = ActivationCache(
        tiny_cache.path, dataclasses.replace(tiny_cache.manifest, config=config)
    )
    with pytest.raises(CacheError, match="has no rows in its train split, and controls"):
        pca_sae(cache, HOOK, 3)


def test_few_rows_are_spread_over_the_split(tiny_cache: ActivationCache) -> None:
    index = tiny_cache.indices("train")
    some = _controls._index(tiny_cache, 10)
    assert some.tolist() == [int(index[i * len(index) // 10]) for i in range(10)]
