"""Check metrics against known answers, or any library's SAE against what metrics expect of it."""

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from saekit.commands._shared import Args, parse, print_table
from saekit.errors import ConfigError, SaekitError, first_line

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.conformance import Autoencoder, Check


@dataclass(frozen=True, kw_only=True)
class ConformanceArgs(Args):
    """Without WHAT, compare saekit's own metrics with small cases whose answers are known. With it,
    check an SAE of any library: any object with encode(x) and decode(z)."""

    what: Positional[str | None] = None
    """Folder of an SAE of any format, or python.module:name of an object with encode and decode, or
    of something that makes one when it is called. Modules are looked for in the current folder,
    too."""
    cache: str | None = None
    """Activations that the SAE is for, to check it on; otherwise Gaussian rows of many lengths,
    which leave out whether x_hat is in the units of x."""
    hook: str | None = None
    """Hook point of the cache."""
    n_rows: int = 256
    """Rows to check it on."""
    d_in: int | None = None
    """Width of its activations, where neither a cache nor the object says it."""
    k: int | None = None
    """Latents of a row, at most, as its own library reports."""
    l0: float | None = None
    """Mean L0 as its own library reports it, on these rows."""
    ev: float | None = None
    """Explained variance about the mean as its own library reports it, on these rows."""


def run(argv: list[str]) -> None:
    args = parse(ConformanceArgs, argv, "conformance")
    if args.n_rows < 2:
        raise ConfigError(f"n_rows={args.n_rows} must be at least 2: rows are compared")
    found = _of_metrics() if args.what is None else _of_sae(args, args.what)
    print_table(
        ["check", "expected", "found", ""],
        [(one.name, one.expected, one.found, _word(one.passed)) for one in found],
    )
    failed = [one.name for one in found if one.passed is False]
    if failed:
        raise SaekitError(f"{len(failed)} of {len(found)} checks failed: {'; '.join(failed)}")
    left = sum(one.passed is None for one in found)
    print(f"{len(found) - left} checks passed" + (f", {left} could not be made" if left else ""))


def _word(passed: bool | None) -> str:
    return {True: "pass", False: "FAIL", None: "-"}[passed]


def _of_metrics() -> "list[Check]":
    from saekit.evals._conformance import checks

    return checks()


def _of_sae(args: ConformanceArgs, what: str) -> "list[Check]":
    from saekit.conformance import Reported, check

    # A program that pip installed does not look where it is called.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    sae = resolve(what)
    x = _rows(args, sae)
    reported = Reported(k=args.k, l0=args.l0, ev=args.ev)
    return check(sae, x, reported=reported, real=args.cache is not None)


def _rows(args: ConformanceArgs, sae: "Autoencoder") -> "Tensor":
    from saekit.activations_cache.store import ActivationCache
    from saekit.conformance import rows_for

    if args.cache is None:
        return rows_for(width(sae) if args.d_in is None else args.d_in, args.n_rows)
    cache = ActivationCache.open(args.cache)
    hook = args.hook or (next(iter(cache.hooks)) if len(cache.hooks) == 1 else None)
    if hook is None:
        raise ConfigError(f"the cache holds {', '.join(cache.hooks)}: name one with --hook")
    index = cache.indices("all")[: args.n_rows]
    return cache.rows(hook, index)


def resolve(what: str) -> "Autoencoder":
    """The SAE of a folder, or what `python.module:name` leads to: an object with `encode` and
    `decode`, or something that returns one when it is called without arguments.

    Raises ConfigError where there is neither, and SaekitError where the call fails.
    """
    from saekit.conformance import Autoencoder
    from saekit.interop import load

    if Path(what).exists() or ":" not in what:
        sae = load(what)
        if sae.W_skip is not None or sae.row_norm is not None or sae.d_out != sae.d_in:
            raise ConfigError(
                f"{what} decodes from x, too, or to another width (a transcoder, or an SAE that "
                "normalises each row): only what decodes from latents alone to the width that it "
                "reads can be checked"
            )
        return sae
    module, _, name = what.partition(":")
    try:
        found: Any = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"'{what}' cannot be found ({first_line(error)}): give python.module:name of something "
            "that can be imported from here, or the folder of an SAE"
        ) from error
    makes = isinstance(found, type) or (callable(found) and not hasattr(found, "encode"))
    try:
        made: Any = found() if makes else found
    except Exception as error:
        raise SaekitError(
            f"'{what}' fails when it is called: {type(error).__name__}: {first_line(error)}. It is "
            "called without arguments; --debug shows where"
        ) from error
    if not isinstance(made, Autoencoder):
        raise ConfigError(
            f"'{what}' gives a {type(made).__name__}, which lacks encode(x) or decode(z): wrap it "
            "in an object that has both"
        )
    return made


def width(sae: "Autoencoder") -> int:
    """`d_in`, as the object says it: `d_in`, `cfg.d_in` or `activation_dim`. Raises ConfigError
    where it does not."""
    for held, name in ((sae, "d_in"), (getattr(sae, "cfg", None), "d_in"), (sae, "activation_dim")):
        if isinstance(found := getattr(held, name, None), int):
            return found
    raise ConfigError(
        f"a {type(sae).__name__} does not say how wide its activations are: give --d-in, or rows "
        "from a cache"
    )
