import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

from saekit import matching
from saekit.errors import Undefined
from saekit.evals._matching import compare, definitions, random_rows, subspace_overlap
from saekit.matching import SIGNS, Pairs, Sign, matched, mutual, nearest, unit_rows

A = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
B = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, -1.0]])


def dictionary(n: int, d: int = 6) -> Tensor:
    return unit_rows(torch.randn(n, d))[0]


def cosines(a: Tensor, b: Tensor, sign: Sign) -> list[list[float]]:
    """In plain loops."""

    def cosine(p: list[float], q: list[float]) -> float:
        dot = sum(x * y for x, y in zip(p, q, strict=True))
        value = dot / math.sqrt(sum(x * x for x in p) * sum(y * y for y in q))
        return abs(value) if sign == "abs" else value

    return [[cosine(p, q) for q in b.double().tolist()] for p in a.double().tolist()]


def test_two_dictionaries_in_the_plane_worked_by_hand() -> None:
    """Cosines (1, .8, 0), (0, .6, -1), (.6, .96, -.8); the best matching is 0 + .6 + .6."""
    found = compare(A, B, signs=("signed",), over=(0.7,), max_matching=3)
    assert found.values == pytest.approx(
        {
            "mmcs_signed_forward": (1 + 0.6 + 0.96) / 3,
            "mmcs_signed_backward": (1 + 0.96 + 0) / 3,
            "uniqueness_signed_forward": 2 / 3,
            "uniqueness_signed_backward": 2 / 3,
            "share_over_0.7_signed_forward": 2 / 3,
            "share_over_0.7_signed_backward": 2 / 3,
            "mutual_share_signed": 2 / 3,
            "mutual_cos_signed": 0.98,
            "pw_mcc_signed": 0.4,
            "pw_share_over_0.7_signed": 0,
        },
        abs=1e-6,
    )
    assert found.pairs["signed"].b.tolist() == [2, 1, 0]


def test_where_direction_does_not_count_another_matching_is_the_best() -> None:
    """Absolute cosines (1, .8, 0), (0, .6, 1), (.6, .96, .8): 1 + 1 + .96."""
    found = compare(A, B, signs=("abs",), over=(0.7,), max_matching=3)
    assert found.pairs["abs"].b.tolist() == [0, 2, 1]
    assert found.values["pw_mcc_abs"] == pytest.approx(2.96 / 3)
    assert found.values["mmcs_abs_forward"] == pytest.approx(2.96 / 3)


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("block", [1, 20, 10_000])
def test_it_agrees_with_plain_loops_for_any_block(
    sign: Sign, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "_COSINES_AT_ONCE", block)
    a, b = dictionary(5), dictionary(7)
    table = cosines(a, b, sign)
    columns = [list(column) for column in zip(*table, strict=True)]
    there = [row.index(max(row)) for row in table]
    back = [column.index(max(column)) for column in columns]
    each_other = [(i, j) for i, j in enumerate(there) if back[j] == i]
    matchings = [
        [row[j] for row, j in zip(table, p, strict=True)] for p in permutations(range(7), 5)
    ]
    best = max(matchings, key=sum)
    expected = {
        f"mmcs_{sign}_forward": sum(map(max, table)) / 5,
        f"mmcs_{sign}_backward": sum(map(max, columns)) / 7,
        f"uniqueness_{sign}_forward": len(set(there)) / 5,
        f"uniqueness_{sign}_backward": len(set(back)) / 7,
        f"share_over_0.5_{sign}_forward": sum(max(row) > 0.5 for row in table) / 5,
        f"share_over_0.5_{sign}_backward": sum(max(c) > 0.5 for c in columns) / 7,
        f"mutual_share_{sign}": len(each_other) / 5,
        f"mutual_cos_{sign}": sum(table[i][j] for i, j in each_other) / len(each_other),
        f"pw_mcc_{sign}": sum(best) / 5,
        f"pw_share_over_0.5_{sign}": sum(cosine > 0.5 for cosine in best) / 5,
    }
    found = compare(a, b, signs=(sign,), over=(0.5,), max_matching=7)
    assert found.values == pytest.approx(expected, abs=1e-6)
    assert found.forward[sign].row.tolist() == there
    assert found.values.keys() == definitions((sign,), (0.5,)).keys()


@pytest.mark.parametrize("sign", SIGNS)
def test_a_row_is_not_its_own_neighbour(sign: Sign) -> None:
    a = dictionary(8)
    asked = torch.tensor([6, 1])
    found = nearest(a[asked], a, asked)[sign]
    table = cosines(a, a, sign)
    for i, row, cosine in zip([6, 1], found.row.tolist(), found.cosine.tolist(), strict=True):
        others = [(table[i][j], j) for j in range(8) if j != i]
        assert (cosine, row) == (pytest.approx(max(others)[0], abs=1e-6), max(others)[1])


def test_a_dictionary_is_found_in_itself_whatever_the_order() -> None:
    a = dictionary(9)
    order = torch.randperm(9)
    found = compare(a, a[order], signs=SIGNS, over=(0.7,), max_matching=9)
    assert found.values == pytest.approx(dict.fromkeys(found.values, 1), abs=1e-6)
    assert order[found.pairs["signed"].b].tolist() == list(range(9))


def test_the_rows_of_the_larger_dictionary_that_are_left_over_have_no_pair() -> None:
    a = dictionary(6)
    pairs = matched(a, a[:4], "signed")
    assert pairs.a.tolist() == pairs.b.tolist() == [0, 1, 2, 3]
    assert pairs.mean == pytest.approx(1)


def test_beyond_the_limit_there_is_no_matching_but_pairs_that_are_each_others_nearest() -> None:
    found = compare(A, B, signs=("signed",), over=(0.7,), max_matching=2)
    assert not found.pairs and not [name for name in found.values if name.startswith("pw_")]
    assert found.values["mutual_cos_signed"] == pytest.approx(0.98)


def test_mutual_takes_both_ways_into_account() -> None:
    """Row 1 of A is nearest to row 1 of B, which is nearer to row 2 of A."""
    pairs = mutual(nearest(A, B)["signed"], nearest(B, A)["signed"])
    assert (pairs.a.tolist(), pairs.b.tolist()) == ([0, 2], [0, 1])


def test_rows_without_a_direction_are_left_out() -> None:
    rows, there = unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -1e-30]]))
    assert there.tolist() == [True, False, True]
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, -1.0]]))


def test_nothing_to_compare_with_is_an_error_not_a_nan() -> None:
    with pytest.raises(Undefined, match="of 0 and 3 latents none has another"):
        nearest(A[:0], A)
    with pytest.raises(Undefined, match="of 1 and 1 latents"):
        nearest(A[:1], A[:1], torch.tensor([0]))
    none = torch.zeros(0, dtype=torch.long)
    with pytest.raises(Undefined, match="no two latents are each other's nearest"):
        _ = Pairs(none, none, torch.zeros(0)).mean


def test_random_rows_have_length_1_and_the_covariance_asked_for() -> None:
    root = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double()
    rows = random_rows(20_000, 2, torch.Generator().manual_seed(0), root)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(20_000))
    # The share of a Gaussian's directions whose slope is below 1, where axes are 3 to 1.
    flat = float((rows[:, 0].abs() > rows[:, 1].abs()).double().mean())
    assert flat == pytest.approx(2 / math.pi * math.atan(3), abs=0.01)
    again = random_rows(20_000, 2, torch.Generator().manual_seed(0), root)
    assert again.equal(rows)


def test_subspaces_worked_by_hand() -> None:
    x, y, z = torch.eye(3)
    plane = torch.stack([2 * x, y, x + y])
    assert subspace_overlap(plane, torch.stack([x - y, x]), 2) == pytest.approx(1)
    assert subspace_overlap(torch.stack([x, -x]), torch.stack([z]), 1) == pytest.approx(0, abs=1e-9)
    # Planes that share x, with y at 60 degrees to their other direction.
    turned = torch.stack([x, 0.5 * y + 0.75**0.5 * z])
    assert subspace_overlap(torch.stack([x, y]), turned, 2) == pytest.approx((1 + 0.25) / 2)
    with pytest.raises(Undefined, match="3 and 1 rows of width 3 span no subspaces of rank 2"):
        subspace_overlap(plane, x[None], 2)
