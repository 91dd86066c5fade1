"""Evaluations by three processes, which look at a part of the rows each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saekit import ActivationCache, checkpoint, evaluate, matching
from saekit.evals import _kinds, _splice
from saekit.results import EvalResult
from saekit.sae import SAE, TopK

SCRIPT = Path(__file__).with_name("_ranks.py")
HOOK = "resid_post.0"
PRELOAD = ("saekit.evals.core", "saekit.evals.geometry", "saekit.activations_cache.model_language")
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "core": ("core", {"n_bootstrap": 20, "batch_size": 32, "ce_tokens": 150}),
    # Fewer batches than processes.
    "core of one batch": ("core", {"n_bootstrap": 0, "max_rows": 30, "ce_tokens": 0}),
    # Windows within a process's share, across two of them and across all.
    "firing": (
        "firing",
        {"n_bootstrap": 20, "batch_size": 16, "windows": (3, 16, 25, 32, 70, 100), "rules": (1, 3)},
    ),
    "firing of one batch": ("firing", {"n_bootstrap": 0, "max_rows": 30, "windows": (7,)}),
    "geometry": ("geometry", {"batch_size": 16, "covariance_rows": 40, "max_latents": 20}),
    "geometry of all rows": ("geometry", {"batch_size": 16, "covariance_rows": 5000}),
    "geometry without covariance": ("geometry", {"batch_size": 16, "covariance_rows": 0}),
}

LOGITS = 1 << 12
"""So that the model reads its windows in many batches."""
COSINES = 100
"""So that latents are compared in many blocks, a few for each process."""

# Sums in float64, added up in another order; of geometry, random rows that are drawn with a
# covariance in which the sums differ by that, and are then rounded to float32.
TOLERANCE = {"core": 1e-12, "firing": 1e-12, "geometry": 1e-6}


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_cache: ActivationCache,
    start_ranks: Callable[..., Any],
) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    checkpoint.save(some_sae(), folder / "sae")
    given = {
        "SAE": str(folder / "sae"),
        "CACHE": tiny_cache.location,
        "HOOK": HOOK,
        "CONFIGS": CONFIGS,
        "OUT": str(folder),
        "LOGITS": LOGITS,
        "COSINES": COSINES,
    }
    assert start_ranks(3, SCRIPT, PRELOAD, **given).wait() == [0, 0, 0]
    return folder


def some_sae() -> SAE:
    W = torch.randn(24, 16, generator=torch.Generator().manual_seed(3))
    return SAE(W.T.contiguous() / 4, torch.zeros(24), W / 4, torch.zeros(16), TopK(4))


@pytest.mark.parametrize("name", CONFIGS)
def test_several_processes_find_the_numbers_that_one_finds(
    name: str, found: Path, tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_splice, "_LOGITS_AT_ONCE", LOGITS)
    monkeypatch.setattr(matching, "_COSINES_AT_ONCE", COSINES)
    sae = checkpoint.load(found / "sae")
    kind, options = CONFIGS[name]
    config = _kinds.find(kind).Config(**options)
    alone = evaluate(kind, sae, tiny_cache, hook=HOOK, config=config)
    ours = EvalResult.load(found / name, kind)
    assert ours.metrics.keys() == alone.metrics.keys()
    assert len(alone.metrics) > 8
    for key, metric in alone.metrics.items():
        assert ours.metrics[key].n == metric.n, key
        assert ours.metrics[key].value == pytest.approx(metric.value, rel=TOLERANCE[kind]), key
        if metric.interval is not None:
            assert ours.metrics[key].interval == pytest.approx(metric.interval, rel=1e-9), key
    assert ours.arrays.keys() == alone.arrays.keys()
    for key, array in alone.arrays.items():
        np.testing.assert_allclose(ours.arrays[key], array, rtol=1e-9, err_msg=key)


@pytest.mark.parametrize("name", ["ground_truth", "attention"])
def test_an_evaluation_that_cannot_be_shared_is_refused_by_name(name: str, found: Path) -> None:
    """Attention is built on core, and looks at the rows once more, all of them."""
    for rank in range(3):
        said = (found / f"refused-{name}-{rank}").read_text()
        assert f"evaluation '{name}' runs in one process, and there are 3" in said
        assert said.endswith("Several can share the rows of: core, examples, firing, geometry")
