"""The recipe of the embedded model: `python -m saekit.demo.train_model --books DIR --out DIR`.

A GPT-2 of 5.3 M parameters learns books, Python source and task sentences for some minutes.
Each window is `<bos>` and what follows, because that is how activations are harvested from it.
"""

import json
import logging
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from saekit.demo import _text
from saekit.demo._tokenizer import (
    BOS_ID,
    name_ids,
    pack,
    save_tokenizer,
    train_tokenizer,
    word_ids,
)
from saekit.documents import Document

log = logging.getLogger(__name__)

CONTEXT = 256
TASK_CONTEXT = 128
"""Length of a window of task sentences: shorter, so that more of them begin one, as they will when
the model is asked."""
MODEL = GPT2Config(
    vocab_size=8192,
    n_positions=CONTEXT,
    n_embd=256,
    n_layer=4,
    n_head=8,
    # The same function as the default "gelu_new", in one operator: much faster on a CPU.
    activation_function="gelu_pytorch_tanh",
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=BOS_ID,
    eos_token_id=BOS_ID,
)

_ROWS_WITH_THE_SAME_WORDS = 8


@dataclass(frozen=True, kw_only=True)
class Recipe:
    books: Path
    """Folder with the books' `train.jsonl.xz`."""
    out: Path
    """Folder to write the model to."""
    minutes: float = 7.0
    """Time to train for, without the preparation of the text."""
    megabytes: float = 90.0
    """Most text to take of the books, and again of the Python source."""
    n_sentences: int = 600_000
    """Task sentences to make."""
    task_share: float = 0.12
    """Share of the tokens that are of task sentences."""
    answer_weight: float = 1.0
    """What the loss at the name that ends a sentence counts beside the mean loss of all tokens. A
    name is one token of thirty, and most of the others cannot be foreseen."""
    batch_size: int = 256
    """Windows a step, one of text counting as two of task sentences."""
    lr: float = 2e-3
    """Peak learning rate: it is reached after `warmup` steps and falls to 0 by a cosine in time."""
    warmup: int = 300
    weight_decay: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Windows:
    """Where training windows come from: text from any offset, tasks from a sentence's start.

    Names that stand in few sentences can be learned by heart, and then the rule is not (docs/log.md
    has the figures). So in each window of task sentences the train names are exchanged for words
    drawn anew: for capitalised words in every second window, for any words in the others.
    """

    ids: Int[Tensor, " row"]
    n_text: int
    """The first ids, up to here, are books and source; the rest are task sentences."""
    starts: Int[Tensor, " sentence"]
    names: Int[Tensor, " name"]
    """Ids of the names that are exchanged."""
    words: Int[Tensor, " word"]
    """Ids they are exchanged for, the capitalised ones first."""
    n_capitalised: int
    full_stop: int
    """Its id."""

    @classmethod
    def of(
        cls,
        text: Int[Tensor, " text"],
        tasks: Int[Tensor, " task"],
        tokenizer: Tokenizer,
        device: torch.device,
    ) -> "Windows":
        starts = (tasks[: -CONTEXT - 1] == BOS_ID).nonzero().flatten() + len(text)
        capitalised, others = word_ids(tokenizer)
        return cls(
            ids=torch.cat([text, tasks]).to(device),
            n_text=len(text),
            starts=starts.to(device),
            names=torch.tensor(name_ids(tokenizer), device=device),
            words=torch.tensor(capitalised + others, device=device),
            n_capitalised=len(capitalised),
            full_stop=int(tokenizer.encode(".").ids[0]),
        )

    def text(self, n: int) -> Int[Tensor, "batch pos_plus_1"]:
        """Rows of `<bos>` and text."""
        starts = torch.randint(self.n_text - CONTEXT, (n,), device=self.ids.device)
        return self._rows(starts, CONTEXT)

    def tasks(self, n: int) -> tuple[Int[Tensor, "batch pos_plus_1"], Bool[Tensor, "batch pos"]]:
        """Rows of `<bos>` and task sentences, and where the token to foresee is a sentence's last
        name."""
        choice = torch.randint(len(self.starts), (n,), device=self.ids.device)
        window = self._rows(self.starts[choice], TASK_CONTEXT)
        ends = torch.isin(window[:, 1:-1], self.names) & (window[:, 2:] == self.full_stop)
        return self._exchanged(window), nn.functional.pad(ends, (0, 1))

    def _rows(self, starts: Int[Tensor, " batch"], length: int) -> Int[Tensor, "batch pos_plus_1"]:
        rows = self.ids[starts[:, None] + torch.arange(length + 1, device=starts.device)].long()
        rows[:, 0] = BOS_ID
        return rows

    def _exchanged(self, window: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
        """Each row with other words for its names, and no word for two names.

        Some rows share their words, because drawing them is slow.
        """
        device, n = window.device, -(-len(window) // _ROWS_WITH_THE_SAME_WORDS)
        draws = torch.rand(n, len(self.words), device=device)
        draws[::2, self.n_capitalised :] = -1
        table = torch.arange(MODEL.vocab_size, device=device).repeat(n, 1)
        table[:, self.names] = self.words[draws.topk(len(self.names)).indices]
        own = torch.arange(len(window), device=device) % n
        return table[own].gather(1, window)


def main(recipe: Recipe) -> None:
    """Read the text, train the tokenizer and the model, and write both with the run's figures."""
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    max_chars = int(recipe.megabytes * 1e6)
    by_author = _text.books(recipe.books, "train")
    books = list(_text.first_chars((b for own in by_author.values() for b in own), max_chars))
    source = _text.python_source(max_chars)
    recall = _text.name_recall(recipe.n_sentences // 4)
    sentences = _text.training_sentences(recipe.n_sentences, books, source) + recall
    random.Random(recipe.seed).shuffle(sentences)
    log.info("%.0f s: %d books, %d files", time.monotonic() - started, len(books), len(source))

    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(_tokenizer_sample(books, source, sentences), MODEL.vocab_size)
    model = GPT2LMHeadModel(MODEL)
    recipe.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, recipe.out)
    text_ids = torch.from_numpy(pack(tokenizer, (d.text for d in books + source)))
    task_ids = torch.from_numpy(pack(tokenizer, sentences))
    windows = Windows.of(text_ids, task_ids, tokenizer, device)
    log.info("%.0f s: %.1f M tokens", time.monotonic() - started, len(windows.ids) / 1e6)

    figures = train(model, windows, recipe)
    save_model(model, recipe.out)
    figures |= {
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "text_tokens": len(text_ids),
        "task_tokens": len(task_ids),
        "book_megabytes": _megabytes(books),
        "source_megabytes": _megabytes(source),
        "n_books": len(books),
        "n_authors": len({b.id.split("/")[1] for b in books}),
        "n_source_files": len(source),
        "n_sentences": len(sentences),
        "n_recall_sentences": len(recall),
        "n_names": len(windows.words),
        "task_share": recipe.task_share,
        "answer_weight": recipe.answer_weight,
        "lr": recipe.lr,
        "batch_size": recipe.batch_size,
        "context": CONTEXT,
        "seed": recipe.seed,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "packages": _text.distributions(source),
    }
    metrics = json.dumps({"training": figures}, indent=2)
    (recipe.out / "metrics.json").write_text(metrics + "\n")
    log.info("%.0f s: the model is in %s", time.monotonic() - started, recipe.out)


def train(model: nn.Module, windows: Windows, recipe: Recipe) -> dict[str, Any]:
    """Steps until the time is over. Returns how many, and the last loss.

    The token embedding learns from text alone. Otherwise words that stand in task sentences get
    features that the rules lean on and that no test name has.
    """
    device = windows.ids.device
    model.to(device)
    forward = torch.compile(_loss, dynamic=False) if device.type == "cuda" else _loss
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)
    share = recipe.task_share
    n_text = round((1 - share) * recipe.batch_size)
    n_tasks = (recipe.batch_size - n_text) * (CONTEXT // TASK_CONTEXT)
    embedding = model.get_parameter("transformer.wte.weight")
    model.train()
    step, loss = 0, torch.zeros(())
    for step, done in enumerate(_clock(60 * recipe.minutes)):
        warm = min(1.0, (step + 1) / recipe.warmup)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * done))
        rows, answers = windows.tasks(n_tasks)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            each = forward(model, rows)
            at_answers = (each * answers).sum() / answers.sum()
            task_loss = share * (each.mean() + recipe.answer_weight * at_answers)
        task_loss.backward()
        embedding.grad = None
        with torch.autocast(device.type, dtype=torch.bfloat16):
            text_loss = (1 - share) * forward(model, windows.text(n_text)).mean()
        text_loss.backward()
        loss = task_loss.detach() + text_loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            # Reading the loss waits for the device, so that the clock below tells the truth.
            value = loss.item()
            if step % 500 == 0:
                log.info("%.0f %%: step %d, loss %.3f", 100 * done, step, value)
    tokens = (step + 1) * recipe.batch_size * CONTEXT
    return {
        "minutes": recipe.minutes,
        "steps": step + 1,
        "tokens_seen": tokens,
        "last_loss": loss.item(),
    }


def save_model(model: GPT2LMHeadModel, folder: Path) -> None:
    """Write config.json and half-precision weights, without the copy of the tied embedding.

    The config says float32, for that is what the weights are to be computed in: loaders widen them.
    """
    state = model.state_dict()
    del state["lm_head.weight"]
    half = {name: tensor.to("cpu", torch.float16).contiguous() for name, tensor in state.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string())
    config |= {"architectures": ["GPT2LMHeadModel"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _loss(model: nn.Module, rows: Int[Tensor, "batch pos_plus_1"]) -> Float[Tensor, "batch pos"]:
    logits = model(rows[:, :-1], use_cache=False).logits
    target = rows[:, 1:]
    loss = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), target.flatten(), reduction="none"
    )
    return loss.view_as(target)


def _clock(seconds: float) -> Iterator[float]:
    """The share of the time that has passed, until it is all gone.

    The first step, which may compile the model, is outside the time.
    """
    yield 0.0
    started = time.monotonic()
    while (done := (time.monotonic() - started) / seconds) < 1:
        yield done


def _tokenizer_sample(
    books: list[Document], source: list[Document], sentences: list[str]
) -> Iterator[str]:
    """A tenth of every book, every tenth source file, and some task sentences."""
    for book in books:
        yield from (book.text[i : i + 20_000] for i in range(0, len(book.text), 200_000))
    yield from (d.text for d in source[::10])
    yield from sentences[:10_000]


def _megabytes(documents: list[Document]) -> float:
    return sum(len(d.text.encode()) for d in documents) / 1e6


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(tyro.cli(Recipe, description=__doc__))
