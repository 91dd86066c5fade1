import math

import numpy as np
import pytest
import torch
from torch import Tensor

from saekit.evals._resample import FEW, Estimate, Explained, Resamples, Scatter, few, widening
from saekit.seeds import stream

DOCUMENT = torch.tensor([3, 3, 5, 5, 5, 9, 12, 12])


def targets(q: int = 2) -> tuple[Tensor, Tensor]:
    y = torch.randn(len(DOCUMENT), q, dtype=torch.float64)
    return y, y + 0.3 * torch.randn_like(y)


def drawn(n_bootstrap: int, seed: int) -> list[list[int]]:
    """The rows of each resample, the sample first: whole documents, one after another."""
    generator = stream("bootstrap", seed)
    names = [3, 5, 9, 12]
    rows = {name: [i for i, d in enumerate(DOCUMENT.tolist()) if d == name] for name in names}
    samples = [list(range(len(DOCUMENT)))]
    for _ in range(n_bootstrap):
        picks = torch.randint(4, (4,), generator=generator).tolist()
        samples.append([row for pick in picks for row in rows[names[pick]]])
    return samples


def test_sums_are_those_of_the_drawn_documents_one_after_another() -> None:
    y, _ = targets()
    resamples = Resamples.of(DOCUMENT, 25, seed=4)
    sums = resamples.sums(y, DOCUMENT)
    assert sums.shape == (26, 2)
    for found, rows in zip(sums, drawn(25, 4), strict=True):
        torch.testing.assert_close(found, y[rows].sum(0))
    torch.testing.assert_close(
        resamples.sums(y[:3], DOCUMENT[:3]) + resamples.sums(y[3:], DOCUMENT[3:]), sums
    )
    assert torch.equal(resamples.sample.sums(y, DOCUMENT), sums[:1])


def test_r2_of_each_resample_agrees_with_a_loop_over_its_rows() -> None:
    """About the mean of the sample, in every resample."""
    y, y_hat = targets()
    resamples = Resamples.of(DOCUMENT, 25, seed=1)
    pilot = torch.tensor([0.5, -3.0]).double()
    parts = [
        Explained.of(resamples, y[rows], y_hat[rows], DOCUMENT[rows], pilot)
        for rows in (slice(0, 4), slice(4, 8))
    ]
    found = parts[0] + parts[1]
    mean = [sum(y[:, j].tolist()) / len(y) for j in range(2)]
    for i, rows in enumerate(drawn(25, 1)):
        total, left = [0.0, 0.0], [0.0, 0.0]
        for row in rows:
            for j in range(2):
                total[j] += (float(y[row, j]) - mean[j]) ** 2
                left[j] += float(y[row, j] - y_hat[row, j]) ** 2
        uniform = sum(1 - a / b for a, b in zip(left, total, strict=True)) / 2
        assert float(found.uniform[i]) == pytest.approx(uniform, rel=1e-9)
        assert float(found.pooled[i]) == pytest.approx(1 - sum(left) / sum(total), rel=1e-9)
        assert float(found[1:].pooled[i]) == pytest.approx(1 - left[1] / total[1], rel=1e-9)


def test_a_dimension_that_does_not_vary_is_left_out_of_the_mean_over_dimensions() -> None:
    y, y_hat = targets(3)
    y[:, 1] = 0.1
    resamples, pilot = Resamples.of(DOCUMENT, 0, 0), torch.zeros(3).double()
    found = Explained.of(resamples, y, y_hat, DOCUMENT, pilot)
    alone = Explained.of(resamples, y[:, ::2], y_hat[:, ::2], DOCUMENT, pilot[:2])
    assert float(found.uniform) == pytest.approx(float(alone.uniform), rel=1e-12)
    assert Estimate.of(found[1:2].uniform) is None
    assert Estimate.of(found[1:2].pooled) is None


@pytest.mark.parametrize("pilot", [0.1, 5.0, 0.0])
def test_rows_that_are_all_the_same_have_no_scatter_whatever_the_pilot(pilot: float) -> None:
    y = torch.full((8, 1), 0.1).double()
    resamples = Resamples.of(DOCUMENT, 3, 0)
    scatter = Scatter.of(resamples, y, DOCUMENT, torch.tensor([pilot]).double())
    assert scatter.total.isnan().all()


def test_the_interval_is_of_percentiles_of_the_resamples() -> None:
    values = torch.randn(41, dtype=torch.float64)
    found = Estimate.of(values)
    assert found is not None and found.interval is not None
    assert found.value == float(values[0])
    assert found.interval == pytest.approx(np.quantile(values[1:].numpy(), [0.025, 0.975]))


@pytest.mark.parametrize(
    ("units", "t"), [(2, 12.706), (3, 4.303), (4, 3.182), (6, 2.571), (11, 2.228), (29, 2.048)]
)
def test_an_interval_of_few_documents_is_widened_as_a_t_distribution_is(
    units: int, t: float
) -> None:
    wider = t / 1.96 * math.sqrt(units / (units - 1))
    assert widening(units) == pytest.approx(wider, rel=0.01)
    values = torch.randn(41, dtype=torch.float64)
    plain, found = Estimate.of(values), Estimate.of(values, units)
    assert plain is not None and plain.interval is not None
    assert found is not None and found.interval is not None
    for side in (0, 1):
        apart = (found.interval[side] - found.value) / (plain.interval[side] - plain.value)
        assert apart == pytest.approx(wider, rel=0.01)
    assert f"of {units} documents alone, too few to rest a claim on" in few(units)


@pytest.mark.parametrize("units", [1, FEW, 400])
def test_an_interval_of_enough_documents_is_left_as_it_is(units: int) -> None:
    values = torch.randn(41, dtype=torch.float64)
    assert Estimate.of(values, units) == Estimate.of(values)
    assert few(units) == ""


@pytest.mark.parametrize("n", [4, 12])
def test_of_few_documents_the_interval_still_covers_the_truth(n: int) -> None:
    generator = torch.Generator().manual_seed(1)
    hits = {"plain": 0, "widened": 0}
    for seed in range(300):
        y = torch.randn(n, generator=generator).double()[:, None]
        resamples = Resamples.of(torch.arange(n), 200, seed)
        means = resamples.sums(y, torch.arange(n))[:, 0] / n
        for name, units in (("plain", None), ("widened", n)):
            found = Estimate.of(means, units)
            assert found is not None and found.interval is not None
            hits[name] += found.interval[0] <= 0 <= found.interval[1]
    assert hits["plain"] < 278 and 275 <= hits["widened"] <= 297, hits


def test_a_number_that_some_resample_leaves_undefined_has_no_interval() -> None:
    assert Estimate.of(torch.tensor([0.5, 0.4, math.nan]).double()) == Estimate(0.5, None)
    assert Estimate.of(torch.tensor([0.5]).double()) == Estimate(0.5, None)
    assert Estimate.of(torch.tensor([math.nan, 0.4]).double()) is None


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Rows of a document share an offset, so that an interval over rows would be far too narrow."""
    hits = 0
    generator = torch.Generator().manual_seed(0)
    document = torch.arange(40).repeat_interleave(10)
    for seed in range(100):
        offset = torch.randn(40, 1, generator=generator)[document]
        y = (offset + 0.1 * torch.randn(400, 1, generator=generator)).double()
        resamples = Resamples.of(document, 200, seed)
        sums = resamples.sums(torch.cat([y, torch.ones_like(y)], 1), document)
        found = Estimate.of(sums[:, 0] / sums[:, 1])
        assert found is not None and found.interval is not None
        hits += found.interval[0] <= 0 <= found.interval[1]
    assert 88 <= hits <= 99
