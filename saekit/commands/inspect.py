"""List a model's hook points, or say what a cache or a run holds."""

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from saekit.commands._shared import Args, parse, print_table
from saekit.errors import ModelError

if TYPE_CHECKING:
    from saekit.activations_cache.manifest import Manifest
    from saekit.activations_cache.model import Model


@dataclass(frozen=True, kw_only=True)
class InspectArgs(Args):
    """Say what something is: a model's hook points, what a cache holds, what an SAE was made
    from."""

    what: Positional[str]
    """A model ("demo", a folder, a hub id), a cache (a folder or a URL), or a run."""
    modules: bool = False
    """Of a model, list also the paths of all modules that can be harvested. Each is tried in a
    small pass of its own."""


def run(argv: list[str]) -> None:
    args = parse(InspectArgs, argv, "inspect")
    from saekit import checkpoint
    from saekit.activations_cache import manifest
    from saekit.activations_cache.model import load
    from saekit.activations_cache.storage import storage

    folder, at = Path(args.what), storage(args.what)
    if "://" in args.what or at.exists(manifest.NAME):
        _print_cache(manifest.Manifest.load(at))
    elif (folder / checkpoint.WEIGHTS).exists():
        config = checkpoint.read_config(folder)
        provenance = config.pop("provenance") or {}
        rows = {**config, **provenance, **provenance.get("config", {})}
        print_table(["SAE", ""], rows.items())
    else:
        model = load(args.what)
        print_table(["hook point", "width"], model.widths().items())
        if args.modules:
            print_table(["module", "width"], _modules(model).items())
            print("The path of a module means its output; with :input at its end, what goes in.")


def _print_cache(held: "Manifest") -> None:
    state = "complete" if held.complete else "not complete"
    about: dict[str, object] = {
        "rows": f"{held.n_rows:,} ({state})",
        "shards": len(held.shards),
        "padding dropped": f"{held.n_padding:,}",
        "fingerprint": held.fingerprint,
        **held.config,
    }
    print_table(["cache", ""], about.items())
    if held.shuffle is not None:
        print_table(["shuffled", ""], asdict(held.shuffle).items())
    print_table(["tokens marked", "rows"], [(k, f"{n:,}") for k, n in held.marked.items()])
    print_table(
        ["hook point", "width", "mean norm", "covariance trace", "rounding error"],
        [(hook, width, *_figures(held, hook)) for hook, width in held.hooks.items()],
    )


def _figures(held: "Manifest", hook: str) -> tuple[str, str, str]:
    """What the last three headings say, "-" where it was not measured."""
    if hook not in held.stats:
        return "-", "-", "-"
    stats = held.stats[hook]
    lost = "-" if stats.rounding_error is None else f"{stats.rounding_error:.2g}"
    return f"{stats.mean_norm:.4g}", f"{stats.covariance_trace:.4g}", lost


def _modules(model: "Model") -> dict[str, int]:
    """Width at every module whose output can be harvested, by its path."""
    from saekit.progress import bar

    paths = [path for path, _ in model.model.named_modules() if path]
    widths: dict[str, int] = {}
    with bar("modules", len(paths)) as shown:
        for path in paths:
            with suppress(ModelError):
                widths |= model.widths([path])
            shown.advance(1)
    return widths
