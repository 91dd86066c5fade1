from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saekit import ActivationCache, evaluate
from saekit.activations_cache.model import LanguageModel
from saekit.errors import CacheError, ConfigError
from saekit.evals.examples import Examples, ExamplesConfig
from saekit.results import LatentExamples
from saekit.sae import SAE, MatchingPursuit

HOOK = "resid_post.0"


def collect(
    sae: SAE, cache: ActivationCache, hook: str = HOOK, **config: Any
) -> tuple[LatentExamples, ExamplesConfig]:
    cfg = ExamplesConfig(**config)
    with torch.no_grad():
        return Examples(cfg, sae, cache, hook).collect(), cfg


def by_brute_force(
    all_z: Tensor, cache: ActivationCache, cfg: ExamplesConfig, latent: int
) -> list[tuple[float, int, list[int], list[float], str]]:
    """(peak, column, tokens, activations, document) of a latent, window by window."""
    found = []
    for window in cache.windows(cfg.split, cfg.exclude):
        z = all_z[window.start : window.start + len(window.tokens), latent] * window.keep
        peak = int(z.argmax())
        if z[peak] > 0:
            first = max(0, min(peak - cfg.window // 2, len(z) - cfg.window))
            tokens = window.tokens[first : first + cfg.window].tolist()
            acts = z[first : first + cfg.window].tolist()
            short = cfg.window - len(tokens)
            document = cache.documents[window.document]
            found.append(
                (
                    float(z[peak]),
                    peak - first,
                    tokens + [-1] * short,
                    acts + [0.0] * short,
                    document,
                )
            )
    return sorted(found, key=lambda example: -example[0])[: cfg.n_contexts]


@pytest.mark.parametrize("window", [1, 6, 24])
def test_examples_agree_with_the_dense_matrix(
    window: int, random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    examples, cfg = collect(random_sae, tiny_cache, window=window, n_contexts=5, batch_size=64)
    assert examples.tokens.shape == (40, 5, window)
    z = random_sae.encode(tiny_cache.row_slice(HOOK, 0, tiny_cache.n_rows))
    for latent in range(40):
        expected = by_brute_force(z, tiny_cache, cfg, latent)
        used = len(expected)
        for slot, (peak, column, tokens, acts, document) in enumerate(expected):
            assert examples.peak[latent, slot] == pytest.approx(peak, rel=1e-4)
            assert examples.peak_at[latent, slot] == column
            assert examples.tokens[latent, slot].tolist() == tokens
            assert examples.acts[latent, slot].tolist() == pytest.approx(acts, rel=2e-3)
            assert examples.documents[examples.document[latent, slot]] == document
        assert not examples.peak[latent, used:].any()
        assert (examples.tokens[latent, used:] == -1).all()
        assert (examples.document[latent, used:] == -1).all()


def test_counts_agree_with_the_dense_matrix(random_sae: SAE, tiny_cache: ActivationCache) -> None:
    examples, cfg = collect(random_sae, tiny_cache, batch_size=100, bins=8)
    index = tiny_cache.indices("all")
    z = random_sae.encode(tiny_cache.rows(HOOK, index)).numpy()
    assert examples.n_rows == len(index)
    np.testing.assert_allclose(examples.density, (z > 0).mean(0), rtol=1e-6)
    np.testing.assert_allclose(examples.maximum, z.max(0), rtol=1e-5)
    assert examples.histogram.sum(1).tolist() == (z > 0).sum(0).tolist()
    latent = int(examples.density.argmax())
    active = z[:, latent][z[:, latent] > 0]
    expected, _ = np.histogram(active, bins=8, range=(0, float(active.max())))
    assert examples.histogram[latent].tolist() == expected.tolist()
    assert examples.histogram[latent, -1] >= 1


def test_batch_size_changes_no_example(random_sae: SAE, tiny_cache: ActivationCache) -> None:
    one, _ = collect(random_sae, tiny_cache, batch_size=40)
    all_, _ = collect(random_sae, tiny_cache, batch_size=10_000)
    for name in ("tokens", "peak_at", "document", "histogram", "density"):
        np.testing.assert_array_equal(getattr(one, name), getattr(all_, name))
    np.testing.assert_allclose(one.peak, all_.peak, rtol=1e-5)


def test_a_latent_has_at_most_one_example_of_a_window(
    random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    """With examples as wide as the context, two from one window would hold the same tokens."""
    examples, _ = collect(random_sae, tiny_cache, n_contexts=40)
    windows = {tuple(w.tokens.tolist()) for w in tiny_cache.windows("all")}
    for latent in range(40):
        shown = [tuple(t[t >= 0]) for t in examples.tokens[latent] if t[0] >= 0]
        assert set(shown) <= windows
        assert len(shown) <= sum(1 for _ in tiny_cache.windows("all"))


def test_only_whole_windows_up_to_max_rows_are_looked_at(
    random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    kept = [int(window.keep.sum()) for window in tiny_cache.windows("all")]
    examples, _ = collect(random_sae, tiny_cache, max_rows=sum(kept[:5]) + 1)
    assert examples.n_rows == sum(kept[:5])
    with pytest.raises(CacheError, match="has no window of at most max_rows=1 rows"):
        collect(random_sae, tiny_cache, max_rows=1)


def test_promoted_tokens_are_those_of_the_whole_logit_matrix(
    random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    model = LanguageModel.load(tiny_cache.model)
    gain, W_U = model.unembed()
    logits = (random_sae.W_dec * gain) @ W_U
    logits = logits - logits.mean(1, keepdim=True)
    examples, _ = collect(random_sae, tiny_cache, top=3)
    order = logits.argsort(1, descending=True)
    assert examples.promoted.tolist() == order[:, :3].tolist()
    assert examples.suppressed.tolist() == order.flip(1)[:, :3].tolist()
    np.testing.assert_allclose(
        examples.promoted_logit, logits.gather(1, order[:, :3]), rtol=1e-4, atol=1e-6
    )
    assert examples.vocab == model.vocab


def test_a_hook_beside_the_residual_stream_goes_through_its_map(
    random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    model = LanguageModel.load(tiny_cache.model)
    to_residual = model.residual_map("attn_z.1")
    assert to_residual is not None
    gain, W_U = model.unembed()
    logits = (random_sae.W_dec @ to_residual * gain) @ W_U
    examples, _ = collect(random_sae, tiny_cache, "attn_z.1", top=1)
    assert examples.promoted[:, 0].tolist() == logits.argmax(1).tolist()


def test_where_nothing_reaches_the_residual_stream_nothing_is_promoted(
    random_sae: SAE, tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanguageModel, "residual_map", lambda self, hook: None)
    examples, _ = collect(random_sae, tiny_cache)
    assert (examples.promoted == -1).all()
    assert (examples.suppressed == -1).all()


def test_a_silent_sae_has_no_examples(silent: SAE, tiny_cache: ActivationCache) -> None:
    examples, _ = collect(silent, tiny_cache)
    assert not examples.peak.any()
    assert not examples.histogram.any()
    assert examples.documents == []


def test_activations_past_the_range_of_fp16_are_cut_and_the_peak_is_not(
    exact: SAE, tiny_cache: ActivationCache
) -> None:
    loud = SAE(exact.W_enc * 1e6, exact.b_enc, exact.W_dec, exact.b_dec, exact.activation)
    examples, _ = collect(loud, tiny_cache)
    assert np.isfinite(examples.acts).all()
    assert examples.peak.max() > 65504


def test_latents_below_zero_fire_and_show_but_make_no_example(tiny_cache: ActivationCache) -> None:
    """A signed pursuit's, in which an atom may also come twice in a row."""
    atoms = torch.nn.functional.normalize(torch.randn(6, 16))
    how = MatchingPursuit(8, signed=True)
    sae = SAE.of_atoms(atoms, torch.zeros(16), how)
    examples, cfg = collect(sae, tiny_cache, window=6, n_contexts=5, bins=8)
    z = sae.encode(tiny_cache.rows(HOOK, tiny_cache.indices("all"))).numpy()
    assert 0.1 < (z < 0).mean() < 0.9
    np.testing.assert_allclose(examples.density, (z != 0).mean(0), rtol=1e-6)
    np.testing.assert_allclose(examples.maximum, z.max(0), rtol=1e-5)
    for latent in range(6):
        positive = z[:, latent][z[:, latent] > 0]
        expected, _ = np.histogram(positive, bins=8, range=(0, float(positive.max())))
        assert examples.histogram[latent].tolist() == expected.tolist()
    assert (examples.peak > 0).all()
    all_z = sae.encode(tiny_cache.row_slice(HOOK, 0, tiny_cache.n_rows))
    _, _, tokens, acts, _ = by_brute_force(all_z, tiny_cache, cfg, 0)[0]
    assert examples.tokens[0, 0].tolist() == tokens
    assert examples.acts[0, 0].tolist() == pytest.approx(acts, rel=2e-3)
    assert (examples.acts < 0).any()


def test_excluded_rows_alter_nothing(
    random_sae: SAE, tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _ = collect(random_sae, tiny_cache)
    kept = torch.zeros(tiny_cache.n_rows, dtype=torch.bool)
    kept[tiny_cache.indices("all")] = True
    read = ActivationCache.rows

    def spoilt(self: ActivationCache, hook: str, index: torch.Tensor) -> torch.Tensor:
        return read(self, hook, index).where(kept[index][:, None], torch.nan)

    monkeypatch.setattr(ActivationCache, "rows", spoilt)
    after, _ = collect(random_sae, tiny_cache)
    np.testing.assert_array_equal(before.acts, after.acts)
    np.testing.assert_array_equal(before.density, after.density)


def test_examples_are_saved_in_their_own_format(
    random_sae: SAE, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    result = evaluate("examples", random_sae, tiny_cache, hook=HOOK, out=tmp_path)
    read = LatentExamples.load(tmp_path)
    assert read.split == "all"
    assert read.n_rows == result.metrics["examples"].n == len(tiny_cache.indices("all"))
    assert result.metrics["examples"].value == (read.peak > 0).sum()
    assert result.metrics["latents_with_examples"].value == (read.density > 0).sum()


@pytest.mark.parametrize("field", ["n_contexts", "window", "bins", "top"])
def test_counts_below_one_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}=0 must be at least 1"):
        ExamplesConfig.from_dict({field: 0})
