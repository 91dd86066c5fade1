"""The embedded model's tokenizer: byte-level BPE, single digits, one special token `<bos>`.

Every digit is a token, so that a year has the same shape in each task sentence. Names and
arguments of the tasks are counted in when merges are chosen, so that each tends to be one token.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from saekit.demo.tasks import ARGUMENTS, NAMES

BOS = "<bos>"
BOS_ID = 0

# GPT-2's pattern, but for `\p{N}`, which has no `+`: a digit stands alone.
_WORDS = Regex(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
)
_TASK_WORD_REPEATS = 500
_CHUNK_CHARS = 100_000
_CHUNKS_AT_ONCE = 512


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn the merges. The task words come first, `_TASK_WORD_REPEATS` times over."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()

    def sample() -> Iterator[str]:
        words = [word for pool in (NAMES, ARGUMENTS) for part in pool.values() for word in part]
        yield from [" " + " ".join(words)] * _TASK_WORD_REPEATS
        yield from texts

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(), trainer)
    return _with_special_tokens_as_text(tokenizer)


def pack(tokenizer: Tokenizer, texts: Iterable[str]) -> NDArray[np.int32]:
    """One stream of ids: `<bos>` before each text, nothing else between them."""
    chunks: list[str] = []
    opens: list[bool] = []
    for text in texts:
        for start in range(0, len(text), _CHUNK_CHARS):
            chunks.append(text[start : start + _CHUNK_CHARS])
            opens.append(start == 0)
    ids: list[NDArray[np.int32]] = []
    for first in range(0, len(chunks), _CHUNKS_AT_ONCE):
        part = slice(first, first + _CHUNKS_AT_ONCE)
        for encoding, is_open in zip(
            tokenizer.encode_batch_fast(chunks[part]), opens[part], strict=True
        ):
            ids.append(np.array([BOS_ID] * is_open + encoding.ids, dtype=np.int32))
    return np.concatenate(ids)


def name_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of the train names, each after a space."""
    ids = [tokenizer.encode(f" {name}").ids for name in NAMES["train"]]
    return [i for (i,) in ids]


def word_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokens that are a space and letters, no test name: the capitalised ones, and the others."""
    test_names = {f"\u0120{name}" for name in NAMES["test"]}  # a byte-level space is U+0120
    vocab = {word: i for word, i in tokenizer.get_vocab().items() if word not in test_names}
    capitalised = [i for word, i in vocab.items() if re.fullmatch("\u0120[A-Z][a-z]{2,}", word)]
    others = [i for word, i in vocab.items() if re.fullmatch("\u0120[a-z]{3,}", word)]
    return sorted(capitalised), sorted(others)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    The class is named, because transformers would otherwise choose GPT-2's for a GPT-2 model, which
    puts its own rule for digits in place of ours.
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": BOS,
        "pad_token": BOS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _with_special_tokens_as_text(tokenizer: Tokenizer) -> Tokenizer:
    # "<bos>" written in a source file is text, not the start of a document. tokenizer.json has no
    # field for it, so that it is set anew after each reading.
    tokenizer.encode_special_tokens = True
    return tokenizer
