import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saekit import SAE, JumpReLU, MatchingPursuit, ReLU, TopK, load, save
from saekit.checkpoint import fingerprint
from saekit.errors import CheckpointError
from saekit.sae import Activation, LayerNorm, UnitRow


def random_sae(activation: Activation, skip: bool = False) -> SAE:
    return SAE(
        W_enc=torch.randn(7, 5).T,  # not contiguous, as trainers keep it
        b_enc=torch.randn(7),
        W_dec=torch.randn(7, 5),
        b_dec=torch.randn(5),
        activation=activation,
        W_skip=torch.randn(5, 5) if skip else None,
    )


@pytest.mark.parametrize(
    "activation", [ReLU(), TopK(2), JumpReLU(torch.rand(7))], ids=lambda a: type(a).__name__
)
@pytest.mark.parametrize("skip", [False, True])
def test_every_tensor_and_the_activation_come_back(
    activation: Activation, skip: bool, tmp_path: Path
) -> None:
    sae = random_sae(activation, skip)
    save(sae, tmp_path)
    read = load(tmp_path)
    assert type(read.activation) is type(activation)
    assert set(read.tensors()) == set(sae.tensors())
    for name, tensor in sae.tensors().items():
        assert read.tensors()[name].equal(tensor), name
    x = torch.randn(9, 5)
    torch.testing.assert_close(read(x), sae(x))


@pytest.mark.parametrize("n_atoms", [1, 7])
def test_a_pursuit_comes_back_as_it_was(n_atoms: int, tmp_path: Path) -> None:
    """One atom's encoder and decoder are the same memory, which a file must hold twice."""
    atoms = torch.nn.functional.normalize(torch.randn(n_atoms, 5))
    how = MatchingPursuit(4, residual=0.1, signed=True)
    sae = SAE.of_atoms(atoms, torch.randn(5), how)
    assert save(sae, tmp_path) == fingerprint(sae)
    read = load(tmp_path)
    assert read.activation == how
    for name, tensor in sae.tensors().items():
        assert read.tensors()[name].equal(tensor), name
    x = torch.randn(9, 5)
    torch.testing.assert_close(read.encode(x), sae.encode(x))


@pytest.mark.parametrize("norm", [LayerNorm(1e-3), UnitRow()], ids=lambda n: type(n).__name__)
def test_how_rows_are_normalised_comes_back_and_needs_version_2(
    norm: LayerNorm | UnitRow, tmp_path: Path
) -> None:
    save(random_sae(ReLU()), tmp_path / "plain")
    save(replace(random_sae(ReLU()), row_norm=norm), tmp_path / "normalised")
    assert load(tmp_path / "normalised").row_norm == norm
    versions = [
        json.loads((tmp_path / name / "config.json").read_text())["version"]
        for name in ("plain", "normalised")
    ]
    assert versions == [1, 2]


def test_where_a_pursuit_stops_comes_back(tmp_path: Path) -> None:
    how = MatchingPursuit(4, rest=0.5, once=True)
    sae = SAE.of_atoms(torch.nn.functional.normalize(torch.randn(7, 5)), torch.randn(5), how)
    save(sae, tmp_path)
    assert load(tmp_path).activation == how
    assert json.loads((tmp_path / "config.json").read_text())["version"] == 2


@pytest.mark.parametrize("key", ["activation", "provenance", "version", "fingerprint"])
def test_a_config_that_lacks_something_is_refused(key: str, tmp_path: Path) -> None:
    save(random_sae(ReLU()), tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values[key]
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"not what saekit writes|version None|SHA-256"):
        load(tmp_path)


def test_altered_weights_are_refused(tmp_path: Path) -> None:
    save(random_sae(ReLU()), tmp_path)
    file = tmp_path / "sae.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="was altered or only partly written"):
        load(tmp_path)


def test_weights_that_are_missing_are_refused(tmp_path: Path) -> None:
    save(random_sae(ReLU()), tmp_path)
    (tmp_path / "sae.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path)


def test_a_folder_that_holds_no_sae_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no finished SAE"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="is not a saekit SAE"):
        load(tmp_path)


def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    save(random_sae(ReLU()), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(CheckpointError, match="format version 99, this saekit reads up to 2"):
        load(tmp_path)
