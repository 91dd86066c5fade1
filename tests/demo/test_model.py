"""The embedded model as it is shipped: it loads by path, and it can do what its card says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from saekit.demo import MODEL_DIR
from saekit.demo._model_card import render
from saekit.demo.eval_model import LanguageModel, task_metrics
from saekit.demo.tasks import ARGUMENTS, NAMES, TASKS, Task, sentences

MOST_BYTES = 20_000_000


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel(MODEL_DIR)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def test_the_weights_are_small_and_load_as_float32() -> None:
    assert (MODEL_DIR / "model.safetensors").stat().st_size < MOST_BYTES
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    assert model.dtype == torch.float32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_transformer_lens_gives_the_logits_of_transformers(lm: LanguageModel) -> None:
    bridges = pytest.importorskip("transformer_lens.model_bridge")
    bridge = bridges.TransformerBridge.boot_transformers(str(MODEL_DIR), device="cpu")
    ids = torch.tensor([[lm.bos, *lm.encode("Then, Kate and Hugh went to the garden.")]])
    with torch.no_grad():
        ours, theirs = lm.model(ids.to(lm.device)).logits.cpu(), bridge(ids)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\t\treturn  x\r\n",
        "  two spaces,\u00a0none that breaks, and a tab\tat the end\t",
        "na\u00efve \u6f22\u5b57 \U0001f600 \u0000",
        "in 1732 there were 1,048,576 of them",
        "a <bos> that is text",
    ],
)
def test_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, split_special_tokens=True)["input_ids"]) == text


def test_the_tokenizer_adds_nothing_and_knows_one_special_token(tokenizer: Any) -> None:
    assert tokenizer("")["input_ids"] == []
    assert tokenizer("<bos>")["input_ids"] == [0]
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} == {0}


def test_a_digit_is_a_token_and_so_is_a_name(lm: LanguageModel) -> None:
    assert len(lm.encode("1732")) == 4
    for pool in (NAMES, ARGUMENTS):
        for word in pool["train"] + pool["test"]:
            assert len(lm.encode(f" {word}")) == 1


def test_the_prompt_is_tokenized_alike_with_and_without_its_answer(lm: LanguageModel) -> None:
    for task in TASKS:
        for s in sentences(task, 50, 0, "test"):
            assert lm.encode(s.prompt) + lm.encode(s.answer) == lm.encode(s.prompt + s.answer)


def test_ids_stand_for_as_many_bytes_as_the_text_has(lm: LanguageModel) -> None:
    text = "na\u00efve \u6f22\u5b57\n"
    assert lm.n_bytes(lm.encode(text)) == len(text.encode())


@pytest.mark.parametrize("task", TASKS)
def test_held_out_tasks_come_out_as_the_card_says(lm: LanguageModel, task: Task) -> None:
    """On the first 200 of the sentences that the card counts, so within sampling error of it."""
    card = json.loads((MODEL_DIR / "metrics.json").read_text())["tasks"][task]["share_preferred"]
    error = (card * (1 - card) / 200) ** 0.5
    assert abs(task_metrics(lm, task, 200)["share_preferred"] - card) < 4 * error + 1 / 200
    assert card > 0.8


def test_the_indirect_object_is_preferred_in_held_out_sentences(lm: LanguageModel) -> None:
    assert task_metrics(lm, "ioi", 200)["share_preferred"] >= 0.95


def test_the_card_is_what_the_metrics_make() -> None:
    metrics = json.loads(Path(MODEL_DIR, "metrics.json").read_text())
    assert Path(MODEL_DIR, "README.md").read_text() == render(metrics)
