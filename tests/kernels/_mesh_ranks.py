"""What one of two processes does in `test_triton_step_mesh.py`: given to `runpy.run_path`."""

import os
import runpy
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saekit import ActivationCache, train
from saekit.activations_cache.planted import cache_of
from saekit.distributed import ALONE, Mesh, connect
from saekit.kernels.auxk import AuxKConfig
from saekit.trainers._run import Columns, Run
from saekit.trainers.topk import TopKConfig

D_IN, D_SAE, BATCH, K, STEPS = 12, 16, 6, 3, 3
NAMES = ("W_enc_T", "W_dec", "b_enc", "b_dec")

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip_norm": 2.0, "weight_decay": 0.1},
    # Latents die after a step or two; k is above what one process has of them.
    "revived": {"auxk": 5},
    "split": {"precision": "bfloat16", "split_master": True, "deterministic": True},
}


def start() -> dict[str, Tensor]:
    torch.manual_seed(4)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN))
    b_enc = 0.02 * torch.randn(D_SAE)
    b_enc[:2] += 3
    return dict(zip(NAMES, (W_dec.clone(), W_dec, b_enc, 0.1 * torch.randn(D_IN)), strict=True))


def steps(case: str, mesh: Mesh) -> dict[str, Tensor]:
    """What some steps make of everything, on all processes."""
    options = {"precision": "float32", **CASES[case]}
    held = mesh.held(D_SAE)
    given = {n: t if n == "b_dec" else t[held].clone() for n, t in start().items()}
    since, fired = (torch.zeros(len(given["W_dec"]), dtype=torch.int64) for _ in range(2))
    if k_aux := options.pop("auxk", None):
        options["auxk"] = AuxKConfig(2 * BATCH, k_aux, 1 / 32, torch.tensor(10.0))
    module, name = ("triton_step", "FusedTopKStep")
    if mesh.size > 1:
        module, name = ("triton_step_mesh", "FusedMeshStep")
        options["mesh"] = mesh
    form = getattr(import_module(f"saekit.kernels.{module}"), name)
    step = form(*given.values(), k=K, batch_size=BATCH, since=since, fired=fired, **options)
    found: dict[str, Any] = {}
    part = BATCH // mesh.data
    for number in range(STEPS):
        # Few values, so that pre-activations are equal now and then in bfloat16.
        x = torch.randint(-2, 3, (BATCH, D_IN), generator=torch.Generator().manual_seed(number))
        step.lr.fill_(1e-2)
        step(x[mesh.data_rank * part : (mesh.data_rank + 1) * part].float())
        found |= {f"loss-{number}": step.loss.clone(), f"l0-{number}": step.l0.clone()}
        found[f"auxk-{number}"] = step.auxk_loss.clone()
    step.write_back()
    state = getattr(step, "whole_state", step.state)
    for name, t in {**given, "since": since, "fired": fired}.items():
        found[name] = t if name == "b_dec" else mesh.whole(t)
    for name in NAMES:
        moment = state[name]["exp_avg_sq"]
        found[f"square of {name}"] = moment if name == "b_dec" else mesh.whole(moment)
    return {name: t.contiguous() for name, t in found.items()}


class Stopped(Exception):
    pass


def train_some(mesh: Mesh, out: Path, cache: Path, stop: int | None = None) -> None:
    """A run by the fused steps, which may stop and go on from its checkpoint."""
    advance = Run.advance

    def until(self: Run, columns: Columns) -> dict[str, float]:
        if self.step == stop:
            raise Stopped
        return advance(self, columns)

    Run.advance = until  # type: ignore[method-assign]
    cfg = TopKConfig(
        d_sae=16,
        k=K,
        n_tokens=30,
        batch_size=6,
        checkpoint_every=2,
        log_every=2,
        life_windows=2,
        dead_after=12,
        k_aux=3,
    )
    try:
        train(cfg, ActivationCache.open(cache), out=out, mesh=mesh)
    except Stopped:
        pass
    finally:
        Run.advance = advance  # type: ignore[method-assign]


if __name__ == "<run_path>":
    os.environ.update(globals()["ENV"])
    torch.set_num_threads(1)
    runpy.run_path(str(Path(globals()["HERE"]) / "_interpret.py"))
    triton_step = import_module("saekit.kernels.triton_step")
    # The interpreter runs programs one after another.
    few = triton_step.RowConfig(1, 2, 2)
    vars(triton_step).update(_RESIDUAL_PARTS=3, _ENCODER_PARTS=2, row_config=lambda *_, **__: few)
    for shape in ((1, 2), (2, 1)):
        mesh = connect(shape, "cpu", 120)
        for case in CASES:
            found = steps(case, mesh)
            if mesh.rank == 0:
                save_file(found, f"{globals()['OUT']}/{shape[0]}x{shape[1]}-{case}")
    os.environ["SAEKIT_KERNELS"] = "triton"
    out, cache = Path(globals()["OUT"]), Path(globals()["OUT"]) / "cache"
    if mesh.rank == 0:
        x = torch.randn(60, D_IN, generator=torch.Generator().manual_seed(9))
        cache_of([(x, x)], cache)
    mesh.barrier()
    train_some(mesh, out / "run-mesh", cache, stop=3)
    train_some(connect((1, 2), "cpu"), out / "run-mesh", cache)
    if mesh.rank == 0:
        train_some(ALONE, out / "run-alone", cache)
        for case in CASES:
            save_file(steps(case, ALONE), f"{globals()['OUT']}/alone-{case}")
