"""Run a model over text or images and keep its activations on disk."""

from dataclasses import dataclass

from saekit.commands._shared import ConfigArgs, parse, toml

SHARED = True


@dataclass(frozen=True, kw_only=True)
class HarvestArgs(ConfigArgs):
    """Run a model over text or images and keep its activations on disk. The processes of torchrun
    share the documents among them."""

    out: str
    """Folder of the cache, or a URL (s3://...). A harvest that was stopped goes on with the same
    command."""


def run(argv: list[str]) -> None:
    from saekit.activations_cache.config import HarvestConfig
    from saekit.activations_cache.harvest import harvest
    from saekit.activations_cache.storage import storage
    from saekit.distributed import place

    argv, given = toml(argv)
    args = parse(HarvestArgs, argv, "harvest", HarvestConfig, given)
    rank, ranks = place()
    cache = harvest(args.config, args.out, rank=rank, ranks=ranks, progress=rank == 0)
    if cache.url != storage(args.out).url:
        print(f"{cache.url}: {cache.n_rows:,} rows, the share of rank {rank} of {ranks}")
        return
    widths = ", ".join(f"{hook} ({width})" for hook, width in cache.hooks.items())
    print(f"{args.out}: {cache.n_rows:,} rows at {widths}")
    hook = next(iter(cache.hooks))
    print(f"Next: saekit train topk --cache {args.out} --hook {hook} --out RUN")
