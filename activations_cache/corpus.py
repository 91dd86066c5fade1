"""Text and chats to harvest from, one document at a time, each under a name that is the same on
every machine.

The only module here that knows `datasets`.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from saekit.demo import corpus as demo_corpus
from saekit.documents import Document
from saekit.errors import ConfigError, CorpusError, first_line

_TEXT_FILES = {".txt", ".md", ".rst", ".py"}
_BUILDERS = {".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_IN_FOLDERS = (".parquet", ".jsonl")
_BY_NAME = (".json", ".csv")
_SPLITS = "dataset_dict.json"


def documents(
    dataset: str,
    *,
    config: str | None = None,
    split: str = "train",
    text_field: str = "text",
    messages_field: str | None = None,
    skip: int = 0,
) -> Iterator[Document]:
    """The documents of a corpus from number `skip` on, in a fixed order.

    `dataset` is "demo" (the standard library of this Python, and task sentences), a folder of text
    files, a .txt file, or anything that `rows` reads. A row's text stands under `text_field`, or,
    where `messages_field` is given, its chat under that: a list of objects with a "role" and a
    "content". Raises CorpusError where the corpus cannot be read or lacks the field, ConfigError
    for chats asked of plain text.
    """
    path = Path(dataset)
    texts = [] if dataset == "demo" else _text_files(path)
    if messages_field is not None and (dataset == "demo" or texts):
        raise ConfigError(
            f"dataset '{dataset}' is plain text and has no field '{messages_field}': leave "
            "messages_field out, or give a dataset of rows"
        )
    if dataset == "demo":
        return islice(demo_corpus.documents(), skip, None)
    if texts:
        root = path if path.is_dir() else path.parent
        return (Document(file.relative_to(root).as_posix(), _read(file)) for file in texts[skip:])
    table = rows(dataset, config=config, split=split, skip=skip)
    if messages_field is not None:
        return (_chat(name, row, messages_field) for name, row in table)
    return (_text(name, row, text_field) for name, row in table)


def rows(
    dataset: str,
    *,
    config: str | None = None,
    split: str = "train",
    skip: int = 0,
    besides: str = f"text file ({', '.join(sorted(_TEXT_FILES))})",
) -> Iterator[tuple[str, Any]]:
    """Rows of a table from number `skip` on, each under its name, "<table>/<number>".

    `dataset` is a .json (a list), .jsonl, .parquet or .csv file; a folder of .parquet or of .jsonl
    files, which are read as one in the order of their names; a folder that `save_to_disk` wrote
    (its `split`, where it has several); or the id of a dataset on the hub (streamed; its `config`
    and `split` apply). Raises CorpusError where it cannot be read; `besides` says there what the
    caller has looked for in a folder before.
    """
    path = Path(dataset)
    if path.is_dir():
        name = path.resolve().name
        if _is_saved(path):
            if (path / _SPLITS).is_file():
                name = f"{name}/{split}"
            return _numbered(_load_saved(path, split), name, skip)
        files = _table_files(path, besides)
        return _numbered(_load_files(dataset, files), name, skip, files)
    if path.is_file() and path.suffix == ".json":
        return _numbered(_json_list(path), path.name, skip)
    if path.is_file() and path.suffix in _BUILDERS:
        return _numbered(_load_files(dataset, [path]), path.name, skip, [path])
    if path.suffix in {*_TEXT_FILES, *_BUILDERS, ".json"}:
        raise CorpusError(f"dataset '{dataset}': no such file")
    return _numbered(_load(dataset, dataset, name=config, split=split), f"{dataset}/{split}", skip)


def _text_files(path: Path) -> list[Path]:
    """The text files of a corpus of text files, else none."""
    if path.is_file() and path.suffix in _TEXT_FILES:
        return [path]
    if not path.is_dir() or _is_saved(path):
        return []
    found = sorted(p for p in path.rglob("*") if p.suffix in _TEXT_FILES and p.is_file())
    # A downloaded dataset is a folder of tables and a README.md about them.
    about = all(file.name == "README.md" for file in found)
    return [] if about and (_tables(path) or _by_name(path)) else found


def _tables(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in _IN_FOLDERS and p.is_file())


def _by_name(folder: Path) -> list[Path]:
    """Tables that are read alone, as what else is a table in a folder of them cannot be told."""
    return sorted(p for p in folder.rglob("*") if p.suffix in _BY_NAME and p.is_file())


def _table_files(folder: Path, besides: str) -> list[Path]:
    files = _tables(folder)
    if not files and (named := _by_name(folder)):
        raise CorpusError(
            f"dataset folder '{folder}' holds a {named[0].suffix} file and no {besides}: name the "
            f"file itself, {named[0]}"
        )
    if not files:
        raise CorpusError(
            f"dataset folder '{folder}' holds no {besides} and no table "
            f"({', '.join(_IN_FOLDERS)}), at any depth"
        )
    if len({file.suffix for file in files}) > 1:
        raise CorpusError(
            f"dataset folder '{folder}' holds both .parquet and .jsonl files, and the order of one "
            "corpus cannot be told: keep one kind, or name one file"
        )
    return files


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote it."""
    whole = all((folder / name).is_file() for name in ("dataset_info.json", "state.json"))
    return whole or (folder / _SPLITS).is_file()


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error.start) from error


def _not_utf8(file: Path, byte: int) -> CorpusError:
    return CorpusError(f"{file} is not UTF-8 text (byte {byte}): convert it or leave it out")


def _json_list(file: Path) -> list[Any]:
    text = _read(file)
    try:
        listed = json.loads(text)
    except ValueError as error:
        raise CorpusError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(listed, list):
        raise CorpusError(f"{file} holds a {type(listed).__name__}, not a list of texts or objects")
    return listed


def _numbered(
    table: Any, name: str, skip: int, files: Iterable[Path] = ()
) -> Iterator[tuple[str, Any]]:
    from datasets.exceptions import DatasetsError

    # A saved dataset refuses to skip all of itself.
    if hasattr(table, "__len__") and skip >= len(table):
        return
    remaining = iter(table[skip:] if isinstance(table, list) else table.skip(skip))
    number = skip
    while True:
        try:
            row = next(remaining)
        except StopIteration:
            return
        # SyntaxError is what a broken picture raises.
        except (OSError, ValueError, SyntaxError, DatasetsError) as error:
            for file in files:
                if file.suffix != ".parquet":
                    _check_utf8(file)
            raise CorpusError(
                f"'{name}' cannot be read from row {number} on: {first_line(error)}. Mend what "
                "stands there, or leave it out"
            ) from error
        yield f"{name}/{number}", row
        number += 1


def _check_utf8(file: Path) -> None:
    passed = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise _not_utf8(file, passed + error.start) from error
            passed += len(line)


def _text(name: str, row: Any, field: str) -> Document:
    text = row if isinstance(row, str) else _field(name, row, field)
    if not isinstance(text, str):
        raise CorpusError(
            f"row '{name}' has no text under '{field}'; it has: {_keys(row)}. Name the field with "
            "--text-field"
        )
    return Document(name, text)


def _chat(name: str, row: Any, field: str) -> Document:
    messages = _field(name, row, field)
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise CorpusError(
            f"row '{name}' has no chat under '{field}', which is a list of objects with a \"role\" "
            f'and a "content", both text; it has: {_keys(row)}. Name the field with '
            "--messages-field"
        )
    return Document(
        name, messages=tuple({"role": m["role"], "content": m["content"]} for m in messages)
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )


def _field(name: str, row: Any, field: str) -> Any:
    if not isinstance(row, dict):
        raise CorpusError(f"row '{name}' is a {type(row).__name__}, not an object with fields")
    return row.get(field)


def _keys(row: Any) -> str:
    return ", ".join(map(str, row))


def _load_files(dataset: str, files: list[Path]) -> Any:
    builder = _BUILDERS[files[0].suffix]
    return _load(dataset, builder, data_files=[str(file) for file in files], split="train")


def _load(dataset: str, builder: str, **options: Any) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(builder, streaming=True, **options)
    except (OSError, ValueError, DatasetsError) as error:
        raise CorpusError(
            f"dataset '{dataset}' cannot be opened: {first_line(error)}. Give 'demo', a folder of "
            "text files or tables, a .txt, .json, .jsonl, .parquet or .csv file, or a hub id"
        ) from error


def _load_saved(folder: Path, split: str) -> Any:
    from datasets import DatasetDict, load_from_disk
    from datasets.exceptions import DatasetsError

    try:
        saved = load_from_disk(str(folder))
    except (OSError, ValueError, DatasetsError) as error:
        raise CorpusError(
            f"dataset folder '{folder}' cannot be opened: {first_line(error)}. Write it again with "
            "save_to_disk"
        ) from error
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise CorpusError(
            f"dataset folder '{folder}' has no split '{split}'; there are: "
            f"{', '.join(map(str, saved))}"
        )
    return saved[split]
