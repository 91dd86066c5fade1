"""saekit's own folder: `sae.safetensors` and `config.json` (see `saekit.checkpoint`)."""

from pathlib import Path
from typing import Any

from saekit import checkpoint
from saekit.interop._stored import Stored, plain
from saekit.sae import SAE

FILES = (checkpoint.CONFIG, checkpoint.WEIGHTS)
MARKS = (*FILES, "config.toml")
"""Any of these makes a folder one that saekit began to write."""
HOLDS = "everything that an SAE here is"


def detect(path: Path) -> bool:
    """Whether the folder is a run, or another place that saekit wrote an SAE to."""
    return all((path / name).is_file() for name in FILES)


def read(path: Path) -> Stored:
    """Raises CheckpointError where the folder is damaged."""
    sae = checkpoint.load(path)
    about = sae.provenance.to_dict() if sae.provenance else {}
    return plain(sae, "native", about)


def write(sae: SAE, path: Path, origin: dict[str, Any]) -> None:
    """Everything fits. What is known of its origin stands in the parity proof beside it."""
    checkpoint.save(sae, path)
