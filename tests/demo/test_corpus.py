"""The offline corpus: the same on every call, with nothing twice."""

import random
from itertools import islice

import pytest

from saekit.demo import corpus
from saekit.demo.tasks import NAMES, Split
from saekit.documents import Document, held_out

N = 300
"""A prefix that holds three blocks of sentences, and takes under a second."""


@pytest.fixture(scope="module")
def prefix() -> list[Document]:
    return list(islice(corpus.documents(), N))


def test_two_readings_are_equal_whatever_the_global_seed(prefix: list[Document]) -> None:
    random.seed(123)
    assert list(islice(corpus.documents(), N)) == prefix


def test_no_document_comes_twice(prefix: list[Document]) -> None:
    assert len({d.id for d in prefix}) == N
    assert len({d.text for d in prefix}) == N


def test_a_block_of_sentences_follows_every_twelve_modules(prefix: list[Document]) -> None:
    kinds = [d.id.split("/")[0] for d in prefix]
    assert kinds == (["stdlib"] * 12 + ["tasks"] * 64) * 3 + ["stdlib"] * 12 + ["tasks"] * 60


def test_tests_and_installed_packages_are_left_out() -> None:
    names = [d.id for d in corpus.modules()]
    assert "stdlib/json/decoder.py" in names
    assert not [n for n in names if "/test/" in n or "/tests/" in n or "-packages/" in n]


def test_a_sentence_is_of_the_test_split_where_its_document_is_held_out() -> None:
    sentences = [d for d in corpus.documents() if d.id.startswith("tasks/ioi/")]
    assert len(sentences) > 200
    for document in sentences:
        part: Split = "test" if held_out(document.id, corpus.HELD_OUT) else "train"
        assert document.text.rstrip(".").split()[-1] in NAMES[part]
