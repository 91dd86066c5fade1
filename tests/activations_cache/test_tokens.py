from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from saekit.activations_cache.masks import KINDS
from saekit.activations_cache.tokens import (
    Cursor,
    Layout,
    TokenBatch,
    TokenWindow,
    batches,
    windows,
)
from saekit.documents import Document
from saekit.errors import ConfigError

LAYOUTS = get_args(Layout)
CONTEXT = 12
ALL = 10**9

# Another order of summation in float32, nothing else.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Letters:
    """What a model tells about its text: here a character is a token, its number the id."""

    prefix: list[int]
    suffix: list[int]
    causal: bool = True
    special: frozenset[int] = frozenset({ord("!")})
    tokenizer: Any = None

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(character) for character in text] for text in texts]


DECODER = Letters([1], [])
ENCODER = Letters([1], [2], causal=False)
BARE = Letters([], [])


def documents(*texts: str) -> list[Document]:
    return [Document(f"d{number}", text) for number, text in enumerate(texts)]


def cut(texts: Sequence[str], model: Letters = DECODER, **options: Any) -> list[TokenWindow]:
    given: dict[str, Any] = {"context": 4, "n_tokens": ALL} | options
    return list(windows(documents(*texts), model, **given))


def kinds(mask: int) -> set[str]:
    return {name for name, bit in KINDS.items() if mask & bit}


def test_a_document_is_cut_into_windows_with_prefix_and_suffix() -> None:
    assert [w.ids for w in cut(["abcd"])] == [[1, 97, 98, 99], [1, 100]]
    assert [w.ids for w in cut(["abc"], ENCODER)] == [[1, 97, 98, 2], [1, 99, 2]]


def test_truncate_gives_the_first_window_of_each_document() -> None:
    cutted = cut(["abcdefgh", "", "xy"], layout="truncate")
    assert [(w.document, w.ids) for w in cutted] == [
        ("d0", [1, 97, 98, 99]),
        ("d2", [1, 120, 121]),
    ]
    assert [w.end.document for w in cutted] == [1, 3]


def test_the_last_window_is_cut_to_fit_and_loses_its_suffix() -> None:
    assert [w.ids for w in cut(["abc", "xyz"], ENCODER, n_tokens=6)][-1] == [1, 99]
    assert [w.ids for w in cut(["ab", "xyz"], ENCODER, n_tokens=7)][-1] == [1, 120, 121]
    assert [w.ids for w in cut(["abc", "xyz"], n_tokens=5)][-1] == [1]


def test_the_cursor_counts_documents_tokens_of_text_and_rows() -> None:
    assert [w.end for w in cut(["abcd", "", "xy"], n_tokens=8)] == [
        Cursor(0, 3, 4),
        Cursor(1, 0, 6),
        Cursor(2, 1, 8),
    ]


def test_mask_bits_follow_from_the_text() -> None:
    first, second = cut(["ab!cdef!"], context=6, first_k=3)
    assert [kinds(bits) for bits in first.mask] == [
        {"special", "bos", "first"},
        {"first"},
        {"first"},
        {"special"},
        set(),
        {"last"},
    ]
    assert [kinds(bits) for bits in second.mask] == [
        {"special", "bos", "first"},
        {"first"},
        {"first"},
        {"special", "last"},
    ]


def test_a_suffix_is_special_and_last_and_no_window_without_a_prefix_has_a_bos() -> None:
    (encoder,) = cut(["ab"], ENCODER, first_k=0)
    assert [kinds(bits) for bits in encoder.mask] == [
        {"special", "bos"},
        set(),
        set(),
        {"special", "last"},
    ]
    (bare,) = cut(["ab"], BARE, first_k=1)
    assert [kinds(bits) for bits in bare.mask] == [{"first"}, {"last"}]


# No deadline: the time that an example takes says how busy the machine is, nothing else.
properties = settings(max_examples=50, deadline=None)
texts_of_any_length = st.lists(st.text("ab!", max_size=12), max_size=9)


@properties
@given(
    texts_of_any_length,
    st.sampled_from([DECODER, ENCODER, BARE]),
    st.integers(3, 8),
    st.integers(1, 60),
    st.sampled_from(LAYOUTS[:2]),
)
def test_from_any_window_on_a_stream_is_the_rest_of_the_uninterrupted_one(
    texts: list[str], model: Letters, context: int, n_tokens: int, layout: Layout
) -> None:
    options: dict[str, Any] = {"context": context, "n_tokens": n_tokens, "layout": layout}
    whole = cut(texts, model, **options)
    for number, window in enumerate(whole):
        rest = documents(*texts)[window.end.document :]
        assert list(windows(rest, model, start=window.end, **options)) == whole[number + 1 :]


@properties
@given(texts_of_any_length, st.integers(1, 60), st.integers(2, 4), st.sampled_from(LAYOUTS[:2]))
def test_the_ranks_together_give_what_one_gives(
    texts: list[str], n_tokens: int, ranks: int, layout: Layout
) -> None:
    options: dict[str, Any] = {"n_tokens": n_tokens, "layout": layout}
    whole = cut(texts, **options)
    shares = [cut(texts, rank=rank, ranks=ranks, **options) for rank in range(ranks)]
    in_order = sorted((w for share in shares for w in share), key=lambda w: w.end.n_tokens)
    assert in_order == whole
    for rank, share in enumerate(shares):
        assert all(int(w.document[1:]) % ranks == rank for w in share)
        for number, window in enumerate(share):
            rest = documents(*texts)[window.end.document :]
            resumed = windows(
                rest, DECODER, context=4, start=window.end, rank=rank, ranks=ranks, **options
            )
            assert list(resumed) == share[number + 1 :]


@properties
@given(texts_of_any_length, st.integers(1, 60), st.sampled_from([DECODER, ENCODER, BARE]))
def test_rows_are_counted_up_to_the_limit_and_no_text_is_lost_before_it(
    texts: list[str], n_tokens: int, model: Letters
) -> None:
    given = cut(texts, model, n_tokens=n_tokens)
    everything = [i for w in cut(texts, model) for i in w.ids]
    counts = [len(w.ids) for w in given]
    assert sum(counts) == min(n_tokens, len(everything))
    assert [w.end.n_tokens for w in given] == [sum(counts[: i + 1]) for i in range(len(counts))]
    assert [i for w in given for i in w.ids] == everything[:n_tokens]


def test_documents_are_read_only_as_far_as_they_are_needed() -> None:
    read = 0

    def stream() -> Iterator[Document]:
        nonlocal read
        while True:
            read += 1
            yield Document(f"d{read}", "abc")

    assert len(list(windows(stream(), DECODER, context=4, n_tokens=256))) == 64
    assert read == 64  # tokenized at once


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kept_positions_in_order_are_the_rows_of_the_windows(layout: Layout) -> None:
    model = DECODER
    given = cut(["abcde", "", "x", "!", "yz", "abcdefgh"], layout=layout)
    made = list(batches(given, model, 2, context=4, layout=layout))
    rows = [i for w in given for i in w.ids]
    assert torch.cat([b.token[b.kept] for b in made]).tolist() == rows
    assert torch.cat([b.mask[b.kept] for b in made]).tolist() == [m for w in given for m in w.mask]
    assert torch.cat([b.position[b.kept] for b in made]).tolist() == [
        position for w in given for position in range(len(w.ids))
    ]
    assert [b.names[int(n)] for b in made for n in b.document[b.kept]] == [
        w.document for w in given for _ in w.ids
    ]
    assert made[-1].end == given[-1].end
    assert sum(b.n_rows for b in made) == len(rows)
    assert all(b.n_rows + b.n_padding == b.token.numel() and len(b.token) <= 2 for b in made)


def test_a_document_that_goes_on_in_the_next_batch_is_the_first_name_there() -> None:
    first, second = batches(cut(["ab", "cdefghi"]), DECODER, 2, context=4)
    assert (first.names, second.names) == (("d0", "d1"), ("d1",))


def test_packing_puts_windows_into_a_row_as_long_as_they_fit() -> None:
    given = cut(["ab", "c", "defg", "h"], context=8)
    (batch,) = batches(given, DECODER, 8, context=8, layout="pack")
    assert batch.position.tolist() == [
        [0, 1, 2, 0, 1, 0, 0],
        [0, 1, 2, 3, 4, 0, 1],
    ]
    assert batch.n_padding == 2
    assert set(batch.inputs) == {"input_ids", "position_ids"}


@properties
@given(texts_of_any_length, st.integers(1, 60), st.integers(1, 3), st.sampled_from(LAYOUTS))
def test_from_any_batch_on_the_batches_are_those_of_the_uninterrupted_stream(
    texts: list[str], n_tokens: int, batch_size: int, layout: Layout
) -> None:
    def stream(start: Cursor) -> list[TokenBatch]:
        rest = documents(*texts)[start.document :]
        some = windows(rest, DECODER, context=8, n_tokens=n_tokens, layout=layout, start=start)
        return list(batches(some, DECODER, batch_size, context=8, layout=layout))

    whole = stream(Cursor())
    for number, batch in enumerate(whole):
        resumed = stream(batch.end)
        assert len(resumed) == len(whole) - number - 1
        for ours, theirs in zip(resumed, whole[number + 1 :], strict=True):
            assert ours.token.equal(theirs.token)
            assert ours.position.equal(theirs.position)
            assert (ours.names, ours.end) == (theirs.names, theirs.end)


@properties
@given(texts_of_any_length, st.sampled_from(LAYOUTS))
def test_a_scored_position_has_its_next_token_in_the_same_window(
    texts: list[str], layout: Layout
) -> None:
    given = cut(texts, context=8, layout=layout)
    scored = 0
    for batch in batches(given, DECODER, 3, context=8, layout=layout):
        for row, column in batch.scored.nonzero().tolist():
            assert batch.kept[row, column + 1]
            assert batch.position[row, column + 1] == batch.position[row, column] + 1
            assert batch.document[row, column + 1] == batch.document[row, column]
        scored += int(batch.scored.sum())
    assert scored == sum(len(w.ids) - 1 for w in given)


def test_an_encoder_gets_a_mask_of_what_is_kept_and_a_decoder_needs_none() -> None:
    given = cut(["ab", "c"])
    (encoder,) = batches(given, ENCODER, 2, context=4)
    assert encoder.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    (decoder,) = batches(given, DECODER, 2, context=4)
    assert set(decoder.inputs) == {"input_ids"}


SHAPE: dict[str, Any] = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}
WIDE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    **SHAPE,
}
MODELS: dict[str, Any] = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_positions": 32, "n_embd": 16, "n_layer": 2} | SHAPE),
    "llama": (LlamaForCausalLM, LlamaConfig, WIDE),
    # Each layer looks back three tokens only: a mask that replaces the model's own would show.
    "mistral": (MistralForCausalLM, MistralConfig, WIDE | {"sliding_window": 3}),
}


@pytest.fixture
def real(tiny_lm: Path) -> Letters:
    """What a tokenizer on disk gives, rather than letters."""

    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)

    class Real(Letters):
        def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
            ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
            return ids

    return Real([0], [], special=frozenset({0}), tokenizer=tokenizer)


def run(
    architecture: str, attention: str, given: Sequence[TokenWindow], model: Letters, layout: Layout
) -> tuple[Tensor, Tensor, int]:
    """Hidden states at kept positions after every layer, the gradients of the scored positions'
    loss with respect to the embeddings, and the rows of all passes."""
    kind, config, shape = MODELS[architecture]
    heads = {"n_head": 2} if architecture == "gpt2" else {}
    torch.manual_seed(0)
    lm = kind(config(**shape, **heads, attn_implementation=attention)).eval()
    for parameter in lm.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    states, grads, rows = [], [], 0
    for batch in batches(given, model, 3, context=CONTEXT, layout=layout):
        inputs = dict(batch.inputs)
        embedded = lm.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
        out = lm(inputs_embeds=embedded, **inputs, use_cache=False, output_hidden_states=True)
        states.append(torch.stack([x[batch.kept] for x in out.hidden_states], 1))
        where = batch.scored[:, :-1]
        target = batch.token[:, 1:][where]
        assert not batch.scored[:, -1].any()
        loss = torch.nn.functional.cross_entropy(out.logits[:, :-1][where], target, reduction="sum")
        (grad,) = torch.autograd.grad(loss, embedded)
        grads.append(grad[batch.kept])
        rows += len(batch.token)
    return torch.cat(states).detach(), torch.cat(grads), rows


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", MODELS)
def test_packed_windows_give_the_activations_and_gradients_of_windows_alone(
    architecture: str, attention: str, real: Letters, texts: list[str]
) -> None:
    # A document of one token, and one of several windows, among the others.
    given = list(
        windows(
            documents("a", *texts[:14], texts[35] * 2, "a"), real, context=CONTEXT, n_tokens=ALL
        )
    )
    alone = run(architecture, attention, given, real, "windows")
    packed = run(architecture, attention, given, real, "pack")
    torch.testing.assert_close(packed[0], alone[0], atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(packed[1], alone[1], atol=TOLERANCE, rtol=TOLERANCE)
    assert packed[2] < alone[2]


def test_packing_an_encoder_is_refused() -> None:
    with pytest.raises(ConfigError, match="'pack' needs a causal model"):
        cut(["ab"], ENCODER, layout="pack")
    with pytest.raises(ConfigError, match="'pack' needs a causal model"):
        list(batches(cut(["ab"]), ENCODER, 2, context=4, layout="pack"))


def test_a_context_without_room_for_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="context=2 must be at least 3"):
        cut(["ab"], ENCODER, context=2)
