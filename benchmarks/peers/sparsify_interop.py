# pyright: reportMissingImports=false
"""sparsify fits its sparse coders to rows, saves and loads them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _interop import D_IN, D_SAE, STEPS, Answer, batches, main
from sparsify import SparseCoder, SparseCoderConfig

CASES: dict[str, dict[str, Any]] = {
    "layers.1": {},
    "layers.2": {"normalize_decoder": False},
    "layers.3.mlp": {"transcode": True},
    "layers.4.mlp": {"transcode": True, "skip_connection": True},
}


def make(out: Path) -> Iterator[tuple[str, Callable[[torch.Tensor], Answer]]]:
    turn = torch.linalg.qr(torch.randn(D_IN, D_IN)).Q
    for name, options in CASES.items():
        coder = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=4, **options))
        data = batches()
        coder.b_dec.data = next(data).mean(0)
        optimiser = torch.optim.Adam(coder.parameters(), lr=1e-2)
        for _ in range(STEPS):
            x = next(data)
            coder(x, x @ turn if coder.cfg.transcode else x).fvu.backward()
            optimiser.step()
            optimiser.zero_grad()
            if coder.cfg.normalize_decoder and not coder.cfg.transcode:
                coder.set_decoder_norm_to_unit_norm()
        coder.save_to_disk(out / name)
        yield name, of(SparseCoder.load_from_disk(out / name))


def of(coder: Any) -> Callable[[torch.Tensor], Answer]:
    def compute(x: torch.Tensor) -> Answer:
        top = coder.encode(x)
        z = torch.zeros(len(x), coder.num_latents).scatter(1, top.top_indices, top.top_acts)
        return z, coder(x).sae_out

    return compute


def load(folder: Path, x: torch.Tensor) -> Answer:
    # As delphi finds them: all of a folder, by hook point.
    return of(
        SparseCoder.load_many(str(folder.parent), local=True, layers=[folder.name])[folder.name]
    )(x)


if __name__ == "__main__":
    main("eai-sparsify", make, load)
