"""Every architecture of the table, as a tiny model with random weights, obeys the same contract."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
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
    ModernBertConfig,
    ModernBertModel,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)

from saekit.activations_cache.architectures import ARCHITECTURES
from saekit.activations_cache.model import LanguageModel, Model, load, wrap
from saekit.activations_cache.model_module import ModuleModel
from saekit.activations_cache.model_vision import VisionModel
from saekit.errors import ConfigError, ModelError

_SIZE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
_GROUPED: dict[str, Any] = {**_SIZE, "num_key_value_heads": 1, "head_dim": 8}
_PADDED: dict[str, Any] = {**_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_IMAGE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
_GPT: dict[str, Any] = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2}

DECODERS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT, n_positions=32)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZE, num_key_value_heads=1)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GROUPED)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_PADDED)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**_GROUPED)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_GROUPED)),
    "gemma3_text": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_GROUPED)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZE)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**_GPT, n_positions=32, rotary_dim=4)),
}
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: BertModel(BertConfig(**_PADDED)),
    "roberta": lambda: RobertaModel(RobertaConfig(**_PADDED)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(
            vocab_size=50, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=32
        )
    ),
    "modernbert": lambda: ModernBertModel(
        ModernBertConfig(**_PADDED, cls_token_id=1, sep_token_id=2, local_attention=8)
    ),
}
VISION: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: ViTModel(ViTConfig(**_IMAGE)),
    "clip_vision_model": lambda: CLIPVisionModel(CLIPVisionConfig(**_IMAGE)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**_IMAGE)),
    "dinov2_with_registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**_IMAGE, num_register_tokens=3)
    ),
}
POST_NORM = {
    "bert": ("attention.output.LayerNorm", "output.LayerNorm"),
    "roberta": ("attention.output.LayerNorm", "output.LayerNorm"),
    "distilbert": ("sa_layer_norm", "output_layer_norm"),
}
"""The norms around the sums of a post-LayerNorm block."""

IDS = torch.arange(3, 23).reshape(2, 10)


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """A model whose every weight matters: far from zero, norms and scales unlike each other."""
    built = make().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return built


def word_tokenizer(n_words: int = 50) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>"]
    vocab = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(3, n_words))])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
    )


def model_of(kind: str) -> Model:
    built = build({**DECODERS, **ENCODERS, **VISION}[kind])
    if kind in VISION:
        return VisionModel(kind, "random", built)
    return LanguageModel(kind, "random", built, word_tokenizer())


@pytest.fixture(params=[*DECODERS, *ENCODERS, *VISION])
def model(request: pytest.FixtureRequest) -> Model:
    return model_of(request.param)


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> LanguageModel:
    made = model_of(request.param)
    assert isinstance(made, LanguageModel)
    return made


@pytest.fixture(params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> LanguageModel:
    made = model_of(request.param)
    assert isinstance(made, LanguageModel)
    return made


def inputs_of(model: Model) -> dict[str, Tensor]:
    if isinstance(model, LanguageModel):
        return model.inputs(IDS)
    return {"pixel_values": torch.randn(2, 3, 12, 12)}


def test_every_architecture_of_the_table_is_tested() -> None:
    kinds = {kind: row.kind for kind, row in ARCHITECTURES.items()}
    assert kinds == {
        **dict.fromkeys(DECODERS, "decoder"),
        **dict.fromkeys(ENCODERS, "encoder"),
        **dict.fromkeys(VISION, "vision"),
    }


def test_contributions_add_up_to_the_residual_stream(model: Model) -> None:
    seen = model.capture(inputs_of(model), list(model.points))
    for layer in range(2):
        block = model.points[f"resid_post.{layer}"].module
        norms = [block.get_submodule(path) for path in POST_NORM.get(model.name, ())]
        after_attn, after_mlp = norms or (nn.Identity(), nn.Identity())
        pre, post = seen[f"resid_pre.{layer}"], seen[f"resid_post.{layer}"]
        attn, mlp = seen[f"attn_out.{layer}"], seen[f"mlp_out.{layer}"]
        mid = after_attn(pre + attn)
        torch.testing.assert_close(after_mlp(mid + mlp), post)
        if ARCHITECTURES[model.name].resid_mid is not None:
            torch.testing.assert_close(mid, seen[f"resid_mid.{layer}"])
    torch.testing.assert_close(seen["resid_post.0"], seen["resid_pre.1"])


def test_the_residual_stream_is_what_transformers_calls_hidden_states(model: Model) -> None:
    inputs = inputs_of(model)
    states = model.model(**inputs, output_hidden_states=True).hidden_states
    seen: dict[str, Tensor] = {}
    names = ["resid_pre.0", "resid_post.0"]
    model.visit(inputs, names, lambda name, x: seen.update({name: x.clone()}))
    torch.testing.assert_close(seen, dict(zip(names, states, strict=False)))


@pytest.mark.parametrize(("inner", "outer"), [("attn_z", "attn_out"), ("mlp_hidden", "mlp_out")])
def test_heads_and_neurons_go_through_the_projection_to_what_they_add(
    model: Model, inner: str, outer: str
) -> None:
    seen = model.capture(inputs_of(model), [f"{inner}.1", f"{outer}.1"])
    added = model.points[f"{inner}.1"].module(seen[f"{inner}.1"])
    behind = getattr(ARCHITECTURES[model.name], outer)
    if "layernorm" in behind or "layer_scale" in behind:
        added = model.points[f"{outer}.1"].module(added)
    torch.testing.assert_close(added, seen[f"{outer}.1"])


def test_widths_are_those_of_the_activations(model: Model) -> None:
    seen = model.capture(inputs_of(model), list(model.points))
    assert model.widths() == {name: x.shape[-1] for name, x in seen.items()}
    neurons = 64 if model.name in ("gpt2", "gptj", "dinov2", "dinov2_with_registers") else 24
    assert model.widths(["mlp_hidden.0", "attn_out.0"]) == {
        "mlp_hidden.0": neurons,
        "attn_out.0": 16,
    }


def test_the_model_runs_no_further_than_the_last_hook_asked_for(model: Model) -> None:
    if isinstance(model, VisionModel):
        assert model.n_positions > 9, "seen in a pass of its own"
    reached = []
    later = model.points["resid_pre.1"].module
    later.register_forward_pre_hook(lambda *_: reached.append(1))
    model.visit(inputs_of(model), ["resid_post.0", "attn_z.0"], lambda name, x: None)
    assert not reached


def test_two_names_of_one_place_are_both_given(model: Model) -> None:
    path = model.points["resid_post.0"].path
    seen = model.capture(inputs_of(model), ["resid_post.0", path, "resid_post.0"])
    assert list(seen) == ["resid_post.0", path]
    torch.testing.assert_close(seen[path], seen["resid_post.0"])


def test_the_residual_map_carries_heads_and_neurons_to_what_they_add(
    decoder: LanguageModel,
) -> None:
    """Up to the projection's bias, which a difference of two rows does not see."""
    for inner, outer in (("attn_z.1", "attn_out.1"), ("mlp_hidden.1", "mlp_out.1")):
        seen = decoder.capture(decoder.inputs(IDS), [inner, outer])
        W = decoder.residual_map(inner)
        if decoder.name in ("gemma2", "gemma3_text"):
            assert W is None, "a norm stands between"
            continue
        assert W is not None
        step = seen[inner][0, 1:] - seen[inner][0, :-1]
        added = seen[outer][0, 1:] - seen[outer][0, :-1]
        torch.testing.assert_close(step @ W, added)


def test_replacing_an_activation_by_itself_changes_no_logit(decoder: LanguageModel) -> None:
    clean = decoder.logits(IDS)
    for name in decoder.points:
        torch.testing.assert_close(decoder.logits(IDS, {name: lambda x: x.clone()}), clean)


def test_replacing_an_activation_changes_the_logits(decoder: LanguageModel) -> None:
    clean = decoder.logits(IDS)
    for name in decoder.points:
        assert not decoder.logits(IDS, {name: torch.zeros_like}).allclose(clean), name


def test_an_edit_between_attention_and_mlp_reaches_the_residual_stream(
    decoder: LanguageModel,
) -> None:
    if "resid_mid.0" not in decoder.points:
        pytest.skip("attention and MLP are parallel: there is nothing between them")
    seen: dict[str, Tensor] = {}
    keep = {name: seen.__setitem__ for name in ("mlp_out.0", "resid_post.0")}
    edits = {name: partial(_seen, name, put) for name, put in keep.items()}
    decoder.logits(IDS, {"resid_mid.0": torch.zeros_like, **edits})
    torch.testing.assert_close(seen["resid_post.0"], seen["mlp_out.0"])


def _seen(name: str, put: Callable[[str, Tensor], None], x: Tensor) -> Tensor:
    put(name, x)
    return x


def test_padding_on_the_right_does_not_reach_what_stands_before(decoder: LanguageModel) -> None:
    padded = torch.cat([IDS, torch.full((2, 5), 7)], dim=1)
    inputs = (decoder.inputs(ids) for ids in (IDS, padded))
    x, y = (decoder.capture(given, ["resid_post.1"])["resid_post.1"] for given in inputs)
    torch.testing.assert_close(y[:, :10], x)


def test_masked_padding_does_not_reach_what_stands_before(encoder: LanguageModel) -> None:
    padded = torch.cat([IDS, torch.zeros(2, 5, dtype=torch.long)], dim=1)
    mask = (padded != 0).long()
    names = list(encoder.points)
    alone = encoder.capture(encoder.inputs(IDS), names)
    together = encoder.capture(encoder.inputs(padded, mask), names)
    for name in names:
        torch.testing.assert_close(together[name][:, :10], alone[name])
    unmasked = encoder.capture(encoder.inputs(padded), ["resid_post.1"])["resid_post.1"]
    assert not unmasked[:, :10].allclose(alone["resid_post.1"], atol=1e-2), "the mask matters"


def test_logits_are_the_normed_stream_times_the_unembedding(decoder: LanguageModel) -> None:
    """Gain and matrix are right: on a step of the stream whose norm is taken out by hand."""
    if decoder.name == "gemma2":
        decoder.config.final_logit_softcapping = None  # it bends the logits after the unembedding
    stream: dict[str, Tensor] = {}
    head = decoder.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: stream.__setitem__("x", args[0]))
    logits = decoder.logits(IDS)
    handle.remove()
    last = decoder.capture(decoder.inputs(IDS), ["resid_post.1"])["resid_post.1"]
    centred = last - last.mean(-1, keepdim=True) if "gpt" in decoder.name else last
    normed = centred / centred.square().mean(-1, keepdim=True).sqrt()
    gain, W_U = decoder.unembed()
    steps = (normed * gain)[:, 1:] - (normed * gain)[:, :-1]
    torch.testing.assert_close(
        steps, stream["x"][:, 1:] - stream["x"][:, :-1], rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(steps @ W_U, logits[:, 1:] - logits[:, :-1], rtol=1e-3, atol=1e-2)


def scored_of(*lengths: int) -> Tensor:
    """All but the last of each row's first `length` positions."""
    return torch.arange(10) < torch.tensor(lengths)[:, None] - 1


def test_gradients_are_those_of_the_summed_loss(decoder: LanguageModel) -> None:
    """Against central differences in float64, at every hook point, for one push at one position."""
    decoder.model.double()
    scored = scored_of(10, 7)
    _, grads = decoder.capture_with_gradients(decoder.inputs(IDS), scored, list(decoder.points))

    def loss(edits: dict[str, Callable[[Tensor], Tensor]]) -> float:
        log_p = decoder.logits(IDS, edits).log_softmax(-1)
        return -sum(float(log_p[row, t, IDS[row, t + 1]]) for row, t in scored.nonzero().tolist())

    for name, grad in grads.items():
        push = torch.zeros_like(grad)
        steepest = grad[1, 3] / grad[1, 3].norm()
        push[1, 3] = (torch.randn_like(steepest) + 4 * steepest) * 3e-4
        up, down = (loss({name: push.add}), loss({name: push.neg().add}))
        # RMSNorm computes in float32 whatever comes in, which is what limits the agreement.
        assert float((grad * push).sum()) == pytest.approx((up - down) / 2, rel=1e-2), name
        assert grad[0, 9].eq(0).all() and grad[1, 6:].eq(0).all(), "past the last scored position"


def test_gradients_do_not_depend_on_which_windows_go_together(decoder: LanguageModel) -> None:
    x, g = decoder.capture_with_gradients(decoder.inputs(IDS), scored_of(10, 7), ["resid_post.0"])
    alone, g_alone = decoder.capture_with_gradients(
        decoder.inputs(IDS[1:, :7]), scored_of(7)[:, :7], ["resid_post.0"]
    )
    torch.testing.assert_close(g["resid_post.0"][1, :7], g_alone["resid_post.0"][0])
    torch.testing.assert_close(x["resid_post.0"][1, :7], alone["resid_post.0"][0])
    torch.testing.assert_close(x, decoder.capture(decoder.inputs(IDS), ["resid_post.0"]))


def test_gradients_at_module_paths_equal_those_at_the_named_points() -> None:
    model = model_of("gpt2")
    names = ["embed", "transformer.wte", "attn_out.1", "transformer.h.1.attn", "lm_head"]
    acts, grads = model.capture_with_gradients({"input_ids": IDS}, scored_of(10, 7), names)
    torch.testing.assert_close(grads["embed"], grads["transformer.wte"])
    torch.testing.assert_close(grads["attn_out.1"], grads["transformer.h.1.attn"])
    p = acts["lm_head"].softmax(-1)
    p[0, torch.arange(9), IDS[0, 1:]] -= 1
    torch.testing.assert_close(grads["lm_head"][0, :9], p[0, :9])


def test_a_last_position_cannot_be_scored() -> None:
    model = model_of("gpt2")
    with pytest.raises(ConfigError, match="no next token"):
        model.capture_with_gradients({"input_ids": IDS}, torch.ones(2, 10).bool(), ["embed"])


def test_an_encoder_has_no_next_token_loss(encoder: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="predicts no next token"):
        encoder.capture_with_gradients(encoder.inputs(IDS), scored_of(10, 7), ["resid_post.0"])
    with pytest.raises(ModelError, match="no next-token logits"):
        encoder.logits(IDS)
    with pytest.raises(ModelError, match="no next-token unembedding"):
        encoder.unembed()
    assert encoder.residual_map("attn_out.0") is None


def test_windows_begin_and_end_as_the_kind_of_model_wants() -> None:
    for kind, edges in (("llama", ([1], [])), ("bert", ([1], [2]))):
        model = model_of(kind)
        assert isinstance(model, LanguageModel)
        assert (model.prefix, model.suffix) == edges
        assert model.causal == (kind == "llama")
        assert model.special == {0, 1, 2}


def test_a_window_beyond_the_context_is_refused() -> None:
    for kind, context in (("gpt2", 32), ("roberta", 31)):
        model = model_of(kind)
        assert isinstance(model, LanguageModel)
        assert model.context == context
        model.capture(model.inputs(torch.full((1, context), 5)), ["resid_post.0"])
        with pytest.raises(ConfigError, match=f"{context + 1} tokens exceeds the context"):
            model.capture(model.inputs(torch.full((1, context + 1), 5)), ["resid_post.0"])


def test_a_bare_decoder_has_activations_but_no_logits() -> None:
    built = build(DECODERS["gpt2"])
    whole = wrap(built, word_tokenizer())
    bare = wrap(built.get_submodule("transformer"), word_tokenizer())
    assert isinstance(bare, LanguageModel)
    given = bare.inputs(IDS)
    torch.testing.assert_close(
        bare.capture(given, ["resid_post.1"]), whole.capture(given, ["resid_post.1"])
    )
    with pytest.raises(ModelError, match="bare GPT2Model and has no next-token logits"):
        bare.logits(IDS)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(ModelError, match="largest token id is 59, .* for 50 tokens"):
        LanguageModel("m", "f", build(DECODERS["gpt2"]), word_tokenizer(60))


def test_a_special_token_beyond_the_embedding_does_no_harm() -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    model = LanguageModel("m", "f", build(DECODERS["gpt2"]), tokenizer)
    assert len(model.vocab) == 50
    with pytest.raises(ModelError, match="token id 50 is beyond the 50 tokens"):
        model.logits(torch.tensor([[3, 50]]))
    tokenizer.add_tokens(["word"])
    with pytest.raises(ModelError, match="largest token id is 51"):
        LanguageModel("m", "f", build(DECODERS["gpt2"]), tokenizer)


def test_an_encoder_that_is_set_up_as_a_decoder_is_refused() -> None:
    built = BertModel(BertConfig(**_PADDED, is_decoder=True))
    with pytest.raises(ModelError, match="set up as a decoder"):
        LanguageModel("m", "f", built, word_tokenizer())


def test_an_architecture_that_is_not_in_the_table_is_refused() -> None:
    class Other(GPT2Config):
        model_type = "gpt5"

    built = GPT2LMHeadModel(Other(**_GPT, n_positions=32))
    with pytest.raises(ModelError, match="'gpt5' has no hook points yet; known: gpt2, llama"):
        LanguageModel("m", "f", built, word_tokenizer())
    assert isinstance(wrap(built), ModuleModel), "its modules still have paths"


def test_a_model_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelError, match="'/no/such/model' cannot be loaded"):
        LanguageModel.load("/no/such/model")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="'jax' is unknown; there are: transformers, transformer_lens"
    ):
        load("demo", backend="jax")


def saved(kind: str, folder: Path) -> nn.Module:
    built: Any = build({**DECODERS, **ENCODERS}[kind])
    built.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    module: nn.Module = built
    return module


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_folder_is_loaded_and_gives_what_the_model_in_memory_gives(
    kind: str, tmp_path: Path
) -> None:
    built = wrap(saved(kind, tmp_path), word_tokenizer())
    loaded, again = load(str(tmp_path)), LanguageModel.load(str(tmp_path), dtype=torch.bfloat16)
    assert isinstance(loaded, LanguageModel)
    assert loaded.causal == (kind == "gpt2")
    given = loaded.inputs(IDS)
    torch.testing.assert_close(
        loaded.capture(given, ["resid_post.1"]), built.capture(given, ["resid_post.1"])
    )
    assert loaded.fingerprint == again.fingerprint, "whatever the precision"
    assert loaded.tokenizer_fingerprint == again.tokenizer_fingerprint is not None


def test_an_untrained_model_is_the_same_for_the_same_seed() -> None:
    ids = torch.arange(12)[None]
    models = [load(f"demo#random={seed}") for seed in (3, 3, 4)]
    logits = [model.logits(ids) for model in models if isinstance(model, LanguageModel)]
    trained = load("demo")
    assert models[0].widths() == trained.widths()
    assert models[0].fingerprint == models[1].fingerprint
    assert len({model.fingerprint for model in (*models[1:], trained)}) == 3
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=1e-2)


def test_drawing_weights_leaves_the_random_numbers_of_others_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load("demo#random=1")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", ["demo#random=", "demo#random=x", "demo#random=-1"])
def test_a_seed_that_is_no_number_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="must end in a seed"):
        load(name)


def test_fingerprints_tell_models_and_tokenizers_apart() -> None:
    built = build(DECODERS["gpt2"])
    one = wrap(built, word_tokenizer())
    tokenizer = word_tokenizer()
    tokenizer(["w4", "w5 w6"], padding=True, truncation=True, max_length=4)
    assert wrap(built, tokenizer).tokenizer_fingerprint == one.tokenizer_fingerprint
    assert wrap(built, word_tokenizer(49)).tokenizer_fingerprint != one.tokenizer_fingerprint
    assert wrap(built, tokenizer).fingerprint == one.fingerprint
    next(built.parameters()).data[0, 0] += 1
    assert wrap(built, tokenizer).fingerprint != one.fingerprint


def test_wrapping_a_language_model_needs_its_tokenizer() -> None:
    with pytest.raises(ConfigError, match="give its tokenizer too"):
        wrap(build(DECODERS["gpt2"]))


def test_gradients_of_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="'vit' predicts no next token"):
        model_of("vit").capture_with_gradients({}, scored_of(10), ["resid_post.0"])


def test_weights_that_are_a_pickle_are_not_read(tiny_lm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lm"
    shutil.copytree(tiny_lm, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded: .*safetensors"):
        load(str(folder))
