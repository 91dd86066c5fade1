"""Which evaluations there are: every module of this folder without a leading underscore."""

import pkgutil
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import saekit.evals
from saekit.errors import ConfigError


def names() -> list[str]:
    """The evaluations, by the name that `saekit eval` takes."""
    modules = pkgutil.iter_modules(saekit.evals.__path__)
    return sorted(module.name for module in modules if not module.name.startswith("_"))


def find(name: str) -> Any:
    """The `EVAL` of `evals/<name>.py`, a subclass of `Eval`. Raises ConfigError for others."""
    known = names()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(known)}"
        raise ConfigError(f"there is no evaluation '{name}'; {hint}")
    return import_module(f"saekit.evals.{name}").EVAL
