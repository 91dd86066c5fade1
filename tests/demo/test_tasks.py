"""The task sentences: what their labels say, and what the test split must not share."""

from itertools import islice

import pytest

from saekit.demo import tasks
from saekit.demo.tasks import TASKS, Split, Task, TaskSentence, sentences, stream

SPLITS: tuple[Split, ...] = ("train", "test")


def labelled(task: Task, label: str, split: Split) -> set[str]:
    return {s.labels[label] for s in sentences(task, 400, 0, split)}


@pytest.fixture(params=TASKS)
def any_task(request: pytest.FixtureRequest) -> Task:
    task: Task = request.param
    return task


@pytest.fixture(params=SPLITS)
def any_split(request: pytest.FixtureRequest) -> Split:
    split: Split = request.param
    return split


def test_the_text_opens_with_prompt_and_answer(any_task: Task, any_split: Split) -> None:
    for s in sentences(any_task, 200, 0, any_split):
        assert s.text.startswith(s.prompt + s.answer)
        assert s.answer != s.distractor


def test_a_seed_gives_one_order_of_sentences(any_task: Task, any_split: Split) -> None:
    first = sentences(any_task, 100, 5, any_split)
    assert sentences(any_task, 40, 5, any_split) == first[:40]
    assert sentences(any_task, 100, 6, any_split) != first


def test_no_sentence_comes_twice(any_task: Task, any_split: Split) -> None:
    assert len({s.text for s in sentences(any_task, 2000, 0, any_split)}) == 2000


def test_no_text_is_in_both_splits(any_task: Task) -> None:
    train, test = ({s.text for s in sentences(any_task, 2000, 0, split)} for split in SPLITS)
    assert not train & test


def test_templates_of_the_splits_are_disjoint() -> None:
    pools: tuple[dict[Split, tuple[object, ...]], ...] = (
        dict(tasks.FRAMES),
        dict(tasks.DEEDS),
        dict(tasks.GIFTS),
        dict(tasks.YEAR_TEMPLATES),
        dict(tasks.DOCSTRING_TEMPLATES),
    )
    for pool in pools:
        assert not set(pool["train"]) & set(pool["test"])


def test_words_of_the_splits_are_disjoint() -> None:
    for pool in (tasks.NAMES, tasks.NOUNS, tasks.ARGUMENTS, tasks.VERBS):
        words = pool["train"] + pool["test"]
        assert len(set(words)) == len(words)


@pytest.mark.parametrize(
    ("task", "label"),
    [
        ("ioi", "io"),
        ("ioi", "subject"),
        ("ioi", "template"),
        ("greater_than", "noun"),
        ("greater_than", "template"),
        ("docstring", "argument"),
        ("docstring", "template"),
    ],
)
def test_sentences_of_the_splits_share_no_label(task: Task, label: str) -> None:
    assert not labelled(task, label, "train") & labelled(task, label, "test")


def test_no_sentence_opens_with_a_name(any_split: Split) -> None:
    for s in sentences("ioi", 400, 0, any_split):
        assert s.prompt.split()[0] not in {s.labels["io"], s.labels["subject"]}


def test_the_indirect_object_is_named_once_and_the_subject_twice(any_split: Split) -> None:
    for s in sentences("ioi", 300, 0, any_split):
        words = s.prompt.replace(",", " ").replace(".", " ").replace(";", " ").split()
        io, subject = s.labels["io"], s.labels["subject"]
        assert (words.count(io), words.count(subject)) == (1, 2)
        assert (s.answer, s.distractor) == (f" {io}", f" {subject}")
        io_is_first = words.index(io) < words.index(subject)
        assert s.labels["order"] == ("ABB" if io_is_first else "BAB")


def test_the_answer_is_a_greater_year_and_the_distractor_is_not(any_split: Split) -> None:
    for s in sentences("greater_than", 300, 0, any_split):
        assert s.labels["century"] + s.labels["start"] in s.prompt
        assert s.prompt.endswith(s.labels["century"])
        assert s.answer == s.labels["end"]
        assert len(s.answer) == len(s.distractor) == 2
        assert int(s.distractor) <= int(s.labels["start"]) < int(s.answer)


def test_the_years_that_begin_a_span_are_split() -> None:
    for split in SPLITS:
        for s in sentences("greater_than", 300, 0, split):
            start = int(s.labels["century"] + s.labels["start"])
            assert tasks.is_test_year(start) == (split == "test")


def test_the_next_argument_of_the_signature_is_the_answer(any_split: Split) -> None:
    for s in sentences("docstring", 300, 0, any_split):
        arguments = s.labels["arguments"].split()
        position = int(s.labels["position"])
        assert ", ".join(arguments) in s.prompt
        assert s.answer.strip() == arguments[position] == s.labels["argument"]
        assert s.distractor.strip() in arguments
        described = s.prompt.split('"""')[1]
        assert [a for a in arguments if f" {a}:" in described] == arguments[:position]


def test_words_stand_in_for_the_names_of_the_split() -> None:
    words = ("Ada", "Bea", "Cid")
    found: list[TaskSentence] = list(islice(stream("ioi", 0, "train", words), 50))
    assert {s.labels["io"] for s in found} == set(words)
