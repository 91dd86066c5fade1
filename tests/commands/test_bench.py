import json
from pathlib import Path

import pytest
import torch

from saekit.cli import main

SMALL = ["bench", "--device", "cpu", "--shape", "16", "64", "4", "--batch-size", "32"]
DESIGN = {"impl", "op", "d_in", "d_sae", "k", "batch", "ms", "device", "versions"}


def lines_of(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_ops_and_steps_are_timed_and_each_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "new" / "f.jsonl"
    assert main([*SMALL, "--rounds", "2", "--out", str(out)]) == 0
    lines = lines_of(out)
    assert all(line.keys() >= DESIGN for line in lines)
    sizes = [tuple(line[name] for name in ("d_in", "d_sae", "k", "batch")) for line in lines]
    assert set(sizes) == {(16, 64, 4, 32)}
    assert {line["op"] for line in lines if line["impl"] == "eager ops"} == {
        "topk step",
        "batch_topk step",
    }
    assert {line["op"] for line in lines if line["impl"] == "eager"} == {
        "select",
        "select of a batch",
        "decode",
        "decode backward",
    }
    for line in lines:
        assert isinstance(line["ms"], float) and line["ms"] > 0
        assert line["device"] == "cpu" and line["against"] == "plain torch"
        assert ("tokens_per_s" in line) == str(line["op"]).endswith("step")
    printed = capsys.readouterr().out
    assert "times plain torch" in printed and "topk step, eager ops" in printed
    assert f"{len(lines)} lines: {out}" in printed


def test_lines_are_added_to_those_of_before(tmp_path: Path) -> None:
    out = tmp_path / "f.jsonl"
    out.write_text('{"op": "before"}\n', encoding="utf-8")
    assert main([*SMALL, "--rounds", "1", "--out", str(out)]) == 0
    lines = lines_of(out)
    assert lines[0] == {"op": "before"} and len(lines) > 10


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--shape", "4", "2", "3"],
            "k=3 must lie in 1..d_sae=2: it is how many latents fire; give",
        ),
        (["--shape", "0", "2", "1"], "shape 0 2 1 lacks dimensions or latents: there must be"),
        (["--shapes", "XL"], "'XL' is no shape that is known (--shape D_IN D_SAE K gives one"),
        (["--batch-size", "0"], "batch_size=0 must be at least 1"),
        (["--rounds", "0"], "rounds=0 must be at least 1"),
    ],
)
def test_a_bad_value_is_refused_with_the_rule(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--device", "cpu", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 2
    assert "device='cuda', but torch sees no GPU here: leave --device" in capsys.readouterr().err
