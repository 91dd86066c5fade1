"""Write a run's report, or one that compares many, as HTML and Markdown."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from saekit.commands._shared import Args, parse
from saekit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ReportArgs(Args):
    """Write a run's report, or of several runs one that compares them: one HTML file that needs no
    network, and the same in Markdown beside it; of a comparison in JSON, too."""

    runs: Positional[tuple[Path, ...]]
    """Folders of the runs, with their results."""
    out: Path | None = None
    """The HTML file. Where none is given: of one run, `report.html` in its folder; of several,
    `comparison.html` here."""


def run(argv: list[str]) -> None:
    args = parse(ReportArgs, argv, "report")
    from saekit.dashboard.compare import write_comparison
    from saekit.dashboard.report import write_report

    if not args.runs:
        raise ConfigError("no run was named: give the folders of one or more")
    if len(args.runs) == 1:
        print(write_report(args.runs[0], args.out))
    else:
        print(write_comparison(args.runs, args.out or Path("comparison.html")))
