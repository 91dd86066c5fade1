"""What saekit raises. A message gives the value, the rule, and the remedy, in one paragraph.

The command line prints the message alone and exits with `exit_code`; Python callers catch
`SaekitError`.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class SaekitError(Exception):
    """Anything a user can put right."""

    exit_code = 1


class ConfigError(SaekitError):
    """A value, a key or a combination of options that cannot work."""

    exit_code = 2


class CacheError(SaekitError):
    """An activation cache that is incomplete, altered, or of another model, hook or width."""


class CheckpointError(SaekitError):
    """An SAE folder or a training state that cannot be read, or belongs to another run."""


class CorpusError(SaekitError):
    """Text that cannot be read, or is not there."""


class ModelError(SaekitError):
    """A model that cannot be loaded, or lacks the hook point asked for."""


class Undefined(SaekitError):
    """A ratio whose denominator is zero, or says nothing."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    names = list(known)
    near = get_close_matches(name, names, n=1)
    return f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(names)}"


def first_line(error: Exception) -> str:
    """What another library says went wrong, without its essay, to go before a full stop."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(" .")
