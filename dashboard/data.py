"""What a run's folder holds, read for people: curves, metrics, and each latent's examples as text.

Reading alone: no torch, no streamlit, no figures. Axes: d_sae (latents), context (examples of one
latent, strongest first), window (tokens of one example), step (lines of the training log).
"""

import json
import shlex
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from safetensors import SafetensorError

from saekit.config import read_toml
from saekit.errors import SaekitError
from saekit.results import RESULTS, EvalResult, LatentExamples, Provenance

CONFIG, LOG, SAE_CONFIG, TRAIN_STATE = "config.toml", "metrics.jsonl", "config.json", "train_state"

# Evaluation -> the file, without its ending, that holds what is read of it here.
_FILES = {"core": "core", "examples": LatentExamples.NAME}

Where = Literal["fires on", "contexts", "promotes"]
Show = Literal["alive", "dead", "all"]
SortBy = Literal["density", "maximum", "latent"]
Result = TypeVar("Result")


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
    examples: LatentExamples | None

    @classmethod
    def open(cls, path: Path | str, *, with_examples: bool = True) -> "Run":
        """Read everything the folder holds; the examples, which are large, only where asked for.

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
            core=_read_result(path, "core", lambda folder: EvalResult.load(folder, "core")),
            examples=_read_result(path, "examples", LatentExamples.load) if with_examples else None,
        )
        run._check_results_belong()
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
    def table(self) -> dict[str, ndarray]:
        """See `latent_table`; empty without examples."""
        return latent_table(self.examples) if self.examples else {}

    def missing(self) -> list[str]:
        """The commands that still have to be given before a report can be written, in order."""
        if self.training:
            config, out = shlex.quote(str(self.path / CONFIG)), shlex.quote(str(self.path))
            return [f"saekit train {self.kind} {config} --out {out}"]
        absent = [name for name in ("core", "examples") if getattr(self, name) is None]
        return [eval_command(name, self.path) for name in absent]

    def _check_results_belong(self) -> None:
        for name, result in (("core", self.core), ("examples", self.examples)):
            made_with = result.sae_fingerprint if result else None
            if made_with and self.fingerprint and made_with != self.fingerprint:
                raise SaekitError(
                    f"{self.path / RESULTS / _FILES[name]}.json was measured on weights "
                    f"{made_with[:12]}..., the run now holds {self.fingerprint[:12]}...: it was "
                    f"trained again since. Measure again: `{eval_command(name, self.path)}`"
                )
        if self.examples is not None and self.d_sae not in (None, len(self.examples.density)):
            raise SaekitError(
                f"{self.path / RESULTS / _FILES['examples']}.json tells of "
                f"{len(self.examples.density)} latents, the SAE has {self.d_sae}. Measure again: "
                f"`{eval_command('examples', self.path)}`"
            )


def eval_command(name: str, path: Path) -> str:
    """The command that writes the named results into the run."""
    return f"saekit eval {name} --sae {shlex.quote(str(path))}"


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
    spans: list[Span]


@dataclass(frozen=True)
class TokenLogit:
    """An output token and how much a latent's decoder direction raises (or lowers) its logit."""

    name: str
    logit: float


def contexts(examples: LatentExamples, latent: int, limit: int | None = None) -> list[Context]:
    """The latent's examples, strongest first; empty slots and padding left out."""
    found = []
    for slot in np.flatnonzero(examples.peak[latent] > 0)[:limit]:
        tokens, acts = examples.tokens[latent, slot], examples.acts[latent, slot]
        peak_at = examples.peak_at[latent, slot]
        spans = [
            Span(show_token(examples.vocab[token]), float(acts[at]), bool(at == peak_at))
            for at, token in enumerate(tokens)
            if token >= 0
        ]
        document = examples.documents[examples.document[latent, slot]]
        found.append(Context(document, float(examples.peak[latent, slot]), spans))
    return found


def promoted(examples: LatentExamples, latent: int) -> list[TokenLogit]:
    """Output tokens the latent raises most, first the most; empty where it writes to none."""
    return _token_logits(examples, examples.promoted[latent], examples.promoted_logit[latent])


def suppressed(examples: LatentExamples, latent: int) -> list[TokenLogit]:
    """Output tokens the latent lowers most, first the most."""
    return _token_logits(examples, examples.suppressed[latent], examples.suppressed_logit[latent])


def is_dead(examples: LatentExamples) -> Bool[ndarray, " d_sae"]:
    """Latents that fired on none of the rows looked at."""
    return examples.density <= 0


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


def latent_table(examples: LatentExamples) -> dict[str, ndarray]:
    """One row a latent: its numbers, the tokens it fires on, those it promotes."""
    names = np.array([name_token(text) for text in examples.vocab] + [""], dtype=object)
    peaks = peak_tokens(examples)
    return {
        "latent": np.arange(len(examples.density)),
        "density": examples.density,
        "maximum": examples.maximum,
        "fires on": np.array([_few(names[row]) for row in peaks], dtype=object),
        "promotes": np.array([_few(names[row]) for row in examples.promoted], dtype=object),
    }


def peak_tokens(examples: LatentExamples) -> Int[ndarray, "d_sae context"]:
    """The token under the strongest activation of each example; -1 for an empty slot."""
    at = examples.peak_at[..., None].astype(np.int64)
    tokens = np.take_along_axis(examples.tokens, at, axis=2)[..., 0]
    return np.where(examples.peak > 0, tokens, -1)


def select(
    examples: LatentExamples,
    *,
    show: Show = "alive",
    query: str = "",
    where: Where = "contexts",
    density: tuple[float, float] = (0.0, 1.0),
    sort_by: SortBy = "density",
    descending: bool = True,
) -> Int[ndarray, " found"]:
    """The latents that pass every filter, in order. `density` bounds are inclusive."""
    dead = is_dead(examples)
    keep = {"alive": ~dead, "dead": dead, "all": np.ones_like(dead)}[show]
    inside = (examples.density >= density[0]) & (examples.density <= density[1])
    keep = keep & (inside | dead)
    if query:
        keep &= search(examples, query, where)
    found = np.flatnonzero(keep)
    keys = {"density": examples.density, "maximum": examples.maximum}
    values = keys[sort_by][found] if sort_by in keys else found
    return found[np.argsort(-values if descending else values, kind="stable")]


def search(examples: LatentExamples, query: str, where: Where) -> Bool[ndarray, " d_sae"]:
    """Latents with `query` (any case) in a token they fire on or promote, or in their contexts.

    A query in contexts may run over several tokens; elsewhere it must lie within one.
    """
    wanted = query.casefold()
    if where == "contexts":
        vocab = np.array([text.casefold() for text in examples.vocab] + [""], dtype=object)
        found = [_in_contexts(vocab, tokens, wanted) for tokens in examples.tokens]
        return np.array(found, dtype=bool)
    matches = np.array([wanted in text.casefold() for text in examples.vocab] + [False])
    tokens = peak_tokens(examples) if where == "fires on" else examples.promoted
    return np.asarray(matches[tokens].any(axis=1))


def sample_latents(examples: LatentExamples, n: int, seed: int) -> list[int]:
    """A fair sample of the latents that fire: one drawn at random from each of `n` equal groups by
    density, the densest group first. All of them where there are no more than `n`.
    """
    alive = select(examples)
    rng = np.random.default_rng(seed)
    groups = np.array_split(alive, min(n, len(alive))) if len(alive) and n > 0 else []
    return [int(rng.choice(group)) for group in groups]


_SHOWN = {"\n": "↵", "\r": "␍", "\t": "→", " ": " "}


def _spell(char: str) -> str:
    hidden = unicodedata.category(char) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")
    return f"\\u{ord(char):04x}" if hidden else char


def _few(names: ndarray, limit: int = 5) -> str:
    distinct = dict.fromkeys(name for name in names if name)
    return "  ".join(list(distinct)[:limit])


def _in_contexts(vocab: ndarray, tokens: Int[ndarray, "context window"], wanted: str) -> bool:
    return any(wanted in "".join(vocab[window]) for window in tokens)


def _token_logits(examples: LatentExamples, tokens: ndarray, logits: ndarray) -> list[TokenLogit]:
    return [
        TokenLogit(name_token(examples.vocab[token]), float(logit))
        for token, logit in zip(tokens, logits, strict=True)
        if token >= 0
    ]


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


def _read_result(path: Path, name: str, load: Callable[[Path], Result]) -> Result | None:
    """What the named evaluation found; None where it has not been run."""
    file = path / RESULTS / _FILES[name]
    if not file.with_suffix(".json").is_file():
        return None
    try:
        return load(file.parent)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise SaekitError(
            f"{file}.json or .safetensors cannot be read ({error}); write both again: "
            f"`{eval_command(name, path)}`"
        ) from error
