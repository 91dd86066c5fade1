"""Held-out figures: `python -m saekit.demo.eval_model --model DIR --books DIR`.

Text is cut into windows of `<bos>` and up to 255 tokens of one document, which do not overlap;
every token after `<bos>` is scored. Writes `metrics.json` and the model card `README.md` into the
model's folder.
"""

import json
import logging
import math
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from saekit.demo import _text
from saekit.demo._model_card import render
from saekit.demo.tasks import TASKS, Task, TaskSentence, sentences
from saekit.documents import Document

log = logging.getLogger(__name__)

_IGNORED = -100  # the target at a position that is not scored
_BATCH = 64
_SEED = 2


@dataclass(frozen=True, kw_only=True)
class EvalFlags:
    model: Path
    """The model's folder: it is read, and the figures are written there."""
    books: Path
    """Folder with the books' `test.jsonl.xz`."""
    max_tokens: int | None = None
    """Most tokens to score of each author, and of the code."""
    n_sentences: int = 2000
    """Held-out sentences of each task."""


class LanguageModel:
    """A model and its tokenizer, read from a folder, for scoring text."""

    def __init__(self, folder: Path) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
        self.model = model.eval().to(self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.bos = int(self.tokenizer.bos_token_id)
        self.context = int(self.model.config.n_positions)

    def encode(self, text: str) -> list[int]:
        """Ids without `<bos>`; a "<bos>" written in the text stays text."""
        ids: list[int] = self.tokenizer(text, split_special_tokens=True)["input_ids"]
        return ids

    def n_bytes(self, ids: Iterable[int]) -> int:
        """Bytes of text that the ids stand for: a byte-level token has one letter a byte."""
        return sum(len(token) for token in self.tokenizer.convert_ids_to_tokens(list(ids)))

    @torch.no_grad()
    def log_probs(self, rows: list[list[int]]) -> Float[Tensor, "batch pos vocab"]:
        """Next-token log-probabilities after `<bos>` and each row; rows are padded at the end."""
        logits: Tensor = self.model(self._inputs(rows)).logits
        return logits.float().log_softmax(-1)

    def scores(self, rows: list[list[int]]) -> Float[Tensor, "batch pos"]:
        """The log-probability of each token of each row, 0 beyond the row's end."""
        targets = self._padded(rows, _IGNORED)
        losses = nn.functional.cross_entropy(
            self.log_probs([row[:-1] for row in rows]).transpose(1, 2),
            targets,
            ignore_index=_IGNORED,
            reduction="none",
        )
        return -losses

    def _inputs(self, rows: list[list[int]]) -> Int[Tensor, "batch pos"]:
        return self._padded([[self.bos, *row] for row in rows], self.bos)

    def _padded(self, rows: list[list[int]], filler: int) -> Int[Tensor, "batch pos"]:
        width = max(map(len, rows))
        filled = [row + [filler] * (width - len(row)) for row in rows]
        return torch.tensor(filled, device=self.device)


def main(flags: EvalFlags) -> None:
    """Measure text and tasks, keep the training run's figures, write metrics.json and the card."""
    lm = LanguageModel(flags.model)
    path = flags.model / "metrics.json"
    metrics: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    metrics["python"] = platform.python_version()
    metrics["text"] = text_metrics(lm, flags.books, flags.max_tokens)
    metrics["tasks"] = {task: task_metrics(lm, task, flags.n_sentences) for task in TASKS}
    path.write_text(json.dumps(metrics, indent=2) + "\n")
    (flags.model / "README.md").write_text(render(metrics))
    log.info("%s", json.dumps({"text": metrics["text"], "tasks": metrics["tasks"]}, indent=2))


def text_metrics(lm: LanguageModel, books: Path, max_tokens: int | None) -> dict[str, Any]:
    """Figures for each author of the books' test part, for all of them together, and for code."""
    by_author = {
        f"books, {author}": _totals(lm, own, max_tokens)
        for author, own in _text.books(books, "test").items()
    }
    sums = [sum(column) for column in zip(*by_author.values(), strict=True)]
    totals = {"books": sums, **by_author, "code": _totals(lm, _text.held_out_modules(), max_tokens)}
    return {
        name: {
            "bits_per_byte": nats / math.log(2) / n_bytes,
            "nats_per_token": nats / n_tokens,
            "n_tokens": int(n_tokens),
            "n_bytes": int(n_bytes),
        }
        for name, (nats, n_tokens, n_bytes) in totals.items()
    }


def task_metrics(lm: LanguageModel, task: Task, n: int) -> dict[str, Any]:
    """How often the right continuation is preferred, and by how much on the mean.

    For `greater_than` all greater years stand against all others; elsewhere it is one answer
    against one distractor, by the summed log-probability of their tokens.
    """
    held_out = sentences(task, n, _SEED, "test")
    margins = torch.cat(
        [
            _year_margins(lm, held_out[first : first + _BATCH])
            if task == "greater_than"
            else _answer_margins(lm, held_out[first : first + _BATCH])
            for first in range(0, n, _BATCH)
        ]
    )
    return {
        "share_preferred": (margins > 0).double().mean().item(),
        "mean_log_ratio": margins.double().mean().item(),
        "n": n,
    }


def _totals(
    lm: LanguageModel, documents: Iterable[Document], max_tokens: int | None
) -> tuple[float, int, int]:
    """Summed nats, number of tokens, number of bytes."""
    length = lm.context - 1
    windows = [
        ids[first : first + length]
        for document in documents
        for ids in [lm.encode(document.text)]
        for first in range(0, len(ids), length)
    ]
    if max_tokens is not None:
        windows = windows[: max(1, max_tokens // length)]
    nats = 0.0
    for first in range(0, len(windows), _BATCH):
        nats -= lm.scores(windows[first : first + _BATCH]).double().sum().item()
    return nats, sum(map(len, windows)), sum(map(lm.n_bytes, windows))


def _answer_margins(lm: LanguageModel, batch: list[TaskSentence]) -> Float[Tensor, " batch"]:
    """log p(answer) - log p(distractor) after the prompt."""
    prompts = [lm.encode(s.prompt) for s in batch]

    def total(continuations: list[str]) -> Float[Tensor, " batch"]:
        rows = [p + lm.encode(c) for p, c in zip(prompts, continuations, strict=True)]
        scores = lm.scores(rows)
        return torch.stack([s[len(p) :].sum() for s, p in zip(scores, prompts, strict=True)])

    return total([s.answer for s in batch]) - total([s.distractor for s in batch])


def _year_margins(lm: LanguageModel, batch: list[TaskSentence]) -> Float[Tensor, " batch"]:
    """log p(a greater year) - log p(another), for two digits after the century.

    A year is greater if its first digit is, or if that is the start's and the second is greater; so
    one pass over the prompt with the start's first digit gives both probabilities.
    """
    digits = [lm.encode(str(d))[0] for d in range(10)]
    prompts = [lm.encode(s.prompt) for s in batch]
    starts = [tuple(map(int, s.labels["start"])) for s in batch]
    log_probs = lm.log_probs([p + [digits[d]] for p, (d, _) in zip(prompts, starts, strict=True)])
    margins = []
    for row, prompt, (first, second) in zip(log_probs, prompts, starts, strict=True):
        p_first, p_second = row[len(prompt) : len(prompt) + 2, digits].exp()
        greater = p_first[first + 1 :].sum() + p_first[first] * p_second[second + 1 :].sum()
        other = p_first[:first].sum() + p_first[first] * p_second[: second + 1].sum()
        margins.append(greater.log() - other.log())
    return torch.stack(margins)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(tyro.cli(EvalFlags, description=__doc__))
