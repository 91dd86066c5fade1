from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from saekit import SAE, ActivationCache, MatchingPursuit, train
from saekit.activations_cache.planted import CONTEXT
from saekit.errors import ConfigError
from saekit.trainers._base import Batch
from saekit.trainers.itda import ITDAConfig, ITDATrainer, jaccard

D_IN = 12


def batch(x: Tensor, start: int = 0) -> Batch:
    """Rows with their numbers as positions."""
    position = start + torch.arange(len(x))
    return Batch(x, label=torch.stack([position // 50, position, 7 * position], 1))


def trainer(x: Tensor, **options: Any) -> ITDATrainer:
    cfg = ITDAConfig(**{"d_sae": 500, "steps": 6, "tau": 0.1, "batch_size": 100, **options})
    model = ITDATrainer(cfg, x.shape[1])
    model.initialise(x)
    return model


def atoms(model: ITDATrainer) -> Tensor:
    return model.export().W_dec


def test_an_activation_that_was_added_is_one_latent_without_error() -> None:
    x = 50 * torch.randn(200, D_IN)
    model = trainer(x)
    model.losses(batch(x))
    chosen = x[model.extras()["labels"][:, 1]]
    assert 10 < len(chosen) < 200
    code = model.export().encode(chosen)
    assert code.ne(0).sum(1).eq(1).all()
    torch.testing.assert_close(code.diag(), chosen.norm(dim=1))
    torch.testing.assert_close(model.export()(chosen), chosen)


def test_a_batch_is_coded_with_the_dictionary_from_before_it() -> None:
    x = torch.randn(100, D_IN)
    model = trainer(x)
    for rows in x[:50], x[50:]:
        before = model.export()
        loss = model.losses(batch(rows))["mse"]
        assert model.n_atoms > before.d_sae
        torch.testing.assert_close(loss, (rows - before(rows)).square().sum(1).mean())


def test_what_was_coded_badly_is_coded_well_afterwards() -> None:
    """With every atom that enters a code may get worse, so not quite all rows are within tau."""
    x = torch.randn(400, D_IN)
    model = trainer(x)
    model.losses(batch(x))
    left = (x - model.export()(x)).square().sum(1) / x.square().sum(1)
    assert (left <= 0.1).float().mean() > 0.95
    assert model.n_atoms < 200


def test_near_copies_in_a_batch_enter_once() -> None:
    directions = torch.eye(D_IN)[:8]
    x = (directions[:, None] + 0.02 * torch.randn(8, 30, D_IN)).flatten(0, 1)[torch.randperm(240)]
    model = trainer(x)
    model.losses(batch(x))
    assert model.n_atoms == 8
    assert (atoms(model) @ directions.T).amax(0).min() > 0.95


def test_a_row_that_points_the_other_way_is_explained_too() -> None:
    x = torch.eye(D_IN)[[0, 1, 1, 0]] * torch.tensor([1.0, 1.0, -1.0, -2.0])[:, None]
    model = trainer(x, batch_size=4)
    model.losses(batch(x))
    assert model.n_atoms == 2
    torch.testing.assert_close(model.export()(x), x)


def test_how_rows_are_batched_decides_little() -> None:
    """To the letter it is one row after the other; all at once find about as many atoms."""
    x = torch.randn(300, D_IN)
    sizes = []
    for size in (1, 300):
        model = trainer(x[:1], batch_size=size)
        for start in range(0, 300, size):
            model.losses(batch(x[start : start + size], start))
        sizes.append(int(model.n_atoms))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)
    assert sizes[0] < 100


def test_only_relative_errors_count() -> None:
    x = torch.randn(200, D_IN)
    found = []
    for scaled in (x, 100 * x, x * torch.logspace(-2, 2, 200)[:, None]):
        model = trainer(scaled)
        model.losses(batch(scaled))
        found.append(model.extras()["labels"])
    assert found[0].equal(found[1]) and found[0].equal(found[2])


def test_a_full_dictionary_holds_those_that_came_first() -> None:
    x = torch.randn(600, D_IN)
    large, small = (trainer(x, d_sae=d_sae) for d_sae in (500, 37))
    for model in (large, small):
        for start in (0, 100, 200):
            model.losses(batch(x[start : start + 100], start))
    assert small.n_atoms == 37 < large.n_atoms
    assert atoms(small).equal(atoms(large)[:37])
    assert small.extras()["labels"].equal(large.extras()["labels"][:37])


def test_slots_without_an_atom_are_not_dead_and_silent_atoms_are() -> None:
    axes = torch.eye(D_IN)
    model = trainer(axes[:2], dead_after=30, batch_size=2)
    for _ in range(20):
        model.losses(batch(axes[:2]))
    assert model.n_atoms == 2
    assert model.metrics()["dead"] == 0
    for _ in range(20):
        model.losses(batch(axes[:1].expand(2, D_IN)))
    assert model.metrics()["dead"] == 0.5
    model.losses(batch(axes[2:3]))
    model.losses(batch(axes[2:3]))
    assert model.metrics()["dead"] == pytest.approx(1 / 3), "the newest has just begun"


def test_zero_rows_never_enter() -> None:
    x = torch.cat([torch.zeros(50, D_IN), torch.randn(10, D_IN)])
    model = trainer(x, initial_atoms=3)
    model.losses(batch(x))
    assert model.extras()["labels"][:, 1].min() >= 50
    assert atoms(model).isfinite().all()


def test_a_run_names_the_rows_it_took(planted: ActivationCache, tmp_path: Path) -> None:
    """Through the loop: scaled there, folded back at export."""
    cfg = ITDAConfig(d_sae=60, n_tokens=2000, batch_size=200, tau=0.05, initial_atoms=4)
    sae = train(cfg, planted, out=tmp_path / "run")
    assert sae.activation == MatchingPursuit(40, residual=1e-4, signed=True)
    assert sae.d_sae == 60
    labels = load_file(tmp_path / "run" / "extras.safetensors")["labels"]
    rows = planted.rows("resid_post.0", CONTEXT * labels[:, 0] + labels[:, 1])
    torch.testing.assert_close(normalize(rows), sae.W_dec, atol=1e-5, rtol=0)
    assert not sae.b_dec.any()
    torch.testing.assert_close(sae.encode(rows).diag(), rows.norm(dim=1))


def test_the_same_order_gives_the_same_labels_and_another_does_not(
    planted: ActivationCache, tmp_path: Path
) -> None:
    labels = []
    for name, shuffle_seed in (("one", 0), ("two", 0), ("other", 1)):
        cfg = ITDAConfig(
            d_sae=60, n_tokens=2000, batch_size=200, tau=0.05, shuffle_seed=shuffle_seed
        )
        train(cfg, planted, out=tmp_path / name)
        labels.append(load_file(tmp_path / name / "extras.safetensors")["labels"])
    assert labels[0].equal(labels[1])
    assert jaccard(labels[0], labels[1]) == 1
    assert jaccard(labels[0], labels[2]) < 0.5


def test_jaccard_by_hand() -> None:
    """Two labels of four are in both; one differs from another in its position alone."""
    a = torch.tensor([[0, 1, 5], [0, 2, 5], [3, 0, 1]])
    b = torch.tensor([[3, 0, 1], [0, 3, 5], [0, 1, 5]])
    assert jaccard(a, b) == 0.5
    assert jaccard(a, a) == 1
    assert jaccard(a, a.flip(0)) == 1


def test_there_is_nothing_to_freeze() -> None:
    with pytest.raises(ConfigError, match="this kind has no decoder of its own to freeze"):
        trainer(torch.randn(5, D_IN), freeze="decoder").frozen()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"tau": 0.0}, r"tau=0\.0 must lie between 0 and 1"),
        ({"initial_atoms": 11}, r"initial_atoms=11 must lie in 1\.\.10"),
        ({"initial_atoms": 6, "batch_size": 5}, "not exceed batch_size=5"),
        ({"life_windows": 32}, "life_windows=32 must be 0"),
    ],
)
def test_bad_values_are_refused_with_the_rule(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ITDAConfig(d_sae=10, **options)


def test_a_full_pursuit_of_an_export_is_what_the_trainer_does() -> None:
    x = torch.randn(100, D_IN)
    model = trainer(x)
    model.losses(batch(x))
    sae = model.export()
    assert isinstance(sae, SAE)
    values, _, error = model._code(x)
    torch.testing.assert_close((x - sae(x)).square().sum(1), error)
    assert (values != 0).sum() == (sae.encode(x) != 0).sum()
