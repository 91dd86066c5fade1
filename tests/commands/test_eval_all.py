"""`saekit eval all` on real runs of the tiny model."""

import logging
import shutil
from pathlib import Path

import pytest

from saekit import ActivationCache, checkpoint, train
from saekit.cli import main
from saekit.results import Control, EvalResult
from saekit.trainers.topk import TopKConfig

# Seconds, not minutes: few rows, few resamples.
QUICK = """
[core]
max_rows = 100
ce_tokens = 50
n_bootstrap = 10
[firing]
max_rows = 100
n_bootstrap = 10
windows = [50]
[geometry]
max_rows = 100
null_draws = 1
[dark_matter]
max_rows = 100
fit_rows = 200
ce_tokens = 0
n_bootstrap = 10
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_cache: ActivationCache) -> Path:
    """Two SAEs that differ in their seed alone, and one of another k."""
    folder = tmp_path_factory.mktemp("trained")
    for name, k, seed in (("one", 4, 0), ("two", 4, 1), ("three", 2, 0)):
        cfg = TopKConfig(d_sae=32, k=k, n_tokens=2_000, batch_size=100, seed=seed)
        train(cfg, tiny_cache, hook="resid_post.0", out=folder / name)
    return folder


@pytest.fixture
def runs(tmp_path: Path, trained: Path) -> list[Path]:
    """Copies of them, without results."""
    return [shutil.copytree(trained / name, tmp_path / name) for name in ("one", "two", "three")]


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    path = tmp_path / "quick.toml"
    path.write_text(QUICK)
    return path


def eval_all(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    try:
        code = main(["eval", "all", *map(str, argv)])
    except SystemExit as stopped:  # tyro ends a wrong call so
        code = stopped.code if isinstance(stopped.code, int) else 1
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def written(*runs: Path) -> dict[Path, int]:
    """When each result was last written."""
    files = [file for run in runs for file in (run / "results").rglob("*.json")]
    return {file: file.stat().st_mtime_ns for file in files if file.name != Control.FILE}


def test_all_saes_are_evaluated_and_a_second_call_keeps_what_is_there(
    runs: list[Path], quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [quick, "--sae", *runs[:2], "--only", "geometry", "core"]
    code, out, err = eval_all(capsys, *args)
    assert code == 0, err
    assert f"Next: saekit report {runs[0]} {runs[1]}" in out
    before = written(*runs)
    assert {(file.parents[1].name, file.stem) for file in before} == {
        (run, name) for run in ("one", "two") for name in ("core", "geometry")
    }
    # What was stopped in between: one result is not there.
    gone = runs[1] / "results" / "core.json"
    gone.unlink()
    assert eval_all(capsys, *args)[0] == 0
    after = written(*runs)
    assert {file for file in after if after[file] != before[file]} == {gone}


@pytest.mark.parametrize("change", ["config", "weights", "cache", "damage"])
def test_a_result_of_something_else_is_measured_again(
    change: str,
    runs: list[Path],
    quick: Path,
    tiny_cache: ActivationCache,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, args = runs[0], [quick, "--sae", runs[0], "--only", "geometry"]
    assert eval_all(capsys, *args)[0] == 0
    file = run / "results" / "geometry.json"
    before = written(run)
    match change:
        case "config":
            quick.write_text(QUICK.replace("null_draws = 1", "null_draws = 2"))
        case "weights":
            for name in ("sae.safetensors", "config.json"):
                shutil.copy(runs[1] / name, run / name)
        case "cache":
            file.write_text(file.read_text().replace(tiny_cache.fingerprint, "0" * 32))
            before = written(run)
        case "damage":
            file.write_text(file.read_text()[:100])
            before = written(run)
    assert eval_all(capsys, *args)[0] == 0
    assert written(run) != before
    found = EvalResult.load(run / "results", "geometry")
    assert found.sae_fingerprint == checkpoint.fingerprint(checkpoint.load(run))
    assert found.cache_fingerprint == tiny_cache.fingerprint


def test_a_batch_size_does_not_make_a_result_another(
    runs: list[Path], quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [quick, "--sae", runs[0], "--only", "geometry"]
    assert eval_all(capsys, *args)[0] == 0
    before = written(runs[0])
    quick.write_text(QUICK.replace("[geometry]", "[geometry]\nbatch_size = 7"))
    assert eval_all(capsys, *args)[0] == 0
    assert written(runs[0]) == before


def test_what_does_not_fit_is_left_out_with_the_reason(
    runs: list[Path],
    quick: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    only = ("attention", "ground_truth", "stability", "geometry")
    with caplog.at_level(logging.INFO, "saekit"):
        code, out, _ = eval_all(capsys, quick, "--sae", runs[0], runs[2], "--only", *only)
    assert code == 0
    assert all("left out" in line for line in out.splitlines() if "attention" in line[:20])
    log = "\n".join(caplog.messages)
    assert "attention: left out, resid_post.0 does not hold the outputs of attention heads" in log
    assert "ground_truth: left out" in log
    assert "stability: left out, it compares SAEs" in log
    assert log.count("SAE 1 of 2") == log.count("SAE 2 of 2") == 1
    assert {file.stem for file in written(*runs)} == {"geometry"}


def test_saes_of_other_seeds_are_compared_and_runs_tell_of_their_training(
    runs: list[Path], quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = eval_all(capsys, quick, "--sae", *runs, "--only", "stability", "firing")
    assert code == 0, err
    assert EvalResult.load(runs[0] / "results", "stability").config["against"] == [str(runs[1])]
    assert EvalResult.load(runs[1] / "results", "stability").config["against"] == [str(runs[0])]
    assert not (runs[2] / "results" / "stability.json").exists()
    assert "life_dying_share" in EvalResult.load(runs[2] / "results", "firing").metrics


def test_a_failure_does_not_lose_the_others(
    runs: list[Path], quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick.write_text(QUICK.replace("[dark_matter]", '[dark_matter]\nothers = ["nowhere"]'))
    weights = runs[0] / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    only = ("dark_matter", "geometry")
    code, _, err = eval_all(capsys, quick, "--sae", *runs[:2], "--only", *only)
    assert code == 1
    assert "2 of 3 evaluations failed" in err
    assert f"{runs[0]}, all: " in err and "the file was altered" in err
    assert f"{runs[1]}, dark_matter: nowhere holds no finished SAE" in err
    assert [file.stem for file in written(*runs)] == ["geometry"]


@pytest.mark.parametrize(("toml", "code"), [("", 0), ("[indirect_object]\nn_fit = 50\n", 1)])
def test_an_evaluation_that_the_model_is_not_for_fails_only_if_the_user_set_it(
    toml: str, code: int, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny model has no tokens for names: that shows once its tokenizer is asked."""
    config = tmp_path / "evals.toml"
    config.write_text(toml)
    found, out, err = eval_all(capsys, config, "--sae", runs[0], "--only", "indirect_object")
    assert found == code
    assert ("left out" if code == 0 else "1 of 1 evaluations failed") in (out if code == 0 else err)


def test_controls_are_measured_beside_their_sae(
    runs: list[Path], quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [quick, "--sae", runs[0], "--controls"]
    code, _, err = eval_all(capsys, *args, "--only", "core", "geometry", "firing")
    assert code == 0, err
    folder = runs[0] / "results" / "controls"
    for name in ("random", "random_pursuit", "pca", "neuron"):
        control = Control.load(folder / name)
        assert control.of == checkpoint.fingerprint(checkpoint.load(runs[0]))
        assert control.provenance.kind == f"{name} control"
        assert sorted(file.stem for file in (folder / name).glob("*.safetensors")) == [
            "core",
            "geometry",
        ]
        found = EvalResult.load(folder / name, "core")
        assert found.sae_fingerprint == control.sae_fingerprint
        # A pursuit may take a latent twice.
        near = 0.5 if name == "random_pursuit" else 0.01
        assert found.metrics["l0_mean"].value == pytest.approx(4, abs=near)
    before = written(runs[0])
    assert eval_all(capsys, *args, "--only", "core", "geometry", "firing")[0] == 0
    assert written(runs[0]) == before


@pytest.mark.parametrize(
    ("argv", "toml", "message"),
    [
        (["--only", "cor"], "", "no evaluation 'cor'; did you mean 'core'"),
        ([], "[cor]\n", "no evaluation 'cor'; did you mean 'core'"),
        ([], "[core]\nrows = 3\n", "has no key 'rows'"),
        ([], "[core]\nmax_rows = 0\n", "max_rows=0 must be at least 1"),
        ([], "max_rows = 3\n", "no evaluation 'max_rows'"),
        ([], "core = 3\n", "'core' is no table"),
        (["--sae"], "", "--sae names no SAE"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_is_measured(
    argv: list[str],
    toml: str,
    message: str,
    runs: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "evals.toml"
    config.write_text(toml)
    saes = [] if "--sae" in argv else ["--sae", runs[0]]
    code, _, err = eval_all(capsys, config, *saes, *argv)
    assert code == 2 and message in err
    assert not (runs[0] / "results").exists()


def test_a_folder_that_is_no_sae_is_refused_before_anything_is_measured(
    runs: list[Path], quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = eval_all(capsys, quick, "--sae", runs[0], tmp_path / "none", "--only", "core")
    assert code == 1 and "holds no finished SAE" in err
    assert not (runs[0] / "results").exists()


def test_runs_are_compared_by_command(
    runs: list[Path],
    quick: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The commands from training to the page, with what `saekit report` writes by default."""
    monkeypatch.chdir(tmp_path)
    assert (
        eval_all(capsys, quick, "--sae", *runs, "--only", "core", "firing", "dark_matter")[0] == 0
    )
    assert main(["report", *map(str, runs)]) == 0
    for ending in ("html", "md", "json"):
        assert (tmp_path / f"comparison.{ending}").exists()
    # What it says of the evaluations is a file that the command takes, and measures the same.
    from saekit.dashboard._comparison import Comparison
    from saekit.dashboard.compare import evals_toml

    before = written(*runs)
    quick.write_text(evals_toml(Comparison.open(runs)))
    assert (
        eval_all(capsys, quick, "--sae", *runs, "--only", "core", "firing", "dark_matter")[0] == 0
    )
    assert written(*runs) == before
    assert main(["report"]) == 2


def test_several_processes_are_refused(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, _, err = eval_all(capsys, "--sae", runs[0])
    assert code == 2 and "runs in one process, and there are 3: start it without torchrun" in err
