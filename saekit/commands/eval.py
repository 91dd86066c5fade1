"""Evaluate SAEs: saekit eval NAME --sae RUN, or saekit eval all --sae RUN [RUN ...]"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from saekit.commands._shared import ConfigArgs, choice, evaluated, parse, refuse_several, toml
from saekit.errors import ConfigError

if TYPE_CHECKING:
    from saekit.activations_cache.store import ActivationCache

SHARED = True


@dataclass(frozen=True, kw_only=True)
class EvalArgs(ConfigArgs):
    """Evaluate a sparse autoencoder on a cache, by default on documents that training never saw.
    The processes of torchrun share the rows, where an evaluation can be shared: core, examples,
    firing, geometry."""

    sae: Path
    """Folder of the SAE: a run, or one of another tool's (then name the cache and the hook)."""
    cache: str | None = None
    """Activation cache, a folder or a URL. Where none is given, the one that the run was trained
    on, or if that is shuffled the one that it was made from."""
    hook: str | None = None
    """Hook point, for an SAE that does not say which it was trained on."""
    out: Path | None = None
    """Folder for the result; `results` inside the SAE's folder where none is given."""


def run(argv: list[str]) -> None:
    from saekit.activations_cache.store import ActivationCache
    from saekit.commands import _eval_all
    from saekit.evals import _kinds
    from saekit.interop import load
    from saekit.results import RESULTS

    name, argv = choice(argv, "eval", "NAME", [*_kinds.names(), "all"])
    if name == "all":
        refuse_several("eval all")
        _eval_all.run(argv)
        return
    argv, given = toml(argv)
    config = _kinds.find(name).Config
    args = parse(EvalArgs, argv, f"eval {name}", config, given)
    sae = load(args.sae)
    cache = cache_of(args.sae) if args.cache is None else ActivationCache.open(args.cache)
    out = args.out or args.sae / RESULTS
    if evaluated(name, sae, cache, args.hook, args.config, out):
        print(f"{out / name}.json\nNext: saekit report {args.sae}, or saekit dashboard {args.sae}")


def cache_of(sae: Path, else_give: str = "--cache CACHE") -> "ActivationCache":
    """The cache that a run was trained on, in the order of its text. Raises ConfigError, with what
    else to give, where it is no run."""
    from saekit.activations_cache.store import ActivationCache
    from saekit.activations_cache.unshuffled import unshuffled
    from saekit.config import read_toml

    path = sae / "config.toml"
    if not path.exists():
        raise ConfigError(f"{sae} does not say which cache it was trained on: give {else_give}")
    return unshuffled(ActivationCache.open(read_toml(path)["cache"]))
