"""Fit sparse autoencoders: saekit train KIND [CONFIG.toml] [flags], or saekit train SWEEP.toml"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.commands._shared import (
    Args,
    ConfigArgs,
    choice,
    parse,
    print_table,
    toml,
)
from saekit.errors import ConfigError, SaekitError

if TYPE_CHECKING:
    from saekit.activations_cache.store import ActivationCache
    from saekit.trainers._run import Callback

SHARED = True


@dataclass(frozen=True, kw_only=True)
class _Common(Args):
    device: str = "auto"
    """Where to train: "auto" is a GPU where there is one."""
    eval_every: int | None = None
    """Steps between two evaluations while training goes on (`core`, on held-out documents), whose
    figures go to metrics.jsonl."""
    eval_ce_tokens: int = 0
    """Tokens whose cross-entropy is part of them; 0 leaves the language model out."""


@dataclass(frozen=True, kw_only=True)
class TrainArgs(_Common, ConfigArgs):
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
    mesh: str | None = None
    """How the processes of torchrun share the work, such as "data=2,latent=4": over the rows of
    each batch, and over the latents. Where not given, those of one machine share the latents, and
    machines the rows."""
    stall_seconds: float = 600.0
    """How long the processes of torchrun wait for one of them that gets no further, before they
    give up and name it."""
    verify_resume: bool = False
    """Instead of training, try out on this machine whether a run that is stopped and goes on ends
    in the same SAE, bit for bit."""


@dataclass(frozen=True, kw_only=True)
class SweepArgs(_Common):
    """Fit the many sparse autoencoders that a TOML file names; runs that want the same activations
    are fed together, from one reading of the cache. The processes of torchrun take runs in turn."""

    cache: str
    """Activation cache to train on, a folder or a URL."""
    out: Path
    """Folder for the runs. A sweep that was stopped goes on with the same command."""


def run(argv: list[str]) -> None:
    from saekit.trainers import _kinds

    if argv and argv[0].endswith(".toml"):
        _sweep(argv)
    else:
        name, argv = choice(argv, "train", "KIND", _kinds.names())
        _one(name, argv)


def _one(name: str, argv: list[str]) -> None:
    from saekit.activations_cache.config import HarvestConfig
    from saekit.activations_cache.harvest import harvest
    from saekit.activations_cache.job import resolve_device
    from saekit.activations_cache.store import ActivationCache
    from saekit.distributed import connect, disconnect, place, shape_of
    from saekit.trainers import _kinds
    from saekit.trainers._loop import train

    argv, given = toml(argv)
    if given.pop("kind", name) != name:
        raise ConfigError(f"the TOML file is of another kind of SAE than '{name}'")
    given.pop("cache_fingerprint", None)
    config = _kinds.kind(name).Config
    args = parse(TrainArgs, argv, f"train {name}", config, given)
    rank, ranks = place()
    shape = shape_of(args.mesh, ranks)
    if ranks > 1 and (args.cache is None or args.verify_resume):
        raise ConfigError(
            "several processes train on a cache that is there, and do not verify a resume: give "
            "--cache CACHE (torchrun ... saekit harvest makes one), and leave out --verify-resume"
        )
    if args.cache is not None:
        cache = ActivationCache.open(args.cache)
    elif args.hook is None:
        raise ConfigError(
            "give --cache CACHE, or --hook HOOK to harvest (with --model and --dataset)"
        )
    else:
        wanted = HarvestConfig(
            model=args.model,
            dataset=args.dataset,
            hooks=(args.hook,),
            n_tokens=args.harvest_tokens,
            gradients="grad" in _kinds.kind(name).NEEDS,
        )
        cache = harvest(wanted, args.out.with_name(f"{args.out.name}-cache"), progress=True)
    if args.verify_resume:
        _verify_resume(args, cache)
        return
    device = resolve_device(args.device)
    train(
        args.config,
        cache,
        hook=args.hook,
        out=args.out,
        device=device,
        progress=rank == 0,
        callbacks=_callbacks(args, cache),
        mesh=connect(shape, device, args.stall_seconds),
    )
    disconnect()
    if rank > 0:
        return
    print(f"{args.out}: a {name} SAE of {args.config.d_sae:,} latents")
    print(f"Next: saekit eval core --sae {args.out}")


def _verify_resume(args: TrainArgs, cache: "ActivationCache") -> None:
    from saekit.activations_cache.job import resolve_device
    from saekit.trainers._resume_check import check_resume

    device = resolve_device(args.device)
    found = check_resume(args.config, cache, hook=args.hook, device=device)
    if found:
        listed = ", ".join(f"{one.name} by up to {one.largest:.3g}" for one in found)
        raise SaekitError(
            f"a run that is stopped and goes on does not end in the same SAE on {device}: {listed} "
            "differ. Some operator there is not repeatable; try another --device or --precision"
        )
    print(f"A run that was stopped and went on ended in the same SAE, bit for bit ({device}).")


def _sweep(argv: list[str]) -> None:
    from saekit.activations_cache.job import resolve_device
    from saekit.activations_cache.store import ActivationCache
    from saekit.distributed import place
    from saekit.trainers._loop import RunSpec, train_many
    from saekit.trainers._sweep import expand

    path = argv[0]
    argv, given = toml(argv)
    own = {key: given.pop(key) for key in ("cache", "out", "device") if key in given}
    flags = [part for key, value in own.items() for part in (f"--{key}", str(value))]
    args = parse(SweepArgs, [*flags, *argv], f"train {path}")
    rank, ranks = place()
    # In turn, so that what differs in size from run to run is spread, too.
    runs = expand(given)[rank::ranks]
    if not runs:
        print(f"rank {rank} of {ranks} has no run to train: the sweep has fewer")
        return
    cache = ActivationCache.open(args.cache)
    callbacks = _callbacks(args, cache)
    specs = [
        RunSpec(config=run.config, hook=run.hook, out=args.out / run.name, callbacks=callbacks)
        for run in runs
    ]
    train_many(specs, cache, device=resolve_device(args.device), progress=rank == 0)
    _print_last([args.out / run.name for run in runs])
    print(f"{args.out}: {len(runs)} SAEs\nNext: saekit eval core --sae {args.out / runs[0].name}")


def _print_last(folders: Sequence[Path]) -> None:
    """What the log of each run says last of the batch it was trained on."""
    import json

    from saekit.trainers._log import FILE

    rows: list[tuple[object, ...]] = []
    for folder in folders:
        lines = (folder / FILE).read_text(encoding="utf-8").splitlines()
        last: dict[str, Any] = next(
            (line for line in map(json.loads, reversed(lines)) if "mse" in line), {}
        )
        shown = (f"{last[key]:.4g}" if key in last else "-" for key in ("ev", "l0", "dead"))
        rows.append((folder.name, *shown))
    print_table(["run", "ev, training", "l0", "dead"], rows)


def _callbacks(args: _Common, cache: "ActivationCache") -> "tuple[Callback, ...]":
    if args.eval_every is None:
        return ()
    if args.eval_every < 1:
        raise ConfigError(f"eval_every={args.eval_every} must be at least 1 step")
    from saekit.activations_cache.unshuffled import unshuffled
    from saekit.evals._base import evaluate
    from saekit.evals.core import CoreConfig
    from saekit.sae import SAE
    from saekit.trainers._run import Callback

    source = unshuffled(cache)
    config = CoreConfig(max_rows=50_000, ce_tokens=args.eval_ce_tokens, device=args.device)

    def core(sae: SAE) -> dict[str, float]:
        found = evaluate("core", sae, source, config=config).metrics
        return {f"core/{name}": metric.value for name, metric in found.items()}

    return (Callback(every=args.eval_every, call=core),)
