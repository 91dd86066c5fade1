"""What only a GPU does: pinned buffers filled by a stream of their own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from saekit import ActivationCache, HarvestConfig, harvest
from saekit.activations_cache.reader import Reader

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_a_harvest_on_a_gpu_gives_the_rows_of_one_on_the_cpu(
    dtype: Any, tiny_config: HarvestConfig, tmp_path: Path
) -> None:
    cfg = replace(tiny_config, dtype=dtype, gradients=True)
    cpu, gpu = (harvest(replace(cfg, device=d), tmp_path / d) for d in ("cpu", "cuda"))
    assert torch.equal(cpu.indices("all"), gpu.indices("all"))
    for hook in cpu.hooks:
        for column in (hook, f"{hook}.grad"):
            x, y = (c.row_slice(column, 0, c.n_rows) for c in (cpu, gpu))
            # A step of int8 is 1/127 of the row's largest value; the others round finer.
            torch.testing.assert_close(y, x, rtol=2**-6, atol=float(x.abs().max()) / 100)
        assert gpu.stats(hook).n == cpu.stats(hook).n
        torch.testing.assert_close(gpu.stats(hook).mean, cpu.stats(hook).mean, rtol=1e-3, atol=1e-4)


def test_two_harvests_on_a_gpu_give_the_same_files(
    tiny_config: HarvestConfig, tmp_path: Path
) -> None:
    cfg = replace(tiny_config, device="cuda", memory_mib=0.13)
    first, second = (harvest(cfg, tmp_path / name) for name in "ab")
    assert first.fingerprint == second.fingerprint


def test_batches_reach_the_gpu(tiny_cache: ActivationCache) -> None:
    hook = "resid_post.0"
    on_cpu = Reader(tiny_cache, (hook,), 64, seed=1)
    on_gpu = Reader(tiny_cache, (hook,), 64, seed=1, device="cuda")
    for x, y in zip(on_cpu, on_gpu, strict=True):
        assert y[hook].device.type == "cuda"
        assert torch.equal(x[hook], y[hook].cpu())
