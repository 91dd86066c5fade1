import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from saekit.dashboard import data
from saekit.dashboard.data import Run
from saekit.errors import SaekitError


def test_a_finished_run_has_everything(any_run: Path) -> None:
    run = Run.open(any_run)
    assert run.kind == "topk"
    assert run.hook == "resid_post.0"
    assert not run.training
    assert run.missing() == []
    assert run.features is not None
    assert run.d_sae == run.features.d_sae


def test_a_half_written_last_line_of_the_log_is_passed_over(hostile_run: Path) -> None:
    curves = Run.open(hostile_run).curves
    np.testing.assert_array_equal(curves["step"], [1, 2])
    np.testing.assert_array_equal(curves["ev"], [np.nan, 0.5])


def test_a_run_without_results_says_which_commands_make_them(hostile_run: Path) -> None:
    shutil.rmtree(hostile_run / "results")
    assert Run.open(hostile_run).missing() == [
        f"saekit eval core --sae '{hostile_run}'",
        f"saekit eval examples --sae '{hostile_run}'",
    ]


def test_a_run_still_training_is_read_and_asks_for_its_training_first(hostile_run: Path) -> None:
    (hostile_run / "config.json").unlink()
    run = Run.open(hostile_run)
    assert run.training
    (command,) = run.missing()
    assert command == f"saekit train topk '{hostile_run}/config.toml' --out '{hostile_run}'"


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SaekitError, match=r"is no run: it holds neither config\.toml"):
        Run.open(tmp_path)
    with pytest.raises(SaekitError, match=r"there is no such folder\. Give the folder that"):
        Run.open(tmp_path / "absent")


def test_results_of_other_weights_are_refused(hostile_run: Path) -> None:
    path = hostile_run / "config.json"
    config = json.loads(path.read_text()) | {"fingerprint": "0" * 64}
    path.write_text(json.dumps(config))
    with pytest.raises(SaekitError, match=r"trained again since.*saekit eval core"):
        Run.open(hostile_run)


def test_a_store_of_another_width_is_refused(hostile_run: Path) -> None:
    path = hostile_run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"d_sae": 4}))
    run = Run.open(hostile_run)
    with pytest.raises(SaekitError, match="tells of 3 latents, the SAE has 4"):
        _ = run.features


def test_a_store_of_other_weights_is_refused_and_the_rest_is_read(hostile_run: Path) -> None:
    path = hostile_run / "results" / "features" / "features.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sae_fingerprint": "0" * 64}))
    run = Run.open(hostile_run)
    assert run.core is not None
    with pytest.raises(SaekitError, match=r"trained again since.*saekit eval examples"):
        _ = run.features


def test_a_damaged_result_names_the_command_that_writes_it_again(hostile_run: Path) -> None:
    (hostile_run / "results" / "core.json").write_text("{}")
    with pytest.raises(SaekitError, match="saekit eval core --sae"):
        Run.open(hostile_run)


@pytest.mark.parametrize(
    "file",
    [
        "features.json",
        "latents-00000.parquet",
        "contexts-00000.parquet",
        "tokens-00000.parquet",
        "vocab.parquet",
    ],
)
def test_a_damaged_store_names_the_command_that_makes_it_again(
    file: str, hostile_run: Path
) -> None:
    path = hostile_run / "results" / "features" / file
    assert path.exists()
    path.write_text("{}")
    run = Run.open(hostile_run)
    with pytest.raises(SaekitError, match=f"{file} cannot be read.*saekit eval examples --sae"):
        _ = run.features


@pytest.mark.parametrize(
    ("text", "shown", "named"),
    [
        ("\n", "↵", "↵"),
        ("\t", "→", "→"),
        ("  ", "  ", "␣␣"),
        (" a b ", " a b ", "␣a b␣"),
        ("", "", "(empty)"),
        ("\x00\u202e\ud800", "\\u0000\\u202e\\ud800", "\\u0000\\u202e\\ud800"),
        ("é漢🙂", "é漢🙂", "é漢🙂"),
    ],
)
def test_what_cannot_be_seen_in_a_token_is_made_visible(text: str, shown: str, named: str) -> None:
    assert data.show_token(text) == shown
    assert data.name_token(text) == named
