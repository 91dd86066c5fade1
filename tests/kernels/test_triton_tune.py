import runpy
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from saekit.kernels import memory

DEVICE = runpy.run_path(str(Path(__file__).with_name("_interpret.py")))["DEVICE"]
triton_tune = pytest.importorskip("saekit.kernels.triton_tune")


def test_what_was_found_for_a_shape_is_used_for_that_shape_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    best = triton_tune.step_config(768, 24_576, 32)
    found = {triton_tune._name(768, 24_576, 32, torch.float32): asdict(best)}
    monkeypatch.setattr(memory, "recall", lambda _, what: found.get(what))
    gpu = torch.device("cuda", 0)
    assert triton_tune.tuned(gpu, 768, 24_576, 32) == best
    assert triton_tune.tuned(gpu, 768, 24_576, 64) is None
    assert triton_tune.tuned(torch.device("cpu"), 768, 24_576, 32) is None


def test_without_memory_the_usual_configuration_is_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = {}

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(triton_tune, "_best", full)
    monkeypatch.setattr(memory, "remember", lambda _, what, found: kept.update({what: found}))
    usual = triton_tune.step_config(768, 24_576, 32)
    gpu = torch.device("cuda", 0)
    assert triton_tune.tune(gpu, 768, 24_576, 32, torch.float32, 8_192, True) == usual
    assert list(kept.values()) == [asdict(usual)]
    assert "no memory" in caplog.text


@pytest.mark.gpu
def test_the_quickest_candidates_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gpu = torch.device("cuda", 0)
    best = triton_tune.tune(gpu, 256, 8_192, 16, torch.float32, 1_024, True)
    assert triton_tune.tuned(gpu, 256, 8_192, 16) == best
    assert best in [
        type(best)(select.select, decode.decode, row.row, best.heavy)
        for select in triton_tune.step_candidates(256, 8_192, 16)
        for decode in triton_tune.step_candidates(256, 8_192, 16)
        for row in triton_tune.step_candidates(256, 8_192, 16)
    ]
