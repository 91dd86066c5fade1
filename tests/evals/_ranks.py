"""What one of several processes does in `test_ranks.py`: given to `runpy.run_path`."""

import os
from pathlib import Path

import torch

from saekit import ActivationCache, checkpoint, evaluate, matching
from saekit.distributed import connect
from saekit.errors import ConfigError
from saekit.evals import _kinds, _splice

if __name__ == "<run_path>":
    given = globals()
    os.environ.update(given["ENV"])
    torch.set_num_threads(1)
    _splice._LOGITS_AT_ONCE = given["LOGITS"]
    matching._COSINES_AT_ONCE = given["COSINES"]
    mesh = connect((int(given["ENV"]["WORLD_SIZE"]), 1), "cpu", 60)
    sae = checkpoint.load(given["SAE"])
    cache = ActivationCache.open(given["CACHE"])
    for name, (kind, options) in given["CONFIGS"].items():
        config = _kinds.find(kind).Config(**options)
        out = Path(given["OUT"]) / name
        evaluate(kind, sae, cache, hook=given["HOOK"], config=config, out=out, mesh=mesh)
    for name in ("ground_truth", "attention"):
        try:
            evaluate(name, sae, cache, hook=given["HOOK"], mesh=mesh)
        except ConfigError as error:
            Path(given["OUT"], f"refused-{name}-{mesh.rank}").write_text(str(error))
