"""What the feature browser was opened on: one run, or a folder of runs, and no path outside it.

A run is named by its path below the folder, and links carry that name. Links are made by anybody,
so a name is followed only where it leads, symbolic links resolved, to something below the folder.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from saekit.dashboard.data import CONFIG, SAE_CONFIG, show_token
from saekit.errors import SaekitError, nearest

WEIGHTS = "sae.safetensors"

_DEPTH = 4
"""Folders below the one opened in which runs are looked for."""

_NO_RUNS = ("results", "train_state", "__pycache__")
"""Folders inside a run that hold what belongs to it."""


@dataclass(frozen=True)
class Folder:
    """A run, or a folder of runs."""

    path: Path
    single: bool
    """Whether it is a run itself; its name is then empty."""

    @classmethod
    def open(cls, path: Path | str) -> "Folder":
        """Raises SaekitError where there is neither a run nor a folder that holds one."""
        path = Path(path)
        folder = cls(path, is_run(path))
        if not folder.single and not folder.names:
            what = "there is no such folder"
            if path.is_dir():
                what = (
                    f"it holds neither {CONFIG} (written when training starts) nor {SAE_CONFIG} "
                    f"(written when it ends), and no folder within {_DEPTH} below it does"
                )
            raise SaekitError(
                f"{path} is no run and holds none: {what}. Give the folder that "
                "`saekit train ... --out` wrote, or one that holds such folders"
            )
        return folder

    @cached_property
    def names(self) -> list[str]:
        """Of every run, sorted. A run that a symbolic link leads to lies outside, and is not
        among them."""
        return [""] if self.single else sorted(_runs_below(self.path, self.path, _DEPTH))

    def run(self, name: str) -> Path:
        """The folder of the run of that name, which comes from a link.

        Raises SaekitError for a name that leads out of the folder or to no run. Where the folder
        itself is the run, that is the only one.
        """
        if name not in self.names or not self._below(self.path / name):
            raise SaekitError(self.refusal(name))
        return self.path / name

    def refusal(self, name: str) -> str:
        """Why there is no run of that name."""
        shown = f"the link asks for run '{show_token(name)}'"
        if self.single:
            return f"{shown}, and {self.path} was opened, which is one run: open the folder of both"
        known = nearest(name, self.names)
        if "\0" in name or not self._below(self.path / name):
            return f"{shown}, which lies outside of {self.path}, the folder opened; {known}"
        return f"{shown}, and {self.path} has no such run; {known}"

    def _below(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self.path.resolve())


def is_run(path: Path) -> bool:
    """Whether a folder holds a run, finished or not, or an SAE of saekit's own format."""
    return (path / CONFIG).is_file() or _holds_sae(path / SAE_CONFIG)


def _holds_sae(config: Path) -> bool:
    """A model's folder has a config.json, too; where the file cannot be read, opening says so."""
    if not config.is_file():
        return False
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return config.with_name(WEIGHTS).is_file()
    return isinstance(values, dict) and "d_sae" in values


def _runs_below(root: Path, folder: Path, depth: int) -> Iterator[str]:
    try:
        entries = list(os.scandir(folder))
    except OSError:  # not ours to read: nothing to show either
        return
    for entry in entries:
        if entry.name.startswith(".") or not entry.is_dir(follow_symlinks=False):
            continue
        path = Path(entry.path)
        if is_run(path):
            yield path.relative_to(root).as_posix()
        elif depth > 1 and entry.name not in _NO_RUNS:
            yield from _runs_below(root, path, depth - 1)
