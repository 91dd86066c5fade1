from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from saekit import ActivationCache, HarvestConfig, harvest
from saekit.activations_cache import shards
from saekit.activations_cache.manifest import Manifest, Shard
from saekit.activations_cache.model import LanguageModel
from saekit.errors import CacheError, ConfigError, CorpusError, ModelError, SaekitError
from saekit.files import file_sha256


def test_rows_are_what_the_model_computes_window_by_window(
    tiny_cache: ActivationCache, tiny_lm: Path
) -> None:
    """Against transformers' own hidden states, one unpadded window at a time."""
    model = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32)
    for window in tiny_cache.windows("all"):
        with torch.no_grad():
            states = model(window.tokens[None], output_hidden_states=True).hidden_states
        stop = window.start + len(window.tokens)
        stored = tiny_cache.row_slice("resid_post.0", window.start, stop)
        # bfloat16 keeps 8 bits: a relative error of 2^-9 at most.
        torch.testing.assert_close(stored, states[1][0], rtol=2**-8, atol=1e-3)


def test_windows_give_the_documents_back(
    tiny_cache: ActivationCache, tiny_lm: Path, texts: list[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    read: dict[str, list[int]] = {}
    for window in tiny_cache.windows("all"):
        assert window.tokens[0] == tokenizer.bos_token_id
        assert len(window.tokens) <= tiny_cache.manifest.config["context"]
        name = tiny_cache.documents[window.document]
        read.setdefault(name, []).extend(window.tokens[1:].tolist())
    whole = list(read)[:-1]  # the last document is cut where n_tokens is reached
    assert len(whole) > 10
    for name in whole:
        assert tokenizer.decode(read[name]) == texts[int(name.split("/")[1])]


def test_n_tokens_is_met_exactly_over_several_shards(tiny_cache: ActivationCache) -> None:
    assert tiny_cache.n_rows == 900
    assert len(tiny_cache.manifest.shards) > 1


def test_only_special_tokens_are_masked(tiny_cache: ActivationCache) -> None:
    kept = set(tiny_cache.indices().tolist())
    starts = {window.start for window in tiny_cache.windows("all")}
    assert kept == set(range(tiny_cache.n_rows)) - starts


@pytest.mark.parametrize("die_at", [0, 1, 2])
def test_a_harvest_killed_anywhere_ends_in_the_same_files(
    die_at: int,
    tmp_path: Path,
    tiny_cache: ActivationCache,
    tiny_config: HarvestConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = shards.write
    calls = iter(range(100))

    def dying_write(folder: Path, *args: object) -> Shard:
        if next(calls) == die_at:
            folder.mkdir(exist_ok=True)
            # What a kill leaves behind: part of a file, under the name of one that is not whole.
            (folder / ".shard.safetensors.xyz.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        return real(folder, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "write", dying_write)
    with pytest.raises(KeyboardInterrupt):
        harvest(tiny_config, tmp_path / "c")
    with pytest.raises(CacheError, match="not complete" if die_at else "is no activation cache"):
        ActivationCache.open(tmp_path / "c")
    resumed = harvest(tiny_config, tmp_path / "c")
    assert resumed.fingerprint == tiny_cache.fingerprint
    files = {path.name: file_sha256(path) for path in tiny_cache.path.iterdir()}
    assert {path.name: file_sha256(path) for path in (tmp_path / "c").iterdir()} == files


def test_a_deleted_shard_is_made_again(
    tmp_path: Path, tiny_cache: ActivationCache, tiny_config: HarvestConfig
) -> None:
    harvest(tiny_config, tmp_path / "c")
    (tmp_path / "c" / "shard-00001.safetensors").unlink()
    assert harvest(tiny_config, tmp_path / "c").fingerprint == tiny_cache.fingerprint


def test_gradients_are_kept_in_the_same_rows(
    tmp_path: Path, tiny_config: HarvestConfig, tiny_cache: ActivationCache, tiny_lm: Path
) -> None:
    hooks = ("resid_post.0", "mlp_out.1")
    cache = harvest(replace(tiny_config, gradients=True, hooks=hooks), tmp_path / "c")
    assert cache.hooks == {"resid_post.0": 16, "mlp_out.1": 16}
    model = LanguageModel.load(str(tiny_lm))
    for window in cache.windows("all"):
        stop = window.start + len(window.tokens)
        length = torch.tensor([len(window.tokens)])
        _, grads = model.capture_with_gradients(window.tokens[None], length, hooks)
        for hook in hooks:
            stored = cache.row_slice(f"{hook}.grad", window.start, stop)
            torch.testing.assert_close(stored, grads[hook][0], rtol=2**-7, atol=1e-4)
            plain = tiny_cache.row_slice(hook, window.start, stop)
            torch.testing.assert_close(
                cache.row_slice(hook, window.start, stop), plain, rtol=2**-7, atol=1e-3
            )


def test_the_last_token_of_a_window_is_marked(tiny_cache: ActivationCache) -> None:
    kept = set(tiny_cache.indices("all", ("last",)).tolist())
    ends = {w.start + len(w.tokens) - 1 for w in tiny_cache.windows("all")}
    assert kept == set(range(tiny_cache.n_rows)) - ends


def test_a_second_call_changes_nothing(
    tiny_cache: ActivationCache, tiny_config: HarvestConfig
) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_cache.path.iterdir()}
    harvest(tiny_config, tiny_cache.path)
    assert {path: path.stat().st_mtime_ns for path in tiny_cache.path.iterdir()} == before


def test_a_cache_of_another_config_is_refused_with_the_difference(
    tiny_cache: ActivationCache, tiny_config: HarvestConfig
) -> None:
    with pytest.raises(ConfigError, match=r"n_tokens: 900 there, 901 here"):
        harvest(replace(tiny_config, n_tokens=901), tiny_cache.path)


def test_a_folder_of_something_else_is_refused_and_left_alone(
    tmp_path: Path, tiny_config: HarvestConfig
) -> None:
    (tmp_path / "thesis").write_text("mine")
    with pytest.raises(ConfigError, match="is no activation cache"):
        harvest(tiny_config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_an_altered_shard_is_refused_by_name(
    damage: str, tmp_path: Path, tiny_config: HarvestConfig
) -> None:
    cache = harvest(tiny_config, tmp_path / "c")
    shard = tmp_path / "c" / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content if damage == "flip" else content[:-100])
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors does not match its checksum"):
        ActivationCache.open(cache.path).row_slice("attn_z.1", 0, cache.n_rows)


def test_a_hook_the_model_lacks_is_refused_with_the_nearest(
    tmp_path: Path, tiny_config: HarvestConfig
) -> None:
    with pytest.raises(
        ModelError, match=r"no hook point 'resid_pots\.1'; did you mean 'resid_post"
    ):
        harvest(replace(tiny_config, hooks=("resid_pots.1",)), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_an_empty_corpus_is_refused(tmp_path: Path, tiny_config: HarvestConfig) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    with pytest.raises(CorpusError, match="gave no token"):
        harvest(replace(tiny_config, dataset=str(tmp_path / "empty.jsonl")), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_activations_that_are_not_finite_are_refused_by_hook(
    tmp_path: Path, tiny_config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 ends at 65,504, and real models go beyond it."""
    real = LanguageModel.capture

    def huge(self: object, *args: object) -> dict[str, torch.Tensor]:
        return {name: x * 1e9 for name, x in real(self, *args).items()}  # type: ignore[arg-type]

    monkeypatch.setattr(LanguageModel, "capture", huge)
    with pytest.raises(CacheError, match=r"'resid_post\.0' are not finite"):
        harvest(replace(tiny_config, dtype="float16"), tmp_path / "c")


def test_a_full_disk_keeps_what_was_complete(
    tmp_path: Path, tiny_config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error that safetensors gave on a small tmpfs, raised for the second shard."""
    calls = iter(range(100))

    def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if next(calls) == 1:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(shards, "save_file", save)
    with pytest.raises(SaekitError, match="no space left while writing .*shard-00001"):
        harvest(tiny_config, tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "manifest.json",
        "shard-00000.safetensors",
    ]
    assert Manifest.load(tmp_path / "c").shards[0].file == "shard-00000.safetensors"


def test_a_context_longer_than_the_models_is_refused(
    tmp_path: Path, tiny_config: HarvestConfig
) -> None:
    with pytest.raises(ConfigError, match="context=33 exceeds"):
        harvest(replace(tiny_config, context=33), tmp_path / "c")
