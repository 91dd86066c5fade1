import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from saekit import ActivationCache, HarvestConfig, harvest
from saekit.activations_cache.plan import plan
from saekit.errors import CorpusError, SaekitError

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_planned_bytes_are_those_on_disk(
    gradients: bool, dtype: str, tmp_path: Path, tiny_config: HarvestConfig
) -> None:
    cfg = replace(tiny_config, gradients=gradients, dtype=dtype)  # type: ignore[arg-type]
    planned = plan(cfg, tmp_path / "c", seconds=0.01)
    assert not (tmp_path / "c").exists()
    cache = harvest(cfg, tmp_path / "c")
    on_disk: dict[str, int] = {}
    for shard in cache.manifest.shards:
        with safe_open(cache.path / shard.file, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                column = name if name in planned.disk else "token"
                on_disk[column] = on_disk.get(column, 0) + tensor.numel() * tensor.element_size()
    assert planned.disk == on_disk
    assert planned.rows == cache.n_rows
    assert planned.fits and planned.tokens_per_s > 0


def test_a_harvest_that_cannot_fit_is_refused_before_it_begins(
    tmp_path: Path, tiny_config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 10**6 - 1000, 1000))
    assert not plan(tiny_config, tmp_path / "c", seconds=0.01).fits
    with pytest.raises(SaekitError, match="900 tokens need up to 98.1 kB more .* 1.0 kB are free"):
        harvest(tiny_config, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_what_is_on_disk_already_is_not_asked_for_again(
    tiny_cache: ActivationCache, tiny_config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 10**6, 0))
    assert harvest(tiny_config, tiny_cache.path).n_rows == 900


def test_an_empty_corpus_cannot_be_planned(tmp_path: Path, tiny_config: HarvestConfig) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(CorpusError, match="gave no token"):
        plan(replace(tiny_config, dataset=str(tmp_path / "empty.jsonl")), tmp_path / "c")
