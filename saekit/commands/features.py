"""What each latent of an SAE does: write a run's feature store, explain latents, hand them on"""

from saekit.commands import _features_build, _features_explain, _features_export
from saekit.commands._shared import choice, refuse_several
from saekit.errors import ConfigError, nearest

SHARED = True

PARTS = {
    "build": _features_build.run,
    "explain": _features_explain.run,
    "export": _features_export.run,
}


def run(argv: list[str]) -> None:
    what, argv = choice(argv, "features", "WHAT", list(PARTS))
    if what not in PARTS:
        raise ConfigError(f"there is no `saekit features {what}`; {nearest(what, list(PARTS))}")
    if what != "build":
        refuse_several(f"features {what}")
    PARTS[what](argv)
