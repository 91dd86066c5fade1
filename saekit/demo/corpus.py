"""The offline corpus: the running interpreter's standard library, with blocks of task sentences.

Every machine with Python has it, and it is code and English with known structure. One module is one
document, `stdlib/<path>`; one task sentence is one document, `tasks/<task>/<number>`.
"""

import os
import sysconfig
from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path

from saekit.demo.tasks import TASKS, Split, Task, stream
from saekit.documents import Document, held_out

HELD_OUT = 0.05
"""The share of documents that the embedded model has not seen: `held_out(id, HELD_OUT)`."""

MODULES_BETWEEN_BLOCKS = 12
SENTENCES_PER_BLOCK = 64

_ORDER_SALT = b"saekit.demo"
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
# Written when the interpreter was built, with that machine's paths in them.
_GENERATED_PREFIXES = ("_sysconfigdata", "config-")
_SEED = 0
# Half of the sentences are of the first task; the other tasks share the rest.
_TASK_PATTERN: tuple[Task, ...] = tuple(t for other in TASKS[1:] for t in (TASKS[0], other))


def documents() -> Iterator[Document]:
    """Modules in a fixed pseudo-random order, and 64 task sentences after every 12 of them.

    Any prefix is therefore a fair sample of the whole. The order and the names depend on the Python
    version alone.
    """
    sentences = _task_documents()
    for number, module in enumerate(modules(), start=1):
        yield module
        if number % MODULES_BETWEEN_BLOCKS == 0:
            yield from islice(sentences, SENTENCES_PER_BLOCK)


def modules() -> Iterator[Document]:
    """The modules of the standard library, without its tests, empty files and second copies."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = {f"stdlib/{path.relative_to(root).as_posix()}": path for path in _library_source(root)}
    seen: set[str] = set()
    for name in sorted(paths, key=_place_in_order):
        text = _read(paths[name])
        if text.strip() and text not in seen:
            seen.add(text)
            yield Document(name, text)


def _task_documents() -> Iterator[Document]:
    """Task sentences without end: the sentence is of the test split if its document is held out."""
    splits: tuple[Split, ...] = ("train", "test")
    streams = {(task, split): stream(task, _SEED, split) for task in TASKS for split in splits}
    count = dict.fromkeys(TASKS, 0)
    while True:
        for task in _TASK_PATTERN:
            name = f"tasks/{task}/{count[task]}"
            count[task] += 1
            split: Split = "test" if held_out(name, HELD_OUT) else "train"
            yield Document(name, next(streams[task, split]).text)


def _library_source(root: Path) -> Iterator[Path]:
    # Installed packages lie in there, too, and walking them would take longer than all the rest.
    for folder, subfolders, files in os.walk(root):
        skipped = _GENERATED_PREFIXES if Path(folder) == root else ()
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _SKIPPED_FOLDERS and not name.startswith(skipped)
        ]
        for name in files:
            if name.endswith(".py") and not name.startswith(skipped):
                yield Path(folder, name)


def _place_in_order(name: str) -> bytes:
    # Salted, so that the order says nothing about which documents are held out.
    return blake2b(name.encode(), digest_size=8, salt=_ORDER_SALT).digest()


def _read(path: Path) -> str:
    """The text, or nothing where the file cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
