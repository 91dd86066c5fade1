"""What latents are said to respond to, with scores, in the run's `explanations.json`.

`saekit features explain` writes it, or anybody by hand: `{"explanations": {"5": "wolves"}}`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from saekit.errors import SaekitError
from saekit.files import write_json

FILE = "explanations.json"


@dataclass(frozen=True)
class Explanation:
    """Of one latent."""

    text: str
    by: str = ""
    """"rules", or the language model's name."""
    detection: float | None = None
    """Of held-out contexts, (share of those where it fires that the explanation calls so + share of
    the others that it does not) / 2: 0.5 is what a coin has. None where it was not measured."""
    fuzzing: float | None = None
    """The same of contexts whose marked tokens are those that it fires on, or others."""
    n: int = 0
    """Contexts that `detection` is over."""


def read(run: Path, sae_fingerprint: str | None = None) -> dict[int, Explanation]:
    """All explanations, by latent; nothing where there are none. Raises SaekitError for a file that
    is damaged, or of other weights than those of the fingerprint."""
    path = run / FILE
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = {int(latent): _one(value) for latent, value in values["explanations"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SaekitError(f"{path} cannot be read ({error}): write it again") from error
    of = values.get("sae_fingerprint")
    if of and sae_fingerprint and of != sae_fingerprint:
        raise SaekitError(
            f"{path} explains weights {of[:12]}..., the run now holds {sae_fingerprint[:12]}...: "
            "write it again with `saekit features explain`"
        )
    return found


def keep(run: Path, found: Mapping[int, Explanation], sae_fingerprint: str) -> Path:
    """Write explanations beside those of other latents; returns the file. What explained other
    weights is given up."""
    path = run / FILE
    with FileLock(run / f".{FILE}.lock"):
        known: dict[int, Explanation] = {}
        if path.exists():
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.get("sae_fingerprint") in (None, sae_fingerprint):
                known = read(run)
        known |= found
        entries = {str(latent): asdict(known[latent]) for latent in sorted(known)}
        write_json(path, {"sae_fingerprint": sae_fingerprint, "explanations": entries})
    return path


def _one(value: Any) -> Explanation:
    return Explanation(**value) if isinstance(value, dict) else Explanation(str(value))
