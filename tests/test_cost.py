"""The cost model of several GPUs: what it counts, and what the command says."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from saekit.cli import main
from saekit.cost import Figures, Training, quickest
from saekit.errors import ConfigError

ROOT = Path(__file__).parent.parent
SIZES: dict[str, int] = {"d_in": 2_048, "d_sae": 65_536, "k": 64, "batch_size": 8_192}


def figures(**own: float) -> Figures:
    rates: dict[str, Any] = dict.fromkeys(
        ("operations", "memory_bytes", "gathered_bytes", "near_bytes", "far_bytes"), 1e12
    )
    return Figures(
        gpu="one", **{**rates, "gpu_bytes": 1e11, "exchange_seconds": 0.0, **own}, measured=()
    )


def test_one_process_sends_nothing_and_holds_16_bytes_a_weight() -> None:
    one = Training(**SIZES)
    assert sum(one.sent().values()) == 0
    assert one.memory()["weights"] == 16 * 2 * 2_048 * 65_536
    assert one.seconds(figures())["near"] == one.seconds(figures())["far"] == 0


def test_what_is_sent_when_latents_are_shared_is_counted_by_hand() -> None:
    sent = Training(**SIZES, latent=4).sent()
    # To each of three others 64 candidates a row, in bfloat16.
    assert sent["candidates"] == 3 * 8_192 * 64 * 2
    # By a ring, each of 4 parts goes 3 steps to be added up, and 3 to be spread, in float32.
    assert sent["reconstructions"] == 6 * (8_192 * 2_048 / 4) * 4
    assert sent["weights"] == sent["codes"] == 0


def test_what_is_sent_when_rows_are_shared_is_counted_by_hand() -> None:
    one = Training(**SIZES, data=2)
    sent = one.sent()
    assert one.rows == 4_096 and one.updated == 32_768
    assert sent["codes"] == 4_096 * 64 * (2 + 4)
    assert sent["errors and rows"] == 2 * 4_096 * 2_048 * 2
    assert sent["weights"] == 2 * 32_768 * 2_048 * 2
    assert sent["candidates"] == sent["reconstructions"] == 0


def test_links_between_machines_are_taken_where_an_axis_leaves_one() -> None:
    within, across = (
        Training(**SIZES, data=2, latent=4, per_node=n).seconds(figures()) for n in (8, 4)
    )
    assert within["far"] == 0 < within["near"]
    # The latents of a machine are still near.
    assert 0 < across["near"] < within["near"] and across["far"] > 0


def test_work_is_shared_out() -> None:
    one, four = (Training(**SIZES, latent=n).seconds(figures()) for n in (1, 4))
    for part in ("product", "weights", "gathered"):
        assert four[part] == pytest.approx(one[part] / 4)


def test_the_quickest_mesh_is_one_that_fits() -> None:
    def best(gpu_bytes: float, near: float) -> Training | None:
        some = figures(gpu_bytes=gpu_bytes, near_bytes=near)
        return quickest(some, gpus=8, per_node=8, **SIZES)

    assert best(1e6, 1e12) is None
    tight = best(2.5e9, 1e12)
    assert tight is not None and sum(tight.memory().values()) <= 2.5e9
    for one in (tight, best(1e11, 1e15)):
        assert one is not None and one.data * one.latent == 8
        others = [Training(**SIZES, data=d, latent=8 // d) for d in (1, 2, 4, 8)]
        assert one in [Training(**{**SIZES}, data=o.data, latent=o.latent) for o in others]


def test_sizes_that_the_mesh_does_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="d_sae=65536 must be a multiple of data x latent=1 x 3"):
        Training(**SIZES, latent=3)


def test_the_command_says_what_a_mesh_takes(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--gpus", "8", "--nodes", "2", "--d-sae", "1048576", "--mesh", "data=2,latent=8"]
    assert main(["plan", *flags]) == 0
    said = capsys.readouterr().out
    assert "data=2,latent=8" in said and "sent a step: weights" in said and "tokens" in said
    assert main(["plan", *flags, "--gpu-gb", "1"]) == 1
    assert "does not fit into the memory of a GPU" in capsys.readouterr().err
    assert main(["plan", *flags[:-2], "--gpu-gb", "1"]) == 2
    assert "no mesh of 16 GPUs holds this in 1.0 GB each" in capsys.readouterr().err


def test_the_page_and_the_figures_are_what_the_command_makes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "table", raising=False)
    fit = runpy.run_path(str(ROOT / "benchmarks" / "fit_cost.py"))
    results = fit["load"]()
    assert fit["fit"](results) == Figures.load()
    text = fit["PAGE"].read_text(encoding="utf-8")
    assert fit["made"](Figures.load(), results, text) == text
