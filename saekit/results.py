"""The files that evaluations write and the report and dashboard read, and where a result comes
from.

No torch here: a reader of results needs numpy and no more. What there is to see of each latent is
in a format of its own: `saekit.features`."""

import dataclasses
import json
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
from numpy import ndarray
from safetensors.numpy import load_file, save_file

from saekit.errors import SaekitError
from saekit.files import write_atomic, write_json

RESULTS = "results"
"""The folder inside a run that holds its results."""

CONTROLS = "controls"
"""The folder inside that one that holds the results of its SAE's controls, each in a folder of the
control's name."""


def versions() -> dict[str, str]:
    """What a result was computed with."""
    packages = {name: version(name) for name in ("saekit", "torch", "transformers")}
    return {"python": python_version(), **packages}


def commit() -> str | None:
    """The commit of saekit's own checkout; None for a wheel, which has a version alone."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What an SAE was made from: enough to make it again, and to refuse what it does not belong
    to."""

    kind: str
    hook: str
    model: str
    model_fingerprint: str
    cache_fingerprint: str
    config: dict[str, Any]
    rows_seen: int
    """Activations trained on, repeats counted."""
    versions: dict[str, str]
    commit: str | None = None
    """Of saekit's checkout, where it ran from one."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Provenance":
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number, how it is defined, and over how many rows it was taken."""

    value: float
    definition: str
    """Equation and reading in a line: what 0 and 1 mean, which baseline."""
    n: int
    interval: tuple[float, float] | None = None
    """Of 95 %, by bootstrap over documents (over prompts, for a task) where one is given."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Metric":
        interval = values.get("interval")
        return cls(**{**values, "interval": None if interval is None else tuple(interval)})


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """What one evaluation found. Written as `results/<eval>.json`, arrays beside it as
    safetensors."""

    eval: str
    metrics: dict[str, Metric]
    hook: str
    split: str
    """Which documents: "test" are those held out from training."""
    exclude: tuple[str, ...]
    """Kinds of token left out of every number here."""
    sae_fingerprint: str | None
    cache_fingerprint: str
    config: dict[str, Any]
    versions: dict[str, str]
    arrays: dict[str, ndarray] = field(default_factory=dict)
    """Per-latent or per-bin values, by name."""

    def save(self, folder: Path) -> Path:
        """Write into `folder` (a run's results); returns the JSON file's path."""
        _save_arrays(folder / f"{self.eval}.safetensors", self.arrays)
        values = dataclasses.asdict(dataclasses.replace(self, arrays={}))
        del values["arrays"]
        path = folder / f"{self.eval}.json"
        write_json(path, values)
        return path

    @classmethod
    def load(cls, folder: Path, name: str) -> "EvalResult":
        values = _read_json(folder / f"{name}.json", name)
        values["metrics"] = {key: Metric.from_dict(m) for key, m in values["metrics"].items()}
        values["exclude"] = tuple(values["exclude"])
        return cls(**values, arrays=_load_arrays(folder / f"{name}.safetensors"))


@dataclass(frozen=True, kw_only=True)
class Control:
    """Which control the results in a folder are of, and which SAE it was made beside. Written as
    `results/controls/<name>/control.json`; its weights are not kept, as they can be made again."""

    name: str
    of: str
    """Fingerprint of the SAE that it stands beside."""
    sae_fingerprint: str
    """Of the control's own weights."""
    d_sae: int
    provenance: Provenance

    FILE = "control.json"

    def save(self, folder: Path) -> None:
        write_json(folder / self.FILE, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Control":
        values = json.loads((folder / cls.FILE).read_text(encoding="utf-8"))
        return cls(**{**values, "provenance": Provenance.from_dict(values["provenance"])})


def _save_arrays(path: Path, arrays: dict[str, ndarray]) -> None:
    contiguous = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
    write_atomic(path, lambda temporary: save_file(contiguous, temporary))


def _load_arrays(path: Path) -> dict[str, ndarray]:
    return load_file(path)


def _read_json(path: Path, eval_name: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        command = f"saekit eval {eval_name} --sae {path.parent.parent}"
        raise SaekitError(f"{path} is not there; write it with `{command}`") from error
    assert isinstance(values, dict)
    return values
