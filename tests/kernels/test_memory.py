import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from saekit.errors import SaekitError
from saekit.kernels import memory

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gpu = SimpleNamespace(name="NVIDIA H200", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(memory, "version", lambda _: "3.6.0")
    memory.key.cache_clear()


def test_what_was_found_out_is_recalled_on_the_same_gpu_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert memory.recall(GPU, "self-test") is None
    memory.remember(GPU, "self-test", {})
    memory.remember(GPU, "768", {"group": 32})
    assert memory.recall(GPU, "self-test") == {}
    assert memory.recall(GPU, "768") == {"group": 32}
    monkeypatch.setattr(memory, "version", lambda _: "3.7.0")
    memory.key.cache_clear()
    assert memory.recall(GPU, "self-test") is None


def test_a_file_that_cannot_be_read_is_said_and_written_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory.path().parent.mkdir(parents=True)
    memory.path().write_text("{")
    with caplog.at_level(logging.WARNING):
        assert memory.recall(GPU, "self-test") is None
    assert "cannot be read" in caplog.text
    memory.remember(GPU, "self-test", {})
    assert memory.recall(GPU, "self-test") == {}


def test_a_full_disk_costs_no_more_than_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise SaekitError("the disk is full")

    monkeypatch.setattr(memory, "write_json", full)
    with caplog.at_level(logging.WARNING):
        memory.remember(GPU, "self-test", {})
    assert "the disk is full" in caplog.text


def test_a_folder_that_cannot_be_written_to_costs_no_more_than_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        memory.remember(GPU, "self-test", {})
    assert "cannot be written" in caplog.text
