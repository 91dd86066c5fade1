import json
from pathlib import Path

import pytest

from saekit import ActivationCache
from saekit.cli import main


def test_a_run_is_converted_on_rows_of_its_cache_and_checked_again(
    tiny_run: Path,
    tiny_cache: ActivationCache,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    arguments = ["convert", str(tiny_run), str(out), "--format", "sae_lens"]
    rows = ["--cache", tiny_cache.location, "--hook", "resid_post.0", "--n-rows", "64"]
    assert main([*arguments, *rows]) == 0
    assert f"sae_lens, proof in {out / 'parity.json'}" in capsys.readouterr().out.replace("\n", "")
    record = json.loads((out / "parity.json").read_text())
    assert record["probe"]["cache_fingerprint"] == tiny_cache.fingerprint
    assert record["saes"][0]["ev"]["before"] > 0.2  # of real activations
    metadata = json.loads((out / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == "blocks.0.hook_resid_post"
    assert main(["convert", "--check", str(out)]) == 0
    assert "computes what its source does" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a source, the new folder and a format"),
        (["a", "b", "--format", "xx"], "no format 'xx'"),
        (["--check", "a", "--format", "sae_lens"], "--check takes the product alone"),
        (["a", "b", "--format", "sae_lens", "--n-rows", "1"], "n_rows=1 must be at least 2"),
    ],
)
def test_what_cannot_be_done_is_wrong_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_evaluation_takes_an_sae_of_another_tool(
    tiny_run: Path, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(tiny_run), str(out), "--format", "sparsify"]) == 0
    rows = ["--cache", tiny_cache.location, "--hook", "resid_post.0", "--ce-tokens", "0"]
    assert main(["eval", "core", "--sae", str(out), *rows, "--out", str(tmp_path / "r")]) == 0
    ours = json.loads((tiny_run / "results" / "core.json").read_text())["metrics"]["ev"]["value"]
    theirs = json.loads((tmp_path / "r" / "core.json").read_text())["metrics"]["ev"]["value"]
    assert theirs == pytest.approx(ours, abs=1e-4)
