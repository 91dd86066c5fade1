from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from saekit.errors import ConfigError
from saekit.seeds import stream
from saekit.synthetic import (
    BLOCK,
    Detection,
    Synthetic,
    SyntheticConfig,
    hierarchical_tree,
    matching,
    recovery,
)

N_ROWS = 40_000


def synthetic(**options: Any) -> Synthetic:
    return Synthetic.from_config(SyntheticConfig(**{"n_features": 24, "d_in": 8, **options}))


def pair(**options: Any) -> Synthetic:
    """Two features that fire on half of the rows each."""
    held: dict[str, Any] = {
        "directions": torch.eye(2),
        "p": torch.tensor([0.5, 0.5]),
        "bias": torch.zeros(2),
        "parent": torch.tensor([-1, -1]),
        "group": torch.tensor([0, 1]),
    }
    return Synthetic(**{**held, **options})


def both(made: Synthetic) -> float:
    return float((made.rows(0, N_ROWS)[1] > 0).all(1).float().mean())


def test_rows_are_codes_times_directions_around_a_bias() -> None:
    made = synthetic(bias_norm=2.0)
    x, codes = made.rows(0, 500)
    torch.testing.assert_close(x, codes @ made.directions + made.bias)
    torch.testing.assert_close(made.bias.norm(), torch.tensor(2.0))
    torch.testing.assert_close(made.directions.norm(dim=1), torch.ones(24))


def test_a_row_is_the_same_however_many_are_asked_for_at_once() -> None:
    made = synthetic(magnitude_sd=0.5, correlation=0.2)
    x, codes = made.rows(0, 2 * BLOCK + 10)
    for start, stop in ((0, 7), (BLOCK - 3, BLOCK + 5), (BLOCK, 2 * BLOCK), (1500, 2 * BLOCK + 10)):
        part_x, part_codes = made.rows(start, stop)
        assert part_codes.equal(codes[start:stop])
        torch.testing.assert_close(part_x, x[start:stop])
    assert not codes[:BLOCK].equal(codes[BLOCK : 2 * BLOCK])


def test_a_config_makes_the_same_rows_again_and_another_seed_others() -> None:
    first, again, other = (synthetic(seed=seed) for seed in (3, 3, 4))
    assert first.directions.equal(again.directions)
    assert first.rows(0, 50)[1].equal(again.rows(0, 50)[1])
    assert not first.directions.equal(other.directions)
    assert not first.rows(0, 50)[1].equal(replace(first, seed=4).rows(0, 50)[1])


def test_an_sae_of_the_same_seed_does_not_begin_at_the_directions() -> None:
    """Whatever others draw after `manual_seed`, and in the training of an SAE."""
    for seed in range(3):
        torch.manual_seed(seed)
        plain = torch.randn(64, 32)
        ours = torch.randn(64, 32, generator=stream("training", seed))
        cfg = SyntheticConfig(n_features=64, d_in=32, seed=seed, orthogonal_steps=0)
        directions = Synthetic.from_config(cfg).directions
        assert recovery(plain, directions).mcc < 0.6
        assert recovery(ours, directions).mcc < 0.6


def test_features_fire_as_often_as_they_are_said_to() -> None:
    made = synthetic(p_max=0.6, p_min=0.05)
    often = (made.rows(0, N_ROWS)[1] > 0).float().mean(0)
    torch.testing.assert_close(often, made.p, atol=0.01, rtol=0)


def test_chances_follow_the_law_of_the_config() -> None:
    zipf = synthetic(n_features=4, firing="zipf", p_max=0.3, p_min=0.01, zipf_exponent=2.0).p
    law = [1.0, 1 / 4, 1 / 9, 1 / 16]
    by_hand = [0.01 + 0.29 * (w - law[3]) / (law[0] - law[3]) for w in law]
    torch.testing.assert_close(zipf, torch.tensor(by_hand))
    linear = synthetic(n_features=4, firing="linear", p_max=0.4, p_min=0.1).p
    torch.testing.assert_close(linear, torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert (
        synthetic(n_features=4, firing="constant", p_max=0.2).p.tolist() == [pytest.approx(0.2)] * 4
    )


@pytest.mark.parametrize(
    ("loadings", "expected"),
    [([0.0, 0.0], 0.25), ([0.99, 0.99], 0.4685), ([0.99, -0.99], 0.0315)],
)
def test_common_factors_make_features_fire_together_or_apart(
    loadings: list[float], expected: float
) -> None:
    """For Gaussians that correlate by r, both are above 0 with 1/4 + arcsin(r) / 2 pi."""
    made = pair(factor=torch.tensor(loadings)[:, None])
    assert both(made) == pytest.approx(expected, abs=0.01)
    often = (made.rows(0, N_ROWS)[1] > 0).float().mean(0)
    torch.testing.assert_close(often, made.p, atol=0.01, rtol=0)


def test_the_correlation_of_a_config_is_the_share_that_factors_explain() -> None:
    factor = synthetic(correlation=0.3, correlation_rank=5).factor
    assert factor is not None and factor.shape == (24, 5)
    torch.testing.assert_close(factor.square().sum(1), torch.full((24,), 0.3))
    assert synthetic().factor is None


def test_features_of_a_group_never_fire_together() -> None:
    assert both(pair()) == pytest.approx(0.25, abs=0.01)
    made = pair(group=torch.tensor([0, 0]))
    fired = (made.rows(0, N_ROWS)[1] > 0).float()
    # Each on half of the rows and never both: one of them on every row.
    assert (fired.sum(1) == 1).all()
    torch.testing.assert_close(fired.mean(0), made.p, atol=0.01, rtol=0)


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_child_fires_only_below_its_parent(exclusive: bool) -> None:
    made = synthetic(
        n_trees=2, branching=(3, 2), p_child=0.3, exclusive=exclusive, firing="constant", p_max=0.5
    )
    # A root, its three children, and two below each of those; 20 of the 24 features.
    assert made.parent.tolist() == [
        *[-1, 0, 0, 0, 1, 1, 2, 2, 3, 3],
        *[-1, 10, 10, 10, 11, 11, 12, 12, 13, 13],
        *[-1] * 4,
    ]
    fired = made.rows(0, N_ROWS)[1] > 0
    has = made.parent >= 0
    assert not (fired[:, has] & ~fired[:, made.parent[has]]).any()
    torch.testing.assert_close(fired.float().mean(0), made.rate, atol=0.01, rtol=0)
    assert made.rate[4] == pytest.approx(0.5 * 0.3 * 0.3)
    together = (fired[:, 1:4].sum(1) > 1).any()
    assert bool(together) != exclusive


def test_magnitudes_are_normal_and_never_negative() -> None:
    assert (synthetic(magnitude=2.5).rows(0, 500)[1].unique() == torch.tensor([0, 2.5])).all()
    codes = synthetic(magnitude=3.0, magnitude_sd=0.5).rows(0, N_ROWS)[1]
    values = codes[codes > 0]
    assert float(values.mean()) == pytest.approx(3.0, abs=0.01)
    assert float(values.std()) == pytest.approx(0.5, abs=0.01)
    cut = synthetic(magnitude=0.0, magnitude_sd=1.0, firing="constant", p_max=1.0).rows(0, 1000)[1]
    assert cut.min() == 0
    assert float((cut > 0).float().mean()) == pytest.approx(0.5, abs=0.02)


def test_directions_are_pushed_apart_as_far_as_the_width_allows() -> None:
    def squares(made: Synthetic) -> float:
        cosine = made.directions @ made.directions.T
        return float((cosine.square().sum() - len(cosine)) / (len(cosine) * (len(cosine) - 1)))

    # The Welch bound: n directions in d dimensions cannot have smaller squared cosines.
    bound = (24 / 8 - 1) / (24 - 1)
    assert squares(synthetic(orthogonal_steps=0)) > 1.2 * bound
    assert squares(synthetic()) == pytest.approx(bound, rel=1e-3)
    few = synthetic(n_features=6, orthogonal_steps=400).directions
    torch.testing.assert_close(few @ few.T, torch.eye(6), atol=1e-3, rtol=0)


@pytest.mark.parametrize("level", range(9))
def test_siblings_of_the_hierarchical_tree_have_the_cosine_of_its_level(level: int) -> None:
    """The closed form of Costa et al.'s mixing, by its own formula, for both kinds of siblings."""
    top = [0.0, 0.3, 0.44, 0.529, 0.594, 0.6467, 0.692, 0.733, 0.7739]
    child = [0.0, 0.0895, 0.163, 0.226, 0.282, 0.3335, 0.3825, 0.431, 0.482]
    made = hierarchical_tree(level)
    cosine = made.directions @ made.directions.T
    for siblings, eps in (
        ([0, 4, 8, *range(12, 20)], top[level]),
        ([1, 2, 3], child[level]),
        ([5, 6, 7], child[level]),
        ([9, 10, 11], child[level]),
    ):
        n = len(siblings)
        a, b = 1 - eps, eps / (n - 1)
        by_hand = (2 * a * b + (n - 2) * b**2) / (a**2 + (n - 1) * b**2)
        assert by_hand == pytest.approx(level / 10, abs=1e-3)
        expected = torch.full((n, n), by_hand).fill_diagonal_(1.0)
        torch.testing.assert_close(cosine[siblings][:, siblings], expected, atol=1e-5, rtol=0)
    # Between families the directions stay at right angles.
    assert cosine[[1, 2, 3]][:, [0, 5, 9, 12]].abs().max() < 1e-5


def test_the_hierarchical_tree_fires_1_36_features_a_row() -> None:
    made = hierarchical_tree(4)
    assert float(made.rate.sum()) == pytest.approx(1.36)
    codes = made.rows(0, N_ROWS)[1]
    assert float((codes > 0).sum(1).float().mean()) == pytest.approx(1.36, abs=0.02)
    fired = codes > 0
    assert fired[:, [0, 4, 8]].sum(1).max() == 1
    assert fired[:, 12:].sum(1).max() > 1
    assert not (fired[:, 5] & ~fired[:, 4]).any()
    assert float(codes[fired].mean()) == pytest.approx(1.5, abs=0.01)
    with pytest.raises(ConfigError, match=r"level=9 must lie in 0\.\.8"):
        hierarchical_tree(9)


def by_trying_all(similarity: Tensor) -> float:
    n, m = similarity.shape
    best = [sum(similarity[i, j] for i, j in enumerate(p)) for p in permutations(range(m), n)]
    return float(max(best))


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 6), (6, 6)])
def test_the_matching_is_the_best_of_all(shape: tuple[int, int]) -> None:
    for _ in range(10):
        similarity = torch.randn(shape)
        column = matching(similarity)
        assert len(column.unique()) == shape[0]
        total = float(similarity.gather(1, column[:, None]).sum())
        assert total == pytest.approx(by_trying_all(similarity), rel=1e-5)
        row = matching(similarity.T)
        assert (row >= 0).sum() == shape[0]
        assert row[column].tolist() == list(range(shape[0]))


def test_greed_does_not_find_the_matching() -> None:
    """Of the pairs of two dictionaries in the plane, the best one-to-one sum is 1.2."""
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    b = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, -1.0]])
    found = recovery(b, a, signed=True)
    assert found.latent.tolist() == [2, 1, 0]
    torch.testing.assert_close(found.cosine, torch.tensor([0.0, 0.6, 0.6]))
    assert found.mcc == pytest.approx(0.4)
    torch.testing.assert_close(found.best, torch.tensor([1.0, 0.6, 0.96]))
    assert found.feature.tolist() == [0, 2, 0]
    assert found.uniqueness == pytest.approx(2 / 3)


def test_a_dictionary_in_another_order_length_and_sign_is_recovered() -> None:
    directions = synthetic().directions
    order = torch.randperm(24)
    W_dec = directions[order] * torch.linspace(-2, 3, 24)[:, None]
    found = recovery(W_dec, directions)
    assert found.latent[order].tolist() == list(range(24))
    assert found.feature.equal(order)
    assert found.mcc == pytest.approx(1, abs=1e-5)
    assert found.share() == 1 and found.uniqueness == 1
    assert recovery(W_dec, directions, signed=True).mcc < 0.9


def test_features_without_a_latent_of_their_own_are_not_found() -> None:
    directions = torch.eye(4)
    W_dec = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.6, 0.8, 0.0]])
    found = recovery(W_dec, directions)
    assert found.latent.tolist() == [-1, 0, 1, -1]
    torch.testing.assert_close(found.cosine, torch.tensor([0.0, 1.0, 0.8, 0.0]))
    assert found.mcc == pytest.approx(0.9)
    assert found.share() == 0.25
    torch.testing.assert_close(found.nearest, torch.tensor([1.0, 0.8]))


def test_detection_counts_add_up_to_precision_recall_and_f1() -> None:
    z = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.0]])
    codes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    feature = torch.tensor([0, 1, 1])
    whole = Detection.of(z, codes, feature)
    parts = Detection.of(z[:3], codes[:3], feature) + Detection.of(z[3:], codes[3:], feature)
    for counts in (whole, parts):
        torch.testing.assert_close(counts.precision, torch.tensor([2 / 3, 1.0, 0.0]))
        torch.testing.assert_close(counts.recall, torch.tensor([1.0, 1 / 3, 0.0]))
        torch.testing.assert_close(counts.f1, torch.tensor([0.8, 0.5, 0.0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_features": 0}, "n_features=0"),
        ({"p_min": 0.4}, r"p_min=0\.4 and p_max=0\.3"),
        ({"correlation": 1.0}, r"correlation=1\.0 is a share"),
        ({"zipf_exponent": 0.0}, "firing='constant'"),
        ({"n_trees": 7}, "7 trees branching .* take 28 features"),
        ({"n_trees": 1, "p_child": 0.4}, "3 children that exclude each other"),
        ({"branching": (0,)}, "counts of at least 1"),
    ],
)
def test_bad_values_are_refused_with_the_rule(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        synthetic(**options)


def test_a_law_that_cannot_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"add up to 1\.2"):
        pair(group=torch.tensor([0, 0]), p=torch.tensor([0.6, 0.6]))
    with pytest.raises(ConfigError, match="stand before their children"):
        pair(parent=torch.tensor([1, -1]))
