"""Every number of `firing`, `geometry` and `stability` once more, in plain loops of float64, those
of random dictionaries too. (Of the other evaluations in their own files.)"""

import dataclasses
import math
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saekit import ActivationCache, checkpoint, evaluate
from saekit.evals.firing import FiringConfig
from saekit.evals.geometry import GeometryConfig
from saekit.evals.stability import StabilityConfig
from saekit.sae import SAE
from saekit.seeds import stream

HOOK = "resid_post.0"
Row = list[float]
Agree = Callable[..., None]


def dot(a: Row, b: Row) -> float:
    return math.fsum(p * q for p, q in zip(a, b, strict=True))


def cos(a: Row, b: Row) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def mean(numbers: list[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def percentile(numbers: list[float], p: float) -> float:
    """By linear interpolation."""
    ranked, at = sorted(numbers), p / 100 * (len(numbers) - 1)
    low = math.floor(at)
    return ranked[low] + (at - low) * (ranked[min(low + 1, len(ranked) - 1)] - ranked[low])


def least(share: float, ranked: list[int]) -> int:
    return ranked[math.ceil(share * len(ranked)) - 1]


def sparsity(rows: list[Row]) -> dict[str, float]:
    found: dict[str, list[float]] = {"effective_l0": [], "participation": [], "hoyer": []}
    for row in rows:
        if any(row):
            one, two = math.fsum(map(abs, row)), dot(row, row)
            root = math.sqrt(len(row))
            found["effective_l0"].append(one**2 / two)
            found["participation"].append(two**2 / math.fsum(a**4 for a in row))
            found["hoyer"].append((root - one / math.sqrt(two)) / (root - 1))
    return {name: mean(each) for name, each in found.items()}


def zipf(count: list[int], few: int) -> dict[str, float]:
    """By a line through log count over log rank, and by likelihood, found by bisection."""
    ranked = sorted((c for c in count if c >= few), reverse=True)
    n = len(ranked)
    x = [math.log(r) for r in range(1, n + 1)]
    y = [math.log(c) for c in ranked]
    mx, my = mean(x), mean(y)
    scatter, together = dot([a - mx for a in x], [a - mx for a in x]), [b - my for b in y]
    slope = dot([a - mx for a in x], together) / scatter
    left = math.fsum((b - my - slope * (a - mx)) ** 2 for a, b in zip(x, y, strict=True))
    total, seen = sum(ranked), dot([float(c) for c in ranked], x)

    def rise(s: float) -> float:
        """Of the log-likelihood."""
        law = [r**-s for r in range(1, n + 1)]
        return total * dot(law, x) / math.fsum(law) - seen

    low, high = 0.0, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if rise(middle) > 0 else (low, middle)
    law = [r**-low for r in range(1, n + 1)]
    apart = [
        abs(sum(ranked[:r]) / total - math.fsum(law[:r]) / math.fsum(law)) for r in range(1, n + 1)
    ]
    return {
        "zipf_exponent_line": -slope,
        "zipf_r2_line": 1 - left / dot(together, together),
        "zipf_exponent_likelihood": low,
        "zipf_ks_likelihood": max(apart),
    }


def test_firing(random_sae: SAE, tiny_cache: ActivationCache, agree: Agree) -> None:
    rows = tiny_cache.rows(HOOK, tiny_cache.indices("test"))
    x = rows.double().tolist()
    z: list[Row] = random_sae.encode(rows).double().tolist()
    n, width = len(x), len(z[0])
    columns = [list(column) for column in zip(*z, strict=True)]
    count = [sum(v != 0 for v in column) for column in columns]
    l0 = sorted(sum(v != 0 for v in row) for row in z)
    middle = mean([float(v) for v in l0])
    alive = [c for c in count if c]
    near = [
        mean([abs(v) <= share * math.sqrt(dot(row, row) / len(row)) for row in x for v in row])
        for share in (0.01, 0.1)
    ]
    scale = math.sqrt(16) / tiny_cache.stats(HOOK).mean_norm
    lengths = [math.sqrt(dot(row, row)) * scale for row in random_sae.W_dec.double().tolist()]
    variances = [
        mean([(v - mean(column)) ** 2 for v in column]) * length**2
        for column, length in zip(columns, lengths, strict=True)
    ]
    expected = {
        "l0_mean": middle,
        "l0_sd": math.sqrt(mean([(v - middle) ** 2 for v in l0])),
        **{f"l0_p{p}": least(p / 100, l0) for p in (5, 25, 50, 75, 95)},
        **{f"z_{name}": value for name, value in sparsity(z).items()},
        **{f"x_{name}": value for name, value in sparsity(x).items()},
        "x_nonzero_share": mean([v != 0 for row in x for v in row]),
        "x_near_zero_share_0.01": near[0],
        "x_near_zero_share_0.1": near[1],
        f"dead_share_lt1_in_{n}": sum(c < 1 for c in count) / width,
        f"dead_share_lt16_in_{n}": sum(c < 16 for c in count) / width,
        "dense_share_over_1_percent": sum(c > 0.01 * n for c in count) / width,
        "dense_share_over_10_percent": sum(c > 0.1 * n for c in count) / width,
        "dense_share_of_alive_over_1_percent": sum(c > 0.01 * n for c in alive) / len(alive),
        "dense_share_of_alive_over_10_percent": sum(c > 0.1 * n for c in alive) / len(alive),
        **zipf(count, 1),
        "active_units_share": sum(v > 0.01 for v in variances) / width,
    }
    config = FiringConfig(n_bootstrap=0)
    agree(evaluate("firing", random_sae, tiny_cache, hook=HOOK, config=config), expected)


@pytest.fixture
def partly_dead(random_sae: SAE) -> SAE:
    """Latents 0..9 never fire."""
    b_enc = random_sae.b_enc.clone()
    b_enc[:10] = -1e6
    return dataclasses.replace(random_sae, b_enc=b_enc)


def alive_of(sae: SAE, cache: ActivationCache) -> list[int]:
    z = sae.encode(cache.rows(HOOK, cache.indices("test")))
    return [i for i in range(sae.d_sae) if bool((z[:, i] != 0).any())]


def spread(name: str, numbers: list[float]) -> dict[str, float]:
    return {
        f"{name}_mean": mean(numbers),
        **{f"{name}_p{p}": percentile(numbers, p) for p in (5, 50, 95)},
    }


def drawn(
    null: str, draw: int, sizes: list[int], roots: list[Any] | None = None
) -> list[list[Row]]:
    """Random dictionaries in place of those of these sizes, one after another from one stream; with
    a root of a covariance each, where given."""
    generator = stream(null, 0, draw)
    found: list[list[Row]] = []
    for i, n in enumerate(sizes):
        rows: list[Row] = torch.randn(n, 16, generator=generator, dtype=torch.float64).tolist()
        if roots is not None:
            columns = roots[i].tolist()
            rows = [[dot(row, column) for column in columns] for row in rows]
        found.append([[v / math.sqrt(dot(row, row)) for v in row] for row in rows])
    return found


def root_of(x: Any) -> Any:
    """The symmetric root of the covariance of rows, by Newton's iteration (Denman and Beavers)."""
    apart = x - x.mean(0)
    y, z = apart.T @ apart / len(x), np.eye(x.shape[1])
    scale = np.trace(y)
    y = y / scale
    for _ in range(60):
        y, z = (y + np.linalg.inv(z)) / 2, (z + np.linalg.inv(y)) / 2
    return y * math.sqrt(scale)


def neighbours(side: str, rows: list[Row]) -> dict[str, float]:
    """Of a dictionary's rows to each other."""
    n, found = len(rows), {}
    table = [[cos(a, b) for b in rows] for a in rows]
    pairs = [table[i][j] for i in range(n) for j in range(n) if i != j]
    found[f"pair_cos_{side}_mean"] = mean(pairs)
    found[f"pair_cos_{side}_rms"] = math.sqrt(mean([c * c for c in pairs]))
    for sign in ("signed", "abs") if side == "dec" else ("abs",):
        size = abs if sign == "abs" else float
        best = [max(size(table[i][j]) for j in range(n) if i != j) for i in range(n)]
        name = f"max_cos_{side}_{sign}"
        found[f"{name}_mean"] = mean(best)
        found[f"{name}_median"] = percentile(best, 50)
        found[f"{name}_p99"] = percentile(best, 99)
        found[f"{name}_share_over_0.7"] = sum(c > 0.7 for c in best) / n
    return found


def means_of(name: str, draws: list[dict[str, float]]) -> dict[str, float]:
    return {f"{key}_{name}": mean([draw[key] for draw in draws]) for key in draws[0]}


def test_geometry(partly_dead: SAE, tiny_cache: ActivationCache, agree: Agree) -> None:
    alive = alive_of(partly_dead, tiny_cache)
    n = len(alive)
    rows = {
        "dec": [partly_dead.W_dec[i].double().tolist() for i in alive],
        "enc": [partly_dead.W_enc[:, i].double().tolist() for i in alive],
    }
    shift = int(torch.randint(1, n, (1,), generator=stream("enc_dec_cos", 0)))
    own = [cos(e, d) for e, d in zip(rows["enc"], rows["dec"], strict=True)]
    others = [cos(rows["enc"][i], rows["dec"][(i - shift) % n]) for i in range(n)]
    expected = {"alive_share": n / 40, **spread("enc_dec_cos", own)}
    expected |= {f"{name}_null": v for name, v in spread("enc_dec_cos", others).items()}
    root = root_of(tiny_cache.rows(HOOK, tiny_cache.indices("test")).double().numpy())
    for side, some in rows.items():
        expected |= spread(f"{side}_norm", [math.sqrt(dot(row, row)) for row in some])
        expected |= neighbours(side, some)
        draws = [neighbours(side, *drawn("null", draw, [n])) for draw in range(2)]
        expected |= means_of("null", draws)
    draws = [neighbours("dec", *drawn("null_cov", draw, [n], [root])) for draw in range(2)]
    expected |= means_of("null_cov", draws)
    config = GeometryConfig(null_draws=2)
    result = evaluate("geometry", partly_dead, tiny_cache, hook=HOOK, config=config)
    agree(result, expected, abs=1e-6)  # Cosines are in fp32.


def subspace(rows: list[Row], rank: int) -> Any:
    """Leading right singular vectors."""
    return np.linalg.svd(np.array(rows))[2][:rank]


Found = tuple[dict[str, float], list[list[Row]]]


def compared(a: list[Row], b: list[Row]) -> Found:
    """Two dictionaries of unit rows, the second no larger; and what neither finds of the other."""
    found: dict[str, float] = {}
    n, m = len(a), len(b)
    unfound: list[list[Row]] = []
    for sign in ("signed", "abs"):
        size = abs if sign == "abs" else float
        table = [[size(dot(p, q)) for q in b] for p in a]
        forward = [line.index(max(line)) for line in table]
        columns = [[table[i][j] for i in range(n)] for j in range(m)]
        backward = [line.index(max(line)) for line in columns]
        for way, best, of in (("forward", forward, table), ("backward", backward, columns)):
            cosines = [line[j] for line, j in zip(of, best, strict=True)]
            found[f"mmcs_{sign}_{way}"] = mean(cosines)
            found[f"uniqueness_{sign}_{way}"] = len(set(best)) / len(best)
            found[f"share_over_0.7_{sign}_{way}"] = mean([c > 0.7 for c in cosines])
        both = [table[i][j] for i, j in enumerate(forward) if backward[j] == i]
        found[f"mutual_share_{sign}"] = len(both) / m
        found[f"mutual_cos_{sign}"] = mean(both)
        tries = permutations(range(n), m)
        pairs = max(([columns[j][i] for j, i in enumerate(some)] for some in tries), key=math.fsum)
        found[f"pw_mcc_{sign}"] = mean(pairs)
        found[f"pw_share_over_0.7_{sign}"] = mean([c > 0.7 for c in pairs])
        unfound = [
            [row for row, line in zip(rows, of, strict=True) if max(line) <= 0.7]
            for rows, of in ((a, table), (b, columns))
        ]
    return found, unfound


def overlap(a: list[Row], b: list[Row]) -> float:
    angles = subspace(a, 2) @ subspace(b, 2).T
    return float((angles**2).sum() / 2)


def test_stability(
    random_sae: SAE, tiny_cache: ActivationCache, tmp_path: Path, agree: Agree
) -> None:
    """Seven latents against five, so that all matchings can be tried."""

    def few(sae: SAE, n: int) -> SAE:
        off = torch.ones(sae.d_sae, dtype=torch.bool)
        off[alive_of(sae, tiny_cache)[:n]] = False
        return dataclasses.replace(sae, b_enc=sae.b_enc.where(~off, -1e6))

    generator = torch.Generator().manual_seed(9)
    near = random_sae.W_dec + 0.15 * torch.randn(40, 16, generator=generator)
    sae = few(random_sae, 7)
    other = few(dataclasses.replace(random_sae, W_dec=near[:, torch.randperm(16)] + near), 5)
    alive = [alive_of(one, tiny_cache) for one in (sae, other)]
    a, b = (
        [[v / math.sqrt(dot(row, row)) for v in row] for row in one.W_dec[i].double().tolist()]
        for one, i in zip((sae, other), alive, strict=True)
    )
    assert 5 < len(a) <= 7 and 3 < len(b) <= 5
    own, unfound = compared(a, b)
    own["unfound_subspace_2"] = overlap(*unfound)
    root = root_of(tiny_cache.rows(HOOK, tiny_cache.indices("test")).double().numpy())
    for null, roots in (("null", None), ("null_cov", [root, root])):
        of, _ = compared(*drawn(null, 0, [len(a), len(b)], roots))
        of["unfound_subspace_2"] = overlap(*drawn(null, 0, list(map(len, unfound)), roots))
        own |= means_of(null, [of])
    expected = {f"vs1_{name}": value for name, value in own.items()}
    expected |= {"alive_share": len(a) / 40, "vs1_alive": len(b)}
    checkpoint.save(other, tmp_path)
    config = StabilityConfig(against=(tmp_path,), subspace_rank=2)
    result = evaluate("stability", sae, tiny_cache, hook=HOOK, config=config)
    agree(result, expected, abs=1e-6)
