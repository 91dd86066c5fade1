import dataclasses
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saekit import ActivationCache, checkpoint, evaluate, train
from saekit.errors import CheckpointError, ConfigError, SaekitError, Undefined
from saekit.evals._firing_life import FILE, Life
from saekit.evals._firing_rows import RowMeans, measure, measures, near_zero, row_sparsity
from saekit.evals._firing_units import Posterior, Spread, training_scale
from saekit.evals._firing_windows import Windows, log_histogram, zipf_likelihood, zipf_line
from saekit.evals._metrics import Firing
from saekit.evals._resample import Resamples, widening
from saekit.evals.firing import FiringConfig
from saekit.results import EvalResult
from saekit.sae import SAE, SparseCode
from saekit.trainers import _life
from saekit.trainers.variational import VariationalConfig

HOOK = "resid_post.0"
Agree = Callable[..., None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_cache: ActivationCache) -> Path:
    """A variational SAE of 24 latents whose variance was fixed, and what training left beside
    it."""
    cfg = VariationalConfig(
        d_sae=24, k=4, n_tokens=2000, batch_size=200, dead_after=500, life_windows=5
    )
    folder = tmp_path_factory.mktemp("runs") / "variational"
    train(cfg, tiny_cache, hook=HOOK, out=folder)
    return folder


def firing(sae: SAE, cache: ActivationCache, **config: Any) -> EvalResult:
    cfg = FiringConfig(**{"n_bootstrap": 50, "windows": (20, 60), **config})
    return evaluate("firing", sae, cache, hook=HOOK, config=cfg)


def values(result: EvalResult) -> dict[str, float]:
    return {name: metric.value for name, metric in result.metrics.items()}


def code_of(z: Tensor) -> SparseCode:
    """With a slot for every latent, in another order in each row."""
    order = torch.rand(z.shape).argsort(1)
    return SparseCode(z.gather(1, order), order)


def sparse(n: int, d: int, share: float = 0.3) -> Tensor:
    return torch.randn(n, d) * (torch.rand(n, d) < share)


def counted(z: Tensor, size: int, rules: tuple[int, ...], batch: int) -> Windows:
    window = Windows(size, z.shape[1], rules)
    for part in z.split(batch):
        window.add(code_of(part))
    return window


# Windows


def test_windows_worked_by_hand() -> None:
    """Latents fire on rows 0 1 2 3 4 | 5 ... of windows of 2: the last row is of none."""
    z = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 5, -1]])
    window = counted(z, 2, (1, 2), 5)
    assert window.n == 2
    # In the first window they fire 2, 1, 0, 0 times, in the second 0, 2, 0, 0 times.
    assert window.dead_share(1) == (2 + 3) / 8
    assert window.dead_share(2) == (3 + 3) / 8
    assert window.dying(1).tolist() == [True, False, False, False]
    assert window.waking(1).tolist() == [False] * 4
    assert window.waking(2).tolist() == [False, True, False, False]


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_windows_agree_with_plain_loops_for_any_batch(batch: int) -> None:
    z = sparse(64, 12, 0.1)
    window = counted(z, 10, (1, 2), batch)
    counts = [[int((z[10 * w : 10 * w + 10, i] != 0).sum()) for i in range(12)] for w in range(6)]
    for least in (1, 2):
        dead = sum(count < least for one in counts for count in one)
        assert window.dead_share(least) == pytest.approx(dead / (6 * 12))
        pairs = list(zip(counts[0], counts[-1], strict=True))
        assert window.dying(least).tolist() == [a >= least and b < least for a, b in pairs]
        assert window.waking(least).tolist() == [a < least and b >= least for a, b in pairs]


def test_too_few_rows_for_a_window_are_an_error_not_a_nan() -> None:
    window = counted(sparse(19, 3), 10, (1,), 5)
    with pytest.raises(Undefined, match="it takes 2 complete windows of 10 rows, and there are 1"):
        window.dying(1)
    with pytest.raises(Undefined, match="it takes 1 complete windows of 30 rows"):
        counted(sparse(19, 3), 30, (1,), 5).dead_share(1)


# Densities


def test_the_histogram_worked_by_hand() -> None:
    """Bins of a third of a decade below 1 and down to 1/1000."""
    count = torch.tensor([0, 1, 1, 2, 10, 100, 99, 1000, 0])
    counts, edges, never = log_histogram(count, 1000, 9)
    assert edges.tolist() == pytest.approx([i / 3 - 3 for i in range(10)])
    assert counts.tolist() == [3, 0, 0, 1, 0, 1, 1, 0, 1]
    assert never == 2


def test_every_latent_is_in_one_bin_or_fires_never() -> None:
    count = torch.arange(1001)
    counts, edges, never = log_histogram(count, 1000, 7)
    assert never == 1 and int(counts.sum()) == 1000
    logs = [math.log10(c / 1000) for c in range(1, 1001)]
    expected, _ = np.histogram(logs, edges.numpy())
    # Counts on an edge may be rounded to either side of it by the reference.
    assert np.abs(counts.numpy() - expected).max() <= 1


def test_a_law_that_is_kept_is_found_by_both_fits() -> None:
    exact = (1e9 / torch.arange(1, 51).double() ** 1.3).long()
    shuffled = torch.cat([exact, torch.zeros(9, dtype=torch.long)])[torch.randperm(59)]
    line, likelihood = zipf_line(shuffled), zipf_likelihood(shuffled)
    assert (line.n, likelihood.n) == (50, 50)
    assert line.exponent == pytest.approx(1.3, abs=1e-5)
    assert line.fit == pytest.approx(1, abs=1e-8)
    assert likelihood.exponent == pytest.approx(1.3, abs=1e-5)
    assert likelihood.fit == pytest.approx(0, abs=1e-6)


def test_the_fits_agree_with_plain_loops() -> None:
    count = torch.randint(1, 400, (40,))
    ranked = sorted(count.tolist(), reverse=True)
    x = [math.log(r) for r in range(1, 41)]
    y = [math.log(c) for c in ranked]
    mx, my = sum(x) / 40, sum(y) / 40
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum(
        (a - mx) ** 2 for a in x
    )
    left = sum((b - my - slope * (a - mx)) ** 2 for a, b in zip(x, y, strict=True))
    line = zipf_line(count)
    assert line.exponent == pytest.approx(-slope, rel=1e-9)
    assert line.fit == pytest.approx(1 - left / sum((b - my) ** 2 for b in y), rel=1e-9)

    def loss(s: float) -> float:
        total = math.log(sum(r**-s for r in range(1, 41)))
        return sum((c * (s * a + total) for c, a in zip(ranked, x, strict=True)), 0.0)

    fit = zipf_likelihood(count)
    assert loss(fit.exponent) <= min(loss(fit.exponent + step) for step in (-1e-3, 1e-3))
    law = [r**-fit.exponent for r in range(1, 41)]
    apart = [abs(sum(ranked[:r]) / sum(ranked) - sum(law[:r]) / sum(law)) for r in range(1, 41)]
    assert fit.fit == pytest.approx(max(apart), abs=1e-9)


def test_steeper_laws_than_the_first_guess_are_found() -> None:
    steep = (1e15 / torch.arange(1, 11).double() ** 6).long()
    assert zipf_likelihood(steep).exponent == pytest.approx(6, abs=1e-4)


def test_a_fit_without_meaning_is_refused() -> None:
    with pytest.raises(Undefined, match="2 latents fire at least 5 times, and a law"):
        zipf_likelihood(torch.tensor([5, 9, 4, 0]), 5)
    with pytest.raises(Undefined, match="all 4 latents fire equally often"):
        zipf_line(torch.tensor([7, 7, 7, 7]))
    assert zipf_likelihood(torch.tensor([7, 7, 7, 7])).exponent == pytest.approx(0, abs=1e-9)


# Rows


def test_sparsity_of_a_row_worked_by_hand() -> None:
    rows = torch.tensor([[0.0, -3, 0, 0], [2, 2, -2, 2], [1, 1, 0, 0], [0, 0, 0, 0], [3, 1, 0, 0]])
    found, there = row_sparsity(rows, 4)
    assert there.tolist() == [True, True, True, False, True]
    assert found[0].tolist() == [1, 1, 1]
    assert found[1].tolist() == [4, 4, 0]
    assert found[2].tolist() == pytest.approx([2, 2, 2 - 2**0.5])
    assert found[4].tolist() == pytest.approx([1.6, 100 / 82, 2 - 4 / 10**0.5])


def test_sparsity_agrees_with_plain_loops_and_has_no_scale() -> None:
    x = torch.randn(30, 9)
    found, _ = row_sparsity(x, 9)
    for row, got in zip(x.double().tolist(), found.tolist(), strict=True):
        one, two = sum(map(abs, row)), sum(a * a for a in row)
        hoyer = (3 - one / math.sqrt(two)) / 2
        expected = [one**2 / two, two**2 / sum(a**4 for a in row), hoyer]
        assert got == pytest.approx(expected, rel=1e-9)
    for scale in (1e-150, 1e150):
        torch.testing.assert_close(row_sparsity(x.double() * scale, 9)[0], found)


def test_slots_that_are_not_given_count_as_zeros() -> None:
    z = sparse(20, 30)
    values, indices = z.abs().topk(30 - 5)
    code = SparseCode(values, indices)
    for of in range(2):
        torch.testing.assert_close(
            row_sparsity(code.values, 30)[of], row_sparsity(z, 30)[of], check_stride=False
        )


def test_coordinates_near_zero_are_so_by_their_own_row() -> None:
    x = torch.tensor([[10.0, 1, 0, 0], [0, 0, 0, 0], [1e-9, 1e-9, 1e-9, -1e-9]])
    assert near_zero(x, 0.1).tolist() == [0.5, 1, 0]
    assert near_zero(x, 0.2).tolist() == [0.75, 1, 0]


def test_the_measures_are_as_many_as_their_definitions() -> None:
    x = torch.randn(6, 5)
    found, there = measure(x, code_of(sparse(6, 8)), 8, (0.1, 0.5))
    names = list(measures(8, (0.1, 0.5), None))
    assert found.shape == there.shape == (6, len(names))
    assert names[-1] == "x_near_zero_share_0.5"
    assert "Gaussian ones have 0.383" in measures(8, (0.5,), None)[names[-1]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(SaekitError, match="activations contain NaN or infinity"):
        row_sparsity(torch.tensor([[1.0, bad]]), 2)


def test_means_are_over_the_rows_that_have_them_and_intervals_over_documents() -> None:
    document = torch.tensor([3, 3, 7, 7, 7, 9])
    values = torch.tensor([[1.0, 4], [2, 4], [3, 4], [4, 9], [5, 9], [60, 9]]).double()
    there = torch.tensor([[True, i < 3] for i in range(6)])
    resamples = Resamples.of(document, 400, 0)
    sums = RowMeans.of(values[:2], there[:2], document[:2], resamples) + RowMeans.of(
        values[2:], there[2:], document[2:], resamples
    )
    first, second = sums.estimate(0), sums.estimate(1)
    assert first is not None and second is not None
    assert (sums.n(0), sums.n(1)) == (6, 3)
    assert first.value == pytest.approx(12.5) and second.value == 4
    # By hand: all means that three draws of the documents (2 rows of 3, 3 of 12, 1 of 60) can have.
    weights = [(a, b, c) for a in range(4) for b in range(4 - a) for c in (3 - a - b,)]
    possible = [(3 * a + 12 * b + 60 * c) / (2 * a + 3 * b + c) for a, b, c in weights]
    chance = [math.factorial(3) / math.prod(map(math.factorial, w)) / 27 for w in weights]
    by_value = sorted(zip(possible, chance, strict=True))
    assert first.interval is not None
    # Thrice the first, thrice the last: a chance of 1/27 each. Of three documents it is widened.
    for end, (extreme, _) in zip(first.interval, (by_value[0], by_value[-1]), strict=True):
        assert end == pytest.approx(12.5 + widening(3) * (extreme - 12.5))
    # Some resamples take the last document alone, which has nothing of the second.
    assert second.interval is None


# Units


@pytest.mark.parametrize("size", [1, 7, 50])
def test_variance_agrees_with_the_dense_matrix_for_any_batch(size: int) -> None:
    z = sparse(50, 12) + 100 * (torch.arange(12) == 3)
    parts = [Spread.of(code_of(part), 12) for part in z.split(size)]
    dense = [Spread.of_dense(part) for part in z.split(size)]
    for some in (parts, dense):
        whole = sum(some[1:], some[0])
        torch.testing.assert_close(whole.variance, z.double().var(0, correction=0))
        torch.testing.assert_close(whole.mean, z.double().mean(0))


def test_posteriors_agree_with_plain_loops(random_sae: SAE) -> None:
    x = torch.randn(40, 16)
    mean = (x @ random_sae.W_enc + random_sae.b_enc).relu().double() * 0.5
    parts = [Posterior.of(random_sae, part, 0.5, 0.1) for part in x.split(9)]
    whole = sum((p for p, _ in parts[1:]), parts[0][0])
    torch.testing.assert_close(whole.kl, mean.square().sum(0) / 2)
    torch.testing.assert_close(torch.cat([kl for _, kl in parts]), mean.square().sum(1) / 2)
    below = (mean.square() / 2 < 0.1).double()
    for delta in (0.0, 0.25, 0.6):
        collapsed = float((below.mean(0) >= 1 - delta - 1e-9).double().mean())
        assert whole.collapsed_share(delta) == pytest.approx(collapsed)


def test_the_scale_of_training_is_that_of_its_config(run: Path) -> None:
    origin = checkpoint.load(run).provenance
    assert origin is not None
    for how, scale in (("sqrt_d", 2.0), ("unit", 0.5), ("none", 1.0)):
        config = {**origin.config, "input_scaling": how}
        changed = dataclasses.replace(origin, config=config)
        assert training_scale(changed, 2.0, 16) == scale
    assert training_scale(None, 2.0, 16) == 2
    strange = dataclasses.replace(origin, config={"input_scaling": "odd"})
    with pytest.raises(ConfigError, match="input_scaling='odd', which is none of"):
        training_scale(strange, 2.0, 16)


# The evaluation


def test_it_agrees_with_plain_loops_over_the_split(
    random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    x = tiny_cache.rows(HOOK, tiny_cache.indices("test"))
    z = random_sae.encode(x).double()
    n, count = len(x), (z != 0).sum(0)
    result = firing(random_sae, tiny_cache, near_zero=(0.5,), dense=(0.25,))
    found = values(result)
    l0 = (z != 0).sum(1).double()
    of_z = [row for row in z.tolist() if any(row)]
    rms = x.double().square().mean(1, keepdim=True).sqrt()
    expected = {
        "l0_mean": float(l0.mean()),
        "l0_sd": float(l0.std(correction=0)),
        "l0_p25": float(l0.sort().values[math.ceil(n / 4) - 1]),
        "z_effective_l0": sum(sum(r) ** 2 / sum(a * a for a in r) for r in of_z) / len(of_z),
        "x_participation": float(
            (x.double().square().sum(1) ** 2 / x.double().pow(4).sum(1)).mean()
        ),
        "x_nonzero_share": float((x != 0).double().mean()),
        "x_near_zero_share_0.5": float((x.double().abs() <= 0.5 * rms).double().mean()),
        f"dead_share_lt1_in_{n}": float((count == 0).double().mean()),
        f"dead_share_lt16_in_{n}": float((count < 16).double().mean()),
        "dense_share_over_25_percent": float((count > 0.25 * n).double().mean()),
        "dense_share_of_alive_over_25_percent": float(
            (count[count > 0] > 0.25 * n).double().mean()
        ),
        "zipf_exponent_line": zipf_line(count).exponent,
        "zipf_ks_likelihood": zipf_likelihood(count).fit,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert result.arrays["count"].tolist() == count.tolist()
    assert result.arrays["l0_rows"].tolist() == [int((l0 == i).sum()) for i in range(5)]
    assert int(result.arrays["density_histogram"].sum()) == int((count > 0).sum())
    assert result.arrays["density_never"].tolist() == [int((count == 0).sum())]
    scale = 4 / tiny_cache.stats(HOOK).mean_norm
    variance = z.var(0, correction=0) * (random_sae.W_dec.double().norm(dim=1) * scale) ** 2
    assert found["active_units_share"] == float((variance > 0.01).double().mean())
    assert result.arrays["code_variance"].tolist() == pytest.approx(variance.tolist(), rel=1e-5)
    assert result.metrics[f"dead_share_lt16_in_{n}"].n == n
    assert result.metrics["dead_share_lt1_in_20"].n == n // 20 * 20


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_changes_no_number(
    batch_size: int, random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    whole = firing(random_sae, tiny_cache, max_rows=90)
    parts = firing(random_sae, tiny_cache, max_rows=90, batch_size=batch_size)
    assert values(parts) == pytest.approx(values(whole), rel=1e-6)
    for name, array in whole.arrays.items():
        np.testing.assert_allclose(parts.arrays[name], array, rtol=1e-5, atol=1e-12)


def test_windows_that_are_too_long_are_left_out(
    random_sae: SAE, tiny_cache: ActivationCache, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        names = values(firing(random_sae, tiny_cache, windows=(40, 5000), max_rows=100)).keys()
    assert "windows of [5000] rows are left out: 100 rows are looked at" in caplog.text
    assert {"dead_share_lt1_in_40", "dying_share_lt1_in_40", "dead_share_lt16_in_100"} <= names
    assert "dying_share_lt1_in_100" not in names
    assert not [name for name in names if "5000" in name]


def test_a_silent_sae_is_dead_and_what_it_lacks_is_left_out(
    silent: SAE, tiny_cache: ActivationCache, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = values(firing(silent, tiny_cache))
    assert found["dead_share_lt1_in_20"] == 1 and found["l0_mean"] == 0
    assert found["active_units_share"] == 0
    assert "z_hoyer" not in found and "x_hoyer" in found
    assert "dense_share_of_alive_over_1_percent" not in found
    assert "z_hoyer is left out: all rows are 0" in caplog.text
    assert "zipf_exponent_line is left out: 0 latents fire" in caplog.text


def test_an_interval_needs_two_documents(
    random_sae: SAE, tiny_cache: ActivationCache, caplog: pytest.LogCaptureFixture
) -> None:
    index = tiny_cache.indices("test")
    documents = tiny_cache.take("document", index)
    first = int((documents == documents[0]).sum())
    assert firing(random_sae, tiny_cache).metrics["l0_mean"].interval
    without = firing(random_sae, tiny_cache, n_bootstrap=0).metrics
    assert not any(metric.interval for metric in without.values())
    with caplog.at_level(logging.WARNING):
        alone = firing(random_sae, tiny_cache, max_rows=first).metrics["l0_mean"]
    assert not alone.interval and "intervals are left out" in caplog.text


# Training


def test_the_file_is_the_one_that_trainers_write() -> None:
    assert FILE == _life.FILE


def test_windows_and_lives_agree_with_plain_loops(
    run: Path, tiny_cache: ActivationCache, tmp_path: Path, agree: Agree
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    held = load_file(run / FILE)
    # As if some latents had been given new weights, one of them twice.
    held["replanted"][[2, 3, 3], [5, 5, 8]] = True
    save_file(held, copy / FILE)
    sae = checkpoint.load(copy)
    cfg = FiringConfig(run_folder=copy, n_bootstrap=0, windows=(20,), rules=(1, 3))
    result = evaluate("firing", sae, tiny_cache, config=cfg)
    fires = (sae.encode(tiny_cache.rows(HOOK, tiny_cache.indices("test"))) != 0).tolist()
    windows = [fires[at : at + 20] for at in range(0, len(fires) - 19, 20)]
    counts = [[sum(row[i] for row in window) for i in range(24)] for window in windows]
    total = [sum(row[i] for row in fires) for i in range(24)]
    expected = {}
    for least in (1, 3):
        dead = [sum(c < least for c in count) / 24 for count in counts]
        expected[f"dead_share_lt{least}_in_20"] = math.fsum(dead) / len(dead)
        expected[f"dead_share_lt{least}_in_{len(fires)}"] = sum(c < least for c in total) / 24
        ends = list(zip(counts[0], counts[-1], strict=True))
        for name, is_so in (
            ("dying", [a >= least > b for a, b in ends]),
            ("waking", [a < least <= b for a, b in ends]),
        ):
            expected[f"{name}_share_lt{least}_in_20"] = sum(is_so) / 24
    assert all(value for name, value in expected.items() if name.endswith("_20"))
    # The first record is of the start, and has no rows.
    fired, since, replanted = (held[k][1:].tolist() for k in ("fired", "since", "replanted"))
    rows = held["rows"][1:].tolist()
    expected |= {
        "life_dead_share_lt1_in_500": sum(rest >= 500 for rest in since[-1]) / 24,
        f"life_dead_share_lt1_in_{rows[-1]}": sum(c == 0 for c in fired[-1]) / 24,
        "life_dying_share": sum(a > 0 == b for a, b in zip(fired[0], fired[-1], strict=True)) / 24,
        "life_replanted_share": sum(any(w[i] for w in replanted) for i in range(24)) / 24,
    }
    agree(result, expected)
    assert result.metrics["life_dead_share_lt1_in_500"].n == sum(rows)
    assert result.arrays["life_step"].tolist() == held["step"][1:].tolist()
    shares = [sum(c > 0 for c in window) / 24 for window in fired]
    assert result.arrays["life_fired_share"].tolist() == pytest.approx(shares)
    assert FiringConfig.from_dict(result.config) == cfg


def test_the_run_of_another_sae_is_refused(
    run: Path, random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    with pytest.raises(CheckpointError, match="holds another SAE than the one evaluated"):
        firing(random_sae, tiny_cache, run_folder=run)


def test_a_run_without_records_or_with_damaged_ones_is_refused(run: Path, tmp_path: Path) -> None:
    sae = checkpoint.load(run)
    checkpoint.save(sae, tmp_path)
    with pytest.raises(CheckpointError, match="training writes one unless life_windows=0"):
        Life.read(tmp_path, sae)
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=f"{FILE} cannot be read"):
        Life.read(tmp_path, sae)


def test_lives_worked_by_hand(run: Path, tmp_path: Path) -> None:
    """Of 24 latents: 0 dies at once, 1 later, 2 wakes."""
    sae = checkpoint.load(run)
    checkpoint.save(sae, tmp_path)
    fired = torch.ones(3, 24, dtype=torch.long)
    fired[0] = fired[1:, 0] = fired[2, 1] = fired[1, 2] = 0
    since = torch.where(fired > 0, 0, 400).long()
    since[2, 0] = 800
    save_file(
        {
            "step": torch.tensor([0, 10, 20]),
            "rows": torch.tensor([0, 400, 400]),
            "fired": fired,
            "since": since,
            "replanted": torch.zeros(3, 24, dtype=torch.bool),
        },
        tmp_path / FILE,
    )
    life = Life.read(tmp_path, sae)
    assert life.step.tolist() == [10, 20]
    assert life.fired_share.tolist() == [22 / 24, 22 / 24]
    assert life.dead_share.tolist() == [0, 1 / 24]
    assert life.dying.nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("variance", ["fixed", "learned", "none"])
def test_a_variational_sae_shows_its_posterior_as_far_as_export_kept_it(
    variance: str, run: Path, tiny_cache: ActivationCache, agree: Agree
) -> None:
    sae = checkpoint.load(run)
    assert sae.provenance is not None and sae.provenance.config["variance"] == "fixed"
    changed = {**sae.provenance.config, "variance": variance}
    sae = dataclasses.replace(sae, provenance=dataclasses.replace(sae.provenance, config=changed))
    result = firing(sae, tiny_cache, epsilon=0.05, delta=0.1)
    if variance == "none":
        assert not [name for name in result.metrics if "posterior" in name]
        return
    x = tiny_cache.rows(HOOK, tiny_cache.indices("test"))
    scale = 4 / tiny_cache.stats(HOOK).mean_norm
    mean = (x @ sae.W_enc + sae.b_enc).relu().double() * scale
    kl, n = mean.square() / 2, len(x)
    below = [sum(row[i] < 0.05 for row in kl.tolist()) / n for i in range(24)]
    columns = mean.T.tolist()
    centres = [math.fsum(column) / n for column in columns]
    variances = [
        math.fsum((v - centre) ** 2 for v in column) / n
        for column, centre in zip(columns, centres, strict=True)
    ]
    expected = {
        "posterior_kl": math.fsum(kl.flatten().tolist()) / n,
        "posterior_collapsed_share": sum(share >= 0.9 for share in below) / 24,
        "posterior_active_units_share": sum(v > 0.01 for v in variances) / 24,
    }
    agree(result, expected)
    low, high = result.metrics["posterior_kl"].interval or (0.0, 0.0)
    assert low < expected["posterior_kl"] < high
    assert result.arrays["posterior_kl"].tolist() == pytest.approx(kl.mean(0).tolist(), rel=1e-4)
    bound = "a lower bound" in result.metrics["posterior_kl"].definition
    assert bound == (variance == "learned")


def test_counts_of_a_code_agree_with_those_of_core() -> None:
    z = sparse(30, 9)
    window = counted(z, 30, (1,), 4)
    assert window.dead_share(1) == Firing.of(code_of(z), 9).dead_share


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"windows": (0,)}, r"windows=\(0,\) are counts of rows"),
        ({"rules": ()}, r"rules=\(\) leaves nothing"),
        ({"rules": (0,)}, r"rules=\(0,\) are counts"),
        ({"dense": (1.0,)}, r"dense=\(1.0,\) are shares"),
        ({"bins": 0}, "bins=0 must be at least 1"),
        ({"n_bootstrap": -1}, "n_bootstrap=-1 must not be negative"),
        ({"epsilon": 0.0}, "epsilon=0.0 must be above 0"),
    ],
)
def test_bad_values_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FiringConfig(**config)
