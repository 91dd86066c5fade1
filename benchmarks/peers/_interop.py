"""What the drivers of `check_interop.py` share. They run in other environments than saekit's: torch
and safetensors are all that is there.

A case is a folder. `make` fills it with what the tool itself saves, and `expected.safetensors`
beside it, in which the tool says what that computes: x, z and x_hat. `load` is given folders that
saekit wrote, with an x each, and answers in the same file.
"""

import argparse
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

D_IN, D_SAE, BATCH, STEPS = 16, 64, 64, 200
EXPECTED = "expected.safetensors"

Answer = tuple[torch.Tensor, torch.Tensor]
"""z and x_hat."""


def main(
    package: str,
    make: Callable[[Path], Iterator[tuple[str, Callable[[torch.Tensor], Answer]]]],
    load: Callable[[Path, torch.Tensor], Answer],
) -> None:
    """`make` saves SAEs below a folder, and yields of each the path from there and how the tool
    computes it. `load` is given a folder and x."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--make", type=Path, help="folder to save SAEs into")
    parser.add_argument("--load", type=Path, nargs="*", default=[], help="folders to answer for")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    made = []
    if args.make is not None:
        x = rows(256)
        for name, compute in make(args.make):
            _answer(args.make / name, x, compute)
            made.append(name)
    failed = {}
    for folder in args.load:
        x = load_file(folder.parent / EXPECTED)["x"]
        try:
            _answer(folder, x, partial(load, folder), folder.parent)
        except Exception as error:
            failed[folder.name] = f"{type(error).__name__}: {error}"
    version = importlib.metadata.version(package)
    told: dict[str, Any] = {"versions": {package: version, "torch": torch.__version__}}
    print(json.dumps({**told, "made": made, "failed": failed}))


def _answer(
    folder: Path, x: torch.Tensor, compute: Callable[[torch.Tensor], Answer], at: Path | None = None
) -> None:
    with torch.no_grad():
        z, x_hat = compute(x.clone())
    found = {"x": x, "z": z.detach().float(), "x_hat": x_hat.detach().float()}
    whole = {name: tensor.contiguous().clone() for name, tensor in found.items()}
    save_file(whole, (at or folder).with_name(f"{(at or folder).name}.{EXPECTED}"))


def rows(n: int) -> torch.Tensor:
    """Sparse sums of fixed directions about a mean, with lengths as a residual stream has them."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=generator))
    mean = 3 * torch.randn(D_IN, generator=generator)
    fires = torch.rand(n, D_SAE) < 0.06
    return (fires * torch.rand(n, D_SAE) * 4) @ directions + mean + 0.05 * torch.randn(n, D_IN)


def batches() -> Iterator[torch.Tensor]:
    while True:
        yield rows(BATCH)
