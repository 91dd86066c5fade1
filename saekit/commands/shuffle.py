"""Write a cache's rows in random order, for training to read from end to end."""

from dataclasses import dataclass

from tyro.conf import Positional

from saekit.commands._shared import Args, parse


@dataclass(frozen=True, kw_only=True)
class ShuffleArgs(Args):
    """Write the rows of a cache in random order into another: training then reads files from end
    to end, where it would seek out each row. Keep the first one: evaluations need it."""

    cache: Positional[str]
    """Folder or URL of the cache."""
    out: str
    """Folder or URL of the shuffled one. A shuffle that was stopped goes on with the same
    command."""
    seed: int = 0
    """Of the order."""
    memory_mib: float = 1024.0
    """Most memory for rows; the less, the more and smaller the shards."""


def run(argv: list[str]) -> None:
    args = parse(ShuffleArgs, argv, "shuffle")
    from saekit.activations_cache.shuffle import shuffle
    from saekit.activations_cache.store import ActivationCache

    source = ActivationCache.open(args.cache)
    made = shuffle(source, args.out, seed=args.seed, memory_mib=args.memory_mib, progress=True)
    print(f"{args.out}: {made.n_rows:,} rows in random order, {len(made.manifest.shards)} shards")
    hook = next(iter(made.hooks))
    print(f"Next: saekit train topk --cache {args.out} --hook {hook} --out RUN")
