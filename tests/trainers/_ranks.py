"""What one of several processes does in `test_distributed.py`: given to `runpy.run_path` with JOBS,
or started by torchrun with a file of them."""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from saekit import ActivationCache, cli, kernels, train
from saekit.config import TrainConfig
from saekit.distributed import Mesh, connect
from saekit.errors import SaekitError
from saekit.trainers import _kinds
from saekit.trainers._run import Columns, Run

SPARSITY: dict[str, dict[str, Any]] = {
    # So that most latents are dead after some steps, and more than k_aux of them.
    "topk": {"k": 3, "k_aux": 5, "dead_after": 600},
    "batch_topk": {"k": 3, "k_aux": 5, "dead_after": 600},
    "mutual_choice": {"budget": 361, "k_aux": 5, "dead_after": 600},
    "jumprelu": {"target_l0": 4.0, "k_aux": 5, "dead_after": 600, "pre_act_coef": 1e-3},
    "matching_pursuit": {"steps": 3},
}


def config(kind: str, **options: Any) -> TrainConfig:
    sizes = {"d_sae": 48, "n_tokens": 2_400, "batch_size": 120, "checkpoint_every": 4, "lr": 3e-3}
    rest = {"log_every": 5, "life_windows": 2}
    return _kinds.kind(kind).Config(**{**sizes, **rest, **SPARSITY[kind], **options})


class Stopped(Exception):
    pass


def run(jobs: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    for job in jobs:
        mesh = connect(tuple(job["mesh"]), "cpu", job.get("stall", 60))
        {"train": train_some, "choose": choose}[job.pop("do", "train")](job, mesh)


def train_some(job: dict[str, Any], mesh: Mesh) -> None:
    """Train, until a step, or until one process is killed or stands still there."""
    advance, out = Run.advance, Path(job["out"])
    if "stand" in job:
        said = os.open(f"{out}-said-{mesh.rank}", os.O_CREAT | os.O_WRONLY)
        os.dup2(said, 2)

    def until(self: Run, columns: Columns) -> dict[str, float]:
        if self.step == job.get("stop"):
            raise Stopped
        if [mesh.rank, self.step] == job.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if [mesh.rank, self.step] == job.get("stand"):
            threading.Event().wait()
        return advance(self, columns)

    Run.advance = until  # type: ignore[method-assign]
    try:
        cfg = config(job["kind"], **job.get("options", {}))
        train(cfg, ActivationCache.open(job["cache"]), out=out, mesh=mesh)
    except Stopped:
        pass
    except SaekitError as error:
        out.with_name(f"{out.name}-error-{mesh.rank}").write_text(str(error))
    finally:
        Run.advance = advance  # type: ignore[method-assign]


def tied() -> torch.Tensor:
    """Pre-activations with many equal ones, some rows with hardly any above 0, and one NaN-free."""
    g = torch.Generator().manual_seed(3)
    pre = torch.randint(-3, 4, (8, 12), generator=g).float()
    pre[1] = -1.0
    pre[2, :2], pre[2, 2:] = 1.0, -2.0
    return pre


def choose(job: dict[str, Any], mesh: Mesh) -> None:
    """What is kept of `tied()`, as a mask, by each choice."""
    pre = tied()
    rows = len(pre) // mesh.data
    held = pre[mesh.data_rank * rows : (mesh.data_rank + 1) * rows, mesh.held(pre.shape[1])]
    held = held.contiguous()
    masks = {}
    for n in (1, 3, 5):
        masks[f"row-{n}"] = kernels.row_topk(held, n, mesh, held.shape[1], 0.0)
    for n in (1, 10, 30, 96):
        masks[f"batch-{n}"] = kernels.batch_topk(held, n, mesh)
    found = {}
    for name, (indices, offsets) in masks.items():
        mask = torch.zeros(held.shape, dtype=torch.uint8)
        mask[kernels.rows_of(offsets), indices] = 1
        found[name] = mesh.rows(mesh.whole(mask, 1)).contiguous()
    if mesh.rank == 0:
        save_file(found, job["out"])


if __name__ == "<run_path>":
    given = globals().get("JOBS")
    if given is not None:
        os.environ.update(globals()["ENV"])
        run(given)
elif __name__ == "__main__":
    # Under torchrun: the command, of which one process is killed in its first life.
    flag, *argv = sys.argv[1:]
    advance = Run.advance

    def killed_once(self: Run, columns: Columns) -> dict[str, float]:
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and self.step == 10 and self.mesh.rank == 1:
            Path(flag).write_text(json.dumps({"killed": os.getpid()}))
            os.kill(os.getpid(), signal.SIGKILL)
        return advance(self, columns)

    Run.advance = killed_once  # type: ignore[method-assign]
    sys.exit(cli.main(argv))
