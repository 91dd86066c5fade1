"""Say what a harvest will take: disk, memory, time; with --gpus, what a training will take."""

from dataclasses import dataclass
from datetime import timedelta

from saekit.commands._shared import Args, ConfigArgs, parse, print_table, toml
from saekit.errors import ConfigError, SaekitError


@dataclass(frozen=True, kw_only=True)
class PlanArgs(ConfigArgs):
    """Say what a harvest will take: room on disk, memory and time. Takes the flags of harvest."""

    out: str
    """Folder or URL that the cache would lie in. Nothing is written."""
    seconds: float = 10.0
    """How long to measure the speed."""


@dataclass(frozen=True, kw_only=True)
class PlanTrainingArgs(Args):
    """Say what a TopK training by several GPUs will take: memory, bytes sent, time of a step. Rates
    are those that were measured on one kind of GPU, or are given."""

    gpus: int
    """GPUs of each machine."""
    nodes: int = 1
    """Machines."""
    d_in: int = 4096
    """Width of the activations."""
    d_sae: int = 262_144
    """Latents."""
    k: int = 64
    """Latents kept per token."""
    batch_size: int = 8192
    """Activations a step, of all GPUs."""
    mesh: str | None = None
    """Such as "data=2,latent=4"; where not given, the quickest that fits."""
    tflops: float | None = None
    """Of the product with the encoder, in bfloat16."""
    memory_gb_per_s: float | None = None
    """Of the GPU's memory."""
    gpu_gb: float | None = None
    """Memory of a GPU."""
    near_gb_per_s: float | None = None
    """That a GPU sends to another of its machine."""
    far_gb_per_s: float | None = None
    """That a GPU sends to another machine."""


def run(argv: list[str]) -> None:
    if any(arg.partition("=")[0] == "--gpus" for arg in argv):
        _training(argv)
    else:
        _harvest(argv)


def _training(argv: list[str]) -> None:
    from dataclasses import replace

    from rich.filesize import decimal

    from saekit.cost import Figures, Training, quickest
    from saekit.distributed import shape_of

    args = parse(PlanTrainingArgs, argv, "plan")
    figures = Figures.load()
    given = {
        "operations": (args.tflops, 1e12),
        "memory_bytes": (args.memory_gb_per_s, 1e9),
        "gpu_bytes": (args.gpu_gb, 1e9),
        "near_bytes": (args.near_gb_per_s, 1e9),
        "far_bytes": (args.far_gb_per_s, 1e9),
    }
    own = {name: value * unit for name, (value, unit) in given.items() if value is not None}
    figures = replace(figures, **own)  # type: ignore[arg-type]  # the keys are of its numbers
    n = args.gpus * args.nodes
    sizes = {name: getattr(args, name) for name in ("d_in", "d_sae", "k", "batch_size")}
    if args.mesh is not None:
        data, latent = shape_of(args.mesh, n)
        one: Training | None = Training(**sizes, data=data, latent=latent, per_node=args.gpus)
    else:
        one = quickest(figures, gpus=n, per_node=args.gpus, **sizes)
    if one is None:
        raise ConfigError(
            f"no mesh of {n} GPUs holds this in {decimal(int(figures.gpu_bytes))} each, or divides "
            f"d_sae={args.d_sae} and batch_size={args.batch_size}: give more GPUs, fewer latents, "
            "or a --mesh to see what it takes"
        )
    memory, parts, sent = one.memory(), one.seconds(figures), one.sent()
    step = sum(parts.values())
    assumed = [
        what
        for name, what in (("near_bytes", "near links"), ("far_bytes", "far links"))
        if name not in figures.measured and name not in own
    ]
    rows = {
        "mesh": f"data={one.data},latent={one.latent}",
        **{f"memory: {name}": decimal(int(size)) for name, size in memory.items()},
        "memory: all": decimal(int(sum(memory.values()))),
        "memory: of a GPU": decimal(int(figures.gpu_bytes)),
        **{f"sent a step: {name}": decimal(int(size)) for name, size in sent.items() if size},
        **{f"a step: {name}": f"{1e3 * took:.2f} ms" for name, took in parts.items() if took},
        "a step": f"{1e3 * step:.2f} ms",
        "tokens": f"{one.batch_size / step:,.0f} a second",
        "figures": f"{figures.gpu}" + (f"; assumed: {', '.join(assumed)}" if assumed else ""),
    }
    print_table(["training, each GPU", ""], rows.items())
    if sum(memory.values()) > figures.gpu_bytes:
        raise SaekitError(
            "this does not fit into the memory of a GPU: share the latents among more of them "
            "(--mesh, --gpus, --nodes), or lower --d-sae"
        )


def _harvest(argv: list[str]) -> None:
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
