"""Variants of explained variance, and what numbers are in a resample of the documents."""

import pytest
import torch

from saekit.evals._core_rows import CoreRows
from saekit.evals._resample import Resamples
from saekit.sae import SparseCode

X = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 10.0]])
X_HAT = torch.tensor([[1.0, 1.0], [3.0, 5.0], [4.0, 6.0], [8.0, 9.0]])


def rows(
    x: torch.Tensor, x_hat: torch.Tensor, document: torch.Tensor, n_bootstrap: int
) -> tuple[CoreRows, Resamples]:
    n = len(x)
    values = torch.arange(2.0 * n).view(n, 2) - 1
    code = SparseCode(values, torch.tensor([[0, 1]]).expand(n, 2))
    resamples = Resamples.of(document, n_bootstrap, seed=0)
    norm = torch.tensor([1.0, 0.5])
    centre = x.double().mean(0)
    whole = CoreRows.of(resamples, x, x_hat, code, norm, document, centre)
    parts = [
        CoreRows.of(
            resamples,
            x[i : i + 3],
            x_hat[i : i + 3],
            SparseCode(values[i : i + 3], code.indices[i : i + 3]),
            norm,
            document[i : i + 3],
            centre,
        )
        for i in range(0, n, 3)
    ]
    joined = sum(parts[1:], start=parts[0])
    for name, found in whole.found().items():
        torch.testing.assert_close(joined.found()[name], found, equal_nan=True, msg=name)
    return joined, resamples


def test_the_variants_of_explained_variance_are_told_apart() -> None:
    found = {name: float(v[0]) for name, v in rows(X, X_HAT, torch.arange(4), 0)[0].found().items()}
    assert found == pytest.approx(
        {
            "ev": 50 / 55,
            "fvu": 5 / 55,
            "ev_dimension_mean": 0.907143,
            "ev_token_mean": 0.694218,
            "ev_uncentred": 0.979167,
            "ev_centred_error": 0.913636,
            "ev_scalar_mean": 0.915966,
            "mse": 1.25,
            "cosine": 0.982743,
            "l2_ratio": 0.927105,
            "relative_reconstruction_bias": 0.995726,
            "gain": 1.004292,
            # Values -1 to 6, of which one is 0; decoder rows of norm 1 and 1/2.
            "l0_mean": 7 / 4,
            "l1_mean": (1 + 1 + 3 + 5 + (0 + 2 + 4 + 6) / 2) / 4,
        },
        abs=1e-6,
    )


def test_a_resample_is_its_documents_as_often_as_it_has_them() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 3, generator=generator) + torch.tensor([0.0, 5.0, -2.0])
    x_hat = x + 0.3 * torch.randn(20, 3, generator=generator)
    document = torch.tensor([4, 4, 7, 9, 9, 9, 4, 7, 11, 11] * 2)
    found, resamples = rows(x, x_hat, document, 5)
    assert resamples.documents.tolist() == [4, 7, 9, 11]
    for sample, weights in enumerate(resamples.weights.tolist()):
        times = dict(zip(resamples.documents.tolist(), weights, strict=True))
        drawn = [i for i in range(20) for _ in range(times[int(document[i])])]
        a, b = x[drawn].double(), x_hat[drawn].double()
        # The mean stays the sample's.
        scatter = (a - x.double().mean(0)).square().sum()
        wanted = {
            "ev": 1 - (a - b).square().sum() / scatter,
            "mse": (a - b).square().sum(1).mean(),
            "cosine": torch.cosine_similarity(a, b, dim=1).mean(),
            "l2_ratio": (b.norm(dim=1) / a.norm(dim=1)).mean(),
            "gain": (a * b).sum() / b.square().sum(),
        }
        for name, value in wanted.items():
            assert float(found.found()[name][sample]) == pytest.approx(float(value), rel=1e-9)


def test_a_row_at_the_centre_and_a_row_of_zeros_give_no_nan() -> None:
    x = torch.tensor([[1.0, 1.0], [0.0, 0.0], [2.0, 2.0]])
    found = rows(x, torch.zeros(3, 2), torch.arange(3), 0)[0].found()
    assert found["gain"].isnan() and found["relative_reconstruction_bias"].isnan()
    assert found["cosine"] == 0 and found["l2_ratio"] == 0
    assert found["ev_token_mean"].isfinite()


def test_a_constant_error_is_none_once_it_is_centred() -> None:
    found = rows(X, X - torch.tensor([0.5, -1.0]), torch.arange(4), 3)[0].found()
    assert found["ev_centred_error"].tolist() == [1, 1, 1, 1]
    assert found["ev"][0] < 0.92
