"""Browse a run's features in the web browser."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from saekit.commands._shared import Args, parse
from saekit.errors import SaekitError


@dataclass(frozen=True, kw_only=True)
class DashboardArgs(Args):
    """Open the feature browser on a run, in the web browser."""

    run: Positional[Path]
    """Folder of the run."""
    port: int = 8501
    """Port to serve on, at localhost."""
    headless: bool = False
    """Serve, without opening a web browser."""


def run(argv: list[str]) -> None:
    args = parse(DashboardArgs, argv, "dashboard")
    from saekit.dashboard.server import serve

    if code := serve(args.run, port=args.port, headless=args.headless):
        raise SaekitError(f"the feature browser's server ended with exit code {code}")
