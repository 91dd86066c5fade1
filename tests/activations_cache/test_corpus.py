import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from saekit.activations_cache.corpus import documents
from saekit.documents import Document
from saekit.errors import ConfigError, CorpusError

TEXTS = ["one", "two\nlines", "três"]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"texts.{kind}"
    rows = [{"text": text} for text in TEXTS]
    match kind:
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "json":
            path.write_text(json.dumps(TEXTS))
        case "parquet":
            datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_files_of_rows_are_read_in_order(kind: str, tmp_path: Path) -> None:
    read = list(documents(str(write(tmp_path, kind))))
    assert [document.text for document in read] == TEXTS
    assert [document.id for document in read] == [f"texts.{kind}/{i}" for i in range(3)]


def fill(folder: Path, name: str, texts: list[str]) -> None:
    """A table of texts, of the kind that the name ends in."""
    folder.mkdir(exist_ok=True)
    if name.endswith(".parquet"):
        datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / name)
    else:
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(params=["texts", "jsonl", "json", "parquet", "tables", "saved", "splits"])
def any_corpus(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The three texts in every form that they can come in."""
    folder = tmp_path / "corpus"
    match request.param:
        case "texts":
            folder.mkdir()
            for number, text in enumerate(TEXTS):
                (folder / f"{number}.txt").write_text(text)
        case "tables":
            fill(folder, "train-00001.parquet", TEXTS[2:])
            fill(folder, "train-00000.parquet", TEXTS[:2])
        case "saved":
            datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder)
        case "splits":
            table = datasets.Dataset.from_dict({"text": TEXTS})
            datasets.DatasetDict({"train": table}).save_to_disk(folder)
        case kind:
            return str(write(tmp_path, kind))
    return str(folder)


def test_skipping_gives_the_rest_of_any_corpus(any_corpus: str) -> None:
    whole = list(documents(any_corpus))
    assert [document.text for document in whole] == TEXTS
    for skip in range(5):
        assert list(documents(any_corpus, skip=skip)) == whole[skip:]


def test_skipping_passes_over_documents_of_the_demo_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [Document(str(number), "x") for number in range(3)]
    monkeypatch.setattr("saekit.demo.corpus.documents", lambda: iter(some))
    assert list(documents("demo", skip=1)) == some[1:]


def test_names_do_not_depend_on_where_a_corpus_lies(any_corpus: str, tmp_path: Path) -> None:
    assert not any(str(tmp_path) in document.id for document in documents(any_corpus))


def test_files_of_a_folder_that_are_passed_over_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xe9")
    (tmp_path / "b.txt").write_text("b")
    assert [document.id for document in documents(str(tmp_path), skip=1)] == ["b.txt"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_folder_of_tables_is_one_corpus_in_the_order_of_their_names(
    kind: str, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    fill(folder, f"train-00001.{kind}", TEXTS[2:])
    fill(folder, f"train-00000.{kind}", TEXTS[:2])
    (folder / "README.md").write_text("About these tables.")
    read = list(documents(str(folder)))
    assert [(d.id, d.text) for d in read] == [(f"mine/{i}", text) for i, text in enumerate(TEXTS)]


def test_a_folder_of_two_kinds_of_tables_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "a.parquet", TEXTS)
    fill(tmp_path, "b.jsonl", TEXTS)
    with pytest.raises(CorpusError, match=r"holds both \.parquet and \.jsonl files"):
        documents(str(tmp_path))


def test_a_split_of_a_saved_dataset_is_read_and_a_missing_one_refused(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    splits = datasets.DatasetDict()
    for name in ("a", "b"):
        splits[name] = datasets.Dataset.from_dict({"text": [name]})
    splits.save_to_disk(folder)
    assert list(documents(str(folder), split="b")) == [Document("saved/b/0", "b")]
    with pytest.raises(CorpusError, match="has no split 'train'; there are: a, b"):
        documents(str(folder))


def test_a_saved_dataset_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{")
    with pytest.raises(CorpusError, match="cannot be opened: Expecting property name"):
        documents(str(tmp_path))


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_chats_are_read_from_their_field_and_an_empty_one_is_an_empty_document(
    tmp_path: Path,
) -> None:
    file = tmp_path / "chats.jsonl"
    more = [message | {"extra": 1} for message in CHAT]
    file.write_text("".join(json.dumps({"turns": c}) + "\n" for c in (more, CHAT[:1], [])))
    read = list(documents(str(file), messages_field="turns"))
    assert [document.messages for document in read] == [tuple(CHAT), tuple(CHAT[:1]), ()]
    assert [document.text for document in read] == ["", "", ""]


@pytest.mark.parametrize("chat", [None, "Hi", ["Hi"], [{"role": "user"}], [CHAT[0], {"a": "b"}]])
def test_what_is_no_chat_is_refused_with_the_fields_there_are(chat: Any, tmp_path: Path) -> None:
    (tmp_path / "chats.json").write_text(json.dumps([{"messages": chat, "id": 3}]))
    with pytest.raises(CorpusError, match="chats.json/0' has no chat under.*has: messages, id"):
        list(documents(str(tmp_path / "chats.json"), messages_field="messages"))


def test_chats_asked_of_plain_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1")
    for dataset in ("demo", str(tmp_path), str(tmp_path / "a.txt")):
        with pytest.raises(ConfigError, match="is plain text and has no field 'messages'"):
            documents(dataset, messages_field="messages")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_table_that_is_not_utf8_is_refused_by_name_and_byte(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows.{kind}"
    file.write_bytes(b'text\n"caf\xe9"\n' if kind == "csv" else b'{"text":\n"caf\xe9"}\n')
    with pytest.raises(CorpusError, match=rf"rows\.{kind} is not UTF-8 text \(byte \d+\)") as told:
        list(documents(str(file)))
    byte = int(str(told.value).split("byte ")[1].split(")")[0])
    assert file.read_bytes()[byte] == 0xE9


def test_a_table_that_cannot_be_opened_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"nonsense")
    with pytest.raises(CorpusError, match=r"rows\.parquet' cannot be opened: Parquet magic"):
        list(documents(str(tmp_path / "rows.parquet")))


def test_a_row_that_cannot_be_read_is_refused_by_number(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(
        CorpusError, match=r"'rows\.jsonl' cannot be read from row 0 on: JSON parse"
    ):
        list(documents(str(tmp_path / "rows.jsonl")))


def test_a_list_of_neither_texts_nor_objects_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[3]")
    with pytest.raises(CorpusError, match=r"row 'rows.json/0' is a int, not an object"):
        list(documents(str(tmp_path / "rows.json")))


def test_a_folder_is_read_by_file_name_and_names_do_not_depend_on_where_it_lies(
    tmp_path: Path,
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("2")
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "picture.png").write_bytes(b"\x89")
    read = list(documents(str(tmp_path)))
    assert [(document.id, document.text) for document in read] == [
        ("a.txt", "1"),
        ("b/two.md", "2"),
    ]


def test_another_text_field_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"body": "x"}\n')
    assert [d.text for d in documents(str(tmp_path / "rows.jsonl"), text_field="body")] == ["x"]


def test_a_missing_text_field_is_refused_with_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"body": "x", "id": 3}\n')
    with pytest.raises(CorpusError, match="no text under 'text'; it has: body, id"):
        list(documents(str(tmp_path / "rows.jsonl")))


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.txt", "gone.parquet", "gone.json"])
def test_a_missing_file_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no such file"):
        list(documents(str(tmp_path / name)))


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="holds no text file"):
        list(documents(str(tmp_path)))


def test_text_that_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_bytes(b"caf\xe9 noir")
    with pytest.raises(CorpusError, match=r"old\.txt is not UTF-8 text \(byte 3\)"):
        list(documents(str(tmp_path)))


@pytest.mark.parametrize("beside", ["README.md", None])
def test_a_folder_of_a_table_that_is_read_by_name_says_so(
    beside: str | None, tmp_path: Path
) -> None:
    (tmp_path / "stories.json").write_text('["Once upon a time"]')
    if beside is not None:  # which is about the table, and no corpus
        (tmp_path / beside).write_text("A thousand stories.")
    with pytest.raises(CorpusError, match="name the file itself, .*stories.json"):
        documents(str(tmp_path))
