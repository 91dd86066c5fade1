from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saekit import ActivationCache, evaluate
from saekit.activations_cache.model import LanguageModel
from saekit.errors import CacheError, ConfigError, SaekitError
from saekit.evals import _features_build, _features_near, _features_spool, _features_write
from saekit.evals.examples import Examples, ExamplesConfig
from saekit.features import BUILDING, CONTEXTS, LATENTS, FeatureStore, Passage, progress
from saekit.files import file_checksum
from saekit.sae import SAE, MatchingPursuit

HOOK = "resid_post.0"

Collect = Callable[..., tuple[FeatureStore, ExamplesConfig]]


@pytest.fixture
def collect(tmp_path: Path, tiny_cache: ActivationCache) -> Collect:
    """Makes the store of an SAE, each in a folder of its own."""
    made = []

    def collected(sae: SAE, hook: str = HOOK, **config: Any) -> tuple[FeatureStore, ExamplesConfig]:
        made.append(cfg := ExamplesConfig(**config))
        with torch.no_grad():
            built = Examples(cfg, sae, tiny_cache, hook).build(tmp_path / str(len(made)))
        return built, cfg

    return collected


@pytest.fixture
def z(random_sae: SAE, tiny_cache: ActivationCache) -> np.ndarray:
    """Latents of every row, kept or not, in the cache's order."""
    return random_sae.encode(tiny_cache.row_slice(HOOK, 0, tiny_cache.n_rows)).numpy()


def by_brute_force(
    all_z: Tensor | np.ndarray, cache: ActivationCache, cfg: ExamplesConfig, latent: int
) -> list[tuple[float, int, list[int], list[float], str]]:
    """(peak, column, tokens, activations, document) of a latent, window by window."""
    found = []
    for window in cache.windows(cfg.split, cfg.exclude):
        rows = all_z[window.start : window.start + len(window.tokens), latent]
        z = np.asarray(rows) * window.keep.numpy()
        peak = int(z.argmax())
        if z[peak] > 0:
            first = max(0, min(peak - cfg.window // 2, len(z) - cfg.window))
            tokens = window.tokens[first : first + cfg.window].tolist()
            acts = z[first : first + cfg.window].tolist()
            document = cache.documents[window.document]
            found.append((float(z[peak]), peak - first, tokens, acts, document))
    return sorted(found, key=lambda example: -example[0])[: cfg.n_contexts]


def contexts(store: FeatureStore, latent: int) -> list[tuple[Any, ...]]:
    """The same of a store."""
    return [
        (p.act, p.at, p.tokens.tolist(), p.acts.tolist(), store.documents[p.document])
        for p in store.latent(latent).of("top")
    ]


def files(folder: Path) -> dict[str, str]:
    return {path.name: file_checksum(path) for path in folder.iterdir()}


@pytest.mark.parametrize("window", [1, 6, 24])
def test_strongest_contexts_agree_with_the_dense_matrix(
    window: int, random_sae: SAE, tiny_cache: ActivationCache, z: np.ndarray, collect: Collect
) -> None:
    store, cfg = collect(random_sae, window=window, n_contexts=5, batch_size=64)
    for latent in range(40):
        expected, found = by_brute_force(z, tiny_cache, cfg, latent), contexts(store, latent)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours[1:3] == theirs[1:3]
            assert ours[4] == theirs[4]
            assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
            assert ours[3] == pytest.approx(theirs[3], rel=1e-5)


def test_counts_agree_with_plain_loops(
    random_sae: SAE, tiny_cache: ActivationCache, z: np.ndarray, agree: Callable[..., None]
) -> None:
    config = ExamplesConfig(n_contexts=7)
    result = evaluate("examples", random_sae, tiny_cache, hook=HOOK, config=config)
    latents = kept = 0
    for column in z.T.tolist():
        fires = 0
        for window in tiny_cache.windows("all"):
            rows = column[window.start : window.start + len(window.tokens)]
            fires += any(v > 0 and keep for v, keep in zip(rows, window.keep, strict=True))
        latents += fires > 0
        kept += min(fires, 7)
    assert kept < 7 * latents < 7 * 40
    agree(result, {"latents_with_examples": latents, "examples": kept})


def test_numbers_agree_with_the_dense_matrix(
    random_sae: SAE, tiny_cache: ActivationCache, collect: Collect
) -> None:
    store, _ = collect(random_sae, batch_size=100, bins=8, top=3)
    index = tiny_cache.indices("all")
    x = tiny_cache.rows(HOOK, index)
    z = random_sae.encode(x).double().numpy()
    assert store.header.n_rows == len(index)
    mean, fires = z.mean(0), (z > 0).sum(0)
    m2, m3, m4 = (((z - mean) ** p).mean(0) for p in (2, 3, 4))
    live = fires > 0
    expected = {
        "active": fires,
        "density": fires / len(z),
        "maximum": z.max(0),
        "mean": mean,
        "std": np.sqrt(m2),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(store.column(name), values, rtol=1e-5, atol=1e-12, err_msg=name)
    among = {
        "mean_active": z.sum(0)[live] / fires[live],
        "skewness": m3[live] / m2[live] ** 1.5,
        "kurtosis": m4[live] / m2[live] ** 2,
    }
    for name, values in among.items():
        np.testing.assert_allclose(store.column(name)[live], values, rtol=1e-4, err_msg=name)
        assert np.isnan(store.column(name)[~live]).all(), name
    error = (x - random_sae(x)).square().sum(1).double().numpy()
    spread = (x - tiny_cache.stats(HOOK).mean.float()).square().sum(1).double().numpy()
    latent = int(fires.argmax())
    on = z[:, latent] > 0
    share = error[on].sum() / spread[on].sum()
    assert store.column("unexplained")[latent] == pytest.approx(share, rel=1e-4)
    lists = store.latent(latent).lists
    values = z[on, latent]
    assert lists["histogram"].tolist() == np.histogram(values, 8, (0, values.max()))[0].tolist()
    tokens = tiny_cache.take("token", index).numpy()[on]
    total = {t: values[tokens == t].sum() / values.sum() for t in set(tokens.tolist())}
    best = sorted(total, key=lambda t: (-total[t], t))[:3]
    assert lists["input_token"].tolist() == best
    np.testing.assert_allclose(lists["input_share"], [total[t] for t in best], rtol=1e-5)
    assert lists["input_count"].tolist() == [(tokens == t).sum() for t in best]


def test_samples_come_from_quantiles_of_equal_counts(
    random_sae: SAE, z: np.ndarray, tiny_cache: ActivationCache, collect: Collect
) -> None:
    store, _ = collect(random_sae, quantiles=4, n_samples=1000)
    kept = tiny_cache.indices("all").numpy()
    for latent in range(0, 40, 7):
        values = np.sort(z[kept, latent][z[kept, latent] > 0])
        found = store.latent(latent)
        groups = [found.of("sample", group) for group in range(4)]
        assert sum(map(len, groups)) == len(values), "all of them, where so many are asked for"
        sizes = list(map(len, groups))
        assert max(sizes) - min(sizes) <= 1
        assert [p.act for group in groups for p in sorted(group, key=lambda p: p.act)] == (
            pytest.approx(values.tolist(), rel=1e-5)
        )
        if len(values):
            edges = found.lists["edges"]
            assert len(edges) == 5
            assert edges[[0, -1]].tolist() == pytest.approx([values[0], values[-1]])
            for at, group in enumerate(groups):
                assert all(edges[at] - 1e-6 <= p.act <= edges[at + 1] + 1e-6 for p in group)
    assert len({p.row for p in store.latent(0).of("sample")}) == int((z[kept, 0] > 0).sum())


def test_what_is_drawn_depends_on_the_seed_alone(random_sae: SAE, collect: Collect) -> None:
    def rows(**config: Any) -> list[list[int]]:
        store, _ = collect(random_sae, n_samples=2, **config)
        return [[p.row for p in store.latent(latent).of("sample")] for latent in range(40)]

    first = rows()
    assert first == rows(batch_size=30)
    assert first != rows(seed=1)
    assert first[0] != first[1]


def test_silent_contexts_are_peaks_of_near_latents_where_it_does_not_fire(
    random_sae: SAE, z: np.ndarray, tiny_cache: ActivationCache, collect: Collect
) -> None:
    store, _ = collect(random_sae, window=4, n_silent=5, near=3)
    kept = np.zeros(tiny_cache.n_rows, dtype=bool)
    kept[tiny_cache.indices("all").numpy()] = True
    seen = 0
    for index in range(40):
        latent = store.latent(index)
        near = {*latent.lists["near"].tolist(), *latent.lists["coactive"].tolist()}
        peaks = {p.row for other in near for p in store.latent(other).of("top")}
        for passage in latent.of("silent"):
            seen += 1
            assert passage.row in peaks
            rows = passage.row - passage.at + np.arange(len(passage.tokens))
            assert not (z[rows, index] * kept[rows]).any()
            assert not passage.acts.any()
    assert seen > 40


def test_neighbours_agree_with_the_dense_matrices(
    random_sae: SAE, z: np.ndarray, tiny_cache: ActivationCache, collect: Collect
) -> None:
    store, _ = collect(random_sae, near=4)
    unit = torch.nn.functional.normalize(random_sae.W_dec, dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-torch.inf)
    fires = (z[tiny_cache.indices("all").numpy()] > 0).astype(np.int64)
    both = fires.T @ fires
    either = fires.sum(0)[:, None] + fires.sum(0) - both
    jaccard = np.where(either > 0, both / np.maximum(either, 1), 0)
    np.fill_diagonal(jaccard, 0)
    for index in range(40):
        lists = store.latent(index).lists
        assert lists["near"].tolist() == cosine[index].topk(4).indices.tolist()
        np.testing.assert_allclose(lists["near_cosine"], cosine[index].topk(4).values, rtol=1e-5)
        best = np.argsort(-jaccard[index], kind="stable")[:4]
        best = best[jaccard[index][best] > 0]
        assert lists["coactive"].tolist() == best.tolist()
        np.testing.assert_allclose(lists["coactive_jaccard"], jaccard[index][best], rtol=1e-6)
    np.testing.assert_allclose(store.column("nearest_cosine"), cosine.max(1).values, rtol=1e-5)


def test_the_map_puts_near_latents_near_each_other(collect: Collect) -> None:
    centres = torch.eye(16)[:4].repeat_interleave(10, 0)
    W_dec = torch.nn.functional.normalize(centres + 0.1 * torch.randn(40, 16))
    sae = SAE.of_atoms(W_dec, torch.zeros(16), MatchingPursuit(1))
    store, _ = collect(sae, near=5)
    place = np.stack([store.column("x"), store.column("y")], 1)
    apart = np.linalg.norm(place[:, None] - place, axis=2) + np.diag(np.full(40, np.inf))
    group = np.arange(40) // 10
    assert (group[apart.argmin(1)] == group).all()


def test_batch_size_and_pieces_change_nothing(
    random_sae: SAE, collect: Collect, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = collect(random_sae)
    monkeypatch.setattr(_features_spool, "PLACES", 100)
    monkeypatch.setattr(_features_write, "AT_ONCE", 30)
    monkeypatch.setattr("saekit.evals.examples.AT_ONCE", 30)
    other, _ = collect(random_sae, batch_size=40)
    same = {path for path, check in files(one.folder).items() if check == files(other.folder)[path]}
    assert same >= {"vocab.parquet", "documents.parquet", "tokens-00000.parquet"}
    for latent in range(40):
        ours, theirs = one.latent(latent), other.latent(latent)
        assert [p.row for p in ours.passages] == [p.row for p in theirs.passages]
        assert ours.numbers == pytest.approx(theirs.numbers, rel=1e-5, nan_ok=True)
        for name, values in ours.lists.items():
            np.testing.assert_allclose(values, theirs.lists[name], rtol=1e-5, err_msg=name)


def test_a_latent_has_at_most_one_strongest_context_of_a_window(
    random_sae: SAE, tiny_cache: ActivationCache, collect: Collect
) -> None:
    """With contexts as wide as the model's, two from one window would hold the same tokens."""
    store, _ = collect(random_sae, n_contexts=40)
    windows = {tuple(w.tokens.tolist()) for w in tiny_cache.windows("all")}
    starts = torch.tensor([w.start for w in tiny_cache.windows("all")])
    for latent in range(40):
        found = store.latent(latent).of("top")
        assert {tuple(p.tokens.tolist()) for p in found} <= windows
        in_window = torch.searchsorted(starts, torch.tensor([p.row for p in found]), right=True)
        assert len(set(in_window.tolist())) == len(found)


def test_only_whole_windows_up_to_max_rows_are_looked_at(
    random_sae: SAE, tiny_cache: ActivationCache, collect: Collect
) -> None:
    kept = [int(window.keep.sum()) for window in tiny_cache.windows("all")]
    store, _ = collect(random_sae, max_rows=sum(kept[:5]) + 1)
    assert store.header.n_rows == sum(kept[:5])
    with pytest.raises(CacheError, match="has no window of at most max_rows=1 rows"):
        collect(random_sae, max_rows=1)


def test_promoted_tokens_are_those_of_the_whole_logit_matrix(
    random_sae: SAE, tiny_cache: ActivationCache, collect: Collect
) -> None:
    model = LanguageModel.load(tiny_cache.model)
    gain, W_U = model.unembed()
    logits = (random_sae.W_dec * gain) @ W_U
    logits = logits - logits.mean(1, keepdim=True)
    store, _ = collect(random_sae, top=3)
    order = logits.argsort(1, descending=True)
    for name, expected in (("promoted", order[:, :3]), ("suppressed", order.flip(1)[:, :3])):
        assert store.lists(name)[1].tolist() == expected.flatten().tolist()
        values = logits.gather(1, expected).flatten()
        np.testing.assert_allclose(store.lists(f"{name}_logit")[1], values, rtol=1e-4, atol=1e-6)
    m2, m4 = (logits.double().pow(p).mean(1) for p in (2, 4))
    np.testing.assert_allclose(store.column("logit_std"), m2.sqrt(), rtol=1e-4)
    np.testing.assert_allclose(store.column("logit_kurtosis"), m4 / m2**2, rtol=1e-4)
    assert store.vocab == model.vocab


def test_who_makes_what_others_wait_for_says_all_along_that_it_gets_on(
    random_sae: SAE, tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LanguageModel.load(tiny_cache.model)
    said: list[str] = []
    monkeypatch.setattr(_features_near, "_AT_ONCE", 10 * len(model.vocab))
    _features_near.logit_effects(random_sae, model, HOOK, 3, lambda: said.append("logits"))
    monkeypatch.setattr(_features_near, "_AT_ONCE", 10 * 40)
    W_dec = random_sae.W_dec
    near = _features_near.decoder_neighbours(W_dec, 3, lambda: said.append("near"))
    _features_near.map_of(W_dec, near["near"], near["near_cosine"], lambda: said.append("map"))
    assert said == ["logits"] * 4 + ["near"] * 4 + ["map"] * _features_near._EPOCHS


def test_a_hook_beside_the_residual_stream_goes_through_its_map(
    random_sae: SAE, tiny_cache: ActivationCache, collect: Collect
) -> None:
    model = LanguageModel.load(tiny_cache.model)
    to_residual = model.residual_map("attn_z.1")
    assert to_residual is not None
    gain, W_U = model.unembed()
    logits = (random_sae.W_dec @ to_residual * gain) @ W_U
    store, _ = collect(random_sae, "attn_z.1", top=1)
    assert store.lists("promoted")[1].tolist() == logits.argmax(1).tolist()


def test_where_nothing_reaches_the_residual_stream_nothing_is_promoted(
    random_sae: SAE, collect: Collect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanguageModel, "residual_map", lambda self, hook: None)
    store, _ = collect(random_sae)
    assert not len(store.lists("promoted")[1])
    assert not len(store.latent(0).lists["suppressed_logit"])
    assert np.isnan(store.column("logit_kurtosis")).all()


def test_a_silent_sae_has_a_store_without_contexts(silent: SAE, collect: Collect) -> None:
    store, _ = collect(silent)
    latent = store.latent(7)
    assert latent.dead
    assert latent.passages == []
    assert not latent.lists["histogram"].any()
    assert not len(latent.lists["edges"])
    assert (store.top_tokens == len(store.vocab)).all()


def test_latents_below_zero_fire_and_show_but_make_no_context(
    tiny_cache: ActivationCache, collect: Collect
) -> None:
    """A signed pursuit's, in which an atom may also come twice in a row."""
    atoms = torch.nn.functional.normalize(torch.randn(6, 16))
    sae = SAE.of_atoms(atoms, torch.zeros(16), MatchingPursuit(8, signed=True))
    store, cfg = collect(sae, window=6, n_contexts=5, bins=8)
    z = sae.encode(tiny_cache.rows(HOOK, tiny_cache.indices("all"))).numpy()
    assert 0.1 < (z < 0).mean() < 0.9
    np.testing.assert_allclose(store.column("density"), (z != 0).mean(0), rtol=1e-6)
    np.testing.assert_allclose(store.column("maximum"), z.max(0), rtol=1e-5)
    for index in range(6):
        latent = store.latent(index)
        positive = z[:, index][z[:, index] > 0]
        expected, _ = np.histogram(positive, bins=8, range=(0, float(positive.max())))
        assert latent.lists["histogram"].tolist() == expected.tolist()
        assert all(p.act > 0 for p in latent.of("top") + latent.of("sample"))
    all_z = sae.encode(tiny_cache.row_slice(HOOK, 0, tiny_cache.n_rows))
    _, _, tokens, acts, _ = by_brute_force(all_z, tiny_cache, cfg, 0)[0]
    first = store.latent(0).of("top")[0]
    assert first.tokens.tolist() == tokens
    assert first.acts.tolist() == pytest.approx(acts, rel=1e-4)
    shown = [p.acts for index in range(6) for p in store.latent(index).of("top")]
    assert (np.concatenate(shown) < 0).any()


def test_excluded_rows_alter_nothing(
    random_sae: SAE, tiny_cache: ActivationCache, collect: Collect, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _ = collect(random_sae)
    kept = torch.zeros(tiny_cache.n_rows, dtype=torch.bool)
    kept[tiny_cache.indices("all")] = True
    read = ActivationCache.rows

    def spoilt(self: ActivationCache, hook: str, index: torch.Tensor) -> torch.Tensor:
        return read(self, hook, index).where(kept[index][:, None], torch.nan)

    monkeypatch.setattr(ActivationCache, "rows", spoilt)
    after, _ = collect(random_sae)
    assert files(before.folder) == files(after.folder)


class Stopped(BaseException):
    """As if the process had been killed."""


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets so many renames happen, and none after: files appear by renames alone."""
    rename, replace_ = Path.rename, Path.replace
    left = [0]

    def counted(move: Callable[..., Any]) -> Callable[..., Any]:
        def moved(self: Path, target: Path) -> Any:
            if not left[0]:
                raise Stopped
            left[0] -= 1
            return move(self, target)

        return moved

    monkeypatch.setattr(Path, "rename", counted(rename))
    monkeypatch.setattr(Path, "replace", counted(replace_))

    def after(renames: int) -> None:
        left[0] = renames

    return after


def test_a_store_whose_making_is_stopped_at_any_file_ends_in_the_same_files(
    random_sae: SAE,
    tiny_cache: ActivationCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_after: Callable[[int], None],
) -> None:
    monkeypatch.setattr(_features_spool, "PLACES", 300)
    monkeypatch.setattr(Examples, "LATENTS_PER_FILE", 16)
    monkeypatch.setattr(Examples, "LATENTS_PER_GROUP", 8)
    model = LanguageModel.load(tiny_cache.model)
    monkeypatch.setattr(Examples, "load_model", lambda self: model)
    maker = Examples(ExamplesConfig(batch_size=64), random_sae, tiny_cache, HOOK)
    encoded = []
    code = Examples._code

    def counted(self: Examples, *args: Any) -> Any:
        encoded.append(1)
        return code(self, *args)

    monkeypatch.setattr(Examples, "_code", counted)
    with torch.no_grad():
        stop_after(1000)
        whole = files(maker.build(tmp_path / "whole").folder)
        once = len(encoded)
        out = tmp_path / "stopped"
        stops = 0
        # Some renames are of the progress; the three files of a run of latents come together.
        while not (out / "features").exists():
            stop_after(6)
            try:
                maker.build(out)
            except Stopped:
                stops += 1
                (out / BUILDING / ".text.safetensors.x.partial").write_bytes(b"cut off")
            assert stops < 100
        assert stops > 5
        assert files(out / "features") == whole
        assert not (out / BUILDING).exists()
        assert len(encoded) - once < 1.5 * once, "pieces that are there are not encoded again"
        # An older store stays whole until the new one is there.
        other = Examples(replace(maker.cfg, seed=5), random_sae, tiny_cache, HOOK)
        for renames in (0, 2, 5, 9):
            stop_after(renames)
            with pytest.raises(Stopped):
                other.build(out)
            if (out / "features").exists():
                assert FeatureStore.open(out).header.config["seed"] == 0
        stop_after(1000)
        assert other.build(out).header.config["seed"] == 5


def test_the_same_plan_is_not_made_again_and_another_is(
    random_sae: SAE, tiny_cache: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate("examples", random_sae, tiny_cache, hook=HOOK, out=tmp_path)
    monkeypatch.setattr(Examples, "_make", lambda self, shop: pytest.fail("made again"))
    config = ExamplesConfig(batch_size=7)
    again = evaluate("examples", random_sae, tiny_cache, hook=HOOK, out=tmp_path, config=config)
    assert again.metrics == first.metrics
    with pytest.raises(pytest.fail.Exception, match="made again"):
        config = ExamplesConfig(bins=7)
        evaluate("examples", random_sae, tiny_cache, hook=HOOK, out=tmp_path, config=config)


def test_two_processes_do_not_make_one_store(
    random_sae: SAE, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    shop = _features_build.Workshop(tmp_path, {}, progress=False)
    with shop.open(), pytest.raises(SaekitError, match="another process is making the feature"):
        evaluate("examples", random_sae, tiny_cache, hook=HOOK, out=tmp_path)


def test_progress_is_told_while_it_is_made(
    random_sae: SAE, tiny_cache: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    say = _features_build.Workshop.say

    def heard(self: Any, phase: str, done: int, total: int) -> None:
        say(self, phase, done, total)
        seen.append(progress(tmp_path))

    monkeypatch.setattr(_features_build.Workshop, "say", heard)
    assert progress(tmp_path) is None
    evaluate("examples", random_sae, tiny_cache, hook=HOOK, out=tmp_path)
    told = [(at.phase, at.done, at.total) for at in seen if at is not None]
    n = len(tiny_cache.indices("all"))
    assert told[0] == ("rows", 0, n)
    assert told[-1] == ("latents", 40, 40)
    assert progress(tmp_path) is None


def test_the_store_is_saved_beside_the_result(
    random_sae: SAE, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    result = evaluate("examples", random_sae, tiny_cache, hook=HOOK, out=tmp_path)
    read = FeatureStore.open(tmp_path)
    assert read.header.split == "all"
    assert read.header.sae_fingerprint == result.sae_fingerprint
    assert read.header.n_rows == result.metrics["examples"].n == len(tiny_cache.indices("all"))
    n_contexts = sum(len(read.latent(latent).of("top")) for latent in range(40))
    assert result.metrics["examples"].value == n_contexts
    assert result.metrics["latents_with_examples"].value == (read.column("density") > 0).sum()
    assert evaluate("examples", random_sae, tiny_cache, hook=HOOK).metrics == result.metrics


def test_the_schemas_and_what_is_read_of_them_name_the_same() -> None:
    assert {*Passage.__dataclass_fields__} == {*CONTEXTS.names} - {"latent", "rank"}
    assert LATENTS.names[0] == "latent"


@pytest.mark.parametrize("field", ["n_contexts", "window", "bins", "top", "near", "quantiles"])
def test_counts_below_one_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}=0 must be at least 1"):
        ExamplesConfig.from_dict({field: 0})
