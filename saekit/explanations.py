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
    of, found = _read(run)
    if of and sae_fingerprint and of != sae_fingerprint:
        raise SaekitError(
            f"{run / FILE} explains weights {of[:12]}..., the run now holds "
            f"{sae_fingerprint[:12]}...: write it again with `saekit features explain`"
        )
    return found


def keep(run: Path, found: Mapping[int, Explanation], sae_fingerprint: str) -> Path:
    """Write explanations beside those of other latents; returns the file. What explained other
    weights is given up. Raises SaekitError where the file that is there is damaged."""
    with FileLock(run / f".{FILE}.lock"):
        of, known = _read(run)
        known = (known if of in (None, sae_fingerprint) else {}) | dict(found)
        entries = {str(latent): asdict(known[latent]) for latent in sorted(known)}
        write_json(run / FILE, {"sae_fingerprint": sae_fingerprint, "explanations": entries})
    return run / FILE


def _read(run: Path) -> tuple[str | None, dict[int, Explanation]]:
    """Which weights are explained, where that is said, and the explanations."""
    path = run / FILE
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = {int(latent): _one(value) for latent, value in values["explanations"].items()}
        return values.get("sae_fingerprint"), found
    except FileNotFoundError:
        return None, {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SaekitError(f"{path} cannot be read ({error}): mend it, or move it away") from error


def _one(value: Any) -> Explanation:
    return Explanation(**value) if isinstance(value, dict) else Explanation(str(value))
