"""Upload an SAE to the Hugging Face hub, with a model card made from what is known of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from saekit.commands._shared import Args, parse


@dataclass(frozen=True, kw_only=True)
class PushArgs(Args):
    """Upload an SAE's files (a run's, or those of any format), its results, a model card and
    SHA256SUMS, in one commit: saekit push RUN hf://owner/name --licence mit. Log in first with `hf
    auth login`."""

    folder: Positional[Path]
    """Folder of the SAE."""
    address: Positional[str]
    """hf://owner/name, or hf://owner/name/path for several in one repository, which is made where
    it is not there."""
    licence: (
        Literal[
            "mit",
            "apache-2.0",
            "cc-by-4.0",
            "cc-by-sa-4.0",
            "cc0-1.0",
            "bsd-3-clause",
            "other",
        ]
        | None
    ) = None
    """What others may do with it. It has to be said."""
    title: str | None = None
    """Of the card; the last part of the address where none is given."""
    private: bool = False
    """Make the repository for your eyes alone, where it is made."""
    keep_paths: bool = False
    """Upload also where a file names folders of this machine, which everyone can then read."""
    dry_run: bool = False
    """Print the card and the names of the files, and upload nothing."""


def run(argv: list[str]) -> None:
    args = parse(PushArgs, argv, "push")
    from saekit.errors import ConfigError
    from saekit.interop import _card, _hub

    _hub.Address.parse(args.address)
    made = _card.parcel(args.folder, args.address, args.licence, args.title)
    paths = [] if args.keep_paths else _card.machine_paths(made.files)
    if paths:
        raise ConfigError(
            f"paths of this machine would be for everyone to read: {', '.join(paths)}. Upload them "
            "with --keep-paths, or make the SAE again from a model and corpus by their hub names"
        )
    if args.dry_run:
        print(made.card)
        print("\n".join(sorted(made.files)))
        return
    print(_hub.push(made.files, args.address, private=args.private))
    print(f"Next: saekit pull {args.address} FOLDER, on any machine")
