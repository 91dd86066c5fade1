"""Write a run's report as HTML and Markdown."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from saekit.commands._shared import Args, parse


@dataclass(frozen=True, kw_only=True)
class ReportArgs(Args):
    """Write a run's report: one HTML file that needs no network, and the same in Markdown beside
    it."""

    run: Positional[Path]
    """Folder of the run, with its results."""
    out: Path | None = None
    """The HTML file; `report.html` in the run's folder where none is given."""


def run(argv: list[str]) -> None:
    args = parse(ReportArgs, argv, "report")
    from saekit.dashboard.report import write_report

    print(write_report(args.run, args.out))
