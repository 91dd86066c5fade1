"""Which kinds there are: the public modules of this folder, by name."""

import pkgutil
from importlib import import_module

import saekit.trainers
from saekit.errors import ConfigError, nearest
from saekit.trainers._base import Trainer


def names() -> list[str]:
    """Every kind of SAE that can be trained."""
    modules = pkgutil.iter_modules(saekit.trainers.__path__)
    return sorted(module.name for module in modules if not module.name.startswith("_"))


def kind(name: str) -> type[Trainer]:
    """The trainer of a kind. Raises ConfigError with the nearest name for one that does not
    exist."""
    if name not in names():
        raise ConfigError(f"there is no SAE kind '{name}'; {nearest(name, names())}")
    found: type[Trainer] = import_module(f"saekit.trainers.{name}").KIND
    return found


def name_of(trainer: type[Trainer]) -> str:
    """The name under which a trainer's class is found: that of its module."""
    return trainer.__module__.rsplit(".", 1)[-1]
