"""Conversions, and the proof that one computes what the other does: `parity.json` in the product.

Source and product are each run as their own tool runs them, step by step (`Stored.encode`,
`Stored.decode`), and so is the SAE between them, whose weights have those steps folded in. On the
same probe rows, latents and reconstructions of all three must agree. Axes: row, d_in, d_sae.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.conformance import rows_for
from saekit.errors import CheckpointError, ConfigError, SaekitError
from saekit.files import file_sha256, write_json
from saekit.interop import _formats, folded, read_stored
from saekit.interop._hub import local
from saekit.interop._stored import Stored
from saekit.results import versions

FILE = "parity.json"
FORMAT = "saekit-parity"

CLOSE = 1e-4
"""Relative difference of a row that float32 may leave between two ways to the same number."""
FEW = 0.01
"""Share of the rows that may differ by more: where a latent lies at its threshold, or two at rank
k, rounding decides."""


@dataclass(frozen=True, eq=False)
class Probe:
    """Rows to compare on."""

    rows: Float[Tensor, "row d_in"]
    about: dict[str, Any]
    """How to get them again."""


@dataclass(frozen=True)
class Apart:
    """How far two results are from each other."""

    max: float
    """Of the absolute differences of entries."""
    mean: float
    max_relative: float
    """Of the largest difference in a row over its largest entry."""
    rows_apart: int
    """Rows in which that exceeds 1e-4."""

    @classmethod
    def of(cls, a: Float[Tensor, "row d"], b: Float[Tensor, "row d"]) -> "Apart":
        difference = (a - b).abs().double()
        largest = torch.maximum(a.abs().amax(1), b.abs().amax(1)).double()
        relative = difference.amax(1) / largest.clamp_min(1e-30)
        return cls(
            float(difference.max()),
            float(difference.mean()),
            float(relative.max()),
            int((relative > CLOSE).sum()),
        )


def gaussian(d_in: int) -> Probe:
    """Rows of many lengths, where nobody gives activations that the SAE is for."""
    rows = rows_for(d_in)
    return Probe(rows, {"kind": "gaussian", "rows": len(rows), "d_in": d_in})


def convert(
    sources: Sequence[Path | str],
    out: Path | str,
    format: str,
    *,
    source_format: str | None = None,
    probe: Probe | None = None,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the SAE of `sources` into the new folder `out`, in another format, with its proof.

    More than one source make a set, in the order of its layers. `about` adds to what is known of
    where the SAE comes from, such as model or hook. Returns what `parity.json` says. Raises
    ConfigError where `out` holds anything or the format is not written, and CheckpointError where
    it cannot hold the SAE or the product does not compute the same; then nothing is left at `out`.
    """
    out = Path(out)
    module = _writer(format, len(sources))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already: give a new folder")
    asked, sources = sources, [local(source) for source in sources]
    stored = [read_stored(source, source_format) for source in sources]
    saes = [folded(one, source) for one, source in zip(stored, sources, strict=True)]
    origins = [{**one.origin, **(about or {})} for one in stored]
    with _becomes(out) as made:
        if len(saes) == 1:
            module.write(saes[0], made, origins[0])
        else:
            module.write_set(saes, made, origins)
        files = zip(sources, stored, strict=True)
        record = {
            "format": FORMAT,
            "version": 1,
            "versions": versions(),
            "source_format": stored[0].format,
            "product_format": format,
            "asked_for": [str(source) for source in asked],
            "sources": [str(Path(source).absolute()) for source in sources],
            "source_files": [_hashes(Path(source), one.format) for source, one in files],
            "product_files": _hashes(made, format),
            "origins": origins,
        }
        record |= _compare(record, made, probe)
        if not record["passed"]:
            raise CheckpointError(f"{out} was not written: {_verdict(record)}")
        write_json(made / FILE, record)
    return record


def _writer(format: str, n_saes: int) -> Any:
    """The module of a format, which must be able to write so many SAEs into a folder."""
    module = _formats.find(format)
    if not hasattr(module, "write"):
        raise ConfigError(
            f"format '{format}' is read only; {', '.join(_formats.writable())} can be written"
        )
    if n_saes != 1 and not hasattr(module, "write_set"):
        raise ConfigError(f"format '{format}' holds one SAE in a folder, not {n_saes}")
    return module


@contextmanager
def _becomes(out: Path) -> Iterator[Path]:
    """A folder that takes the place of `out`, missing or empty, at the end of the block; where that
    fails, nothing is left of it."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        # Formats take a folder's name for the hook point.
        made = scratch / out.name
        yield made
        made.chmod(0o755)
        if out.exists():
            out.rmdir()
        made.replace(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_record(product: Path | str) -> dict[str, Any]:
    """What the product's `parity.json` says. Raises CheckpointError where there is none."""
    path = Path(product) / FILE
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is missing or unreadable: `saekit convert` writes it beside what it makes"
        ) from error
    lists = ("sources", "source_files")
    whole = isinstance(record, dict) and all(isinstance(record.get(n), list) for n in lists)
    if not whole or record.get("format") != FORMAT or not isinstance(record.get("saes"), list):
        raise CheckpointError(f"{path} is no proof of saekit's: its 'format' is not '{FORMAT}'")
    return record


def check(product: Path | str, probe: Probe | None = None) -> dict[str, Any]:
    """Make the comparison again that `parity.json` tells of, on the same rows.

    `probe` must be given where they came from a cache. Returns the new record. Raises
    CheckpointError where source or product are not what they were, or do not agree any more.
    """
    product = Path(product)
    record = read_record(product)
    for source, was in zip(record["sources"], record["source_files"], strict=True):
        if not Path(source).exists():
            raise CheckpointError(
                f"{source}, which {product} was converted from, is not there any more: put it back"
            )
        _unaltered(Path(source), was, record["source_format"])
    _unaltered(product, record["product_files"], record["product_format"])
    record |= {"versions": versions()} | _compare(record, product, probe)
    if not record["passed"]:
        raise CheckpointError(f"{product} does not agree with its source: {_verdict(record)}")
    return record


def _unaltered(path: Path, was: dict[str, str], format: str) -> None:
    now = _hashes(path, format)
    for name in {**was, **now}:
        if was.get(name) != now.get(name):
            raise CheckpointError(f"{path}: {name} is not what it was when it was converted")


def _hashes(path: Path, format: str) -> dict[str, str]:
    """SHA-256 of every file that the format may consist of."""
    if path.is_file():
        return {path.name: file_sha256(path)}
    patterns = getattr(_formats.find(format), "FILES", ())
    files = sorted(file for pattern in patterns for file in path.glob(pattern))
    return {file.relative_to(path).as_posix(): file_sha256(file) for file in files}


def _compare(record: dict[str, Any], product: Path, probe: Probe | None) -> dict[str, Any]:
    sources, source_format = record["sources"], record["source_format"]
    files = [product]
    if len(sources) > 1:
        files = _formats.find(record["product_format"]).layers(product)
    found = []
    used = probe
    for source, file in zip(sources, files, strict=True):
        before = read_stored(source, source_format)
        after = read_stored(file, record["product_format"])
        if used is None:
            used = gaussian(before.W_enc.shape[0])
        found.append(_one(before, after, used.rows))
    assert used is not None
    passed = all(one["passed"] for one in found)
    return {"probe": used.about, "saes": found, "close": CLOSE, "few": FEW, "passed": passed}


@torch.no_grad()
def _one(before: Stored, after: Stored, rows: Float[Tensor, "row d_in"]) -> dict[str, Any]:
    x = rows.to(before.W_enc.dtype)
    if x.shape[1] != before.W_enc.shape[0]:
        raise ConfigError(
            f"the rows have width {x.shape[1]}, the SAE reads {before.W_enc.shape[0]}: give the "
            "hook point that it is for"
        )
    sae = before.fold()
    tool = [(z := one.encode(x), one.decode(z, x)) for one in (before, after)]
    units = [
        z if one.unit is None else z * one.unit
        for one, (z, _) in zip((before, after), tool, strict=True)
    ]
    code = sae.encode_sparse(x)
    ours = code.dense(sae.d_sae), sae.decode(code, x)
    figures = {
        "encode": Apart.of(units[0], units[1]),
        "decode": Apart.of(tool[0][1], tool[1][1]),
        "encode_folded": Apart.of(units[0], ours[0]),
        "decode_folded": Apart.of(tool[0][1], ours[1]),
    }
    square = sae.d_in == sae.d_out and sae.W_skip is None
    folds = [_fold(name, one) for name, one in (("source", before), ("product", after))]
    worst = max((f["undone_and_redone"] for parts in folds for f in parts), default=0.0)
    few = FEW * len(x)
    return {
        **{name: asdict(figure) for name, figure in figures.items()},
        "l0": {"before": _l0(tool[0][0]), "after": _l0(tool[1][0])},
        "ev": {"before": _ev(x, tool[0][1]), "after": _ev(x, tool[1][1])} if square else None,
        "latent_unit": "1" if before.unit is None else "the norm of the decoder's row",
        "folds": [fold for parts in folds for fold in parts],
        "passed": worst <= CLOSE and all(f.rows_apart <= few for f in figures.values()),
    }


def _fold(which: str, stored: Stored) -> list[dict[str, Any]]:
    """Every step of folding: how far its weights are, once undone and done again, from what they
    were, as a share of the largest."""
    weights, found = stored.weights(), []
    for step in stored.steps():
        done = step.do(weights)
        again = step.do(step.undo(done))
        error = max(_relative(again[name], done[name]) for name in done)
        found.append({"of": which, "step": step.name, "undone_and_redone": error})
        weights = done
    return found


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def _l0(z: Float[Tensor, "row d_sae"]) -> float:
    """Mean over rows of the latents != 0."""
    return float((z != 0).sum(1).double().mean())


def _ev(x: Float[Tensor, "row d_in"], x_hat: Float[Tensor, "row d_in"]) -> float:
    """Explained variance about the mean, 1 - sum|x - x_hat|^2 / sum|x - mu|^2."""
    a, b = x.double(), x_hat.double()
    return 1 - float((a - b).square().sum() / (a - a.mean(0)).square().sum().clamp_min(1e-300))


def _verdict(record: dict[str, Any]) -> str:
    for number, one in enumerate(record["saes"]):
        names = ("encode", "decode", "encode_folded", "decode_folded")
        worst = max(names, key=lambda name: one[name]["rows_apart"])
        if not one["passed"]:
            return (
                f"SAE {number}: {worst} differs by more than {CLOSE:g} in "
                f"{one[worst]['rows_apart']} rows, by {one[worst]['max_relative']:.3g} at most"
            )
    raise SaekitError("the proof passed")
