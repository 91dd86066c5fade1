"""A harvest that is killed at any moment goes on, and ends in the files of one that was not."""

import multiprocessing
import random
import time
from dataclasses import replace
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest

from saekit import HarvestConfig, harvest
from saekit.files import file_checksum


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "saekit.activations_cache.harvest",
            "transformers.models.auto.modeling_auto",
            "transformers.models.auto.tokenization_auto",
            "transformers.models.gpt2.modeling_gpt2",
        ]
    )
    return context


def _files(folder: Path) -> dict[str, str]:
    return {p.name: file_checksum(p) for p in folder.iterdir() if not p.name.startswith(".")}


def _run(process: ForkServerProcess) -> None:
    process.start()
    process.join()
    assert process.exitcode == 0


def _kill_at(
    cfg: HarvestConfig, moments: list[float], processes: ForkServerContext, folder: Path
) -> int:
    """Kill a harvest at each moment, as a share of the time that one takes; says how many were not
    done yet."""
    # The first one waits for the imports.
    _run(processes.Process(target=harvest, args=(cfg, folder / "first")))
    begun = time.monotonic()
    _run(processes.Process(target=harvest, args=(cfg, folder / "whole")))
    seconds = time.monotonic() - begun
    expected = _files(folder / "whole")
    interrupted = 0
    for number, moment in enumerate(moments):
        out = folder / str(number)
        victim = processes.Process(target=harvest, args=(cfg, out))
        victim.start()
        victim.join(moment * seconds)
        victim.kill()
        victim.join()
        interrupted += victim.exitcode != 0
        _run(processes.Process(target=harvest, args=(cfg, out)))
        assert _files(out) == expected, f"kill number {number}"
    return interrupted


@pytest.fixture
def longer_config(tiny_config: HarvestConfig, tmp_path: Path, texts: list[str]) -> HarvestConfig:
    """Many small shards, two of them being written at a time."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(40):
        (corpus / f"{number:02d}.txt").write_text("\n".join(texts))
    return replace(tiny_config, dataset=str(corpus), n_tokens=40_000, memory_mib=0.13)


def test_a_killed_harvest_goes_on(
    longer_config: HarvestConfig, processes: ForkServerContext, tmp_path: Path
) -> None:
    cfg = replace(longer_config, n_tokens=3_000)
    assert _kill_at(cfg, [0.4, 0.7], processes, tmp_path) > 0


@pytest.mark.slow
def test_a_harvest_killed_at_fifty_moments_goes_on_each_time(
    longer_config: HarvestConfig, processes: ForkServerContext, tmp_path: Path
) -> None:
    draws = random.Random(0)
    moments = [draws.random() for _ in range(50)]
    assert _kill_at(longer_config, moments, processes, tmp_path) > 30
