"""What was found out about the kernels on this machine's GPUs, kept between runs: whether they are
right, and how each shape is best gone about.

A file in the user's cache folder, under a key for the GPU, torch, Triton and the kernels' own
source, so that nothing is believed of another GPU or of code that has changed. Delete it, and
everything is found out anew.
"""

import functools
import json
import logging
import os
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from saekit.errors import SaekitError
from saekit.files import write_json

log = logging.getLogger(__name__)


def path() -> Path:
    """Of the file."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "saekit" / "kernels.json"


@functools.cache
def key(device: torch.device) -> str:
    """What the findings on a GPU depend on."""
    source = sha256()
    for module in sorted(Path(__file__).parent.glob("triton_*.py")):
        source.update(module.read_bytes())
    gpu = torch.cuda.get_device_properties(device)
    parts = (gpu.name, gpu.multi_processor_count, torch.__version__, version("triton"))
    return " | ".join([*map(str, parts), source.hexdigest()[:16]])


def recall(device: torch.device, what: str) -> Any:
    """What was found out of `what`, as JSON holds it; None where nothing was."""
    return _read().get(key(device), {}).get(what)


def remember(device: torch.device, what: str, found: Any) -> None:
    """Keep it. A folder that cannot be written to costs finding it out again, and no more."""
    known = _read()
    known.setdefault(key(device), {})[what] = found
    try:
        write_json(path(), known)
    except (OSError, SaekitError) as error:
        log.warning("%s cannot be written (%s): it is found out again next time", path(), error)


def _read() -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): what it held is found out anew", path(), error)
        return {}
    return found
