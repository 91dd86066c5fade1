import logging
import os
import sys

import pytest
import torch

from saekit import kernels
from saekit.errors import ConfigError
from saekit.kernels import KernelUnavailable, _choose, choose

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAEKIT_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _choose._choose.cache_clear()
    _choose._tell.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of a GPU, and a Triton that can be imported: no kernel is run."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(_choose, "triton_backend", lambda: sys)
    monkeypatch.setattr(_choose, "self_test", lambda _: {})


def test_on_a_cpu_pytorch_operators_are_taken_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        assert choose(CPU).backend == "eager"
        choose(CPU, torch.bfloat16, 768)
    assert [record.message for record in caplog.records] == [
        "kernels on cpu: eager (Triton is for GPUs, and this is cpu)"
    ]


def test_the_interpreter_alone_does_not_make_a_cpu_take_triton(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(CPU).backend == "eager"


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_triton_is_taken() -> None:
    assert choose(CUDA) == kernels.Choice("triton", "NVIDIA H200")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("dtype", "width", "why"),
    [
        (torch.float64, 1, "the tensors are torch.float64, and its kernels take float32"),
        (torch.float32, 20_000, "rows are 20000 wide, and its kernels hold up to 16384"),
    ],
)
def test_what_triton_cannot_serve_falls_back_loudly_unless_forced(
    dtype: torch.dtype,
    width: int,
    why: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choice = choose(CUDA, dtype, width)
    assert choice.backend == "eager"
    assert why in choice.why
    assert caplog.records[0].levelno == logging.WARNING
    monkeypatch.setenv("SAEKIT_KERNELS", "triton")
    with pytest.raises(KernelUnavailable, match=f"{why}.*set SAEKIT_KERNELS=auto"):
        choose(CUDA, dtype, width)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    choice = choose(CUDA)
    assert choice.backend == "eager"
    assert choice.why == "Tesla T4 has compute capability 7.5, and the kernels need 8.0"


@pytest.mark.usefixtures("gpu")
def test_a_triton_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(_choose, "triton_backend", absent)
    assert "pip install triton" in choose(CUDA).why


@pytest.mark.usefixtures("gpu")
def test_kernels_that_are_off_are_named_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_choose, "self_test", lambda _: {"topk": "it differs by 0.1"})
    assert choose(CUDA).backend == "eager"
    assert "on NVIDIA H200 Triton kernels are off (topk: it differs by 0.1)" in caplog.text
    monkeypatch.setenv("SAEKIT_KERNELS", "triton")
    with pytest.raises(KernelUnavailable, match="topk: it differs by 0.1.*delete it to try again"):
        choose(CUDA)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_a_forced_backend_is_taken(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEKIT_KERNELS", backend)
    assert choose(CPU).backend == backend
    values, _ = kernels.topk_encode(torch.ones(2, 3), torch.ones(3, 4), torch.zeros(4), 2)
    assert values.tolist() == [[3, 3]] * 2
    assert kernels.batch_topk(torch.arange(6.0).view(2, 3), 4)[1].tolist() == [0, 1, 4]
    assert kernels.column_topk(torch.ones(2, 3), torch.ones(3).long())[1].tolist() == [0, 3, 3]


def test_triton_forced_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEKIT_KERNELS", "triton")
    with pytest.raises(KernelUnavailable, match="the tensors are on cpu and Triton needs a GPU"):
        kernels.sparse_decode(torch.ones(1, 1), torch.zeros(1, 1).long(), torch.ones(2, 3))


def test_an_unknown_form_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEKIT_KERNELS", "tritton")
    with pytest.raises(ConfigError, match="did you mean 'triton'"):
        choose(CPU)


def test_nothing_is_decided_at_import() -> None:
    assert "SAEKIT_KERNELS" not in os.environ
    assert _choose._choose.cache_info().currsize == 0
