# pyright: reportMissingImports=false
"""overcomplete trains SAEs by its own train_sae; what is saved is their state dict."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _interop import BATCH, D_IN, D_SAE, Answer, main, rows
from overcomplete.sae import SAE, BatchTopKSAE, JumpSAE, TopKSAE, train_sae
from overcomplete.sae.losses import mse_l1
from safetensors.torch import load_file

CLASSES: dict[str, Any] = {
    "SAE": SAE,
    "TopKSAE": TopKSAE,
    "BatchTopKSAE": BatchTopKSAE,
    "JumpSAE": JumpSAE,
}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "relu": ("SAE", {}, "l2"),
    "relu-max_l2": ("SAE", {}, "max_l2"),
    "relu-l1": ("SAE", {}, "l1"),
    "topk": ("TopKSAE", {"top_k": 4}, "l2"),
    "topk-identity": ("TopKSAE", {"top_k": 4}, "identity"),
    "batch_topk": ("BatchTopKSAE", {"top_k": 4 * BATCH}, "l2"),
    "jumprelu": ("JumpSAE", {"bandwidth": 0.1}, "max_l1"),
}


def make(out: Path) -> Iterator[tuple[str, Callable[[torch.Tensor], Answer]]]:
    for case, (name, options, norm) in CASES.items():
        params = {"normalization": norm, "use_multiplier": case.endswith("identity")}
        sae = CLASSES[name](D_IN, D_SAE, dictionary_params=params, **options)
        loader = rows(40 * BATCH).split(BATCH)

        def loss(x: Any, x_hat: Any, pre: Any, z: Any, dictionary: Any) -> Any:
            return mse_l1(x, x_hat, pre, z, dictionary, 1e-3)

        optimiser = torch.optim.Adam(sae.parameters(), lr=1e-2)
        train_sae(sae, loader, loss, optimiser, nb_epochs=3, monitoring=0)
        sae.eval()
        (out / case).mkdir(parents=True)
        torch.save(sae.state_dict(), out / case / "sae.pt")
        about: dict[str, Any] = {"class": name, "normalization": norm}
        if name == "TopKSAE":
            about["top_k"] = options["top_k"]
        if name == "BatchTopKSAE":
            about["running_threshold"] = float(sae.running_threshold)
        (out / case / "overcomplete.json").write_text(json.dumps(about))
        yield case, of(sae)


def of(sae: Any) -> Callable[[torch.Tensor], Answer]:
    def compute(x: torch.Tensor) -> Answer:
        _, z, x_hat = sae(x)
        return z, x_hat

    return compute


def load(folder: Path, x: torch.Tensor) -> Answer:
    about = json.loads((folder / "overcomplete.json").read_text())
    options = {"top_k": about["top_k"]} if "top_k" in about else {}
    params = {"normalization": about["normalization"]}
    tensors = load_file(folder / "sae.safetensors")
    d_sae, d_in = tensors["dictionary._weights"].shape
    sae = CLASSES[about["class"]](d_in, d_sae, dictionary_params=params, **options)
    sae.load_state_dict(tensors)
    sae.eval()
    return of(sae)(x)


if __name__ == "__main__":
    main("overcomplete", make, load)
