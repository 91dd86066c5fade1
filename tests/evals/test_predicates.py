import pytest
import torch
from torch import Tensor

from saekit.evals._metrics import Reconstruction
from saekit.evals._predicates import (
    Family,
    Firings,
    best_thresholds,
    choose,
    resampled_f1,
)
from saekit.sae import SAE, JumpReLU, ReLU, SparseCode

N, D_SAE, NAMES = 80, 12, 6


def firings_of(z: Tensor) -> Firings:
    """Of dense latents."""
    values, indices = z.topk(z.shape[1], dim=1)
    return Firings.of(SparseCode(values, indices), z.shape[1])


@pytest.fixture
def family() -> Family:
    generator = torch.Generator().manual_seed(0)
    # Every seventh row or so has no value of this family.
    return Family("io", torch.randint(-1, NAMES, (N,), generator=generator), NAMES, 3)


@pytest.fixture
def z(family: Family) -> Tensor:
    """Latents that know a name more or less, one that always fires and one that never does."""
    generator = torch.Generator().manual_seed(1)
    z = torch.rand(N, D_SAE, generator=generator)
    names = torch.arange(D_SAE) % NAMES
    noise = torch.rand(N, D_SAE, generator=generator) < torch.linspace(0, 0.6, D_SAE)
    z = z * ((family.value[:, None] == names) ^ noise)
    z[:, 10], z[:, 11] = 1.0, 0.0
    return z


def f1_by_loop(fires: list[bool], holds: list[bool]) -> float:
    hits = sum(a and b for a, b in zip(fires, holds, strict=True))
    if not hits:
        return 0.0
    precision, recall = hits / sum(fires), hits / sum(holds)
    return 2 * precision * recall / (precision + recall)


def holds(family: Family, values: set[int]) -> list[bool]:
    return [value in values for value in family.value.tolist()]


def every(n: int) -> Tensor:
    return torch.arange(n)


def test_f1_worked_by_hand() -> None:
    """Fires on 3 of 4 rows; Mary on 2 of those and nowhere else: precision 2/3, recall 1."""
    z = torch.tensor([[1.0], [2.0], [3.0], [0.0]])
    who = Family("io", torch.tensor([0, 0, 1, 1]), 2)
    choice = choose(firings_of(z).with_values(who, every(1)), 1)
    assert choice.union.tolist() == [[True, False]]
    assert choice.f1.item() == pytest.approx(0.8)


def test_a_latent_that_always_fires_has_two_thirds_for_half_of_the_rows() -> None:
    order = Family("pos", torch.tensor([0, 1] * 10), 2)
    choice = choose(firings_of(torch.ones(20, 1)).with_values(order, every(1)), 1)
    assert choice.f1.item() == pytest.approx(2 / 3)


def test_a_union_grows_by_what_raises_f1_most_as_a_loop_does(z: Tensor, family: Family) -> None:
    choice = choose(firings_of(z).with_values(family, every(D_SAE)), family.most)
    sizes = set()
    for latent in range(D_SAE):
        fires = (z[:, latent] > 0).tolist()
        union: set[int] = set()
        best = -1.0
        while len(union) < family.most:
            tried = {
                v: f1_by_loop(fires, holds(family, union | {v})) for v in set(range(NAMES)) - union
            }
            value = max(sorted(tried), key=lambda v: tried[v])
            if tried[value] <= best:
                break
            union, best = union | {value}, tried[value]
        assert choice.union[latent].nonzero()[:, 0].tolist() == sorted(union)
        assert choice.f1[latent].item() == pytest.approx(best, abs=1e-12)
        sizes.add(len(union))
    assert len(sizes) > 1
    assert choice.f1[11] == 0


def test_f1_of_resamples_is_that_of_repeated_rows(z: Tensor, family: Family) -> None:
    latents = torch.tensor([9, 0, 10, 11, 4])
    choice = choose(firings_of(z).with_values(family, latents), family.most)
    # One that fires where there is no value of the family must not be taken to know the first.
    union = choice.union | ((latents == 10)[:, None] & (torch.arange(NAMES) == 0))
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randint(N, (3, N), generator=generator)
    weights = torch.stack(
        [torch.ones(N, dtype=torch.long), *(d.bincount(minlength=N) for d in drawn)]
    )
    found = resampled_f1(firings_of(z), family, latents, union, weights.double())
    chosen = latents != 10
    torch.testing.assert_close(found[chosen, 0], choice.f1[chosen])
    for sample, rows in enumerate([every(N), *drawn]):
        for i, latent in enumerate(latents.tolist()):
            values = set(union[i].nonzero()[:, 0].tolist())
            told = [holds(family, values)[row] for row in rows.tolist()]
            expected = f1_by_loop((z[rows, latent] > 0).tolist(), told)
            assert found[i, sample].item() == pytest.approx(expected, abs=1e-12)


def test_the_best_threshold_agrees_with_trying_all(z: Tensor, family: Family) -> None:
    graded = (z * 4).ceil() / 4 + 0.2 * (family.value == 2)[:, None] * (z > 0)
    order = Family("pos", torch.arange(N) % 2, 2)
    families, latents = [family, order], every(D_SAE - 1)
    chosen = best_thresholds(firings_of(graded), families, latents)
    for latent in latents.tolist():
        values = graded[:, latent]
        best = max(
            f1_by_loop((values >= threshold).tolist(), holds(f, {value}))
            for threshold in values[values > 0].unique().tolist()
            for f in families
            for value in range(f.size)
        )
        assert chosen.f1[latent].item() == pytest.approx(best, abs=1e-12)
        mine = families[int(chosen.family[latent])]
        told = holds(mine, {int(chosen.value[latent])})
        again = f1_by_loop((values >= chosen.threshold[latent]).tolist(), told)
        assert again == pytest.approx(best, abs=1e-12)


def test_a_threshold_separates_what_activity_alone_does_not(family: Family) -> None:
    """Fires everywhere, and strongly where the value is 1."""
    z = (0.1 + (family.value == 1).float())[:, None]
    firings = firings_of(z)
    assert choose(firings.with_values(family, every(1)), 1).f1.item() < 0.5
    chosen = best_thresholds(firings, [family], every(1))
    assert (chosen.f1.item(), chosen.value.item()) == (1, 1)
    above = firings.above(every(1), chosen.threshold)
    assert sorted(above.row.tolist()) == (family.value == 1).nonzero()[:, 0].tolist()


def test_values_below_zero_do_not_fire() -> None:
    code = SparseCode(torch.tensor([[-1.0, 2.0]]), torch.tensor([[0, 1]]))
    assert Firings.of(code, 3).count.tolist() == [0, 1, 0]


def test_latents_that_never_fire_are_no_latents_to_score(family: Family) -> None:
    firings, none = firings_of(torch.zeros(N, 3)), torch.zeros(0, dtype=torch.long)
    choice = choose(firings.with_values(family, none), 2)
    weights = torch.ones(4, N).double()
    assert resampled_f1(firings, family, none, choice.union, weights).shape == (0, 4)
    assert best_thresholds(firings, [family], none).f1.shape == (0,)


@pytest.mark.parametrize(("norm", "told"), [(4.0, 8), (1.0, 0)])
def test_sparsity_hides_the_smaller_of_two_attributes(norm: float, told: int) -> None:
    """Feature occlusion (the paper's toy): x = 4 u_i + norm v_j, all 16 directions orthogonal.

    On such a dictionary the least |x - x_hat|^2 + 3 |f|_1 has f = relu(x . d - 1.5): with a small
    v, none of its latents ever fires.
    """
    generator = torch.Generator().manual_seed(0)
    i, j = torch.randint(8, (2, 400), generator=generator)
    directions = torch.linalg.qr(torch.randn(20, 20, generator=generator)).Q[:16]
    x = 4 * directions[:8][i] + norm * directions[8:][j]
    sae = SAE(directions.T, torch.full((16,), -1.5), directions, torch.zeros(20), ReLU())
    firings = Firings.of(sae.encode_sparse(x), 16)
    counts = []
    for value in (i, j):
        told_of = choose(firings.with_values(Family("", value, 8), every(16)), 1)
        counts.append(int((told_of.f1 > 0.9).sum()))
    assert counts == [8, told]

    def loss(bias: float) -> float:
        z = (x @ directions.T + bias).relu()
        return float((x - z @ directions).square().sum() + 3 * z.sum())

    assert loss(-1.5) < min(loss(-1.4), loss(-1.6))


def test_the_sparsity_loss_rewards_many_random_latents_over_the_two_true_ones() -> None:
    """Over-splitting (the paper's toy): x = +mu or -mu, |mu| = 2, and unit noise in 100 dimensions.

    Reconstruction error plus L1 is lower for 1000 random directions, none of which tells the two
    apart as each of the two ideal latents does.
    """
    generator = torch.Generator().manual_seed(0)
    side = torch.randint(2, (400,), generator=generator)
    mu = torch.zeros(100)
    mu[0] = 2
    x = torch.where(side[:, None] == 1, mu, -mu) + torch.randn(400, 100, generator=generator)
    unit = torch.stack([mu, -mu]) / 2
    # A latent stands for its mean: fires on its side, with about 2.
    ideal = SAE(unit.T, torch.zeros(2), unit, torch.zeros(100), JumpReLU(torch.zeros(2)))
    random = torch.randn(1000, 100, generator=generator)
    random = random / random.norm(dim=1, keepdim=True)
    split = SAE(random.T / 5, torch.zeros(1000), random, torch.zeros(100), ReLU())
    losses, told = [], []
    for sae in (ideal, split):
        z = sae.encode(x)
        error = Reconstruction.of(x, sae.decode(z)).mse
        plain = [
            sum((a - b) ** 2 for a, b in zip(p, q, strict=True))
            for p, q in zip(x.double().tolist(), sae(x).double().tolist(), strict=True)
        ]
        assert error == pytest.approx(sum(plain) / 400, rel=1e-6)
        losses.append(error + 0.1 * z.double().sum().item() / 400)
        counts = firings_of(z).with_values(Family("side", side, 2), every(sae.d_sae))
        told.append(choose(counts, 1).f1)
    assert losses[1] < losses[0]
    assert told[0].min() > 0.95
    assert told[1].max() < 0.8
    # Each fires on half of the rows: an F1 of 0.5 is chance.
    assert (told[1] >= 0.5).double().mean() > 0.9
