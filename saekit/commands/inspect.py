"""List a model's hook points, or say what a cache or a run holds, or what became of its latents."""

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from saekit.commands._shared import Args, parse, print_table
from saekit.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.activations_cache.manifest import Manifest
    from saekit.activations_cache.model import Model
    from saekit.trainers._doctor import Examination


@dataclass(frozen=True, kw_only=True)
class InspectArgs(Args):
    """Say what something is: a model's hook points, what a cache holds, what an SAE was made
    from."""

    what: Positional[str]
    """A model ("demo", a folder, a hub id), a cache (a folder or a URL), or a run."""
    modules: bool = False
    """Of a model, list also the paths of all modules that can be harvested. Each is tried in a
    small pass of its own."""
    dead: bool = False
    """Of a run, say which latents died and when, why they are likely to have, and what to try. A
    run in training is read as its last checkpoint has it."""


def run(argv: list[str]) -> None:
    args = parse(InspectArgs, argv, "inspect")
    from saekit import checkpoint
    from saekit.activations_cache import manifest
    from saekit.activations_cache.model import load
    from saekit.activations_cache.storage import storage

    folder, at = Path(args.what), storage(args.what)
    a_run = any((folder / name).exists() for name in ("config.toml", checkpoint.WEIGHTS))
    if "://" in args.what or at.exists(manifest.NAME):
        if args.dead:
            raise ConfigError(f"--dead asks about a run's latents, and {args.what} is a cache")
        _print_cache(manifest.Manifest.load(at))
    elif args.dead and not a_run:
        raise ConfigError(
            f"--dead asks about a run's latents, and {args.what} is no run's folder; a model has "
            "no latents"
        )
    elif args.dead:
        from saekit.trainers._doctor import examine

        _print_dead(args.what, examine(folder))
    elif (folder / checkpoint.WEIGHTS).exists():
        config = checkpoint.read_config(folder)
        provenance = config.pop("provenance") or {}
        rows = {**config, **provenance, **provenance.get("config", {})}
        print_table(["SAE", ""], rows.items())
    elif a_run:
        _print_training(folder)
    else:
        model = load(args.what)
        print_table(["hook point", "width"], model.widths().items())
        if args.modules:
            print_table(["module", "width"], _modules(model).items())
            print("The path of a module means its output; with :input at its end, what goes in.")


def _print_training(run: Path) -> None:
    from saekit.config import read_toml
    from saekit.trainers._doctor import steps_taken

    taken = steps_taken(run)
    state = "has no checkpoint yet" if taken is None else f"{taken:,} steps at the last checkpoint"
    print_table(
        ["run", ""], {"state": f"not finished: {state}", **read_toml(run / "config.toml")}.items()
    )


def _print_dead(what: str, found: "Examination") -> None:
    from saekit.trainers._doctor import ALIVE, CAUSES, FIGURES, NEVER, STATES

    of, windows = found.diagnosis, found.diagnosis.windows
    count = len(of.state)
    if not found.finished:
        print(f"{what} is not finished: this is what its last checkpoint knows.")
    about: dict[str, object] = {
        name: _share(int((of.state == i).sum()), count) for i, name in enumerate(STATES)
    }
    about["revive"] = found.policy or "-"
    for how, latents in of.revivals.items():
        stayed = int((of.state[latents] == ALIVE).sum())
        if latents.any():
            about[f"revived {how}"] = f"{int(latents.sum()):,}, of which alive: {stayed:,}"
    print_table([f"latents after {windows[-1].step:,} steps", ""], about.items())
    print_table(
        ["step", "alive", "dead", "died in it", "revived", "replanted"],
        [tuple(f"{n:,}" for n in vars(window).values()) for window in windows],
    )
    if found.tokens < found.config.dead_after:
        print(
            f"{found.tokens:,} tokens were seen, and a latent is dead after "
            f"{found.config.dead_after:,} without firing: none can be yet."
        )
    ill = {i: of.of(i) for i in range(len(CAUSES)) if len(of.of(i))}
    if not ill:
        print("No latent is dead.")
        return
    total = sum(map(len, ill.values()))
    print_table(
        ["likely cause", "latents", "never fired", "for example"],
        [
            (
                CAUSES[i].name,
                _share(len(latents), total),
                f"{int((of.state[latents] == NEVER).sum()):,}",
                ", ".join(map(str, latents[:4].tolist())),
            )
            for i, latents in ill.items()
        ],
    )
    print_table(
        ["evidence (medians)", "figure", "start", "last alive", "end"],
        [
            (
                CAUSES[i].name if name == FIGURES[0] else "",
                name,
                *(_median(held[name][at]) for held in (of.start, of.before, of.after)),
            )
            for i, at in ill.items()
            for name in FIGURES
        ],
    )
    print(
        "margin: how far its best pre-activation came above what it needed to fire; top, mean: the "
        "largest and the mean; all three in units of their standard deviation over rows. Norms: "
        "as shares of the living's median."
    )
    for i in ill:
        said = (f"{CAUSES[i].rule}.", found.seen(i), f"Try {found.remedy(i)}.")
        print(f"\n{CAUSES[i].name}: {' '.join(filter(None, said))}")


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})"


def _median(values: "Tensor") -> str:
    return f"{float(values.median()):.3g}"


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
