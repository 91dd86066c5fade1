"""What the user keeps of latents, a star or a note, in a small file of the run: `notes.json`."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from saekit import explanations
from saekit.dashboard.data import Run
from saekit.errors import SaekitError
from saekit.explanations import Explanation
from saekit.files import write_json

FILE = "notes.json"
LONGEST = 10_000
"""Characters of a note."""


@dataclass(frozen=True)
class Note:
    """Of one latent."""

    star: bool = False
    text: str = ""


def read(run: Path) -> dict[int, Note]:
    """All notes of a run, by latent. Raises SaekitError for a file that is damaged."""
    path = run / FILE
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["latents"]
        return {int(latent): Note(**note) for latent, note in values.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SaekitError(
            f"{path} cannot be read ({error}): mend it, or move it away to begin with none"
        ) from error


def keep(run: Path, latent: int, **changes: Any) -> None:
    """Change the star or the text of a latent's note; others, made meanwhile, stay as they are."""
    if len(changes.get("text", "")) > LONGEST:
        raise SaekitError(f"the note is longer than {LONGEST:,} characters: shorten it")
    with FileLock(run / f".{FILE}.lock"):
        notes = read(run)
        notes[latent] = replace(notes.get(latent, Note()), **changes)
        kept = {str(at): asdict(notes[at]) for at in sorted(notes) if notes[at] != Note()}
        write_json(run / FILE, {"latents": kept})


def labels(run: Run) -> dict[int, str]:
    """Explanations of latents, where there are any. Raises SaekitError for a damaged file."""
    return {latent: one.text for latent, one in explained(run).items()}


def explained(run: Run) -> dict[int, Explanation]:
    """The same with their scores."""
    return explanations.read(run.path, run.fingerprint)
