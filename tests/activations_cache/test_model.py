"""Every architecture of the table, as a tiny model with random weights, obeys the same contract."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from saekit.activations_cache.hooks import ARCHITECTURES
from saekit.activations_cache.model import LanguageModel
from saekit.errors import ModelError

_SIZE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
_GROUPED: dict[str, Any] = {**_SIZE, "num_key_value_heads": 1, "head_dim": 8}

MODELS: dict[str, Any] = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZE, num_key_value_heads=1)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GROUPED)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZE)),
}


class Tokens:
    """As much of a tokenizer as a model of token ids needs."""

    bos_token_id = 0
    all_special_ids = (0,)


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> LanguageModel:
    built: nn.Module = MODELS[request.param]()
    return LanguageModel(request.param, "random", built, Tokens())


IDS = torch.arange(1, 21).reshape(2, 10)


def test_every_architecture_of_the_table_is_tested() -> None:
    assert set(MODELS) == set(ARCHITECTURES)


def test_contributions_add_up_to_the_residual_stream(model: LanguageModel) -> None:
    seen = model.capture(IDS, list(model.points))
    for layer in range(2):
        pre, post = seen[f"resid_pre.{layer}"], seen[f"resid_post.{layer}"]
        attn, mlp = seen[f"attn_out.{layer}"], seen[f"mlp_out.{layer}"]
        torch.testing.assert_close(pre + attn + mlp, post)
        if f"resid_mid.{layer}" in seen:
            torch.testing.assert_close(pre + attn, seen[f"resid_mid.{layer}"])
    torch.testing.assert_close(seen["resid_post.0"], seen["resid_pre.1"])


@pytest.mark.parametrize(("inner", "outer"), [("attn_z", "attn_out"), ("mlp_hidden", "mlp_out")])
def test_the_residual_map_carries_heads_and_neurons_to_what_they_add(
    model: LanguageModel, inner: str, outer: str
) -> None:
    """Up to the projection's bias, which a difference of two rows does not see."""
    seen = model.capture(IDS, [f"{inner}.1", f"{outer}.1"])
    W = model.residual_map(f"{inner}.1")
    assert W is not None
    step = seen[f"{inner}.1"][0, 1:] - seen[f"{inner}.1"][0, :-1]
    added = seen[f"{outer}.1"][0, 1:] - seen[f"{outer}.1"][0, :-1]
    torch.testing.assert_close(step @ W, added)


def test_replacing_an_activation_by_itself_changes_no_logit(model: LanguageModel) -> None:
    clean = model.logits(IDS)
    for name in model.points:
        torch.testing.assert_close(model.logits(IDS, {name: lambda x: x.clone()}), clean)


def test_replacing_an_activation_changes_the_logits(model: LanguageModel) -> None:
    clean = model.logits(IDS)
    for name in model.points:
        assert not model.logits(IDS, {name: torch.zeros_like}).allclose(clean), name


def test_an_edit_between_attention_and_mlp_reaches_the_residual_stream(
    model: LanguageModel,
) -> None:
    if "resid_mid.0" not in model.points:
        pytest.skip("attention and MLP are parallel: there is nothing between them")
    seen: dict[str, Tensor] = {}
    keep = {name: seen.__setitem__ for name in ("mlp_out.0", "resid_post.0")}
    edits = {name: partial(_seen, name, put) for name, put in keep.items()}
    model.logits(IDS, {"resid_mid.0": torch.zeros_like, **edits})
    torch.testing.assert_close(seen["resid_post.0"], seen["mlp_out.0"])


def _seen(name: str, put: Callable[[str, Tensor], None], x: Tensor) -> Tensor:
    put(name, x)
    return x


def test_the_model_runs_no_further_than_the_last_hook_asked_for(model: LanguageModel) -> None:
    reached = []
    blocks = model.model.get_submodule(ARCHITECTURES[model.name].blocks)
    blocks[1].register_forward_pre_hook(lambda *_: reached.append(1))
    model.capture(IDS, ["resid_post.0"])
    assert not reached


def test_padding_on_the_right_does_not_reach_what_stands_before(model: LanguageModel) -> None:
    padded = torch.cat([IDS, torch.full((2, 5), 7)], dim=1)
    x, y = (model.capture(ids, ["resid_post.1"])["resid_post.1"] for ids in (IDS, padded))
    torch.testing.assert_close(y[:, :10], x)


def test_logits_are_the_normed_stream_times_the_unembedding(model: LanguageModel) -> None:
    """`unembed` gives the right gain and matrix: on a stream whose norm is taken out by hand."""
    stream: dict[str, Tensor] = {}
    head = model.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: stream.__setitem__("x", args[0]))
    logits = model.logits(IDS)
    handle.remove()
    _, W_U = model.unembed()
    torch.testing.assert_close(stream["x"] @ W_U, logits)


def test_gradients_are_those_of_the_summed_loss(model: LanguageModel) -> None:
    """Against central differences in float64, at every hook point, for one push at one position."""
    model.model.double()
    lengths = torch.tensor([10, 7])
    _, grads = model.capture_with_gradients(IDS, lengths, list(model.points))

    def loss(edits: dict[str, Callable[[Tensor], Tensor]]) -> float:
        log_p = model.logits(IDS, edits).log_softmax(-1)
        return -sum(
            float(log_p[row, t, IDS[row, t + 1]])
            for row, length in enumerate(lengths.tolist())
            for t in range(length - 1)
        )

    for name, grad in grads.items():
        push = torch.zeros_like(grad)
        push[1, 3] = torch.randn(grad.shape[-1], dtype=torch.float64) * 3e-4
        up, down = (loss({name: push.add}), loss({name: push.neg().add}))
        # RMSNorm computes in float32 whatever comes in, which is what limits the agreement.
        assert float((grad * push).sum()) == pytest.approx((up - down) / 2, rel=5e-3), name
        assert grad[0, 9].eq(0).all() and grad[1, 6:].eq(0).all(), "past the last scored position"


def test_gradients_do_not_depend_on_which_windows_go_together(model: LanguageModel) -> None:
    lengths = torch.tensor([10, 7])
    x, g = model.capture_with_gradients(IDS, lengths, ["resid_post.0"])
    alone, g_alone = model.capture_with_gradients(IDS[1:, :7], lengths[1:], ["resid_post.0"])
    torch.testing.assert_close(g["resid_post.0"][1, :7], g_alone["resid_post.0"][0])
    torch.testing.assert_close(x["resid_post.0"][1, :7], alone["resid_post.0"][0])
    torch.testing.assert_close(x, model.capture(IDS, ["resid_post.0"]))


def test_a_model_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelError, match="'/no/such/model' cannot be loaded"):
        LanguageModel.load("/no/such/model")
