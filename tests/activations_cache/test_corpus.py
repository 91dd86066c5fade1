import json
from pathlib import Path

import datasets
import pytest

from saekit.activations_cache.corpus import documents
from saekit.errors import CorpusError

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
