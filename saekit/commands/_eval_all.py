"""Every evaluation of any number of SAEs: saekit eval all --sae RUN [RUN ...]

One that does not fit an SAE is left out, one that fails does not stop the others, and a result that
is there already is kept, so that the same command goes on where it was stopped.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from safetensors import SafetensorError

from saekit.commands._shared import Args, parse, print_table, toml
from saekit.errors import ConfigError, SaekitError, first_line, nearest
from saekit.features import FeatureStore
from saekit.results import CONTROLS, RESULTS, Control, EvalResult, Provenance

if TYPE_CHECKING:
    from saekit.activations_cache.store import ActivationCache
    from saekit.sae import SAE

log = logging.getLogger(__name__)

FOR_CONTROLS = ("core", "dark_matter", "geometry")
"""Evaluations that controls are put to: what these measure is there without learning, too."""

_FIRST = ("core", "examples")
"""What a report needs."""

_FREE = ("device", "batch_size")
"""Keys of a config that do not change what is found."""

_SEEDS = ("seed", "shuffle_seed")


@dataclass(frozen=True, kw_only=True)
class EvalAllArgs(Args):
    """Run every evaluation that fits on each SAE, by default on documents that training never saw.

    Results that are there already, of the same SAE, cache and config, are kept. A TOML file before
    the flags may hold a config for each evaluation, in tables [core], [firing] and so on."""

    sae: tuple[Path, ...]
    """Folders of the SAEs: runs. Results go into the folder `results` of each."""
    cache: str | None = None
    """Activation cache for all of them, a folder or a URL. Where none is given, each is evaluated
    on the one that it was trained on, or if that is shuffled the one that it was made from."""
    hook: str | None = None
    """Hook point, for SAEs that do not say which they were trained on."""
    only: tuple[str, ...] = ()
    """Evaluations to run; all where none is given."""
    controls: bool = False
    """Evaluate controls of each SAE too (random directions, the same encoded by matching pursuit,
    principal components, neurons), by core, dark_matter and geometry, into
    `results/controls/NAME`."""
    device: str = "auto"
    """Where SAE and model run: "auto" is a GPU where there is one."""


Status = Literal["done", "kept", "left out", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What became of one evaluation of one SAE."""

    sae: Path
    what: str
    status: Status
    note: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.status}" + (f", {self.note}" if self.note else "")


def run(argv: list[str]) -> None:
    argv, tables = toml(argv)
    plan = _Plan.of(parse(EvalAllArgs, argv, "eval all"), tables)
    outcomes: list[Outcome] = []
    for number, path in enumerate(plan.origins, 1):
        log.info("SAE %d of %d: %s", number, len(plan.origins), path)
        for outcome in plan.outcomes(path):
            log.info("  %s", outcome)
            outcomes.append(outcome)
    _print_summary(outcomes)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if failed:
        listed = "\n".join(f"    {one.sae}, {one.what}: {one.note}" for one in failed)
        raise SaekitError(
            f"{len(failed)} of {len(outcomes)} evaluations failed; what the others found is kept, "
            f"and the same command tries these again:\n{listed}"
        )
    print(f"Next: saekit report {' '.join(map(str, plan.origins))}")


def _print_summary(outcomes: Sequence[Outcome]) -> None:
    """How many evaluations of each SAE ended how; and why some gave nothing."""
    counts = Counter((outcome.sae, outcome.status) for outcome in outcomes)
    saes = dict.fromkeys(outcome.sae for outcome in outcomes)
    statuses = get_args(Status)
    print_table(
        ["SAE", *statuses],
        [(sae, *(counts[sae, status] or "" for status in statuses)) for sae in saes],
    )
    without: dict[tuple[str, str, str], list[str]] = {}
    for outcome in outcomes:
        if outcome.status in ("left out", "failed"):
            key = outcome.what, outcome.status, outcome.note
            without.setdefault(key, []).append(str(outcome.sae))
    if without:
        print_table(
            ["evaluation", "", "why", "SAEs"],
            [
                (*key, "all" if len(of) == len(saes) else ", ".join(of))
                for key, of in without.items()
            ],
        )


@dataclass(frozen=True)
class _Plan:
    args: EvalAllArgs
    origins: Mapping[Path, Provenance | None]
    """The SAEs, and what each was made from."""
    kinds: Mapping[str, Any]
    """The evaluations to run, and their classes."""
    absent: Mapping[str, str]
    """Those that cannot be run here, and why."""
    tables: Mapping[str, dict[str, Any]]
    """What the TOML file says of each."""

    @classmethod
    def of(cls, args: EvalAllArgs, tables: dict[str, Any]) -> "_Plan":
        """Raises what is wrong with folders, names and configs before anything is computed."""
        from saekit.checkpoint import read_config
        from saekit.evals import _kinds

        if not args.sae:
            raise ConfigError("--sae names no SAE: give the folders of one or more")
        origins = {}
        for path in args.sae:
            origin = read_config(path)["provenance"]
            origins[path] = Provenance.from_dict(origin) if origin else None
        known = _kinds.names()
        for name in (*tables, *args.only):
            if name not in known:
                raise ConfigError(f"there is no evaluation '{name}'; {nearest(name, known)}")
        for name, values in tables.items():
            if not isinstance(values, dict):
                raise ConfigError(
                    f"'{name}' is no table in the TOML file: give a config as [{name}], and the "
                    "keys under it"
                )
        kinds, absent = {}, {}
        for name in sorted(args.only or known, key=lambda name: (name not in _FIRST, name)):
            try:
                kinds[name] = _kinds.find(name)
            except ImportError as error:
                absent[name] = f"it needs what is not installed: {first_line(error)}"
        plan = cls(args, origins, kinds, absent, tables)
        for name, kind in kinds.items():
            plan.config(name, kind)
        return plan

    def config(self, name: str, kind: Any, more: Mapping[str, Any] | None = None) -> Any:
        """Of an evaluation: what the file says, `more` where it is silent."""
        given = self.tables.get(name, {})
        return kind.Config.from_dict({"device": self.args.device, **(more or {}), **given})

    def outcomes(self, path: Path) -> Iterator[Outcome]:
        """Evaluate one SAE, and say what became of each evaluation as it ends."""
        try:
            sae, cache, hook = self._open(path)
        except Exception as error:
            yield Outcome(path, "all", "failed", _reason(error))
            return
        for name, reason in self.absent.items():
            yield Outcome(path, name, "left out", reason)
        for name, kind in self.kinds.items():
            try:
                more = self._of_run(path, name, kind)
                reason = kind.misfit(cache, hook)
            except ConfigError as error:
                more, reason = {}, str(error)
            if reason is None:
                config = self.config(name, kind, more)
                yield self._measure(path, name, name, config, sae, cache, hook, path / RESULTS)
            else:
                yield Outcome(path, name, "left out", reason)
        if self.args.controls:
            yield from self._controls(path, sae, cache, hook)

    def _open(self, path: Path) -> "tuple[SAE, ActivationCache, str]":
        from saekit.activations_cache.store import ActivationCache
        from saekit.checkpoint import load
        from saekit.commands.eval import cache_of
        from saekit.evals._base import matching_hook

        sae, given = load(path), self.args
        cache = cache_of(path) if given.cache is None else ActivationCache.open(given.cache)
        return sae, cache, matching_hook(sae, cache, given.hook if not sae.provenance else None)

    def _of_run(self, path: Path, name: str, kind: Any) -> dict[str, Any]:
        """What an evaluation asks for that this command knows: the run, and SAEs like it.

        Raises ConfigError where there are none, and the evaluation compares with them.
        """
        from saekit.evals._firing_life import FILE

        asks = {field.name for field in fields(kind.Config)}
        known: dict[str, Any] = {}
        if "run_folder" in asks and (path / FILE).exists():
            known["run_folder"] = str(path)
        if "against" in asks:
            known["against"] = [str(other) for other in self._twins(path)]
            if not known["against"] and "against" not in self.tables.get(name, {}):
                raise ConfigError(
                    "it compares SAEs, and no other of those given differs from this one in its "
                    f"seed alone: name some in a TOML file, [{name}] against = [...]"
                )
        return known

    def _twins(self, path: Path) -> list[Path]:
        """The SAEs given whose training differed from this one's by the seed alone."""

        def made(origin: Provenance) -> tuple[Any, ...]:
            config = {key: value for key, value in origin.config.items() if key not in _SEEDS}
            return origin.kind, origin.hook, origin.cache_fingerprint, config

        own = self.origins[path]
        return [
            other
            for other, origin in self.origins.items()
            if other != path and own and origin and made(origin) == made(own)
        ]

    def _measure(
        self,
        path: Path,
        name: str,
        what: str,
        config: Any,
        sae: "SAE",
        cache: "ActivationCache",
        hook: str,
        out: Path,
    ) -> Outcome:
        from saekit.checkpoint import fingerprint
        from saekit.evals._base import evaluate

        if is_there(out, name, fingerprint(sae), cache.fingerprint, config.to_dict()):
            return Outcome(path, what, "kept")
        start = time.perf_counter()
        try:
            evaluate(name, sae, cache, hook=hook, config=config, out=out, progress=True)
        except Exception as error:
            # The configs are right in themselves: such an error says that SAE and evaluation do not
            # go together. Where the user set something it may be that.
            fits = name in self.tables or not isinstance(error, ConfigError)
            return Outcome(path, what, "failed" if fits else "left out", _reason(error))
        return Outcome(path, what, "done", f"{time.perf_counter() - start:.0f} s")

    def _controls(
        self, path: Path, sae: "SAE", cache: "ActivationCache", hook: str
    ) -> Iterator[Outcome]:
        from saekit.checkpoint import fingerprint
        from saekit.evals._controls import NAMES, controls, l0_of, misfits

        try:
            made = controls(sae, cache, hook)
            unfit = misfits(sae, l0_of(sae, cache, hook)) if len(made) < len(NAMES) else {}
        except Exception as error:
            yield Outcome(path, "controls", "failed", _reason(error))
            return
        for name, reason in unfit.items():
            yield Outcome(path, f"{name} control", "left out", reason)
        for name, control in made.items():
            out = path / RESULTS / CONTROLS / name
            assert control.provenance is not None
            Control(
                name=name,
                of=fingerprint(sae),
                sae_fingerprint=fingerprint(control),
                d_sae=control.d_sae,
                provenance=control.provenance,
            ).save(out)
            for one in FOR_CONTROLS:
                if one in self.kinds:
                    config = self.config(one, self.kinds[one])
                    what = f"{one}, {name} control"
                    yield self._measure(path, one, what, config, control, cache, hook, out)


def is_there(out: Path, name: str, sae: str, cache: str, config: Mapping[str, Any]) -> bool:
    """Whether `out` holds what the evaluation would find now."""
    try:
        found = EvalResult.load(out, name)
        # `examples` alone writes what it finds into files of its own.
        of = FeatureStore.open(out).header.sae_fingerprint if name == "examples" else sae
    except (SaekitError, OSError, ValueError, TypeError, KeyError, SafetensorError):
        return False
    return (found.sae_fingerprint, of, found.cache_fingerprint) == (sae, sae, cache) and _deciding(
        found.config
    ) == _deciding(config)


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _FREE}


def _reason(error: Exception) -> str:
    if isinstance(error, SaekitError):
        return str(error)
    log.error("an error that saekit did not foresee", exc_info=error)
    return f"an error that saekit did not foresee: {type(error).__name__}: {first_line(error)}"
