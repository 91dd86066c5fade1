"""Conversions and their proof."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saekit import SAE, JumpReLU, TopK, interop, save
from saekit.errors import CheckpointError, ConfigError
from saekit.interop import _parity, sae_lens, sparsify
from saekit.interop._stored import Stored


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A TopK SAE whose b_dec is far from 0."""
    sae = SAE(torch.randn(6, 20), torch.randn(20), torch.randn(20, 6), 3 * torch.ones(6), TopK(4))
    save(sae, tmp_path / "run")
    return tmp_path / "run"


def test_a_conversion_leaves_its_proof_and_the_proof_can_be_made_again(
    run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "layers.3"
    record = _parity.convert([run], out, "sparsify")
    assert json.loads((out / "parity.json").read_text()) == record
    (one,) = record["saes"]
    assert one["passed"] and one["encode"]["rows_apart"] == 0
    assert one["encode"]["max_relative"] < 1e-5 and one["decode"]["max_relative"] < 1e-5
    assert one["l0"]["before"] == one["l0"]["after"] > 0
    assert one["ev"]["before"] == pytest.approx(one["ev"]["after"], abs=1e-4)
    assert [fold["of"] for fold in one["folds"]] == ["product"]
    assert _parity.check(out)["saes"] == record["saes"]
    assert sorted(p.name for p in out.parent.iterdir()) == ["layers.3"]


def test_every_foreign_format_converts_to_ours_with_its_steps_undone_and_redone(
    any_foreign: Any, tmp_path: Path
) -> None:
    record = _parity.convert([any_foreign.path], tmp_path / "ours", "native")
    (one,) = record["saes"]
    stored = interop.read_stored(any_foreign.path)
    assert [fold["step"] for fold in one["folds"]] == [step.name for step in stored.steps()]
    assert all(fold["undone_and_redone"] < 1e-6 for fold in one["folds"])
    x = torch.randn(9, stored.W_enc.shape[0])
    ours, theirs = interop.read(tmp_path / "ours"), interop.read(any_foreign.path)
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_l0_and_ev_of_a_proof_are_those_of_a_plain_loop(run: Path, tmp_path: Path) -> None:
    x = torch.randn(30, 6) + 1
    probe = _parity.Probe(x, {"kind": "these"})
    (one,) = _parity.convert([run], tmp_path / "out", "sae_lens", probe=probe)["saes"]
    sae = interop.read(run)
    count = error = total = 0.0
    for row in x:
        z = sae.encode(row[None])[0]
        count += sum(1 for value in z.tolist() if value != 0)
        error += float((row - sae.decode(z[None])[0]).square().sum())
        total += float((row - x.mean(0)).square().sum())
    assert one["l0"]["before"] == pytest.approx(count / 30)
    assert one["ev"]["before"] == pytest.approx(1 - error / total, abs=1e-5)


def broken_writers() -> dict[str, Any]:
    """Converters as they are found elsewhere, each silently wrong in its own way."""

    def keeps_b_dec(sae: SAE, path: Path, origin: dict[str, Any]) -> None:
        sparsify.write(replace(sae, b_enc=sae.b_enc - sae.b_dec @ sae.W_enc), path, origin)

    def transposes(sae: SAE, path: Path, origin: dict[str, Any]) -> None:
        sparsify.write(replace(sae, W_dec=sae.W_dec.flip(1)), path, origin)

    def forgets_k(sae: SAE, path: Path, origin: dict[str, Any]) -> None:
        sparsify.write(replace(sae, activation=TopK(5)), path, origin)

    return {f.__name__: f for f in (keeps_b_dec, transposes, forgets_k)}


@pytest.mark.parametrize("name", list(broken_writers()))
def test_a_product_that_computes_something_else_is_never_left_behind(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = broken_writers()[name]
    real = sparsify.write
    monkeypatch.setattr(sparsify, "write", lambda *args: _once(monkeypatch, real, writer, args))
    with pytest.raises(CheckpointError, match=r"was not written: SAE 0: .* differs by more than"):
        _parity.convert([run], tmp_path / "out", "sparsify")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def _once(patch: pytest.MonkeyPatch, real: Any, writer: Any, args: Any) -> None:
    patch.setattr(sparsify, "write", real)
    writer(*args)


def test_a_reader_that_forgets_a_threshold_is_found(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = replace(interop.read(run), activation=JumpReLU(torch.full((20,), 2.0)))
    save(sae, tmp_path / "jump")
    real = sae_lens.read

    def forgets(path: Path) -> Stored:
        return replace(real(path), activation=JumpReLU(torch.zeros(20)))

    monkeypatch.setattr(sae_lens, "read", forgets)
    with pytest.raises(CheckpointError, match="differs by more than"):
        _parity.convert([tmp_path / "jump"], tmp_path / "out", "sae_lens")


@pytest.mark.parametrize("which", ["source", "product"])
def test_a_proof_of_files_that_were_altered_is_refused(
    which: str, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _parity.convert([run], out, "sae_lens")
    file = run / "config.json" if which == "source" else out / "cfg.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(CheckpointError, match=f"{file.name} is not what it was when"):
        _parity.check(out)


def test_a_source_that_is_gone_is_named(run: Path, tmp_path: Path) -> None:
    _parity.convert([run], tmp_path / "out", "sae_lens")
    run.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"run, which .*out was converted from, is not there"):
        _parity.check(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"parity\.json is missing or unreadable"):
        _parity.check(tmp_path / "moved")


def test_a_folder_that_holds_anything_is_not_written_over(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ConfigError, match="is there already: give a new folder"):
        _parity.convert([run], tmp_path / "out", "sae_lens")


def test_several_saes_make_a_set_and_only_there(tmp_path: Path) -> None:
    folders = [tmp_path / f"layer{i}" for i in range(3)]
    saes = [_transcoder(skip=i > 0) for i in range(3)]
    for sae, folder in zip(saes, folders, strict=True):
        save(sae, folder)
    record = _parity.convert(folders, tmp_path / "set", "circuit_tracer", about={"model": "gpt2"})
    assert len(record["saes"]) == 3
    assert _parity.check(tmp_path / "set")["passed"]
    for i, sae in enumerate(saes):
        read = interop.read(tmp_path / "set" / f"layer_{i}.safetensors")
        assert all(read.tensors()[name].equal(t) for name, t in sae.tensors().items())
    with pytest.raises(ConfigError, match="'sae_lens' holds one SAE in a folder, not 3"):
        _parity.convert(folders, tmp_path / "other", "sae_lens")


def _transcoder(skip: bool) -> SAE:
    W_skip: Tensor | None = torch.randn(5, 5) if skip else None
    sae = SAE(
        torch.randn(5, 8),
        torch.randn(8),
        torch.randn(8, 5),
        torch.randn(5),
        JumpReLU(torch.rand(8)),
    )
    return replace(sae, W_skip=W_skip)


def test_rows_of_another_width_are_refused(run: Path, tmp_path: Path) -> None:
    probe = _parity.Probe(torch.randn(4, 7), {"kind": "these"})
    with pytest.raises(ConfigError, match="the rows have width 7, the SAE reads 6"):
        _parity.convert([run], tmp_path / "out", "sae_lens", probe=probe)
