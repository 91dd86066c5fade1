"""Convert SAEs between the formats of other tools, with a proof that they compute the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from saekit.commands._shared import Args, parse, print_table
from saekit.errors import ConfigError

if TYPE_CHECKING:
    from saekit.interop._parity import Probe


@dataclass(frozen=True, kw_only=True)
class ConvertArgs(Args):
    """Write an SAE of any format in another one, into a new folder, with `parity.json` beside it:
    how far latents and reconstructions of both are apart. `saekit convert SRC DST --format
    sae_lens`, or with several sources, layer by layer, `saekit convert SRC SRC ... DST --format
    circuit_tracer`; `saekit convert --check DST` makes the comparison again."""

    paths: Positional[tuple[str, ...]] = ()
    """Folders or files of SAEs, last the new folder."""
    format: str | None = None
    """What to write: sae_lens, sparsify, dictionary_learning, circuit_tracer, overcomplete or
    native."""
    source_format: str | None = None
    """What the source is, where that cannot be told."""
    check: Path | None = None
    """A product, to compare with its source again."""
    cache: str | None = None
    """Activations that the SAE is for, to compare on; otherwise Gaussian rows of many lengths."""
    hook: str | None = None
    """Hook point of the cache, and of the SAE where its file does not say it."""
    model: str | None = None
    """Name of the model, as the other tool knows it, where the SAE does not say it or by another
    name."""
    n_rows: int = 256
    """Rows of the cache to compare on."""


def run(argv: list[str]) -> None:
    args = parse(ConvertArgs, argv, "convert")
    from saekit.interop import _parity

    if args.check is not None:
        if args.paths or args.format is not None:
            raise ConfigError("--check takes the product alone: what it was made from stands in it")
        about = _parity.read_record(args.check).get("probe")
        record = _parity.check(args.check, _probe_again(args, about))
        _show(record)
        print(f"{args.check} computes what its source does.")
        return
    if args.format is None or len(args.paths) < 2:
        raise ConfigError(
            "give a source, the new folder and a format: saekit convert SRC DST --format sae_lens"
        )
    *sources, out = args.paths
    if args.n_rows < 2:
        raise ConfigError(f"n_rows={args.n_rows} must be at least 2: an L0 is a mean over rows")
    record = _parity.convert(
        sources,
        out,
        args.format,
        source_format=args.source_format,
        probe=_probe(args.cache, args.hook, args.n_rows) if args.cache else None,
        about={k: v for k, v in (("model", args.model), ("hook", args.hook)) if v is not None},
    )
    _show(record)
    print(f"{out}: {record['product_format']}, proof in {Path(out) / _parity.FILE}")
    print(f"Next: saekit convert --check {out}")


def _probe(cache: str, hook: str | None, n_rows: int) -> "Probe":
    from saekit.activations_cache.store import ActivationCache
    from saekit.interop._parity import Probe

    held = ActivationCache.open(cache)
    hook = hook or (next(iter(held.hooks)) if len(held.hooks) == 1 else None)
    if hook is None:
        raise ConfigError(f"the cache holds {', '.join(held.hooks)}: name one with --hook")
    rows = held.rows(hook, held.indices("all")[:n_rows])
    about = {"kind": "cache", "cache": held.location, "hook": hook, "rows": len(rows)}
    return Probe(rows, {**about, "cache_fingerprint": held.fingerprint})


def _probe_again(args: ConvertArgs, about: Any) -> "Probe | None":
    """The rows that a proof was made on; None for Gaussian ones."""
    if args.cache is not None:
        return _probe(args.cache, args.hook, args.n_rows)
    if not isinstance(about, dict) or about.get("kind") != "cache":
        return None
    probe = _probe(str(about.get("cache")), about.get("hook"), int(about.get("rows", 256)))
    if probe.about["cache_fingerprint"] != about.get("cache_fingerprint"):
        raise ConfigError(
            f"{about.get('cache')} is another cache than the one that the proof was made on: give "
            "one with --cache and --hook"
        )
    return probe


def _show(record: dict[str, Any]) -> None:
    compared, figures = [], []
    for number, one in enumerate(record["saes"]):
        for name in ("encode", "decode", "encode_folded", "decode_folded"):
            apart = one[name]
            ends = (f"{apart[end]:.2g}" for end in ("max", "mean", "max_relative"))
            compared.append((number, _WHAT[name], *ends, apart["rows_apart"]))
        for name in ("l0", "ev"):
            if one[name] is not None:
                figures.append((number, name, *(f"{v:.5g}" for v in one[name].values())))
        for fold in one["folds"]:
            print(f"{number}, {fold['of']}: {fold['step']} ({fold['undone_and_redone']:.2g})")
    print_table(["SAE", "apart", "max", "mean", "of a row's largest", "rows > 1e-4"], compared)
    print_table(["SAE", "", "before", "after"], figures)


_WHAT = {
    "encode": "latents, by both tools",
    "decode": "reconstructions, by both tools",
    "encode_folded": "latents, by source and saekit",
    "decode_folded": "reconstructions, by source and saekit",
}
