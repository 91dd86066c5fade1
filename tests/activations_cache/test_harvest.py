import errno
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    ViTConfig,
    ViTModel,
)

from saekit import ActivationCache, HarvestConfig, harvest
from saekit.activations_cache import shards
from saekit.activations_cache.job import Job, load_model
from saekit.activations_cache.manifest import Manifest, Shard
from saekit.activations_cache.model import LanguageModel
from saekit.activations_cache.model_module import ModuleModel, module_batches
from saekit.activations_cache.storage import storage
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

    def dying_write(folder: Any, name: str, *args: Any) -> Shard:
        if name == f"shard-{die_at:05d}.safetensors":
            # What a kill leaves behind: part of a file, under the name of one that is not whole.
            (tmp_path / "c" / ".shard.safetensors.xyz.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        return real(folder, name, *args)

    monkeypatch.setattr(shards, "write", dying_write)
    with pytest.raises(KeyboardInterrupt):
        harvest(tiny_config, tmp_path / "c")
    monkeypatch.undo()
    with pytest.raises(CacheError, match="not complete"):
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
        scored = torch.arange(len(window.tokens))[None] < len(window.tokens) - 1
        inputs = {"input_ids": window.tokens[None]}
        _, grads = model.capture_with_gradients(inputs, scored, hooks)
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


@pytest.fixture
def overflowing(monkeypatch: pytest.MonkeyPatch, tiny_cache: ActivationCache) -> int:
    """The one token on which the model goes beyond 65,504, where float16 ends."""
    token = int(next(tiny_cache.windows("all")).tokens[5])
    real = LanguageModel.visit

    def huge(self: LanguageModel, inputs: Any, names: Any, see: Any) -> None:
        scale = torch.where(inputs["input_ids"] == token, 1e9, 1.0)[..., None]
        real(self, inputs, names, lambda name, x: see(name, x * scale))

    monkeypatch.setattr(LanguageModel, "visit", huge)
    return token


def test_activations_that_are_not_finite_are_refused_by_hook_and_token(
    tmp_path: Path, tiny_config: HarvestConfig, overflowing: int
) -> None:
    with pytest.raises(
        CacheError, match=rf"not finite as float16, here 'resid_post\.0' at token {overflowing} "
    ):
        harvest(replace(tiny_config, dtype="float16"), tmp_path / "c")
    assert not (tmp_path / "c" / "shard-00000.safetensors").exists()


def test_rows_that_are_not_finite_are_never_read(
    tmp_path: Path, tiny_config: HarvestConfig, overflowing: int, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = replace(tiny_config, dtype="float16", max_nonfinite=900)
    cache = harvest(cfg, tmp_path / "c")
    tokens = torch.cat([w.tokens for w in cache.windows("all")])
    n_bad = int((tokens == overflowing).sum())
    assert n_bad > 0
    assert "rows so far are not finite" in caplog.text
    assert cache.manifest.marked["nonfinite"] == n_bad
    kept = cache.indices("all", ())
    assert set(kept.tolist()) == set((tokens != overflowing).nonzero().flatten().tolist())
    assert cache.rows("resid_post.0", kept).isfinite().all()
    assert cache.stats("resid_post.0").mean.isfinite().all()


def test_statistics_are_those_of_a_plain_loop(tiny_cache: ActivationCache, tiny_lm: Path) -> None:
    model = LanguageModel.load(str(tiny_lm))
    rows = []
    for window in tiny_cache.windows("all"):
        acts = model.capture({"input_ids": window.tokens[None]}, ["mlp_out.1"])["mlp_out.1"][0]
        rows += [row.double() for row in acts[1:]]
    x = torch.stack(rows)
    stats = tiny_cache.stats("mlp_out.1")
    assert stats.n == len(x)
    torch.testing.assert_close(stats.mean, x.mean(0), rtol=1e-5, atol=1e-6)
    assert stats.mean_norm == pytest.approx(float(x.norm(dim=1).mean()), rel=1e-5)
    trace = float((x - x.mean(0)).square().sum(1).mean())
    assert stats.covariance_trace == pytest.approx(trace, rel=1e-5)


def test_sinks_are_rows_far_above_the_median_of_their_window(
    tmp_path: Path, tiny_config: HarvestConfig, tiny_cache: ActivationCache
) -> None:
    cache = harvest(replace(tiny_config, sink_factor=1.2, dtype="float32"), tmp_path / "c")
    expected = []
    for window in cache.windows("all"):
        stop = window.start + len(window.tokens)
        found = torch.zeros(len(window.tokens), dtype=torch.bool)
        for hook in cache.hooks:
            norms = cache.row_slice(hook, window.start, stop).norm(dim=1)
            found |= norms > 1.2 * torch.tensor(np.median(norms.numpy()))
        expected += found.tolist()
    assert 0 < sum(expected) < len(expected)
    kept = torch.zeros(cache.n_rows, dtype=torch.bool)
    kept[cache.indices("all", ("sink",))] = True
    assert (~kept).tolist() == expected
    assert cache.manifest.marked["sink"] == sum(expected)


def test_padding_is_counted(tiny_cache: ActivationCache) -> None:
    lengths = [len(window.tokens) for window in tiny_cache.windows("all")]
    rows = [lengths[i : i + 4] for i in range(0, len(lengths), 4)]
    assert tiny_cache.manifest.n_padding == sum(len(r) * max(r) - sum(r) for r in rows)


def test_int8_rows_are_near_and_their_error_is_reported(
    tmp_path: Path, tiny_config: HarvestConfig
) -> None:
    exact = harvest(replace(tiny_config, dtype="float32"), tmp_path / "exact")
    small = harvest(replace(tiny_config, dtype="int8"), tmp_path / "small")
    for hook in exact.hooks:
        x, near = (c.row_slice(hook, 0, c.n_rows) for c in (exact, small))
        step = x.abs().amax(1, keepdim=True) / 127
        assert ((x - near).abs() <= 0.5001 * step + 1e-9).all()
        kept = exact.indices("all")
        lost = (x - near)[kept].double().square().sum()
        variance = (x[kept] - x[kept].mean(0)).double().square().sum()
        stats = small.stats(hook)
        assert stats.rounding_error == pytest.approx(float(lost / variance), rel=1e-4)
        assert exact.stats(hook).rounding_error is None


def test_any_shard_can_be_made_again_by_itself(
    tmp_path: Path, tiny_cache: ActivationCache, tiny_config: HarvestConfig
) -> None:
    harvest(tiny_config, tmp_path / "c")
    folder = storage(tmp_path / "c")
    job = Job(tiny_config, load_model(tiny_config))
    for number, shard in reversed(list(enumerate(tiny_cache.manifest.shards))):
        before = (tmp_path / "c" / shard.file).read_bytes()
        (tmp_path / "c" / shard.file).write_bytes(b"gone")
        job.remake(folder, Manifest.load(folder), number)
        assert (tmp_path / "c" / shard.file).read_bytes() == before


def test_a_shard_that_comes_out_otherwise_is_not_written(
    tmp_path: Path, tiny_config: HarvestConfig, corpus_file: Path
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_bytes(corpus_file.read_bytes())
    cfg = replace(tiny_config, dataset=str(text))
    harvest(cfg, tmp_path / "c")
    text.write_text(text.read_text().replace("cat", "dog"))
    (tmp_path / "c" / "shard-00001.safetensors").write_bytes(b"damaged")
    folder = storage(tmp_path / "c")
    with pytest.raises(CacheError, match="made again, is not what it was"):
        Job(cfg, load_model(cfg)).remake(folder, Manifest.load(folder), 1)
    assert (tmp_path / "c" / "shard-00001.safetensors").read_bytes() == b"damaged"


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_harvest_the_same_rows_together(
    ranks: int, tmp_path: Path, tiny_cache: ActivationCache, tiny_config: HarvestConfig
) -> None:
    for rank in reversed(range(1, ranks)):
        harvest(tiny_config, tmp_path / "c", rank=rank, ranks=ranks)
        with pytest.raises(CacheError, match="is no activation cache"):
            ActivationCache.open(tmp_path / "c")
    cache = harvest(tiny_config, tmp_path / "c", rank=0, ranks=ranks)
    assert cache.n_rows == tiny_cache.n_rows
    assert sorted(cache.documents) == sorted(tiny_cache.documents)

    def rows(held: ActivationCache) -> dict[tuple[str, int], list[list[float]]]:
        found: dict[tuple[str, int], list[list[float]]] = {}
        for window in held.windows("all"):
            name = held.documents[window.document]
            stop = window.start + len(window.tokens)
            x = held.row_slice("mlp_out.1", window.start, stop).tolist()
            found.setdefault((name, 0), []).extend(x)
        return found

    one, together = rows(tiny_cache), rows(cache)
    assert one.keys() == together.keys()
    for key, x in one.items():
        torch.testing.assert_close(
            torch.tensor(together[key]), torch.tensor(x), rtol=2**-7, atol=1e-3
        )
    stats = cache.stats("mlp_out.1"), tiny_cache.stats("mlp_out.1")
    assert stats[0].n == stats[1].n
    torch.testing.assert_close(stats[0].mean, stats[1].mean, rtol=1e-5, atol=1e-6)
    again = harvest(tiny_config, tmp_path / "c", rank=0, ranks=ranks)
    assert again.fingerprint == cache.fingerprint


def test_fewer_ranks_go_on_with_what_more_have_begun(
    tmp_path: Path, tiny_config: HarvestConfig
) -> None:
    out = tmp_path / "c"
    wholes = [harvest(tiny_config, tmp_path / "whole", rank=rank, ranks=3) for rank in range(3)]
    harvest(tiny_config, out, rank=2, ranks=3)
    with pytest.raises(ConfigError, match="begun by 3 processes, .* or fewer, not 4"):
        harvest(tiny_config, out, rank=3, ranks=4)
    harvest(tiny_config, out, rank=0, ranks=2)
    assert harvest(tiny_config, out).fingerprint == wholes[-1].fingerprint
    (out / "rank-0-of-2").mkdir()
    (out / "rank-0-of-2" / "manifest.json").touch()
    (out / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"by several numbers of processes \(2, 3\): delete"):
        harvest(tiny_config, out)


def test_packed_windows_give_the_rows_of_windows_alone(
    tmp_path: Path, tiny_cache: ActivationCache, tiny_config: HarvestConfig
) -> None:
    packed = harvest(replace(tiny_config, layout="pack"), tmp_path / "c")
    assert packed.manifest.n_padding < tiny_cache.manifest.n_padding
    for ours, theirs in zip(packed.windows("all"), tiny_cache.windows("all"), strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)
    x, y = (c.row_slice("resid_post.0", 0, 900) for c in (packed, tiny_cache))
    torch.testing.assert_close(x, y, rtol=2**-7, atol=1e-3)


def test_a_remote_store_holds_the_same_files(
    tiny_cache: ActivationCache,
    tiny_config: HarvestConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SAEKIT_CACHE_DIR", str(tmp_path / "fetched"))
    cache = harvest(tiny_config, "memory://harvest/c")
    assert cache.fingerprint == tiny_cache.fingerprint
    assert (
        ActivationCache.open("memory://harvest/c")
        .row_slice("attn_z.1", 0, 900)
        .equal(tiny_cache.row_slice("attn_z.1", 0, 900))
    )


def test_a_harvest_into_a_locked_folder_is_refused(
    tmp_path: Path, tiny_config: HarvestConfig
) -> None:
    with storage(tmp_path / "c").lock(), pytest.raises(CacheError, match="is being written by"):
        harvest(tiny_config, tmp_path / "c")
    assert harvest(tiny_config, tmp_path / "c").n_rows == 900


def test_a_batch_beyond_the_memory_is_refused(tmp_path: Path, tiny_config: HarvestConfig) -> None:
    with pytest.raises(ConfigError, match=r"memory_mib=0\.015 is too little: a batch of 96 tokens"):
        harvest(replace(tiny_config, memory_mib=0.015, shard_mib=0.001), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_module_path_is_a_hook_point(
    tmp_path: Path, tiny_config: HarvestConfig, tiny_cache: ActivationCache
) -> None:
    hooks = ("transformer.h.0", "transformer.h.1.mlp.c_fc:input")
    cache = harvest(replace(tiny_config, hooks=hooks), tmp_path / "c")
    assert cache.hooks == dict.fromkeys(hooks, 16)
    ours = cache.row_slice("transformer.h.0", 0, 900)
    assert ours.equal(tiny_cache.row_slice("resid_post.0", 0, 900))


def test_a_full_disk_keeps_what_was_complete(
    tmp_path: Path, tiny_config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's error, from the place where a shard's bytes are written."""
    real = shards._bytes
    written = iter(range(1000))

    def full(tensor: torch.Tensor) -> memoryview:
        # Two buffers, so two shards at once: the first has seven columns, the second is cut short.
        if next(written) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(tensor)

    monkeypatch.setattr(shards, "_bytes", full)
    cfg = replace(tiny_config, memory_mib=0.09)
    with pytest.raises(SaekitError, match=r"no space left while writing .*shard-00001"):
        harvest(cfg, tmp_path / "c")
    visible = sorted(p.name for p in (tmp_path / "c").iterdir() if not p.name.startswith("."))
    assert visible == ["manifest.json", "shard-00000.safetensors"]
    monkeypatch.undo()
    assert Manifest.load(storage(tmp_path / "c")).n_rows > 0
    assert harvest(cfg, tmp_path / "c").n_rows == 900


def test_a_context_longer_than_the_models_is_refused(
    tmp_path: Path, tiny_config: HarvestConfig
) -> None:
    with pytest.raises(ConfigError, match="context=33 exceeds"):
        harvest(replace(tiny_config, context=33), tmp_path / "c")


def test_any_module_can_be_harvested(tmp_path: Path, tiny_config: HarvestConfig) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    passes = torch.randn(7, 6, 3, generator=torch.Generator().manual_seed(0))
    cfg = replace(
        tiny_config,
        model="net",
        dataset="noise",
        hooks=("0", "2:input"),
        batch_size=6,
        context=None,
    )
    cfg = replace(cfg, shard_mib=0.0005, memory_mib=0.1, dtype="float32")
    model = ModuleModel(net, "net", example={"input": passes[0]})
    cache = harvest(
        cfg,
        tmp_path / "c",
        model=model,
        data=module_batches(lambda: ({"input": x} for x in passes)),
    )
    assert len(cache.manifest.shards) > 1
    expected = net[0](passes.flatten(0, 1))
    torch.testing.assert_close(cache.row_slice("0", 0, 42), expected)
    torch.testing.assert_close(cache.row_slice("2:input", 0, 42), expected.relu())
    assert cache.documents[13] == "input/2/1"


def test_a_vision_model_can_be_harvested(tmp_path: Path, tiny_config: HarvestConfig) -> None:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=32,
        patch_size=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTModel(config).save_pretrained(tmp_path / "vit")
    pixels = np.random.default_rng(0).integers(0, 255, (6, 40, 40, 3), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{number}.png")
    cfg = replace(
        tiny_config,
        model=str(tmp_path / "vit"),
        dataset=str(tmp_path / "pictures"),
        hooks=("resid_post.1", "attn_out.0"),
        context=None,
    )
    cache = harvest(cfg, tmp_path / "c")
    assert cache.n_rows == 6 * 5, "a class token and four patches each"
    assert cache.documents == [f"{number}.png" for number in range(6)]
    assert cache.manifest.marked["special"] == 6
    with pytest.raises(ConfigError, match="gradient"):
        harvest(replace(cfg, gradients=True), tmp_path / "g")


def test_an_encoder_can_be_harvested(
    tmp_path: Path, tiny_config: HarvestConfig, tiny_lm: Path, texts: list[str]
) -> None:
    folder = tmp_path / "bert"
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    cfg = replace(tiny_config, model=str(folder), hooks=("resid_post.1",))
    cache = harvest(cfg, tmp_path / "c")
    model = AutoModel.from_pretrained(folder)
    for window in islice(cache.windows("all"), 10):
        ids = window.tokens
        assert ids[0] == tokenizer.cls_token_id
        assert ids[-1] == tokenizer.sep_token_id
        with torch.no_grad():
            expected = model(ids[None]).last_hidden_state[0]
        stored = cache.row_slice("resid_post.1", window.start, window.start + len(ids))
        torch.testing.assert_close(stored, expected, rtol=2**-7, atol=2e-2)
