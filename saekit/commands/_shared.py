"""What commands share: flags and TOML files to arguments and configs, and tables on the terminal.

The flags of a command are the fields of its arguments and of the config that they hold.
"""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from saekit.commands._help import described, registry
from saekit.errors import ConfigError, nearest

if TYPE_CHECKING:
    from saekit.activations_cache.store import ActivationCache
    from saekit.config import Config
    from saekit.results import EvalResult
    from saekit.sae import SAE


@dataclass(frozen=True, kw_only=True)
class Args:
    """What a command takes. The docstring is its help, that under a field the flag's."""


@dataclass(frozen=True, kw_only=True)
class ConfigArgs(Args):
    """What a command takes that holds a config, whose fields stand among its own flags."""

    config: Any = None


_T = TypeVar("_T", bound=Args)


def parse(
    args: type[_T],
    argv: list[str],
    command: str,
    config: "type[Config] | None" = None,
    given: dict[str, Any] | None = None,
) -> _T:
    """Flags to arguments, the fields of `config` among them.

    `given` are values from a TOML file, for the arguments' own fields or the config's; flags
    override them. Raises ConfigError for a key of the file that is neither.
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
    return tyro.cli(
        args,
        args=[*flags, *argv],
        prog=f"saekit {command}",
        description=described(args.__doc__ or ""),
        registry=registry(),
    )


def _refuse_unknown(given: dict[str, Any], known: list[str]) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"the TOML file has an unknown key '{key}'; {nearest(key, known)}")


def toml(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take a leading TOML file off the arguments; returns the rest and what the file says."""
    if not argv or not argv[0].endswith(".toml"):
        return argv, {}
    from saekit.config import read_toml

    return argv[1:], read_toml(Path(argv[0]))


def evaluated(
    name: str, sae: "SAE", cache: "ActivationCache", hook: str | None, config: Any, out: Path
) -> bool:
    """Run an evaluation by all processes that torchrun started, or by this one, and print what it
    found. Whether this is the process that says what comes next."""
    from saekit.activations_cache.job import resolve_device
    from saekit.distributed import connect, disconnect, place
    from saekit.evals._base import evaluate

    rank, ranks = place()
    mesh = connect((ranks, 1), resolve_device(config.device))
    result = evaluate(
        name, sae, cache, hook=hook, config=config, out=out, progress=rank == 0, mesh=mesh
    )
    disconnect()
    if rank == 0:
        print_metrics(result)
    return rank == 0


def refuse_several(command: str) -> None:
    """Raises ConfigError where torchrun started several processes, all of which would do the whole
    work."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    # It imports torch.
    from saekit.distributed import place

    _, ranks = place()
    if ranks > 1:
        raise ConfigError(
            f"'saekit {command}' runs in one process, and there are {ranks}: start it without "
            "torchrun. Several share the work of: harvest, train, features build, eval core, "
            "examples, firing or geometry"
        )


def choice(argv: list[str], command: str, what: str, known: list[str]) -> tuple[str, list[str]]:
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


def print_metrics(result: "EvalResult") -> None:
    """Numbers with their intervals, where any has one."""
    rows = [
        (name, f"{metric.value:.4g}", _ends(metric.interval))
        for name, metric in result.metrics.items()
    ]
    headings = [result.eval, f"{result.split} split", "95 % interval"]
    if not any(interval for *_, interval in rows):
        print_table(headings[:2], [row[:2] for row in rows])
        return
    print_table(headings, rows)


def _ends(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4g} .. {interval[1]:.4g}"


def print_table(headings: Iterable[str], rows: Iterable[tuple[object, ...]]) -> None:
    """A table on standard output. Cells are shown as text, whatever signs they hold."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*headings)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console().print(table)
