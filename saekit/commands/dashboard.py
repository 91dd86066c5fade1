"""Browse runs and their features in the web browser."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from saekit.commands._shared import Args, parse
from saekit.errors import SaekitError


@dataclass(frozen=True, kw_only=True)
class DashboardArgs(Args):
    """Open the feature browser on a run, or on a folder of runs, in the web browser."""

    path: Positional[Path]
    """Folder of a run, or one that holds runs. Nothing in it is changed without `--write`, and no
    link leads out of it."""
    port: int = 8501
    """Port to serve on."""
    host: str = "127.0.0.1"
    """Address to serve on. By default only this machine can reach it; with another, such as
    0.0.0.0, everybody who reaches that address sees the runs and can run their models: there is no
    password."""
    headless: bool = False
    """Serve, without opening a web browser."""
    export: Path | None = None
    """Folder for a static site of the run's features, in place of serving: it opens from the disk,
    without a server or a network."""
    write: bool = False
    """Let the browser write into the run: make its feature store (`results/features`), and keep
    your stars and notes (`notes.json`). Without, it changes nothing."""


def run(argv: list[str]) -> None:
    args = parse(DashboardArgs, argv, "dashboard")
    from saekit.dashboard.server import serve

    if args.export is not None:
        from saekit.dashboard.data import Run
        from saekit.dashboard.export import write_site

        print(write_site(Run.open(args.path), args.export))
        return
    code = serve(
        args.path, port=args.port, host=args.host, headless=args.headless, write=args.write
    )
    if code:
        raise SaekitError(f"the feature browser's server ended with exit code {code}")
