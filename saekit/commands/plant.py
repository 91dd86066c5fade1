"""Make activations of which the true features are known, as a cache to train on."""

from dataclasses import dataclass

from saekit.commands._shared import ConfigArgs, parse, toml
from saekit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PlantArgs(ConfigArgs):
    """Make rows from a dictionary drawn at random and keep both in a cache: train on it, then
    `saekit eval ground_truth` says which of the true features were found."""

    out: str
    """Folder or URL of the cache. The same command makes the same rows."""
    n_rows: int = 300_000
    """Rows to make."""
    holdout: float = 0.1
    """Share of the documents, which are windows of rows, that training never sees."""


def run(argv: list[str]) -> None:
    from saekit.activations_cache import manifest
    from saekit.activations_cache.planted import HOOK, fingerprint_of, planted_cache
    from saekit.activations_cache.storage import storage
    from saekit.activations_cache.store import ActivationCache
    from saekit.synthetic import Synthetic, SyntheticConfig

    argv, given = toml(argv)
    args = parse(PlantArgs, argv, "plant", SyntheticConfig, given)
    if args.n_rows < 1 or not 0 <= args.holdout < 1:
        raise ConfigError(
            f"n_rows={args.n_rows} must be at least 1, and holdout={args.holdout} a share of "
            "documents from 0 to below 1"
        )
    if storage(args.out).exists(manifest.NAME):
        cache = ActivationCache.open(args.out)
        same = (
            cache.model_fingerprint == fingerprint_of(Synthetic.from_config(args.config))
            and cache.n_rows == args.n_rows
            and cache.manifest.config["holdout"] == args.holdout
        )
        if not same:
            raise ConfigError(
                f"{args.out} holds another cache ({cache.n_rows:,} rows of '{cache.model}'): give "
                "another --out, or remove that one"
            )
    else:
        cache = planted_cache(
            args.out, args.config, args.n_rows, holdout=args.holdout, progress=True
        )
    n, width = args.config.n_features, args.config.d_in
    print(f"{args.out}: {cache.n_rows:,} rows of {n:,} features at {HOOK} ({width})")
    print(
        f"Next: saekit train topk --cache {args.out} --hook {HOOK} --d-sae {n} --out RUN, then "
        "saekit eval ground_truth --sae RUN"
    )
