"""Where a cache lies: a folder on this machine, or one behind a URL that fsspec knows.

The rest of the package knows names (`manifest.json`, `rank-0/shard-00000.safetensors`) and never
paths. What counts as part of a cache is decided by its manifest alone: a file that the manifest
does not name may be there, whole or not, and means nothing.
"""

import re
from pathlib import Path

from saekit.activations_cache.storage_base import Storage
from saekit.activations_cache.storage_local import LocalStorage
from saekit.activations_cache.storage_remote import RemoteStorage
from saekit.errors import ConfigError

__all__ = ["LocalStorage", "RemoteStorage", "Storage", "storage"]


def storage(where: Path | str) -> Storage:
    """The storage at a local path, or at a URL (`s3://...`, `memory://...`, `file://...`).

    Raises ConfigError for a URL of an unknown kind, or whose driver is not installed.
    """
    if isinstance(where, str) and "://" in where:
        protocol, _, path = where.partition("://")
        if protocol in ("file", "local"):
            return LocalStorage(Path(path))
        return RemoteStorage(where)
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(where)):
        raise ConfigError(
            f"'{where}' looks like a URL with one slash, as a Path makes of it: give it as text, "
            "with '://'"
        )
    return LocalStorage(Path(where))
