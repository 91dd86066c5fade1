"""Say what a harvest will take: disk, memory, time."""

from dataclasses import dataclass
from datetime import timedelta

from saekit.commands._shared import ConfigArgs, parse, print_table, toml
from saekit.errors import SaekitError


@dataclass(frozen=True, kw_only=True)
class PlanArgs(ConfigArgs):
    """Say what a harvest will take: room on disk, memory and time. Takes the flags of harvest."""

    out: str
    """Folder or URL that the cache would lie in. Nothing is written."""
    seconds: float = 10.0
    """How long to measure the speed."""


def run(argv: list[str]) -> None:
    from rich.filesize import decimal

    from saekit.activations_cache.config import HarvestConfig
    from saekit.activations_cache.plan import plan

    argv, given = toml(argv)
    args = parse(PlanArgs, argv, "plan", HarvestConfig, given)
    planned = plan(args.config, args.out, seconds=args.seconds)
    sizes = {f"disk: {name}": size for name, size in planned.disk.items()}
    sizes["disk: all"] = sum(planned.disk.values())
    rows = {
        "rows": f"{planned.rows:,} at most",
        **{name: decimal(size) for name, size in sizes.items()},
        "disk: free": "unknown" if planned.free is None else decimal(planned.free),
        "memory: rows on their way": decimal(planned.host),
        "memory: device": decimal(planned.device),
        "speed": f"{planned.tokens_per_s:,.0f} tokens/s",
        "time": f"{timedelta(seconds=round(planned.seconds))}",
    }
    print_table(["harvest", ""], rows.items())
    if not planned.fits:
        raise SaekitError(
            "this does not fit on the disk: lower --n-tokens, name fewer --hooks, or another --out"
        )
