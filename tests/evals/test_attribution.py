import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from saekit.activations_cache.model import LanguageModel, wrap
from saekit.errors import ConfigError, ModelError
from saekit.evals._attribution import Entries, Mixing, attribution, head_attribution, mixing, site
from saekit.sae import SAE, ReLU

HOOK = "attn_z.1"
TOKENS = torch.arange(3, 15)

_SIZE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {**_SIZE, "num_key_value_heads": 2, "head_dim": 8}
_GPT: dict[str, Any] = {"vocab_size": 50, "n_embd": 24, "n_layer": 2, "n_head": 4}

DECODERS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT, n_positions=32)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED, attention_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_GROUPED, sliding_window=4)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZE, num_key_value_heads=2)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GROUPED)),
    "phi3": lambda: Phi3ForCausalLM(
        Phi3Config(**_SIZE, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_GROUPED, attn_logit_softcapping=2.0, sliding_window=4)
    ),
    "gemma3_text": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_GROUPED, sliding_window=4)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZE)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**_GPT, n_positions=32, rotary_dim=4)),
}


def built(make: Callable[[], nn.Module]) -> LanguageModel:
    """A model whose every weight matters, biases of the values among them."""
    module = make()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", *(f"w{i}" for i in range(2, 50))])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<pad>")),
        bos_token="<s>",
        cls_token="<s>",
        sep_token="<s>",
        pad_token="<pad>",
    )
    model = wrap(module, tokenizer)
    assert isinstance(model, LanguageModel)
    return model


def latents(width: int, n: int = 5) -> SAE:
    W_enc = torch.randn(width, n)
    return SAE(W_enc, torch.randn(n), W_enc.T, torch.zeros(width), ReLU())


def test_head_attribution_worked_by_hand() -> None:
    """Norms 5 and 0; 3 and 1, which squared would give 0.9; nothing at all."""
    W_dec = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 3.0, -1.0, 0.0], [0.0] * 4])
    assert head_attribution(W_dec, 2).tolist() == [[1, 0], [0.75, 0.25], [0, 0]]


def test_head_attribution_agrees_with_a_plain_loop() -> None:
    W_dec = torch.randn(7, 12)
    found = head_attribution(W_dec, 3)
    for row, ours in zip(W_dec.double().tolist(), found.tolist(), strict=True):
        norms = [math.sqrt(sum(w * w for w in row[4 * k : 4 * k + 4])) for k in range(3)]
        assert ours == pytest.approx([norm / sum(norms) for norm in norms], rel=1e-12)
    assert found.sum(1).tolist() == pytest.approx([1] * 7)


def test_attribution_agrees_with_a_plain_loop_though_heads_share_values_and_a_sink_takes_part() -> (
    None
):
    pattern = torch.rand(4, 6, 6).tril().double() / 6
    value = torch.randn(2, 6, 3).double()
    W_enc = torch.randn(12, 2)
    destination = torch.tensor([5, 2])
    found = attribution(Mixing(pattern, value, torch.zeros(6, 12)), W_enc, destination)
    assert found.shape == (2, 4, 6)
    for e, t in enumerate(destination.tolist()):
        for h in range(4):
            for s in range(6):
                reads = sum(
                    float(value[h // 2, s, i]) * float(W_enc[3 * h + i, e]) for i in range(3)
                )
                expected = float(pattern[h, t, s]) * reads
                assert float(found[e, h, s]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", DECODERS)
def test_attribution_sums_to_the_pre_activation(name: str) -> None:
    """Of the activations that the model gives by itself, without its patterns being asked for."""
    model = built(DECODERS[name])
    where = site(model, HOOK)
    z = model.capture(model.inputs(TOKENS[None]), [HOOK])[HOOK][0]
    sae = latents(z.shape[1])
    mixed = mixing(model, where, TOKENS)
    pre = sae.pre(z)
    for t in range(len(TOKENS)):
        parts = attribution(mixed, sae.W_enc, torch.full((sae.d_sae,), t))
        assert not parts[:, :, t + 1 :].any()
        found = parts.sum((1, 2)).float() + sae.b_enc
        # One near 0 is what is left of parts near 1.
        torch.testing.assert_close(found, pre[t], rtol=1e-4, atol=1e-5)


def test_attribution_agrees_with_attention_computed_from_the_weights(tiny_lm: Path) -> None:
    """GPT-2's attention head by head and token by token, in plain loops of fp64."""
    model = LanguageModel.load(str(tiny_lm), dtype=torch.float64)
    tokens = torch.tensor([0, 40, 41, 7, 40, 99])
    block = model.model.transformer.h[1]
    x = model.capture(model.inputs(tokens[None]), ["resid_pre.1"])["resid_pre.1"]
    qkv = block.attn.c_attn(block.ln_1(x))[0].tolist()
    sae = latents(16, 3)
    W_enc = sae.W_enc.double().tolist()
    mixed = mixing(model, site(model, HOOK), tokens)
    t = 4
    found = attribution(mixed, sae.W_enc, torch.full((3,), t))
    for h in range(2):
        block_h = range(8 * h, 8 * h + 8)
        scores = [
            sum(qkv[t][i] * qkv[s][16 + i] for i in block_h) / math.sqrt(8) for s in range(t + 1)
        ]
        total = sum(map(math.exp, scores))
        for s, score in enumerate(scores):
            for e in range(3):
                reads = sum(qkv[s][32 + i] * W_enc[i][e] for i in block_h)
                expected = math.exp(score) / total * reads
                assert float(found[e, h, s]) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_a_model_in_half_precision_is_attributed_as_far_as_it_is_exact(tiny_lm: Path) -> None:
    model = LanguageModel.load(str(tiny_lm), dtype=torch.bfloat16)
    mixed = mixing(model, site(model, HOOK), TOKENS)
    sae = latents(16)
    parts = attribution(mixed, sae.W_enc, torch.full((5,), 9))
    pre = sae.pre(mixed.z[[9]].float())[0]
    scale = float(parts.abs().sum((1, 2)).max())
    torch.testing.assert_close(
        parts.sum((1, 2)).float() + sae.b_enc, pre, rtol=0, atol=0.01 * scale
    )


def test_the_model_is_left_as_it_was(tiny_lm: Path) -> None:
    model = LanguageModel.load(str(tiny_lm))
    before = model.config._attn_implementation
    assert before != "eager"
    where = site(model, HOOK)
    mixing(model, where, TOKENS)
    assert model.config._attn_implementation == before
    with pytest.raises(ConfigError, match="exceeds the context"):
        mixing(model, where, torch.zeros(100, dtype=torch.long))
    assert model.config._attn_implementation == before
    assert not model.model.get_submodule(where.attention)._forward_hooks


def test_outputs_that_are_not_patterns_times_values_are_refused(tiny_lm: Path) -> None:
    model = LanguageModel.load(str(tiny_lm))
    where = site(model, HOOK)

    def scale(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (1.01 * args[0],)

    model.points[HOOK].module.register_forward_pre_hook(scale)
    with pytest.raises(ModelError, match="differ from them by 0.0099 of their length"):
        mixing(model, where, TOKENS)


def test_a_model_that_keeps_its_patterns_is_refused(
    tiny_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LanguageModel.load(str(tiny_lm))
    monkeypatch.setattr(model.model, "set_attn_implementation", lambda how: None)
    with pytest.raises(ModelError, match="does not give its attention pattern"):
        mixing(model, site(model, HOOK), TOKENS)


@pytest.mark.parametrize("hook", ["resid_post.0", "attn_out.1", "attn_z.7", "transformer.h.1.attn"])
def test_a_hook_without_heads_is_refused(tiny_lm: Path, hook: str) -> None:
    with pytest.raises(ConfigError, match=f"hook '{hook}' of .* trained on attn_z.L"):
        site(LanguageModel.load(str(tiny_lm)), hook)


def test_an_encoder_is_refused() -> None:
    with pytest.raises(ModelError, match="there for decoders alone"):
        site(built(lambda: BertModel(BertConfig(**_SIZE))), HOOK)


def test_attention_whose_values_are_not_known_is_refused() -> None:
    model = built(DECODERS["llama"])
    attention = model.model.model.layers[1].self_attn
    attention.new_v = attention.v_proj
    del attention.v_proj
    with pytest.raises(ModelError, match="new_v.* its attention is not known"):
        site(model, HOOK)


def test_the_strongest_entries_worked_by_hand() -> None:
    """Latent 3 in windows 0, 0 and 10: the weaker of window 0 goes; of equals the first stays."""
    found = Entries.empty().joined(entries([(3, 0, 1, 2), (3, 0, 4, 5), (3, 10, 12, 5)]), 1)
    assert rows(found) == [(3, 0, 4, 5)]
    found = found.joined(entries([(3, 20, 25, 7), (1, 20, 21, 0.5)]), 2)
    assert rows(found) == [(1, 20, 21, 0.5), (3, 20, 25, 7), (3, 0, 4, 5)]


@pytest.mark.parametrize("size", [1, 7, 200])
def test_the_strongest_entries_agree_with_a_plain_loop_for_any_batch_size(size: int) -> None:
    g = np.random.default_rng(0)
    every = [(int(g.integers(4)), row // 9 * 9, row, float(g.integers(1, 6))) for row in range(200)]
    found = Entries.empty()
    for first in range(0, 200, size):
        found = found.joined(entries(every[first : first + size]), 3)
    expected = []
    for latent in range(4):
        of_window: dict[int, tuple[int, int, int, float]] = {}
        for entry in every:
            best = of_window.get(entry[1])
            if entry[0] == latent and (best is None or entry[3] > best[3]):
                of_window[entry[1]] = entry
        expected += sorted(of_window.values(), key=lambda entry: (-entry[3], entry[2]))[:3]
    assert rows(found) == expected


def entries(some: list[tuple[int, int, int, float]]) -> Entries:
    latent, start, row, value = zip(*some, strict=True)
    return Entries(np.array(latent), np.array(start), np.array(row), np.array(value, float))


def rows(some: Entries) -> list[tuple[int, int, int, float]]:
    columns = (some.latent, some.start, some.row, some.value)
    return list(zip(*(column.tolist() for column in columns), strict=True))
