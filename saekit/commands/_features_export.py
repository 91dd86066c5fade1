"""Hand features on: saekit features export RUN --format html|csv|neuronpedia --out PATH"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from saekit.commands._shared import Args, parse
from saekit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExportArgs(Args):
    """Write features of a run as one HTML page, as a CSV table, or in Neuronpedia's layout.

    A site of all of them, to look around in, is written by `saekit dashboard RUN --export`."""

    run: Positional[Path]
    """Folder of the run, which needs a feature store."""
    out: Path
    """File to write; for neuronpedia a folder, new or empty, of `batch-0.json` and on."""
    format: Literal["html", "csv", "neuronpedia"] = "html"
    """html: one page that needs no network. csv: a row a latent. neuronpedia: what SAEDashboard
    writes for it."""
    latents: tuple[int, ...] = ()
    """Latents to hand on, as `--latents 3 14`; all that fire, the densest first, where none is
    given."""


def run(argv: list[str]) -> None:
    args = parse(ExportArgs, argv, "features export")
    from saekit.dashboard import export, features
    from saekit.dashboard.data import Run
    from saekit.files import write_text

    run = Run.open(args.run)
    store = export.store_of(run)
    latents = list(args.latents) or features.select(store).tolist()
    if args.format == "neuronpedia":
        if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise ConfigError(f"--out {args.out} is not an empty folder: give a new one")
        export.write_neuronpedia(store, latents, args.out, run.path.resolve().name)
    else:
        make = export.html_page if args.format == "html" else export.csv_table
        write_text(args.out, make(run, store, latents))
    print(args.out)
