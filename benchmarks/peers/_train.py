"""What the drivers that train share. They run in other environments than saekit's: torch and
safetensors are all that is there."""

import argparse
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Job = dict[str, Any]
"""kind, l0, d_sae, lr, n_steps, batch_size, warmup and decay (steps), dead_after (tokens), seed,
device."""
Weights = dict[str, torch.Tensor]
"""W_enc [d_in, d_sae], b_enc, W_dec [d_sae, d_in], b_dec, and where there is one, threshold: of
`z = rule(x @ W_enc + b_enc)`."""


def main(
    package: str, fit: Callable[[Job, Iterator[torch.Tensor], int], tuple[Any, Weights]]
) -> None:
    """Read what to do, do it, and write the weights. `fit` also gives a function that encodes as
    the tool itself does at inference, or None where it has none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", required=True, help="safetensors: x [row, d_in], in order")
    parser.add_argument("--job", required=True, help="JSON")
    parser.add_argument("--out", type=Path, required=True, help="safetensors to write")
    args = parser.parse_args()
    job: Job = json.loads(args.job)
    rows = load_file(args.rows, device=job["device"])["x"]
    torch.manual_seed(job["seed"])
    encode, weights = fit(job, _batches(rows, job["batch_size"]), rows.shape[1])
    if encode is not None:
        _check(encode, weights, job, rows[:256])
    contiguous = {name: t.detach().float().cpu().contiguous() for name, t in weights.items()}
    save_file(contiguous, args.out)
    version = importlib.metadata.version(package)
    print(json.dumps({"versions": {package: version, "torch": torch.__version__}}))


def _batches(rows: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """The rows in order, again and again."""
    while True:
        for start in range(0, len(rows) - size + 1, size):
            yield rows[start : start + size]


@torch.no_grad()
def _check(
    encode: Callable[[torch.Tensor], torch.Tensor], weights: Weights, job: Job, x: torch.Tensor
) -> None:
    """The weights must give the tool's own latents."""
    pre = x @ weights["W_enc"] + weights["b_enc"]
    if "threshold" in weights:
        z = pre * (pre > weights["threshold"])
    else:
        values, indices = pre.relu().topk(job["l0"], dim=1)
        z = torch.zeros_like(pre).scatter(1, indices, values)
    torch.testing.assert_close(z, encode(x).float(), rtol=1e-3, atol=1e-3)
