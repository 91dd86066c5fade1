"""Which formats there are: the public modules of this folder, by name."""

import pkgutil
from importlib import import_module
from pathlib import Path
from types import ModuleType

import saekit.interop
from saekit.errors import CheckpointError, ConfigError, nearest


def names() -> list[str]:
    """Every format that is read."""
    modules = pkgutil.iter_modules(saekit.interop.__path__)
    return sorted(module.name for module in modules if not module.name.startswith("_"))


def find(name: str) -> ModuleType:
    """A format's module. Raises ConfigError with the nearest name for one that does not exist."""
    if name not in names():
        raise ConfigError(f"there is no format '{name}'; {nearest(name, names())}")
    return import_module(f"saekit.interop.{name}")


def writable() -> list[str]:
    """Every format that is written."""
    return [name for name in names() if hasattr(find(name), "write")]


def detect(path: Path) -> str:
    """The format of a file or folder.

    Raises CheckpointError where it is not there, is of none, or of more than one.
    """
    if not path.exists():
        raise CheckpointError(f"{path} is not there: give a folder or file of an SAE")
    found = [name for name in names() if find(name).detect(path)]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{path} looks like {' and '.join(found)}: say which it is, with a format"
        )
    held = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else [path.name]
    raise CheckpointError(
        f"{path} holds no finished SAE of a format known here ({', '.join(names())}), but "
        f"{', '.join(held) or 'nothing'}"
    )
