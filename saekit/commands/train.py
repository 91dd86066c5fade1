"""Fit a sparse autoencoder: saekit train KIND [CONFIG.toml] [flags]"""

from dataclasses import dataclass
from pathlib import Path

from saekit.commands._shared import ConfigArgs, choice, parse, toml
from saekit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainArgs(ConfigArgs):
    """Fit a sparse autoencoder to cached activations."""

    out: Path
    """Folder of the run. A run that was stopped goes on with the same command."""
    cache: str | None = None
    """Activation cache to train on, a folder or a URL. Where none is given, --model and --dataset
    are harvested first, into a folder beside the run."""
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


def run(argv: list[str]) -> None:
    from saekit.activations_cache.config import HarvestConfig
    from saekit.activations_cache.harvest import harvest
    from saekit.activations_cache.job import resolve_device
    from saekit.activations_cache.store import ActivationCache
    from saekit.trainers import _kinds
    from saekit.trainers._loop import train

    name, argv = choice(argv, "train", "KIND", _kinds.names())
    argv, given = toml(argv)
    if given.pop("kind", name) != name:
        raise ConfigError(f"the TOML file is of another kind of SAE than '{name}'")
    given.pop("cache_fingerprint", None)
    config = _kinds.kind(name).Config
    args = parse(TrainArgs, argv, f"train {name}", config, given)
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
