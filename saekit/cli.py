"""The `saekit` command: flags and TOML files to configs, errors to one paragraph and an exit code.

Each command imports what it needs when it is called, so that `saekit --help` answers at once. The
flags of a command are the fields of its arguments below and of the config that they hold. Exit
codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from saekit import __version__
from saekit.errors import ConfigError, SaekitError, nearest
from saekit.files import disk_full

if TYPE_CHECKING:
    from saekit.activations_cache.store import ActivationCache
    from saekit.config import Config
    from saekit.results import EvalResult


@dataclass(frozen=True, kw_only=True)
class _Args:
    """What a command takes. The docstring is its help, that under a field the flag's."""


@dataclass(frozen=True, kw_only=True)
class _ConfigArgs(_Args):
    """What a command takes that holds a config, whose fields stand among its own flags."""

    config: Any = None


_T = TypeVar("_T", bound=_Args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="saekit",
        description="Find and study the features inside transformers with sparse autoencoders.",
        epilog="saekit COMMAND --help says what a command takes. Start with: saekit demo",
    )
    parser.add_argument("--version", action="version", version=f"saekit {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        commands.add_parser(name, help=command.__doc__, add_help=False)
    args, rest = parser.parse_known_args(argv)
    debug = args.debug or "--debug" in rest
    _show_log()
    try:
        _COMMANDS[args.command]([arg for arg in rest if arg != "--debug"])
        return 0
    except KeyboardInterrupt:
        _complain("interrupted: the same command goes on from where it was")
        return 130
    except SaekitError as error:
        if debug:
            raise
        _complain(str(error))
        return error.exit_code
    except Exception as error:
        if debug:
            raise
        if disk_full(error):
            _complain("no space left on the disk: make room, then give the same command again")
        else:
            _complain(
                f"an error that saekit did not foresee: {type(error).__name__}: {error}. The same "
                "command with --debug shows where; please report it"
            )
        return 1


def _show_log() -> None:
    """What saekit logs, on standard error; other libraries keep their own ways."""
    ours = logging.getLogger("saekit")
    ours.setLevel(logging.INFO)
    if not ours.handlers:
        ours.addHandler(logging.StreamHandler())


def _complain(message: str) -> None:
    print(f"saekit: {message}", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class DemoArgs(_Args):
    """Harvest, train, evaluate and report on the embedded model: the whole path, offline."""

    out: Path = Path("demo_run")
    """Folder for everything that the demo makes."""

    harvest_tokens: int = 1_500_000
    """Tokens of the standard library to harvest."""

    train_tokens: int = 4_000_000
    """Activations to train on; they are read more than once."""


def _demo(argv: list[str]) -> None:
    """run the whole path on the embedded model: activations, SAE, metrics, report"""
    args = _parse(DemoArgs, argv, "demo")
    from saekit.activations_cache.harvest import HarvestConfig, harvest
    from saekit.checkpoint import fingerprint
    from saekit.dashboard.report import write_report
    from saekit.evals._base import evaluate
    from saekit.results import RESULTS, EvalResult
    from saekit.trainers._loop import train
    from saekit.trainers.topk import TopKConfig

    run = args.out / "run"
    what = HarvestConfig(hooks=("resid_post.1",), n_tokens=args.harvest_tokens)
    how = TopKConfig(d_sae=4096, k=32, n_tokens=args.train_tokens, lr=2e-3, dead_after=200_000)
    print("1/4  harvest: the embedded language model reads this Python's standard library")
    cache = harvest(what, args.out / "cache", progress=True)
    print(f"     {cache.n_rows:,} activations of {len(cache.documents):,} documents")
    print(f"2/4  train: a TopK SAE of {how.d_sae:,} latents, {how.k} of them active a token")
    sae = train(how, cache, out=run, progress=True)
    print("3/4  evaluate: on documents that training never saw")
    for name in ("core", "examples"):
        if not (run / RESULTS / f"{name}.json").exists() or (
            EvalResult.load(run / RESULTS, name).sae_fingerprint != fingerprint(sae)
        ):
            evaluate(name, sae, cache, out=run / RESULTS, progress=True)
    _print_metrics(EvalResult.load(run / RESULTS, "core"))
    print("4/4  report")
    print(f"     {write_report(run)}\n\nBrowse the features: saekit dashboard {run}")


@dataclass(frozen=True, kw_only=True)
class HarvestArgs(_ConfigArgs):
    """Run a language model over text and keep its activations on disk."""

    out: Path
    """Folder of the cache. A harvest that was stopped goes on with the same command."""


def _harvest(argv: list[str]) -> None:
    """run a language model over text and keep its activations on disk"""
    from saekit.activations_cache.harvest import HarvestConfig, harvest

    argv, given = _toml(argv)
    args = _parse(HarvestArgs, argv, "harvest", HarvestConfig, given)
    cache = harvest(args.config, args.out, progress=True)
    widths = ", ".join(f"{hook} ({width})" for hook, width in cache.hooks.items())
    print(f"{args.out}: {cache.n_rows:,} rows at {widths}")
    hook = next(iter(cache.hooks))
    print(f"Next: saekit train topk --cache {args.out} --hook {hook} --out RUN")


@dataclass(frozen=True, kw_only=True)
class PlanArgs(_ConfigArgs):
    """Say what a harvest will take: room on disk, memory and time. Takes the flags of harvest."""

    out: Path
    """Folder that the cache would lie in. Nothing is written."""
    seconds: float = 10.0
    """How long to measure the speed."""


def _plan(argv: list[str]) -> None:
    """say what a harvest will take: disk, memory, time"""
    from rich.filesize import decimal

    from saekit.activations_cache.harvest import HarvestConfig
    from saekit.activations_cache.plan import plan

    argv, given = _toml(argv)
    args = _parse(PlanArgs, argv, "plan", HarvestConfig, given)
    planned = plan(args.config, args.out, seconds=args.seconds)
    sizes = {f"disk: {name}": size for name, size in planned.disk.items()}
    sizes |= {
        "disk: all": sum(planned.disk.values()),
        "disk: free": planned.free,
        "memory: the model's weights": planned.model,
        "memory: one shard": planned.shard,
    }
    _print_table(
        {
            "rows": f"{planned.rows:,} at most",
            **{name: decimal(size) for name, size in sizes.items()},
            "speed": f"{planned.tokens_per_s:,.0f} tokens/s",
            "time": f"{timedelta(seconds=round(planned.seconds))}",
        },
        "harvest",
    )
    if not planned.fits:
        raise SaekitError(
            "this does not fit on the disk: lower --n-tokens, name fewer --hooks, or another --out"
        )


@dataclass(frozen=True, kw_only=True)
class TrainArgs(_ConfigArgs):
    """Fit a sparse autoencoder to cached activations."""

    out: Path
    """Folder of the run. A run that was stopped goes on with the same command."""
    cache: Path | None = None
    """Activation cache to train on. Where none is given, --model and --dataset are harvested
    first, into a folder beside the run."""
    hook: str | None = None
    """Hook point; may be left out where the cache holds one."""
    model: str = "demo"
    """Language model to harvest where no cache is given."""
    dataset: str = "demo"
    """Corpus to harvest where no cache is given."""
    harvest_tokens: int = 1_000_000
    """Tokens to harvest where no cache is given."""
    device: str = "auto"
    """Where to train: "auto" is a GPU where there is one."""


def _train(argv: list[str]) -> None:
    """fit a sparse autoencoder: saekit train KIND [CONFIG.toml] [flags]"""
    from saekit.activations_cache.harvest import HarvestConfig, harvest, resolve_device
    from saekit.activations_cache.store import ActivationCache
    from saekit.trainers import _kinds
    from saekit.trainers._loop import train

    name, argv = _choice(argv, "train", "KIND", _kinds.names())
    argv, given = _toml(argv)
    if given.pop("kind", name) != name:
        raise ConfigError(f"the TOML file is of another kind of SAE than '{name}'")
    given.pop("cache_fingerprint", None)
    config = _kinds.kind(name).Config
    args = _parse(TrainArgs, argv, f"train {name}", config, given)
    if args.cache is not None:
        cache = ActivationCache.open(args.cache)
    elif args.hook is None:
        raise ConfigError(
            "give --cache CACHE, or --hook HOOK to harvest (with --model and --dataset)"
        )
    else:
        wanted = HarvestConfig(
            model=args.model, dataset=args.dataset, hooks=(args.hook,), n_tokens=args.harvest_tokens
        )
        cache = harvest(wanted, args.out.with_name(f"{args.out.name}-cache"), progress=True)
    train(
        args.config,
        cache,
        hook=args.hook,
        out=args.out,
        device=resolve_device(args.device),
        progress=True,
    )
    print(f"{args.out}: a {name} SAE of {args.config.d_sae:,} latents")
    print(f"Next: saekit eval core --sae {args.out}")


@dataclass(frozen=True, kw_only=True)
class EvalArgs(_ConfigArgs):
    """Evaluate a sparse autoencoder on a cache, by default on documents that training never saw."""

    sae: Path
    """Folder of the SAE: a run."""
    cache: Path | None = None
    """Activation cache; the one that the run was trained on where none is given."""
    hook: str | None = None
    """Hook point, for an SAE that does not say which it was trained on."""
    out: Path | None = None
    """Folder for the result; `results` inside the SAE's folder where none is given."""


def _eval(argv: list[str]) -> None:
    """evaluate an SAE: saekit eval NAME --sae RUN"""
    from saekit.checkpoint import load
    from saekit.evals import _kinds
    from saekit.evals._base import evaluate
    from saekit.results import RESULTS

    name, argv = _choice(argv, "eval", "NAME", _kinds.names())
    argv, given = _toml(argv)
    config = _kinds.find(name).Config
    args = _parse(EvalArgs, argv, f"eval {name}", config, given)
    sae = load(args.sae)
    cache = _cache_of(args.sae, args.cache)
    out = args.out or args.sae / RESULTS
    result = evaluate(name, sae, cache, hook=args.hook, config=args.config, out=out, progress=True)
    _print_metrics(result)
    print(f"{out / name}.json\nNext: saekit report {args.sae}, or saekit dashboard {args.sae}")


@dataclass(frozen=True, kw_only=True)
class ReportArgs(_Args):
    """Write a run's report: one HTML file that needs no network, and the same in Markdown beside
    it."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, with its results."""
    out: Path | None = None
    """The HTML file; `report.html` in the run's folder where none is given."""


def _report(argv: list[str]) -> None:
    """write a run's report as HTML and Markdown"""
    args = _parse(ReportArgs, argv, "report")
    from saekit.dashboard.report import write_report

    print(write_report(args.run, args.out))


@dataclass(frozen=True, kw_only=True)
class DashboardArgs(_Args):
    """Open the feature browser on a run, in the web browser."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    port: int = 8501
    """Port to serve on, at localhost."""
    headless: bool = False
    """Serve, without opening a web browser."""


def _dashboard(argv: list[str]) -> None:
    """browse a run's features in the web browser"""
    args = _parse(DashboardArgs, argv, "dashboard")
    from saekit.dashboard.server import serve

    if code := serve(args.run, port=args.port, headless=args.headless):
        raise SaekitError(f"the feature browser's server ended with exit code {code}")


@dataclass(frozen=True, kw_only=True)
class VerifyArgs(_Args):
    """Read a cache again and compare every shard with its checksum."""

    cache: tyro.conf.Positional[Path]
    """Folder of the cache."""


def _verify(argv: list[str]) -> None:
    """compare every shard of a cache with its checksum"""
    args = _parse(VerifyArgs, argv, "verify")
    from saekit.activations_cache.store import ActivationCache

    cache = ActivationCache.open(args.cache)
    cache.verify(progress=True)
    print(f"{args.cache}: {len(cache.manifest.shards)} shards and {cache.n_rows:,} rows are whole")


@dataclass(frozen=True, kw_only=True)
class InspectArgs(_Args):
    """Say what something is: a model's hook points, what a cache holds, what an SAE was made
    from."""

    what: tyro.conf.Positional[str]
    """A model ("demo", a folder, a hub id), a cache, or a run."""


def _inspect(argv: list[str]) -> None:
    """list a model's hook points, or say what a cache or a run holds"""
    args = _parse(InspectArgs, argv, "inspect")
    from saekit import checkpoint
    from saekit.activations_cache import manifest
    from saekit.activations_cache.model import LanguageModel

    folder = Path(args.what)
    if (folder / manifest.NAME).exists():
        held = manifest.Manifest.load(folder)
        state = "complete" if held.complete else "not complete"
        rows = {"rows": f"{held.n_rows:,} ({state})", "shards": len(held.shards)}
        _print_table({**rows, "fingerprint": held.fingerprint, **held.config}, "cache")
        _print_table(held.hooks, "hook point", "width")
    elif (folder / checkpoint.CONFIG).exists() and not (folder / "tokenizer.json").exists():
        config = checkpoint.read_config(folder)
        provenance = config.pop("provenance") or {}
        _print_table({**config, **provenance, **provenance.get("config", {})}, "SAE")
    else:
        _print_table(LanguageModel.load(args.what).widths(), "hook point", "width")


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": _demo,
    "plan": _plan,
    "harvest": _harvest,
    "train": _train,
    "eval": _eval,
    "report": _report,
    "dashboard": _dashboard,
    "inspect": _inspect,
    "verify": _verify,
}


def _parse(
    args: type[_T],
    argv: list[str],
    command: str,
    config: "type[Config] | None" = None,
    given: dict[str, Any] | None = None,
) -> _T:
    """Flags to arguments, the fields of `config` among them.

    `given` are values from a TOML file, for the arguments' own fields or the config's; flags
    override them.
    """
    given = given or {}
    own = [f.name for f in fields(args) if f.name != "config"]
    flags = [part for key in own if key in given for part in (f"--{key}", str(given[key]))]
    if config is not None:
        _refuse_unknown(given, [*own, *(f.name for f in fields(config))])
        default = config.from_dict({key: given[key] for key in given if key not in own})
        held = ("config", Annotated[config, tyro.conf.arg(name="")], field(default=default))
        documented = {"__doc__": args.__doc__}
        args = make_dataclass(
            args.__name__, [held], bases=(args,), namespace=documented, frozen=True, kw_only=True
        )
    return tyro.cli(args, args=[*flags, *argv], prog=f"saekit {command}")


def _refuse_unknown(given: dict[str, Any], known: list[str]) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"the TOML file has an unknown key '{key}'; {nearest(key, known)}")


def _toml(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take a leading TOML file off the arguments; returns the rest and what the file says."""
    if not argv or not argv[0].endswith(".toml"):
        return argv, {}
    from saekit.config import read_toml

    return argv[1:], read_toml(Path(argv[0]))


def _choice(argv: list[str], command: str, what: str, known: list[str]) -> tuple[str, list[str]]:
    """Take the leading word off the arguments, which must be one of `known`."""
    if argv and not argv[0].startswith("-"):
        return argv[0], argv[1:]
    usage = (
        f"usage: saekit {command} {what} [flags]; {what} is one of: {', '.join(known)}. `saekit "
        f"{command} {known[0]} --help` lists the flags"
    )
    if argv and argv[0] in ("-h", "--help"):
        print(usage)
        sys.exit(0)
    raise ConfigError(usage)


def _cache_of(sae: Path, given: Path | None) -> "ActivationCache":
    """The cache to evaluate on: the one given, or the one that the run was trained on."""
    from saekit.activations_cache.store import ActivationCache
    from saekit.config import read_toml

    if given is not None:
        return ActivationCache.open(given)
    run = sae / "config.toml"
    if not run.exists():
        raise ConfigError(f"{sae} does not say which cache it was trained on: give --cache CACHE")
    return ActivationCache.open(read_toml(run)["cache"])


def _print_metrics(result: "EvalResult") -> None:
    named = {name: f"{metric.value:.4g}" for name, metric in result.metrics.items()}
    _print_table(named, result.eval, f"{result.split} split")


def _print_table(rows: dict[str, Any], *headings: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*headings, *[""] * (2 - len(headings)))
    for name, value in rows.items():
        table.add_row(name, str(value))
    Console().print(table)
