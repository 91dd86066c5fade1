"""What one of several processes does in `test_examples_ranks.py`: given to `runpy.run_path`."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from saekit import ActivationCache, checkpoint, evaluate
from saekit.distributed import connect
from saekit.errors import SaekitError
from saekit.evals import _features_spool, examples
from saekit.evals._features_write import Files
from saekit.evals.examples import Examples, ExamplesConfig


def small() -> None:
    """Of a tiny store many pieces and files."""
    changed = pytest.MonkeyPatch()
    changed.setattr(_features_spool, "PLACES", 100)
    changed.setattr(examples, "AT_ONCE", 50)
    changed.setattr(Examples, "LATENTS_PER_FILE", 8)
    changed.setattr(Examples, "LATENTS_PER_GROUP", 4)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "<run_path>":
    given = globals()
    os.environ.update(given["ENV"])
    torch.set_num_threads(1)
    small()
    mesh = connect((int(given["ENV"]["WORLD_SIZE"]), 1), "cpu", 60)
    sae = checkpoint.load(given["SAE"])
    cache = ActivationCache.open(given["CACHE"])
    code, write = Examples._code, Files.write
    counts = {"rows": 0, "files": 0}

    def counted_code(self: Examples, place: Any, *args: Any) -> Any:
        counts["rows"] += len(place)
        if given["job"].get("kill_in") == "rows" and mesh.rank == 1 and counts["rows"] > 250:
            die()
        return code(self, place, *args)

    def counted_write(self: Files, number: int) -> Any:
        counts["files"] += 1
        for step in write(self, number):
            yield step
            if given["job"].get("kill_in") == "files" and mesh.rank == 1:
                die()

    counted = pytest.MonkeyPatch()
    counted.setattr(Examples, "_code", counted_code)
    counted.setattr(Files, "write", counted_write)
    for job in given["JOBS"]:
        given["job"] = job
        counts.update(rows=0, files=0)
        out = Path(job["out"])
        config = ExamplesConfig(**job.get("config", {}))
        try:
            evaluate("examples", sae, cache, hook=given["HOOK"], config=config, out=out, mesh=mesh)
        except SaekitError as error:
            out.with_name(f"{out.name}-error-{mesh.rank}").write_text(str(error))
        done = f"{counts['rows']} {counts['files']}"
        out.with_name(f"{out.name}-done-{mesh.rank}").write_text(done)
