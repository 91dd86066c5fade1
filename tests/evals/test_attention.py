import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from saekit import ActivationCache, evaluate
from saekit.activations_cache.model import LanguageModel
from saekit.activations_cache.store import Window
from saekit.errors import CacheError, ConfigError
from saekit.evals import attention
from saekit.evals._attribution import attribution, mixing, site
from saekit.evals.attention import AttentionConfig
from saekit.evals.core import CoreConfig
from saekit.results import EvalResult
from saekit.sae import SAE

HOOK = "attn_z.1"
HEADS, D_HEAD = 2, 8
Agree = Callable[..., None]


def run(sae: SAE, cache: ActivationCache, **config: Any) -> EvalResult:
    config = {"ce_tokens": 0, "n_latents": 10, "n_contexts": 3, **config}
    return evaluate("attention", sae, cache, hook=HOOK, config=AttentionConfig(**config))


def values(result: EvalResult) -> dict[str, float]:
    return {name: metric.value for name, metric in result.metrics.items()}


def test_it_begins_with_the_core_row_with_ablation_and_difference_side_by_side(
    random_sae: SAE, tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch, agree: Agree
) -> None:
    # To take the heads from this model of random weights does it good.
    monkeypatch.setattr("saekit.evals._metrics.MIN_CE_RISE", -1.0)
    core = evaluate("core", random_sae, tiny_cache, hook=HOOK, config=CoreConfig(ce_tokens=60))
    found = run(random_sae, tiny_cache, ce_tokens=60)
    for name in core.metrics.keys() - {"dead_share"}:  # which also says what is left out
        assert found.metrics[name] == core.metrics[name]
    assert {"ce_delta", "ce_recovered_zero", "ce_zero", "ce_clean", "ce_sae"} <= set(found.metrics)
    agree(found, values(core))


def test_head_metrics_agree_with_a_plain_loop_over_the_latents_that_fire(
    random_sae: SAE, tiny_cache: ActivationCache, agree: Agree
) -> None:
    result = run(random_sae, tiny_cache, n_latents=0)
    fires = random_sae.encode(tiny_cache.rows(HOOK, tiny_cache.indices("test"))).gt(0).any(0)
    shares = []
    for row in random_sae.W_dec[fires].double().tolist():
        norms = [math.hypot(*row[k * D_HEAD : (k + 1) * D_HEAD]) for k in range(HEADS)]
        shares.append([norm / sum(norms) for norm in norms])
    n = len(shares)
    expected = {
        "single_head_share": sum(max(h) > 0.5 for h in shares) / n,
        "top_head_mean": sum(map(max, shares)) / n,
        "head_entropy_mean": sum(-sum(p * math.log(p) for p in h) for h in shares) / n,
    }
    assert 0 < n < random_sae.d_sae
    agree(result, expected)
    assert result.metrics["top_head_mean"].n == n
    ours = result.arrays["head_attribution"][fires.numpy()]
    assert ours.tolist() == [pytest.approx(h, rel=1e-6) for h in shares]


def test_the_latents_of_a_head_are_those_that_fire_with_the_largest_share_of_it(
    random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    arrays = run(random_sae, tiny_cache, n_latents=0).arrays
    share, fires = arrays["head_attribution"], arrays["density"] > 0
    for head in range(HEADS):
        live = [i for i in range(random_sae.d_sae) if fires[i]]
        expected = sorted(live, key=lambda i: -share[i, head])[:10]
        assert arrays["head_latents"][head].tolist() == expected


def test_a_latent_of_one_head_and_a_latent_of_both(
    random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    """All latents of one head: share 1, entropy 0. All of both alike: not above 0.5, ln 2."""
    one, both = torch.zeros(40, 16), torch.ones(40, 16)
    one[:, 3] = 2
    for W_dec, top, single, entropy in ((one, 1, 1, 0), (both, 0.5, 0, math.log(2))):
        sae = SAE(
            random_sae.W_enc, random_sae.b_enc, W_dec, random_sae.b_dec, random_sae.activation
        )
        found = values(run(sae, tiny_cache, n_latents=0))
        assert found["top_head_mean"] == top
        assert found["single_head_share"] == single
        assert found["head_entropy_mean"] == pytest.approx(entropy)


def test_entries_are_where_each_latent_is_strongest_by_a_plain_loop(
    random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    index = tiny_cache.indices("test")[:90]
    fires = random_sae.encode(tiny_cache.rows(HOOK, index)).gt(0).any(0)
    latents = tuple(fires.nonzero().flatten()[::2].tolist())
    result = run(random_sae, tiny_cache, latents=latents, max_rows=90)
    expected = []
    left = 90
    best: dict[tuple[int, int], tuple[float, int]] = {}
    for window in tiny_cache.windows("test"):
        rows = (window.keep.nonzero().flatten() + window.start)[:left]
        left -= len(rows)
        if len(rows):
            z = random_sae.encode(tiny_cache.rows(HOOK, rows))
            for latent in latents:
                value, at = z[:, latent].max(0)
                if value > 0:
                    best[latent, window.start] = float(value), int(rows[at])
    for latent in latents:
        of_latent = [found for (i, _), found in best.items() if i == latent]
        of_latent.sort(key=lambda found: (-found[0], found[1]))
        expected += [(latent, row) for _, row in of_latent[:3]]
    found = zip(result.arrays["dfa_latent"], result.arrays["dfa_row"], strict=True)
    assert list(found) == expected
    assert result.metrics["dfa_head_agreement"].n == len(expected) > 2 * len(latents) > 4


def test_attributions_are_those_of_the_model_on_the_text_before(
    random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    arrays = run(random_sae, tiny_cache).arrays
    model = LanguageModel.load(tiny_cache.model)
    windows: dict[int, tuple[Window, int]] = {}
    for window in tiny_cache.windows("test"):
        windows |= {window.start + t: (window, t) for t in range(len(window.tokens))}
    for entry, (latent, row) in enumerate(
        zip(arrays["dfa_latent"].tolist(), arrays["dfa_row"].tolist(), strict=True)
    ):
        window, t = windows[row]
        mixed = mixing(model, site(model, HOOK), window.tokens)
        parts = attribution(mixed, random_sae.W_enc[:, [latent]], torch.tensor([t]))[0]
        assert arrays["dfa_head"][entry] == pytest.approx(parts.sum(1).numpy(), rel=1e-4, abs=1e-5)
        source = arrays["dfa_source"][entry]
        assert source[: t + 1] == pytest.approx(parts.sum(0)[: t + 1].numpy(), rel=1e-4, abs=1e-5)
        assert not source[t + 1 :].any()
        token = arrays["dfa_token"][entry]
        assert token[: t + 1].tolist() == window.tokens[: t + 1].tolist()
        assert (token[t + 1 :] == -1).all()


def test_the_parts_sum_to_the_pre_activation_of_the_row(
    random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    result = run(random_sae, tiny_cache, n_latents=40)
    arrays = result.arrays
    assert result.metrics["dfa_residual"].value < 1e-5
    for parts in (arrays["dfa_head"], arrays["dfa_source"]):
        assert parts.sum(1) + arrays["dfa_bias"] == pytest.approx(arrays["dfa_pre"], rel=1e-4)
    x = tiny_cache.rows(HOOK, torch.from_numpy(arrays["dfa_row"]))
    stored = random_sae.pre(x).gather(1, torch.from_numpy(arrays["dfa_latent"])[:, None])[:, 0]
    # The cache holds bfloat16.
    assert arrays["dfa_pre"] == pytest.approx(stored.numpy(), rel=0.02, abs=0.02)


class Wide:
    """The tiny model in float64, and what its second layer's attention does in a window."""

    def __init__(self, folder: Path) -> None:
        self.model = GPT2LMHeadModel.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager"
        )
        self.z = torch.empty(0)
        block: Any = self.model.transformer.h[1]
        self.block = block
        block.attn.c_proj.register_forward_pre_hook(self._keep)

    def _keep(self, module: Any, args: tuple[Tensor, ...]) -> None:
        self.z = args[0][0]

    @torch.no_grad()
    def look(self, tokens: Tensor) -> tuple[list[Any], list[Any], list[list[float]]]:
        """Patterns [head][destination][source], values [source][d], and outputs [pos][d]."""
        seen: Any = self.model(tokens[None], output_attentions=True, output_hidden_states=True)
        mixed = self.block.attn.c_attn(self.block.ln_1(seen.hidden_states[1]))
        return seen.attentions[1][0].tolist(), mixed[0, :, 32:].tolist(), self.z.tolist()


def test_attribution_agrees_with_plain_loops_over_heads_and_sources(
    random_sae: SAE, tiny_cache: ActivationCache, tiny_lm: Path, agree: Agree
) -> None:
    """Of the model in float64, from its weights alone: parts add up to the pre-activation."""
    result = run(random_sae, tiny_cache, n_latents=40, exclude=())
    arrays, wide = result.arrays, Wide(tiny_lm)
    W_enc, W_dec = random_sae.W_enc.double().tolist(), random_sae.W_dec.double().tolist()
    windows = {
        window.start + t: (window, t)
        for window in tiny_cache.windows("test", ())
        for t in range(len(window.tokens))
    }
    all_heads, all_sources, all_pre, apart = 0.0, 0.0, 0.0, 0.0
    top, own, first, agreed = 0.0, 0.0, 0.0, 0
    seen: dict[int, Any] = {}
    entries = list(zip(arrays["dfa_latent"].tolist(), arrays["dfa_row"].tolist(), strict=True))
    for latent, row in entries:
        window, t = windows[row]
        if window.start not in seen:
            seen[window.start] = wide.look(window.tokens)
        pattern, value, z = seen[window.start]
        parts = [
            [
                pattern[h][t][s]
                * sum(value[s][j] * W_enc[j][latent] for j in range(h * D_HEAD, (h + 1) * D_HEAD))
                for s in range(t + 1)
            ]
            for h in range(HEADS)
        ]
        heads = [math.fsum(line) for line in parts]
        sources = [math.fsum(line[s] for line in parts) for s in range(t + 1)]
        bias = float(random_sae.b_enc[latent])
        pre = math.fsum(v * column[latent] for v, column in zip(z[t], W_enc, strict=True)) + bias
        assert math.fsum(heads) + bias == pytest.approx(pre, abs=1e-12)
        apart += abs(math.fsum(heads) + bias - pre)
        all_pre += abs(pre)
        all_heads += sum(map(abs, heads))
        all_sources += sum(map(abs, sources))
        top += max(map(abs, heads))
        own += abs(sources[t])
        first += abs(sources[0]) if t else 0.0
        lengths = [math.hypot(*W_dec[latent][h * D_HEAD : (h + 1) * D_HEAD]) for h in range(HEADS)]
        strongest = max(range(HEADS), key=lambda h, heads=heads: abs(heads[h]))  # type: ignore[misc]
        agreed += strongest == lengths.index(max(lengths))
    places = [windows[row][1] for _, row in entries]
    assert 0 in places and max(places) > 5
    expected = {
        "dfa_head_agreement": agreed / len(entries),
        "dfa_top_head_share": top / all_heads,
        "dfa_self_share": own / all_sources,
        "dfa_first_share": first / all_sources,
        "dfa_residual": apart / all_pre,
    }
    agree(result, expected, abs=1e-6)  # What the model leaves that runs in fp32.


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_changes_no_number(
    batch_size: int, random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    whole = run(random_sae, tiny_cache, max_rows=100)
    parts = run(random_sae, tiny_cache, max_rows=100, batch_size=batch_size)
    assert values(parts) == pytest.approx(values(whole), rel=1e-5, abs=1e-6)
    assert whole.arrays.keys() == parts.arrays.keys()
    for name, array in whole.arrays.items():
        assert parts.arrays[name].tolist() == array.tolist(), name


def test_the_draw_follows_the_seed_and_takes_latents_that_fire(
    random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    drawn = []
    for seed in (0, 0, 1):
        arrays = run(random_sae, tiny_cache, n_latents=6, seed=seed).arrays
        drawn.append(sorted(set(arrays["dfa_latent"].tolist())))
        assert len(drawn[-1]) == 6
        assert (arrays["density"][drawn[-1]] > 0).all()
    assert drawn[0] == drawn[1] != drawn[2]


def test_latents_that_do_not_fire_leave_attribution_out_and_the_reason_is_given(
    silent: SAE, tiny_cache: ActivationCache, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = run(silent, tiny_cache, latents=(1, 3))
    assert not [name for name in result.metrics if "head" in name or "dfa" in name]
    assert "No single_head_share: no latent fires" in result.metrics["dead_share"].definition
    assert "none of the latents [1, 3] fires" in result.metrics["dead_share"].definition
    assert "single_head_share is left out" in caplog.text
    assert (result.arrays["head_latents"] == -1).all()
    assert not run(silent, tiny_cache).arrays.keys() & {"dfa_row", "dfa_pre"}


def test_shares_of_rare_latents_are_there_where_the_rows_can_tell(
    random_sae: SAE, tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch, agree: Agree
) -> None:
    plain = run(random_sae, tiny_cache, n_latents=0, max_rows=100)
    assert not [name for name in plain.metrics if name.startswith("below_")]
    assert "100 rows cannot tell densities below 1e-05" in plain.metrics["dead_share"].definition
    monkeypatch.setattr(attention, "_RARE", (0.05, 0.001))
    found = run(random_sae, tiny_cache, n_latents=0, max_rows=100)
    rows = tiny_cache.rows(HOOK, tiny_cache.indices("test")[:100])
    fires = (random_sae.encode(rows) != 0).tolist()
    rare = [sum(row[i] for row in fires) / 100 < 0.05 for i in range(40)]
    assert any(rare)
    agree(found, {"below_5e-2_share": sum(rare) / 40})
    assert "below_1e-3_share" not in found.metrics


def test_an_sae_of_another_hook_is_refused(random_sae: SAE, tiny_cache: ActivationCache) -> None:
    with pytest.raises(ConfigError, match="'resid_post.0' .* does not hold the outputs of atten"):
        evaluate("attention", random_sae, tiny_cache, hook="resid_post.0")


def test_activations_that_the_model_does_not_give_are_refused(
    random_sae: SAE, tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ActivationCache.row_slice
    monkeypatch.setattr(ActivationCache, "row_slice", lambda *where: 1.1 * read(*where))
    with pytest.raises(CacheError, match="now gives other activations at 'attn_z.1'"):
        run(random_sae, tiny_cache)


@pytest.mark.parametrize("latents", [(40,), (3, -1)])
def test_a_latent_that_there_is_not_is_refused(
    latents: tuple[int, ...], random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    with pytest.raises(ConfigError, match=r"latents=.* must lie in 0..39"):
        run(random_sae, tiny_cache, latents=latents)


@pytest.mark.parametrize(("name", "value"), [("n_latents", -1), ("n_contexts", 0)])
def test_counts_that_cannot_be_are_refused(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value} must"):
        AttentionConfig.from_dict({name: value})
