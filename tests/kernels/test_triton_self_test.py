import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saekit.kernels import _choose, memory

DEVICE = runpy.run_path(str(Path(__file__).with_name("_interpret.py")))["DEVICE"]
self_test = pytest.importorskip("saekit.kernels.triton_self_test")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter does in seconds."""
    if DEVICE == "cpu":
        for name, size in {"BATCH": 9, "D_IN": 10, "D_SAE": 60, "K": 3}.items():
            monkeypatch.setattr(self_test, name, size)


def test_every_kernel_passes() -> None:
    assert self_test.failures(torch.device(DEVICE)) == {}


def test_a_kernel_that_is_off_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = self_test.triton_backend.weighted_rows

    def off(*args: object) -> Tensor:
        rows: Tensor = sound(*args)
        return 1.01 * rows

    def broken(*_: object) -> Tensor:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(self_test.triton_backend, "weighted_rows", off)
    monkeypatch.setattr(self_test.triton_backend, "topk", broken)
    found = self_test.failures(torch.device(DEVICE))
    assert found == {
        "topk": "RuntimeError: no such instruction",
        "weighted_rows": "it differs from its definition by 1.0e-02 (at most 1e-04)",
    }


@pytest.mark.gpu
def test_a_gpu_is_tried_out_once_and_then_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gpu = torch.device("cuda", 0)
    _choose.self_test.cache_clear()
    assert _choose.self_test(gpu) == {}
    assert memory.recall(gpu, "self-test") == {}
    _choose.self_test.cache_clear()
    monkeypatch.setattr(self_test, "failures", None)
    assert _choose.triton_obstacle(gpu, torch.float32, 768) == ""
