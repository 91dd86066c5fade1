"""Other tools' SAEs: their files read and written, each conversion with a proof beside it.

A format is one public module of this folder. It has `detect(path) -> bool` and
`read(path) -> Stored`, and where it can be written `write(sae, path, origin)`; see README.md.
"""

from pathlib import Path
from typing import Any

from saekit.errors import CheckpointError, ConfigError
from saekit.interop import _formats
from saekit.interop._formats import names
from saekit.interop._hub import local
from saekit.interop._stored import Stored
from saekit.sae import SAE

__all__ = ["detect", "load", "names", "read", "read_stored", "write"]


def detect(path: Path | str) -> str:
    """The format of a file or folder, by name.

    Raises CheckpointError where it is not there, is of no format, or of more than one.
    """
    return _formats.detect(Path(path))


def read(path: Path | str, format: str | None = None) -> SAE:
    """The SAE of a file or folder of any format, with whatever its tool does at run time folded in.

    Raises CheckpointError where the file is damaged, or holds what an SAE here cannot be.
    """
    return folded(read_stored(path, format), path)


def folded(stored: Stored, path: Path | str) -> SAE:
    """What is stored at path, as an SAE."""
    try:
        return stored.fold()
    except ConfigError as error:
        raise CheckpointError(f"{path} cannot be held: {error}") from error


def read_stored(path: Path | str, format: str | None = None) -> Stored:
    """The tensors of a file or folder as its tool has them, and what that tool does with them."""
    path = local(path)
    name = _formats.detect(path) if format is None else format
    stored: Stored = _formats.find(name).read(path)
    return stored


def write(
    sae: SAE, path: Path | str, format: str = "sae_lens", origin: dict[str, Any] | None = None
) -> None:
    """Write the SAE into the folder `path`, which is made, for another tool.

    `origin` says where it comes from (model, hook, ...), by default its provenance. Raises
    CheckpointError where the format cannot hold it. `saekit convert` also proves that the product
    computes what the SAE does.
    """
    module = _formats.find(format)
    if not hasattr(module, "write"):
        raise ConfigError(
            f"format '{format}' is read only; {', '.join(_formats.writable())} can be written"
        )
    if origin is None:
        origin = sae.provenance.to_dict() if sae.provenance else {}
    module.write(sae, Path(path), origin)


def load(what: Path | str, device: str = "cpu") -> SAE:
    """An SAE from a run's folder, a file or folder of any format (see `names`), or the hub:
    `hf://owner/name/path`, or `hf://owner/name@revision/path`.

    Raises SaekitError where it is not there, is damaged, or cannot be held.
    """
    from saekit import checkpoint
    from saekit.interop import native

    path = local(what)
    # With its provenance, which a Stored does not have. What is none of ours, or ours and not
    # finished, has an error of its own.
    if native.detect(path) or not path.exists():
        return checkpoint.load(path, device)
    ours = path.is_dir() and not any(_formats.find(name).detect(path) for name in names())
    if ours and (not any(path.iterdir()) or any((path / n).exists() for n in native.MARKS)):
        return checkpoint.load(path, device)
    return read(path).to(device)
