"""What a model is trained on: disturbed templates and exchanged names."""

import random
from dataclasses import replace

import torch
from tokenizers import Tokenizer

from saekit.demo import MODEL_DIR
from saekit.demo._text import disturbed
from saekit.demo._tokenizer import BOS_ID, name_ids, pack, word_ids
from saekit.demo.tasks import NAMES, sentences
from saekit.demo.train_model import CONTEXT, Windows


def test_a_disturbed_sentence_keeps_its_names_and_its_answer() -> None:
    rng = random.Random(0)
    for s in sentences("ioi", 300, 0, "train"):
        text = disturbed(s, rng, ["under", "green"])
        names = {s.labels["io"], s.labels["subject"]}
        assert [w for w in text.rstrip(".").split() if w in names] == [
            w for w in s.text.rstrip(".").split() if w in names
        ]
        assert text.split()[0] == s.text.split()[0]
        assert text.split()[-2:] == s.text.split()[-2:]


def test_no_test_name_is_exchanged_or_put_in() -> None:
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    capitalised, others = word_ids(tokenizer)
    held_out = {tokenizer.token_to_id(f"\u0120{name}") for name in NAMES["test"]}
    assert not held_out & {*capitalised, *others, *name_ids(tokenizer)}
    assert {*name_ids(tokenizer)} <= {*capitalised}


def test_names_are_exchanged_alike_within_a_window_and_nothing_else_is() -> None:
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    ids = torch.from_numpy(pack(tokenizer, [s.text for s in sentences("ioi", 100, 0, "train")]))
    windows = Windows.of(
        torch.zeros(2 * CONTEXT, dtype=torch.int32), ids, tokenizer, torch.device("cpu")
    )
    names = set(name_ids(tokenizer))
    row = torch.cat([torch.tensor(sorted(names)), torch.tensor([BOS_ID, 300])])
    exchanged = windows._exchanged(row.repeat(4, 1))
    for words in exchanged.tolist():
        assert words[-2:] == [BOS_ID, 300]
        assert len(set(words[:-2])) == len(names)
    assert {*exchanged[0, :-2].tolist()} <= {*word_ids(tokenizer)[0]}


def test_the_loss_counts_for_more_where_a_sentence_ends_in_a_name() -> None:
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    made = sentences("ioi", 100, 0, "train")
    ids = torch.from_numpy(pack(tokenizer, [s.text for s in made]))
    windows = Windows.of(
        torch.zeros(2 * CONTEXT, dtype=torch.int32), ids, tokenizer, torch.device("cpu")
    )
    unchanged = replace(windows, words=windows.names)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rows, answers = unchanged.tasks(20)
    full_stop = tokenizer.token_to_id(".")
    assert answers.any()
    for row, answer in zip(rows.tolist(), answers.tolist(), strict=True):
        for position, counts in enumerate(answer[:-1]):
            follows = row[position + 1] in windows.names and row[position + 2] == full_stop
            assert counts == follows
