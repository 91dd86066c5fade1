import json
from pathlib import Path

import pytest

from saekit import ActivationCache
from saekit.activations_cache.planted import HOOK, synthetic_of
from saekit.cli import main

SMALL = ["plant", "--n-features", "12", "--d-in", "6", "--n-rows", "2000", "--holdout", "0.3"]


def test_plant_train_and_evaluate_by_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    assert main([*SMALL, "--out", str(cache)]) == 0
    said = capsys.readouterr().out
    assert f"{cache}: 2,000 rows of 12 features at {HOOK} (6)" in said
    assert "Next: saekit train topk" in said and "saekit eval ground_truth" in said
    assert synthetic_of(ActivationCache.open(cache)).n_features == 12

    train = ["train", "topk", "--cache", str(cache), "--hook", HOOK, "--d-sae", "12", "--k", "2"]
    assert main([*train, "--n-tokens", "2000", "--batch-size", "100", "--out", str(run)]) == 0
    assert main(["eval", "ground_truth", "--sae", str(run)]) == 0
    assert "mcc_abs" in capsys.readouterr().out
    held = json.loads((run / "results" / "ground_truth.json").read_text())
    assert {"mcc_abs", "mcc_abs_null", "f1", "true_l0"} <= held["metrics"].keys()
    assert (run / "results" / "ground_truth.safetensors").exists()


def test_the_same_command_again_leaves_what_is_there(tmp_path: Path) -> None:
    command = [*SMALL, "--out", str(tmp_path)]
    assert main(command) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("change", [["--seed", "1"], ["--n-rows", "2001"], ["--holdout", "0.2"]])
def test_another_cache_in_its_place_is_left_alone(
    change: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--out", str(tmp_path)]) == 0
    assert main([*SMALL, *change, "--out", str(tmp_path)]) == 2
    assert "holds another cache (2,000 rows of 'planted'): give another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--n-rows", "0"], "n_rows=0 must be at least 1"),
        (["--holdout", "1"], "holdout=1.0 a share of documents from 0 to below 1"),
        (["--p-min", "0.5"], "p_min=0.5 and p_max=0.3 are chances"),
    ],
)
def test_a_bad_value_is_refused_with_the_rule(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plant", *flags, "--out", str(tmp_path / "cache")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
