"""Text to harvest from, one document at a time, each under a name that is the same on every
machine.

The only module here that knows `datasets`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saekit.demo import corpus as demo_corpus
from saekit.documents import Document
from saekit.errors import CorpusError, first_line

_TEXT_FILES = {".txt", ".md", ".rst", ".py"}
_BUILDERS = {".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def documents(
    dataset: str, *, config: str | None = None, split: str = "train", text_field: str = "text"
) -> Iterator[Document]:
    """The documents of a corpus, in a fixed order.

    `dataset` is "demo" (the standard library of this Python, and task sentences), a folder of text
    files, a .txt, .json (a list), .jsonl, .parquet or .csv file, or the id of a dataset on the hub
    (streamed; its `config` and `split` apply). Raises CorpusError where it cannot be read or lacks
    the text field.
    """
    if dataset == "demo":
        return demo_corpus.documents()
    path = Path(dataset)
    if path.is_dir():
        return _folder(path)
    if path.suffix in _TEXT_FILES and path.is_file():
        return iter([_text_file(path, path.name)])
    if path.suffix == ".json" and path.is_file():
        return _json_list(path, text_field)
    if path.suffix in _BUILDERS and path.is_file():
        rows = _load(_BUILDERS[path.suffix], data_files=str(path), split="train")
        return _rows(rows, path.name, text_field)
    if path.suffix in {*_TEXT_FILES, *_BUILDERS, ".json"}:
        raise CorpusError(f"dataset '{dataset}': no such file")
    return _rows(_load(dataset, name=config, split=split), f"{dataset}/{split}", text_field)


def _folder(folder: Path) -> Iterator[Document]:
    files = sorted(p for p in folder.rglob("*") if p.suffix in _TEXT_FILES and p.is_file())
    if not files:
        kinds = ", ".join(sorted(_TEXT_FILES))
        raise CorpusError(f"dataset folder '{folder}' holds no text file ({kinds}), at any depth")
    return (_text_file(file, file.relative_to(folder).as_posix()) for file in files)


def _text_file(file: Path, name: str) -> Document:
    try:
        return Document(name, file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{file} is not UTF-8 text (byte {error.start}): convert it or leave it out"
        ) from error


def _json_list(file: Path, text_field: str) -> Iterator[Document]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorpusError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise CorpusError(f"{file} holds a {type(rows).__name__}, not a list of texts or objects")
    keyed = ({text_field: row} if isinstance(row, str) else row for row in rows)
    return _rows(keyed, file.name, text_field)


def _rows(rows: Any, name: str, text_field: str) -> Iterator[Document]:
    for number, row in enumerate(rows):
        text = row.get(text_field)
        if not isinstance(text, str):
            raise CorpusError(
                f"row {number} of '{name}' has no text under '{text_field}'; it has: "
                f"{', '.join(map(str, row))}. Name the field with --text-field"
            )
        yield Document(f"{name}/{number}", text)


def _load(builder: str, **options: Any) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(builder, streaming=True, **options)
    except (OSError, ValueError, DatasetsError) as error:
        raise CorpusError(
            f"dataset '{builder}' cannot be opened: {first_line(error)}. Give 'demo', a folder of "
            "text files, a .txt, .json, .jsonl, .parquet or .csv file, or a hub id"
        ) from error
