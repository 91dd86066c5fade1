"""The command line on the tiny model: what it does, what it says, and its exit codes."""

import json
import shlex
from pathlib import Path

import pytest

from saekit import ActivationCache, checkpoint, cli
from saekit.cli import main
from saekit.errors import SaekitError


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    try:
        code = main([str(arg) for arg in argv])
    except SystemExit as stopped:  # argparse and tyro end a wrong call so
        code = stopped.code if isinstance(stopped.code, int) else 1
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_harvest_train_evaluate_and_report_by_command(
    tiny_lm: Path, corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, sae = tmp_path / "c", tmp_path / "r"
    harvest = ["harvest", "--model", tiny_lm, "--dataset", corpus_file, "--context", 24]
    harvest += ["--hooks", "resid_post.0", "mlp_out.1", "--n-tokens", 900, "--holdout", 0.25]
    code, out, _ = run(capsys, *harvest, "--out", cache)
    assert code == 0 and "900 rows at resid_post.0 (16), mlp_out.1 (16)" in out
    assert run(capsys, "verify", cache)[0] == 0

    train = ["train", "topk", "--cache", cache, "--d-sae", 32, "--k", 4, "--n-tokens", 2_000]
    train += ["--batch-size", 100, "--hook", "resid_post.0", "--out", sae]
    assert run(capsys, *train)[0] == 0
    assert checkpoint.load(sae).d_sae == 32

    code, out, _ = run(capsys, "eval", "core", "--sae", sae)
    assert code == 0 and "ce_recovered_zero" in out
    assert "ev" in json.loads((sae / "results" / "core.json").read_text())["metrics"]
    assert run(capsys, "eval", "examples", "--sae", sae)[0] == 0
    code, out, _ = run(capsys, "report", sae)
    assert code == 0 and (sae / "report.html").exists() and (sae / "report.md").exists()
    code, out, _ = run(capsys, "inspect", sae)
    assert code == 0 and "resid_post.0" in out
    # A run's own config, given back, is the same run; a flag on top of it wins.
    again = ["train", "topk", sae / "config.toml", "--seed", 1, "--out", tmp_path / "again"]
    code, _, err = run(capsys, *again)
    assert code == 0, err
    provenance = checkpoint.load(tmp_path / "again").provenance
    assert provenance is not None
    assert provenance.config["seed"] == 1 and provenance.config["d_sae"] == 32


def test_train_harvests_where_no_cache_is_given(
    tiny_lm: Path, corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["train", "topk", "--model", tiny_lm, "--dataset", corpus_file, "--hook", "attn_z.0"]
    args += ["--harvest-tokens", 900, "--d-sae", 32, "--k", 2]
    args += ["--n-tokens", 1_000, "--batch-size", 100, "--out", tmp_path / "r"]
    assert run(capsys, *args)[0] == 0
    assert ActivationCache.open(tmp_path / "r-cache").hooks == {"attn_z.0": 16}


def test_inspect_lists_a_models_hook_points_with_widths(
    tiny_lm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "inspect", tiny_lm)
    assert code == 0
    for name in ("embed", "resid_pre.0", "attn_z.1", "mlp_hidden.1", "resid_post.1"):
        assert name in out


# {cache} holds three hooks of the tiny model, {tmp} an unknown key in run.toml and a folder of
# somebody's own.
TRAIN = "train topk --cache {cache} --hook resid_post.0"
WRONG = {
    "no command": ("", 2, "COMMAND"),
    "unknown command": ("harvets", 2, "invalid choice"),
    "unknown flag": (f"{TRAIN} --out r --kk 3", 2, "--kk"),
    "unknown kind": ("train topp --out r", 2, "did you mean 'topk'?"),
    "unknown eval": ("eval cor --sae r", 2, "did you mean 'core'?"),
    "unknown key": ("train topk {tmp}/run.toml --out r", 2, "did you mean 'd_sae'?"),
    "k > d_sae": (f"{TRAIN} --out r --d-sae 8 --k 9", 2, "k=9 must lie in 1..d_sae=8"),
    "folder exists": (f"{TRAIN} --out {{tmp}}/thesis", 2, "exists and is no run of saekit"),
    "no cache": ("train topk --cache gone --out r", 1, "is no activation cache"),
    "hook not in cache": (
        "train topk --cache {cache} --hook mlp_out.0 --out r",
        1,
        "has no activations at 'mlp_out.0'",
    ),
    "several hooks": ("train topk --cache {cache} --out r", 2, "say which with --hook"),
    "no sae": ("eval core --sae {tmp}", 1, "holds no finished SAE"),
    "no run": ("report gone", 1, "is no run"),
    "no model": ("inspect /no/such/model", 1, "cannot be loaded"),
}


@pytest.mark.parametrize("call", WRONG)
def test_a_wrong_call_says_what_is_wrong_and_leaves_nothing_behind(
    call: str,
    tiny_cache: ActivationCache,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "run.toml").write_text("d_sea = 64\n")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    line, code, message = WRONG[call]
    argv = shlex.split(line.format(cache=tiny_cache.path, tmp=tmp_path))
    actual, _, err = run(capsys, *argv)
    assert message in err
    assert actual == code
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(SaekitError):
        main(["eval", "core", "--sae", str(tmp_path), "--debug"])


def test_an_unforeseen_error_is_named_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(argv: list[str]) -> None:
        raise ZeroDivisionError("of all things")

    monkeypatch.setitem(cli._COMMANDS, "inspect", broken)
    code, _, err = run(capsys, "inspect", "x")
    assert code == 1 and "ZeroDivisionError: of all things" in err and "--debug" in err


def test_interruption_says_that_the_same_command_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(argv: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, "inspect", interrupted)
    code, _, err = run(capsys, "inspect", "x")
    assert code == 130 and "the same command goes on" in err
