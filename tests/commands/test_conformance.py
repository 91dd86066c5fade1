import sys
from pathlib import Path

import pytest
import torch

from saekit import ActivationCache, checkpoint
from saekit.cli import main
from saekit.evals import _conformance
from saekit.sae import SAE, TopK

MODULE = """
import torch

class Mine:
    activation_dim = 6

    def encode(self, x):
        return torch.cat([x, -x], 1).relu()

    def decode(self, z):
        return z[:, :6] - z[:, 6:]

class Batch(Mine):
    def encode(self, x):
        return super().encode(x - x.mean(0))

class Wide(Mine):
    activation_dim = None

class NoDecode:
    def encode(self, x):
        return x

def make():
    return Mine()

def broken():
    raise OSError("no weights")

made = Mine()
number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_saes.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_our_metrics_are_checked_by_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["conformance"]) == 0
    said = capsys.readouterr().out
    assert "ev_dimension_mean, four rows" in said and "0.907143" in said
    assert "checks passed" in said and "FAIL" not in said
    monkeypatch.setattr(_conformance, "ce_recovered", lambda clean, sae, ablated: 1.0)
    assert main(["conformance"]) == 1
    shown = capsys.readouterr()
    assert "FAIL" in shown.out
    assert "2 of 53 checks failed: ce_recovered_zero" in shown.err


@pytest.mark.parametrize("name", ["Mine", "make", "made"])
def test_an_object_of_a_module_here_is_checked(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["conformance", f"my_saes:{name}"]) == 0
    said = capsys.readouterr().out
    assert "13 checks passed, 3 could not be made" in said


def test_what_fails_is_named_and_the_exit_code_says_so(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["conformance", "my_saes:Batch"]) == 1
    assert "checks failed: encode, in batches of 1" in capsys.readouterr().err


def test_a_saved_sae_is_checked_on_a_cache(
    tiny_run: Path, tiny_cache: ActivationCache, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["conformance", str(tiny_run), "--cache", str(tiny_cache.path)]
    assert main([*command, "--hook", "resid_post.0"]) == 0
    assert "could not be made" not in capsys.readouterr().out
    assert main([*command, "--hook", "resid_post.0", "--k", "3", "--ev", "0.1"]) == 1
    assert "L0 of every row; ev, as reported" in capsys.readouterr().err
    assert main(command) == 2
    assert "the cache holds resid_post.0, attn_z.1, mlp_out.1: name one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["my_saes:Nothing"], "'my_saes:Nothing' cannot be found (module 'my_saes' has no"),
        (["not_there:x"], "'not_there:x' cannot be found (No module named 'not_there')"),
        (["my_saes:NoDecode"], "gives a NoDecode, which lacks encode(x) or decode(z)"),
        (["my_saes:number"], "gives a int, which lacks encode(x)"),
        (["my_saes:Wide"], "a Wide does not say how wide its activations are: give --d-in"),
        (["my_saes:Mine", "--n-rows", "1"], "n_rows=1 must be at least 2"),
    ],
)
def test_what_cannot_be_checked_is_refused(
    argv: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["conformance", *argv]) == 2
    assert said in capsys.readouterr().err


def test_a_call_that_fails_is_reported(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "my_saes:broken"]) == 1
    assert (
        "'my_saes:broken' fails when it is called: OSError: no weights" in capsys.readouterr().err
    )


def test_a_width_that_is_given_is_enough(here: Path) -> None:
    assert main(["conformance", "my_saes:Wide", "--d-in", "6"]) == 0


def test_a_folder_without_an_sae_and_a_transcoder_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["conformance", str(tmp_path)]) == 1
    assert "holds no finished SAE" in capsys.readouterr().err
    skip = torch.zeros(3, 3)
    sae = SAE(torch.eye(3), torch.zeros(3), torch.eye(3), torch.zeros(3), TopK(1), W_skip=skip)
    checkpoint.save(sae, tmp_path)
    assert main(["conformance", str(tmp_path)]) == 2
    assert "decodes from x, too, or to another width (a transcoder" in capsys.readouterr().err
