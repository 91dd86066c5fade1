"""What a run's folder holds, read for people: curves, metrics, and where the features are.

Reading alone: no torch, no streamlit, no figures. Axes: step (lines of the training log).
"""

import json
import shlex
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from safetensors import SafetensorError

from saekit import features
from saekit.config import read_toml
from saekit.errors import SaekitError
from saekit.features import FeatureStore
from saekit.results import RESULTS, EvalResult, Provenance

CONFIG, LOG, SAE_CONFIG, TRAIN_STATE = "config.toml", "metrics.jsonl", "config.json", "train_state"


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One training run and what was measured on it. Whatever is not there yet is None or empty."""

    path: Path
    config: dict[str, Any]
    """The training config with `kind`, `cache` and `hook`; empty for an SAE without provenance."""
    curves: dict[str, Float[ndarray, " step"]]
    """Columns of the training log, in order of steps; NaN where a line lacks the key."""
    d_sae: int | None
    fingerprint: str | None
    """Of the finished SAE's weights; None while it is being trained."""
    provenance: Provenance | None
    core: EvalResult | None

    @classmethod
    def open(cls, path: Path | str) -> "Run":
        """Read everything the folder holds; the feature store, which is large, is only looked into.

        Raises SaekitError where it is no run, where a file in it cannot be read, and where its
        results are of other weights than those that now lie beside them.
        """
        path = Path(path)
        if not ((path / CONFIG).is_file() or (path / SAE_CONFIG).is_file()):
            what = (
                f"it holds neither {CONFIG} (written when training starts) nor {SAE_CONFIG} "
                "(written when it ends)"
                if path.is_dir()
                else "there is no such folder"
            )
            raise SaekitError(
                f"{path} is no run: {what}. Give the folder that `saekit train ... --out` wrote"
            )
        sae = _read_object(path / SAE_CONFIG)
        origin = sae.get("provenance")
        provenance = Provenance.from_dict(origin) if origin else None
        config = read_toml(path / CONFIG) if (path / CONFIG).is_file() else {}
        run = cls(
            path=path,
            config=config or (dict(provenance.config) if provenance else {}),
            curves=read_log(path / LOG),
            d_sae=sae.get("d_sae", config.get("d_sae")),
            fingerprint=sae.get("fingerprint"),
            provenance=provenance,
            core=read_result(path, "core"),
        )
        if run.core is not None:
            run._check_belongs(run.core.sae_fingerprint, f"{RESULTS}/core.json", "core")
        return run

    @property
    def kind(self) -> str:
        return str(
            self.config.get("kind") or (self.provenance.kind if self.provenance else "unknown")
        )

    @property
    def hook(self) -> str:
        return str(
            self.config.get("hook") or (self.provenance.hook if self.provenance else "unknown")
        )

    @property
    def model(self) -> str:
        return self.provenance.model if self.provenance else "unknown until training ends"

    @property
    def training(self) -> bool:
        """Whether the SAE is not finished: still being trained, or stopped before its end."""
        return self.fingerprint is None

    @cached_property
    def features(self) -> FeatureStore | None:
        """The feature store; None where none was made yet.

        Raises SaekitError where it is damaged, or of other weights than those beside it.
        """
        results, command = self.path / RESULTS, eval_command("examples", self.path)
        if not FeatureStore.exists(results):
            return None
        try:
            store = FeatureStore.open(results)
        except SaekitError as error:
            raise SaekitError(f"{error}; make the store again: `{command}`") from error
        where = f"{RESULTS}/{features.NAME}"
        self._check_belongs(store.header.sae_fingerprint, where, "examples")
        if self.d_sae not in (None, store.d_sae):
            raise SaekitError(
                f"{self.path / where} tells of {store.d_sae} latents, the SAE has {self.d_sae}. "
                f"Make it again: `{command}`"
            )
        return store

    def missing(self) -> list[str]:
        """The commands that still have to be given before a report can be written, in order."""
        if self.training:
            config, out = quote(str(self.path / CONFIG)), quote(str(self.path))
            return [f"saekit train {self.kind} {config} --out {out}"]
        there = {
            "core": self.core is not None,
            "examples": FeatureStore.exists(self.path / RESULTS),
        }
        return [eval_command(name, self.path) for name, found in there.items() if not found]

    def _check_belongs(self, made_with: str | None, where: str, name: str) -> None:
        if made_with and self.fingerprint and made_with != self.fingerprint:
            raise SaekitError(
                f"{self.path / where} was measured on weights {made_with[:12]}..., the run now "
                f"holds {self.fingerprint[:12]}...: it was trained again since. Measure again: "
                f"`{eval_command(name, self.path)}`"
            )


def quote(text: str) -> str:
    """A word of a command, for bash; what would hide or reorder its neighbours is spelled out."""
    if text.isprintable():
        return shlex.quote(text)
    spelled = (
        char if char.isprintable() else f"\\U{ord(char):08x}"
        for char in text.replace("\\", "\\\\").replace("'", "\\'")
    )
    return f"$'{''.join(spelled)}'"


def eval_command(name: str, path: Path) -> str:
    """The command that writes the named results into the run."""
    return f"saekit eval {name} --sae {quote(str(path))}"


def read_log(path: Path) -> dict[str, Float[ndarray, " step"]]:
    """The numbers of a training log by column; empty where there is no log.

    A line that is no JSON is passed over: a run that trains may be in the middle of its last.
    """
    if not path.is_file():
        return {}
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    names = dict.fromkeys(key for line in lines for key in line)
    columns = {name: np.array([_number(line.get(name)) for line in lines]) for name in names}
    return {name: column for name, column in columns.items() if np.isfinite(column).any()}


@dataclass(frozen=True)
class Span:
    """One token of a context, and how strongly the latent fires on it."""

    text: str
    """As shown: see `show_token`."""
    act: float
    is_peak: bool


@dataclass(frozen=True)
class Context:
    """One place where a latent fires: the tokens around its strongest activation there."""

    document: str
    peak: float
    """Activation of the token that the context was picked for."""
    spans: list[Span]
    unexplained: float = float("nan")
    """Share of that token's variance that the SAE leaves in the dark."""


def show_token(text: str) -> str:
    """A token inside running text: line breaks, tabs and what has no shape of its own made visible.

    Controls and direction marks are spelled out: they would reorder or hide their neighbours.
    """
    return "".join(_SHOWN.get(char) or _spell(char) for char in text)


def name_token(text: str) -> str:
    """A token standing alone, in a list or on an axis: spaces at its ends are made visible too."""
    shown = show_token(text)
    head, tail = len(shown) - len(shown.lstrip(" ")), len(shown) - len(shown.rstrip(" "))
    if head == len(shown):
        return "␣" * head or "(empty)"
    return "␣" * head + shown.strip(" ") + "␣" * tail


_SHOWN = {"\n": "↵", "\r": "␍", "\t": "→", " ": " "}


def _spell(char: str) -> str:
    hidden = unicodedata.category(char) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")
    return f"\\u{ord(char):04x}" if hidden else char


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SaekitError(
            f"{path} is not JSON ({error}); copy the run again from its source"
        ) from error
    return values if isinstance(values, dict) else {}


def read_result(path: Path, name: str) -> EvalResult | None:
    """What the named evaluation found; None where it has not been run."""
    file = path / RESULTS / name
    if not file.with_suffix(".json").is_file():
        return None
    try:
        return EvalResult.load(file.parent, name)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise SaekitError(
            f"{file}.json or .safetensors cannot be read ({error}); write both again: "
            f"`{eval_command(name, path)}`"
        ) from error
