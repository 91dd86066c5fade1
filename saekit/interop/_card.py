"""The model card of an SAE that goes to the hub: what it is, what it reaches, what it was made
from, and the SHA-256 of its files."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any

import jinja2
import yaml

from saekit import __version__
from saekit.errors import CheckpointError, ConfigError
from saekit.files import file_sha256
from saekit.interop import _formats, folded, read_stored
from saekit.interop._hub import SUMS
from saekit.interop._parity import FILE as PARITY
from saekit.interop._parity import read_record
from saekit.results import RESULTS, EvalResult

LICENCES = ("mit", "apache-2.0", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "bsd-3-clause", "other")

_CARD = """\
---
{{ front }}---

# {{ title }}

A sparse autoencoder: {{ kind }}, {{ d_sae }} latents of width {{ d_in }}{{ out }}\
{% if origin.get("hook") or origin.get("hook_name") %}, at \
`{{ origin.get("hook") or origin.get("hook_name") }}`{% endif %}\
{% if origin.get("model") or origin.get("model_name") %} of \
`{{ origin.get("model") or origin.get("model_name") }}`{% endif %}. Files: {{ format }}.

```python
import saekit

sae = saekit.load("{{ address }}")
code = sae.encode_sparse(x)  # values and indices of the latents of x [batch, {{ d_in }}]
```
{% if format == "sae_lens" %}
```python
from sae_lens import SAE

sae = SAE.load_from_disk(folder)  # after: saekit pull {{ address }} folder
```
{% endif %}
## Metrics
{% for result in results %}
`{{ result.eval }}`, {{ result.split }} split, at `{{ result.hook }}`:

| metric | value | 95 % interval | over | definition |
|---|---|---|---|---|
{% for name, m in result.metrics.items() -%}
| `{{ name }}` | {{ m.value | short }} | {{ m.interval | ends }} | {{ m.n }} | \
{{ m.definition | cell }} |
{% endfor %}{% else %}
None were measured: `saekit eval core --sae RUN` does.
{% endfor %}
## Made from
{% if origin %}
| | |
|---|---|
{% for name, value in origin.items() if value is not none -%}
| {{ name | cell }} | {{ value | cell }} |
{% endfor %}{% else %}
Nobody wrote it down.
{% endif %}
{% if parity %}Converted with `saekit convert`; on {{ parity.probe.rows }} rows, latents of both \
forms are {{ parity.saes[0].encode.max_relative | short }} of a row's largest apart at most, \
reconstructions {{ parity.saes[0].decode.max_relative | short }} (`parity.json`).

{% endif %}## Files

| file | SHA-256 |
|---|---|
{% for name, digest in sums.items() -%}
| `{{ name }}` | `{{ digest }}` |
{% endfor %}
Written by saekit {{ version }}.
"""


@dataclass(frozen=True)
class Parcel:
    """What goes to the hub."""

    card: str
    files: dict[str, Path | bytes]
    """By name: the SAE's own, its results, the card and SHA256SUMS."""


def parcel(folder: Path, address: str, licence: str | None, title: str | None = None) -> Parcel:
    """An SAE's folder made ready for the hub.

    Raises ConfigError where no licence is named, and CheckpointError where the folder holds no SAE.
    """
    if licence not in LICENCES:
        raise ConfigError(
            f"licence={licence!r}: say what others may do with it, --licence with one of "
            f"{', '.join(LICENCES)}"
        )
    stored = read_stored(folder)
    sae = folded(stored, folder)
    results = sorted((folder / RESULTS).glob("*.json")) if (folder / RESULTS).is_dir() else []
    own = [file for name in (*_files(stored.format), PARITY) for file in sorted(folder.glob(name))]
    files: dict[str, Path | bytes] = {p.relative_to(folder).as_posix(): p for p in (*own, *results)}
    parity = _proof(folder)
    if parity is not None:
        files[PARITY] = json.dumps(parity, indent=1).encode()
    sums = {name: _sha256(content) for name, content in sorted(files.items())}
    card = (
        _environment()
        .from_string(_CARD)
        .render(
            front=_front(licence, stored.origin),
            title=title or address.rstrip("/").rpartition("/")[2],
            kind=_kind(sae.activation),
            d_in=sae.d_in,
            d_sae=f"{sae.d_sae:,}",
            out="" if sae.d_out == sae.d_in else f", giving out width {sae.d_out}",
            origin={k: _plain(v) for k, v in stored.origin.items()},
            format=stored.format,
            address=address,
            results=[r for r in map(_result, results) if r is not None],
            parity=parity,
            sums=sums,
            version=__version__,
        )
    )
    text = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    extra = {"README.md": card.encode(), SUMS: text.encode()}
    return Parcel(card, {**files, **extra})


def _proof(folder: Path) -> dict[str, Any] | None:
    """What `parity.json` says, less the folders that what was converted lay in."""
    if not (folder / PARITY).is_file():
        return None
    record = read_record(folder)
    for name in ("sources", "asked_for"):
        record[name] = [
            Path(source).name if _of_this_machine(source) else source
            for source in record.get(name, [])
        ]
    return record


def _sha256(content: Path | bytes) -> str:
    return file_sha256(content) if isinstance(content, Path) else sha256(content).hexdigest()


def machine_paths(files: dict[str, Path | bytes]) -> list[str]:
    """Which paths of this machine the JSON and YAML among these files name, as "'/home/me/model'
    in config.json"."""
    found: dict[str, None] = {}
    for name, content in sorted(files.items()):
        read = {".json": json.loads, ".yaml": yaml.safe_load}.get(PurePath(name).suffix)
        if read is not None:
            data = content.read_bytes() if isinstance(content, Path) else content
            for text in _texts(read(data)):
                if _of_this_machine(text):
                    found[f"{text!r} in {name}"] = None
    return list(found)


def _texts(values: Any) -> Iterator[str]:
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict):
        yield from (text for value in values.values() for text in _texts(value))
    elif isinstance(values, list):
        yield from (text for value in values for text in _texts(value))


def _of_this_machine(text: str) -> bool:
    return text.startswith(("file:", "~/")) or Path(text).is_absolute()


def _files(format: str) -> tuple[str, ...]:
    return tuple(getattr(_formats.find(format), "FILES", ()))


def _front(licence: str, origin: dict[str, Any]) -> str:
    model = origin.get("model") or origin.get("model_name")
    front: dict[str, Any] = {
        "license": licence,
        "library_name": "saekit",
        "tags": ["sparse-autoencoder", "mechanistic-interpretability", "saekit"],
    }
    if isinstance(model, str) and "/" in model and not model.startswith(("/", ".")):
        front["base_model"] = model
    return str(yaml.safe_dump(front, sort_keys=False))


def _kind(activation: Any) -> str:
    name = type(activation).__name__
    k = getattr(activation, "k", getattr(activation, "steps", None))
    return name if k is None else f"{name} ({k})"


def _result(path: Path) -> EvalResult | None:
    """A result of an evaluation; None for another file of the folder."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is no JSON, so nothing of it can stand on the card: evaluate again, or take "
            "it away"
        ) from error
    if not isinstance(values, dict) or "metrics" not in values or "eval" not in values:
        return None
    return EvalResult.load(path.parent, path.stem)


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    environment.filters["short"] = lambda value: f"{value:.4g}"
    environment.filters["ends"] = lambda ends: (
        "" if ends is None else "{:.4g} .. {:.4g}".format(*ends)
    )
    environment.filters["cell"] = lambda text: " ".join(str(text).replace("|", "\\|").split())
    return environment
