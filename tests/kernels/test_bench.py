import importlib.metadata
import runpy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saekit import kernels
from saekit.kernels import bench, bench_peers
from saekit.kernels.bench_ops import check_ops, ops
from saekit.kernels.bench_setting import PLAIN, SHAPES, Mistaken, Setting, Shape
from saekit.kernels.bench_steps import (
    BATCH_TOPK,
    TOPK,
    PlainStep,
    as_trained,
    check_step,
    check_steps,
    impls,
    timed_step,
)

DEVICE = runpy.run_path(str(Path(__file__).with_name("_interpret.py")))["DEVICE"]

SMALL = Shape(6, 24, 3)


@pytest.fixture
def setting() -> Setting:
    return Setting(
        shape=SMALL, batch_size=8, device=torch.device("cpu"), rounds=2, warm_ups=0, name="tiny"
    )


@pytest.mark.parametrize("op", [TOPK, BATCH_TOPK])
def test_a_fused_step_is_checked_and_timed(
    op: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton_step = pytest.importorskip("saekit.kernels.triton_step")
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_step, "_RESIDUAL_PARTS", 3)
        monkeypatch.setattr(triton_step, "_ENCODER_PARTS", 2)
        monkeypatch.setattr(
            triton_step, "row_config", lambda *_, **__: triton_step.RowConfig(1, 2, 2)
        )
    monkeypatch.setenv("SAEKIT_KERNELS", "triton")
    # So few latents and rows are no match for bfloat16.
    monkeypatch.setattr(kernels, "usual_precision", lambda _: "float32")
    setting = replace(setting, device=torch.device(DEVICE))
    assert impls(setting) == [PLAIN, "triton ops", "fused"]
    options = as_trained(setting)
    line = check_step(setting, op, "fused", options)
    assert line["check"]["loss"] < 1e-2 and line["options"]["deterministic"]
    make = partial(timed_step, setting, op, "fused", **options)
    line = setting.measure(op, "fused", make, "as trained")
    assert line["ms"] > 0 and line["rounds"] == 2 and line["loss"] > 0
    assert line["shape"] == "tiny" and "ratio" not in line


@pytest.mark.gpu
def test_all_that_is_timed_on_a_gpu_is_right_in_bfloat16() -> None:
    setting = Setting(shape=SHAPES["S"], batch_size=8_192, device=torch.device("cuda"))
    assert impls(setting)[-1] == "fused" and setting.precision == "bfloat16"
    check_ops(setting)
    check_steps(setting)


@pytest.mark.parametrize("form", ["reference", "eager"])
@pytest.mark.parametrize("op", [TOPK, BATCH_TOPK])
def test_a_step_by_ops_is_what_float64_makes_of_it(
    op: str, form: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEKIT_KERNELS", form)
    assert impls(setting) == [PLAIN, f"{form} ops"]
    for impl in impls(setting):
        assert check_step(setting, op, impl, {})["op"] == op


def test_every_op_is_timed_in_plain_torch_and_by_the_backend(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEKIT_KERNELS", "eager")
    check_ops(setting)
    lines = list(ops(setting))
    assert [line["impl"] for line in lines].count(PLAIN) == 6
    assert all(line["ratio"] == 1 for line in lines if line["impl"] == PLAIN)


def test_wrong_gradients_are_refused_before_anything_is_timed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = PlainStep._loss
    monkeypatch.setattr(PlainStep, "_loss", lambda self, x: 1.1 * right(self, x))
    with pytest.raises(Mistaken, match="plain torch, topk step .* is not what float64 makes of it"):
        next(bench.every(setting))


def test_a_wrong_op_is_refused_before_anything_is_timed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = kernels.sparse_decode
    monkeypatch.setattr(kernels, "sparse_decode", lambda *args: right(*args) * 1.01)
    with pytest.raises(Mistaken, match="not what they are defined as: off by {'decode': '1.0e-02'"):
        next(bench.every(setting))


def test_a_choice_of_other_latents_than_the_largest_is_refused(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def smallest(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
        pre = x @ W_enc + b_enc
        indices = pre.topk(k, largest=False).indices
        return pre.gather(1, indices).relu(), indices

    monkeypatch.setenv("SAEKIT_KERNELS", "eager")
    monkeypatch.setattr(kernels, "topk_encode", smallest)
    with pytest.raises(Mistaken, match="of the largest pre-activations missed"):
        check_step(setting, TOPK, "eager ops", {})


def test_what_has_no_room_is_a_line_that_says_so(setting: Setting) -> None:
    def make() -> tuple[Callable[[], object], dict[str, Any]]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nand failed")

    line = setting.measure(TOPK, "huge", make)
    assert line["ms"] is None and line["error"] == "CUDA out of memory. Tried"
    (row,) = bench.rows([line])
    assert row[:3] == ("tiny", "topk step, huge: CUDA out of memory. Tried", "-")
    assert len(row) == len(bench.COLUMNS)


def test_a_loss_that_is_no_number_is_refused(setting: Setting) -> None:
    with pytest.raises(Mistaken, match="the loss of odd, topk step, is nan"):
        setting.measure(TOPK, "odd", lambda: (lambda: None, {"loss": torch.tensor(float("nan"))}))


def test_a_peer_that_fails_is_a_line_and_the_next_is_timed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> tuple[bench_peers.Step, bench_peers.Facts]:
        raise ImportError("no module\nof that name")

    def peers(*args: Any) -> Iterator[bench_peers.Peer]:
        yield "broken", "1.0", broken
        yield "whole", "2.0", lambda: (lambda: None, {"loss": 1.0, "auxk": True})

    monkeypatch.setattr(bench_peers, "peers", peers)
    setting.plain[TOPK] = [3.0, 4.0]
    broken_line, line = bench.peer_steps(setting)
    assert broken_line["error"] == "no module" and broken_line["ms"] is None
    assert line["impl"] == "whole" and line["variant"] == "2.0" and line["auxk"] is True
    assert line["ratio"] > 1


def test_peers_that_are_not_installed_are_named_and_left_out(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nothing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    sizes = (SMALL.d_in, SMALL.d_sae, SMALL.k, setting.batch_size)
    assert list(bench_peers.peers(*sizes, setting.following)) == []
    assert list(bench_peers.pursuit(*sizes, setting.following)) == []
    left_out = ["eai-sparsify", "dictionary-learning", "sae-lens", "overcomplete"]
    assert caplog.messages == [f"{name} is not installed, and left out" for name in left_out]
