"""Write a run's feature store: saekit features build SAE [CACHE]"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from saekit.commands._shared import ConfigArgs, evaluated, parse, toml
from saekit.errors import ConfigError

if TYPE_CHECKING:
    from saekit.activations_cache.store import ActivationCache
    from saekit.sae import SAE


@dataclass(frozen=True, kw_only=True)
class BuildArgs(ConfigArgs):
    """Look at every latent of an SAE and write down what report and browser show of it: contexts,
    histogram, statistics, tokens, neighbours. What was stopped goes on with the same command.

    The texts are those of a cache; or, with --dataset, text that the SAE's model reads first, whose
    activations are kept beside the SAE's folder. The processes of torchrun share the rows of a
    cache, and then the latents."""

    sae: Positional[Path]
    """Folder of the SAE: a run."""
    cache: Positional[str | None] = None
    """Activation cache, a folder or a URL. Where none is given, the one that the run was trained
    on, or if that is shuffled the one that it was made from."""
    hook: str | None = None
    """Hook point, for an SAE that does not say which it was trained on."""
    model: str | None = None
    """Model that reads the text of --dataset; the SAE's own where none is given."""
    dataset: str | None = None
    """Text to read in place of a cache's: "demo", a folder or file, or a hub id."""
    n_tokens: int = 400_000
    """Tokens of --dataset to read."""
    out: Path | None = None
    """Folder of results to write into; `results` inside the SAE's folder where none is given."""


def run(argv: list[str]) -> None:
    argv, given = toml(argv)
    from saekit.activations_cache.store import ActivationCache
    from saekit.activations_cache.unshuffled import unshuffled
    from saekit.distributed import place
    from saekit.evals.examples import ExamplesConfig
    from saekit.features import NAME
    from saekit.interop import load
    from saekit.results import RESULTS

    args = parse(BuildArgs, argv, "features build", ExamplesConfig, given)
    if args.dataset is not None and args.cache is not None:
        raise ConfigError(
            f"cache {args.cache} and --dataset {args.dataset} are both given: the texts are those "
            "of the one or the other"
        )
    _, ranks = place()
    if ranks > 1 and args.dataset is not None:
        raise ConfigError(
            f"{ranks} processes build from a cache that is there: leave out --dataset, and give "
            "the cache that torchrun ... saekit harvest makes of that text"
        )
    sae = load(args.sae)
    if args.dataset is not None:
        cache = _read_text(args, sae)
    elif args.cache is not None:
        cache = unshuffled(ActivationCache.open(args.cache))
    else:
        from saekit.commands.eval import cache_of

        cache = cache_of(args.sae, else_give="the cache behind the SAE's folder, or --dataset")
    out = args.out or args.sae / RESULTS
    if evaluated("examples", sae, cache, args.hook, args.config, out):
        print(f"{out / NAME}\nNext: saekit dashboard {args.sae}")


def _read_text(args: BuildArgs, sae: "SAE") -> "ActivationCache":
    """The cache of a text, harvested where it is not there yet."""
    from saekit.activations_cache.config import HarvestConfig
    from saekit.activations_cache.harvest import harvest

    origin = sae.provenance
    model, hook = args.model, args.hook
    if origin is not None:
        model, hook = model or origin.model, hook or origin.hook
    if model is None or hook is None or args.dataset is None:
        raise ConfigError(
            f"{args.sae} does not say which model and hook point it was trained on: give --model "
            "and --hook"
        )
    wanted = HarvestConfig(model=model, dataset=args.dataset, hooks=(hook,), n_tokens=args.n_tokens)
    folder = args.sae.with_name(f"{args.sae.name}-features-cache")
    return harvest(wanted, folder, progress=True)
