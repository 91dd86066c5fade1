"""The same model through transformers and through TransformerBridge gives the same activations."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
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
    RobertaConfig,
    RobertaModel,
)

from saekit.activations_cache.architectures import ARCHITECTURES
from saekit.activations_cache.model import LanguageModel, load, wrap
from saekit.activations_cache.model_bridge import BridgeModel, bridged
from saekit.errors import ModelError

_SIZE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED: dict[str, Any] = {**_SIZE, "num_key_value_heads": 1, "head_dim": 8}
_GPT: dict[str, Any] = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2}

MODELS: dict[str, Any] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT, n_positions=32)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZE, num_key_value_heads=1)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GROUPED)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_SIZE)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**_GROUPED)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_GROUPED)),
    "gemma3_text": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_GROUPED)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZE)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**_GPT, n_positions=32, rotary_dim=4)),
    "bert": lambda: BertModel(BertConfig(**_SIZE)),
    "roberta": lambda: RobertaModel(RobertaConfig(**_SIZE)),
}
WITHOUT = {"distilbert", "modernbert"}
"""Architectures of the table that TransformerBridge does not know."""

IDS = torch.arange(3, 23).reshape(2, 10)


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 50))]
    vocab = {word: i for i, word in enumerate(words)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
    )


def saved(kind: str, folder: Path) -> str:
    built = MODELS[kind]()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    built.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def both(kind: str, folder: Path) -> tuple[LanguageModel, BridgeModel]:
    name = saved(kind, folder)
    plain, bridge = load(name), load(name, backend="transformer_lens")
    assert isinstance(plain, LanguageModel) and isinstance(bridge, BridgeModel)
    return plain, bridge


def test_every_text_architecture_is_either_bridged_or_known_to_lack_a_bridge() -> None:
    text = {kind for kind, row in ARCHITECTURES.items() if row.kind != "vision"}
    assert text == MODELS.keys() | WITHOUT


@pytest.mark.parametrize("kind", MODELS)
def test_both_routes_give_the_same_activations_and_logits(kind: str, tmp_path: Path) -> None:
    plain, bridge = both(kind, tmp_path)
    names = list(plain.points)
    assert list(bridge.points) == names
    assert bridge.widths() == plain.widths()
    assert bridge.fingerprint == plain.fingerprint
    assert bridge.tokenizer_fingerprint == plain.tokenizer_fingerprint
    assert (bridge.prefix, bridge.suffix, bridge.context) == (
        plain.prefix,
        plain.suffix,
        plain.context,
    )
    mask = torch.ones_like(IDS)
    mask[1, 7:] = 0
    given = plain.inputs(IDS) if plain.causal else plain.inputs(IDS, mask)
    a, b = (model.capture(given, names) for model in (plain, bridge))
    for name in names:
        torch.testing.assert_close(b[name], a[name], rtol=1e-5, atol=1e-5, msg=name)
    if not plain.causal:
        return
    zero = {"resid_post.0": torch.zeros_like, "attn_z.1": torch.zeros_like}
    if "resid_mid.1" in names:
        zero["resid_mid.1"] = torch.ones_like
    for edits in ({}, zero):
        torch.testing.assert_close(bridge.logits(IDS, edits), plain.logits(IDS, edits))
    for one, other in zip(bridge.unembed(), plain.unembed(), strict=True):
        torch.testing.assert_close(one, other)
    for name in ("attn_z.1", "mlp_hidden.1", "attn_out.1"):
        torch.testing.assert_close(bridge.residual_map(name), plain.residual_map(name))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_both_routes_give_the_same_gradients(kind: str, tmp_path: Path) -> None:
    plain, bridge = both(kind, tmp_path)
    names = ["embed", "attn_z.0", "resid_mid.1", "mlp_out.1"]
    scored = torch.arange(10) < torch.tensor([9, 6])[:, None]
    a, b = (m.capture_with_gradients({"input_ids": IDS}, scored, names) for m in (plain, bridge))
    for one, other in zip(b, a, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_hooks_of_the_bridge_are_hook_points_too(tmp_path: Path) -> None:
    _, bridge = both("gpt2", tmp_path)
    names = ["blocks.1.attn.v.hook_out", "blocks.1.hook_out", "resid_post.1"]
    seen = bridge.capture(bridge.inputs(IDS), names)
    assert seen["blocks.1.attn.v.hook_out"].shape == (2, 10, 16)
    assert seen["blocks.1.hook_out"].equal(seen["resid_post.1"])
    with pytest.raises(ModelError, match=r"hook_pattern' of .* gives \[2, 2, 10, 10\]"):
        bridge.capture(bridge.inputs(IDS), ["blocks.1.attn.hook_pattern"])


def test_the_pass_stops_at_the_last_hook(tmp_path: Path) -> None:
    _, bridge = both("gpt2", tmp_path)
    reached = []
    bridge.model.blocks[1].register_forward_pre_hook(lambda *_: reached.append(1))
    bridge.capture(bridge.inputs(IDS), ["resid_post.0"])
    assert not reached


def test_a_bridge_in_memory_is_wrapped(tmp_path: Path) -> None:
    plain = LanguageModel.load(saved("llama", tmp_path))
    tokenizer = plain.tokenizer
    before = tokenizer.special_tokens_map
    bridge = bridged("x", copy.deepcopy(plain.model), tokenizer)
    assert tokenizer.special_tokens_map == before and tokenizer.padding_side == "right"
    wrapped = wrap(bridge, name="mine")
    assert isinstance(wrapped, BridgeModel)
    x, y = (m.capture(plain.inputs(IDS), ["resid_post.1"]) for m in (plain, wrapped))
    torch.testing.assert_close(x, y)
    assert not any(p.requires_grad for p in wrapped.model.parameters())


def test_an_architecture_without_a_bridge_is_refused(tmp_path: Path) -> None:
    config = DistilBertConfig(vocab_size=50, dim=16, hidden_dim=24, n_layers=1, n_heads=2)
    DistilBertModel(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="TransformerBridge cannot take .*DistilBertForMaskedLM"):
        load(str(tmp_path), backend="transformer_lens")
