"""Read a cache again, list what is wrong with it, and make damaged shards anew."""

from dataclasses import dataclass

from tyro.conf import Positional

from saekit.commands._shared import Args, parse, print_table
from saekit.errors import CacheError


@dataclass(frozen=True, kw_only=True)
class VerifyArgs(Args):
    """Read a whole cache and compare every shard with its checksum and with what the manifest says
    of it."""

    cache: Positional[str]
    """Folder or URL of the cache."""
    repair: bool = False
    """Make the shards that are damaged or gone again: from the corpus and the model, or for a
    shuffled cache from the one that was shuffled."""


def run(argv: list[str]) -> None:
    args = parse(VerifyArgs, argv, "verify")
    from saekit.activations_cache.store import ActivationCache
    from saekit.activations_cache.verify import repair, verify

    cache = ActivationCache.open(args.cache)
    faults = repair(args.cache, progress=True) if args.repair else verify(cache, progress=True)
    if faults:
        what = "what was wrong" if args.repair else "what is wrong"
        print_table(["shard", what], [(fault.file, fault.problem) for fault in faults])
        if not args.repair:
            n = len({fault.file for fault in faults})
            raise CacheError(
                f"{args.cache} is not what was written in {n} of its files: `saekit verify "
                f"{args.cache} --repair` makes shards again"
            )
        print("They were made again, and are what they were.")
    n_shards = len(cache.manifest.shards)
    print(f"{args.cache}: {n_shards:,} shards and {cache.n_rows:,} rows are whole")
