"""What one of several processes does in `test_ranks.py`: given to `runpy.run_path`."""

import os
from pathlib import Path

import torch

from saekit import ActivationCache, checkpoint, evaluate
from saekit.distributed import connect
from saekit.errors import ConfigError
from saekit.evals import _splice
from saekit.evals.core import CoreConfig

if __name__ == "<run_path>":
    given = globals()
    os.environ.update(given["ENV"])
    torch.set_num_threads(1)
    _splice._LOGITS_AT_ONCE = given["LOGITS"]
    mesh = connect((int(given["ENV"]["WORLD_SIZE"]), 1), "cpu", 60)
    sae = checkpoint.load(given["SAE"])
    cache = ActivationCache.open(given["CACHE"])
    for name, options in given["CONFIGS"].items():
        config = CoreConfig(**options)
        out = Path(given["OUT"]) / name
        evaluate("core", sae, cache, hook=given["HOOK"], config=config, out=out, mesh=mesh)
    for name in ("geometry", "attention"):
        try:
            evaluate(name, sae, cache, hook=given["HOOK"], mesh=mesh)
        except ConfigError as error:
            Path(given["OUT"], f"refused-{name}-{mesh.rank}").write_text(str(error))
