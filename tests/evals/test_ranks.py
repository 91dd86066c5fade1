"""The core row by two processes, which look at half of the rows each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saekit import ActivationCache, checkpoint, evaluate
from saekit.evals import _splice
from saekit.evals.core import CoreConfig
from saekit.results import EvalResult
from saekit.sae import SAE, TopK

SCRIPT = Path(__file__).with_name("_ranks.py")
HOOK = "resid_post.0"
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"n_bootstrap": 20, "batch_size": 32, "ce_tokens": 150},
    # Fewer batches than processes.
    "one batch": {"n_bootstrap": 0, "max_rows": 30, "ce_tokens": 0},
}

LOGITS = 1 << 12
"""So that the model reads its windows in many batches."""

# Sums in float64, added up in another order.
TOLERANCE = 1e-12


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
    }
    assert start_ranks(2, SCRIPT, **given).wait() == [0, 0]
    return folder


def some_sae() -> SAE:
    W = torch.randn(24, 16, generator=torch.Generator().manual_seed(3))
    return SAE(W.T.contiguous() / 4, torch.zeros(24), W / 4, torch.zeros(16), TopK(4))


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_find_the_numbers_that_one_finds(
    name: str, found: Path, tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_splice, "_LOGITS_AT_ONCE", LOGITS)
    sae = checkpoint.load(found / "sae")
    config = CoreConfig(**CONFIGS[name])
    alone = evaluate("core", sae, tiny_cache, hook=HOOK, config=config)
    ours = EvalResult.load(found / name, "core")
    assert ours.metrics.keys() == alone.metrics.keys()
    for key, metric in alone.metrics.items():
        assert ours.metrics[key].n == metric.n, key
        assert ours.metrics[key].value == pytest.approx(metric.value, rel=TOLERANCE), key
        if metric.interval is not None:
            assert ours.metrics[key].interval == pytest.approx(metric.interval, rel=1e-9), key
    assert ours.arrays["density"].tolist() == alone.arrays["density"].tolist()


@pytest.mark.parametrize("name", ["geometry", "attention"])
def test_an_evaluation_that_cannot_be_shared_is_refused_by_name(name: str, found: Path) -> None:
    """Attention is built on core, and looks at the rows once more, all of them."""
    for rank in range(2):
        said = (found / f"refused-{name}-{rank}").read_text()
        assert f"evaluation '{name}' runs in one process, and there are 2" in said
        assert said.endswith("Several can share the rows of: core, examples")
