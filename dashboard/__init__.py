"""Reports and the feature browser: what a finished run found, for people to read."""

from saekit.dashboard.data import Run
from saekit.dashboard.report import write_report
from saekit.dashboard.server import serve

__all__ = ["Run", "serve", "write_report"]
