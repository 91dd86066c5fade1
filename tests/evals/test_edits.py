import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from saekit.evals import _edits
from saekit.evals._edits import Candidates, apply, by_score, greedy, share_changed
from saekit.sae import SparseCode

N, D, D_SAE, K = 12, 6, 20, 4


def code(*rows: dict[int, float]) -> SparseCode:
    """Latents by number; unused slots hold latent 0 with value 0."""
    widest = max(len(row) for row in rows)
    values = [[*row.values(), *[0.0] * (widest - len(row))] for row in rows]
    latents = [[*row, *[0] * (widest - len(row))] for row in rows]
    return SparseCode(torch.tensor(values), torch.tensor(latents))


def random_code(generator: torch.Generator) -> SparseCode:
    latents = torch.rand(N, D_SAE, generator=generator).argsort(1)[:, :K]
    values = torch.rand(N, K, generator=generator) * (torch.arange(K) < K - 1)
    return SparseCode(values, latents)


@pytest.fixture
def case() -> tuple[SparseCode, SparseCode, Tensor, Tensor, Tensor]:
    """Codes of source and target, decoder, and both activations."""
    generator = torch.Generator().manual_seed(5)
    source, target = random_code(generator), random_code(generator)
    W_dec, start, goal = (torch.randn(n, D, generator=generator) for n in (D_SAE, N, N))
    return source, target, W_dec, start, goal


def as_dict(code: SparseCode, row: int) -> dict[int, float]:
    pairs = zip(code.indices[row].tolist(), code.values[row].tolist(), strict=True)
    return {latent: value for latent, value in pairs if value != 0}


def exchanged(
    start: Tensor, source: dict[int, float], target: dict[int, float], W: Tensor, latents: list[int]
) -> list[float]:
    x = start.tolist()
    for latent in latents:
        by = target.get(latent, 0.0) - source.get(latent, 0.0)
        x = [a + by * b for a, b in zip(x, W[latent].tolist(), strict=True)]
    return x


def distance(a: list[float], b: Tensor) -> float:
    return math.dist(a, b.tolist())


def test_an_edit_worked_by_hand() -> None:
    """Latent 1 is in both and counts once; 0 goes, 2 comes; then source has become target."""
    W = torch.eye(3)
    source, target = code({0: 1.0, 1: 2.0}), code({1: 5.0, 2: 2.0})
    start, goal = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.0, 5.0, 2.0]])
    candidates = Candidates.of(source, target)
    order = greedy(start, goal, candidates, W, 5)
    assert candidates.latent.gather(1, order[:, :3]).tolist() == [[1, 2, 0]]
    assert order[:, 3:].tolist() == [[-1, -1]]
    edits = [apply(start, candidates, W, order[:, :k]).tolist() for k in (0, 1, 2, 3, 5)]
    assert edits == [[[1, 2, 0]], [[1, 5, 0]], [[1, 5, 2]], [[0, 5, 2]], [[0, 5, 2]]]
    # Of |v|^2 = 5, latent 1 holds 4 and latent 0 holds 1; latent 2 is not in the source.
    shares = [share_changed(candidates, W, order[:, :k]).item() for k in (0, 1, 2, 3)]
    assert shares == pytest.approx([0, 0.8, 0.8, 1])


def test_greedy_agrees_with_a_loop(
    case: tuple[SparseCode, SparseCode, Tensor, Tensor, Tensor],
) -> None:
    source, target, W, start, goal = case
    candidates = Candidates.of(source, target)
    order = greedy(start, goal, candidates, W, 5)
    for row in range(N):
        f_s, f_t = as_dict(source, row), as_dict(target, row)
        left, taken = sorted(f_s.keys() | f_t.keys()), list[int]()
        for k in range(6):
            edited = apply(start, candidates, W, order[:, :k])[row].tolist()
            expected = exchanged(start[row], f_s, f_t, W, taken)
            assert edited == pytest.approx(expected, rel=1e-6, abs=1e-6)
            here = distance(expected, goal[row])
            reach = {
                j: distance(exchanged(start[row], f_s, f_t, W, [*taken, j]), goal[row])
                for j in left
            }
            best = min(reach, key=lambda j: reach[j], default=None)
            if best is not None and reach[best] < here:
                taken.append(best)
                left.remove(best)
    assert (order[:, -1] == -1).any() and (order[:, 2] >= 0).any()


def test_one_exchange_is_the_best_there_is_and_more_do_not_beat_a_full_search(
    case: tuple[SparseCode, SparseCode, Tensor, Tensor, Tensor],
) -> None:
    source, target, W, start, goal = case
    candidates = Candidates.of(source, target)
    order = greedy(start, goal, candidates, W, 2)
    for row in range(N):
        f_s, f_t = as_dict(source, row), as_dict(target, row)
        latents = sorted(f_s.keys() | f_t.keys())
        for k in (1, 2):
            found = apply(start, candidates, W, order[:, :k])[row].tolist()
            best = min(
                distance(exchanged(start[row], f_s, f_t, W, list(some)), goal[row])
                for size in range(k + 1)
                for some in combinations(latents, size)
            )
            reached = distance(found, goal[row])
            assert reached == pytest.approx(best) if k == 1 else reached >= best - 1e-9


def test_exchanging_everything_turns_one_reconstruction_into_the_other(
    case: tuple[SparseCode, SparseCode, Tensor, Tensor, Tensor],
) -> None:
    source, target, W, start, _ = case
    candidates = Candidates.of(source, target)
    every = by_score(candidates, torch.zeros(candidates.latent.shape).double(), 2 * K)
    change = apply(start, candidates, W, every) - start
    torch.testing.assert_close(change.float(), (target.dense(D_SAE) - source.dense(D_SAE)) @ W)
    torch.testing.assert_close(share_changed(candidates, W, every), torch.ones(N).double())


def test_shares_agree_with_a_loop(
    case: tuple[SparseCode, SparseCode, Tensor, Tensor, Tensor],
) -> None:
    source, target, W, start, goal = case
    candidates = Candidates.of(source, target)
    order = greedy(start, goal, candidates, W, 2)
    shares = share_changed(candidates, W, order)
    for row in range(N):
        f_s = as_dict(source, row)
        parts = {j: [f * w for w in W[j].tolist()] for j, f in f_s.items()}
        v = [sum(column) for column in zip(*parts.values(), strict=True)]
        taken = [candidates.latent[row, slot].item() for slot in order[row].tolist() if slot >= 0]
        expected = sum(
            sum(a * b for a, b in zip(parts[int(j)], v, strict=True)) / sum(a * a for a in v)
            for j in taken
            if j in parts
        )
        assert shares[row].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_how_many_rows_go_together_changes_nothing(
    case: tuple[SparseCode, SparseCode, Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, W, start, goal = case
    candidates = Candidates.of(source, target)
    whole = greedy(start, goal, candidates, W, 3)
    edited, shares = apply(start, candidates, W, whole), share_changed(candidates, W, whole)
    monkeypatch.setattr(_edits, "_AT_ONCE", 1)
    assert torch.equal(greedy(start, goal, candidates, W, 3), whole)
    torch.testing.assert_close(apply(start, candidates, W, whole), edited, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(share_changed(candidates, W, whole), shares, rtol=1e-12, atol=1e-12)


def test_latents_go_by_their_score_and_the_unused_never() -> None:
    candidates = Candidates.of(code({3: 1.0, 1: 1.0}), code({5: 2.0, 1: 1.0}))
    score = torch.tensor([0.0, 0.9, 0.1, 0.5, 0.0, 0.8]).double()[candidates.latent]
    order = by_score(candidates, score, 6)
    # Latent 1 has the same value in both: there is nothing to exchange.
    assert candidates.latent.gather(1, order[:, :2]).tolist() == [[5, 3]]
    assert order[:, 2:].tolist() == [[-1] * 4]


def test_a_silent_source_and_target_are_left_as_they_are() -> None:
    silent = SparseCode(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long))
    candidates, x = Candidates.of(silent, silent), torch.randn(2, D)
    order = greedy(x, x + 1, candidates, torch.randn(D_SAE, D), 2)
    assert (order == -1).all()
    assert torch.equal(apply(x, candidates, torch.randn(D_SAE, D), order), x.double())
    assert share_changed(candidates, torch.randn(D_SAE, D), order).tolist() == [0, 0]
