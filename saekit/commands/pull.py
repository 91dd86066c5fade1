"""Fetch an SAE of any format from the Hugging Face hub into a folder, and compare its checksums."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from saekit.commands._shared import Args, parse


@dataclass(frozen=True, kw_only=True)
class PullArgs(Args):
    """Fetch the files of an SAE, and no others of its repository: saekit pull
    hf://owner/name/path FOLDER."""

    address: Positional[str]
    """hf://owner/name, hf://owner/name/path, or hf://owner/name@revision/path; a folder, or one
    file."""
    out: Positional[Path]
    """New folder for the files."""


def run(argv: list[str]) -> None:
    args = parse(PullArgs, argv, "pull")
    from saekit import interop
    from saekit.interop import _hub

    files = _hub.pull(args.address, args.out)
    name = Path(_hub.Address.parse(args.address).path).name
    path = args.out / name if (args.out / name).is_file() else args.out
    sae = interop.load(path)
    kind = type(sae.activation).__name__
    print(f"{path}: {interop.detect(path)}, {kind}, {sae.d_sae:,} latents of width {sae.d_in}")
    print(f"{len(files)} files. Next: saekit convert {path} DST --format FORMAT")
