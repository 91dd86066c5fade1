"""The fused step by two processes, in Triton's interpreter: latents shared out, or rows."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from saekit import checkpoint

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("_mesh_ranks.py")
CASES = list(runpy.run_path(str(SCRIPT), run_name="_mesh_ranks")["CASES"])

# The same sums in another order, float32, over three steps of Adam, which divides by small numbers.
NEAR = 2e-5
# One rounding of a pre-activation or an error to bfloat16, and what a step of Adam makes of it.
NEAR_LOW = 2e-2


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, start_ranks: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("mesh")
    ranks = start_ranks(2, SCRIPT, OUT=str(folder), HERE=str(SCRIPT.parent))
    assert ranks.wait(300) == [0, 0]
    return folder


@pytest.mark.parametrize("mesh", ["1x2", "2x1"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_that_one_takes(case: str, mesh: str, found: Path) -> None:
    ours, theirs = load_file(found / f"{mesh}-{case}"), load_file(found / f"alone-{case}")
    limit = NEAR_LOW if case == "split" else NEAR
    for name, wanted in theirs.items():
        if wanted.is_floating_point():
            assert apart(ours[name], wanted) <= limit, name
        else:
            assert ours[name].equal(wanted), name
    assert (theirs["auxk-2"] > 0) == (case == "revived")


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Relative to the largest entry."""
    most = float(theirs.double().abs().max())
    return float((ours.double() - theirs.double()).abs().max()) / (most or 1.0)


def test_a_run_goes_on_where_others_share_it_out(found: Path) -> None:
    """Two processes share the rows for two steps, then the latents for three."""
    ours, theirs = (checkpoint.load(found / f"run-{who}").tensors() for who in ("mesh", "alone"))
    for name, wanted in theirs.items():
        assert apart(ours[name], wanted) <= NEAR_LOW, name
    lines = [
        [
            json.loads(line)
            for line in (found / f"run-{who}" / "metrics.jsonl").read_text().splitlines()
        ]
        for who in ("mesh", "alone")
    ]
    for one, other in zip(*lines, strict=True):
        assert one.keys() == other.keys()
        for key in ("l0", "dead", "step"):
            assert one[key] == other[key]
        assert one["mse"] == pytest.approx(other["mse"], rel=NEAR_LOW)


def test_a_step_was_taken(found: Path) -> None:
    """Or all would be alike."""
    plain, clipped = (load_file(found / f"alone-{case}")["W_dec"] for case in ("plain", "clipped"))
    assert apart(plain, clipped) > 100 * NEAR
    torch.testing.assert_close(plain.norm(dim=1), torch.ones(len(plain)))
