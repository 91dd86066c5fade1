"""What the embedded model is trained and measured on: books, Python source, task sentences.

Books are read from a folder of `<part>.jsonl.xz` files with `author`, `title` and `text`. Python
source is what this machine has: its standard library, and the packages that are installed.
"""

import json
import lzma
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from importlib.metadata import packages_distributions, version
from itertools import islice
from pathlib import Path

from saekit.demo import corpus
from saekit.demo.tasks import ARGUMENTS, TASKS, Task, TaskSentence, recall_sentences, stream
from saekit.documents import Document, held_out

_LONGEST_PACKAGE_FILE = 300_000  # characters; beyond it stand tables and generated code
_TRAINING_SEED = 1
_N_COMMON_WORDS = 2000
# Sentences of each task, as shares of all.
_TASK_SHARES: dict[Task, float] = {"ioi": 0.6, "greater_than": 0.2, "docstring": 0.2}


def books(folder: Path, part: str) -> dict[str, list[Document]]:
    """The books of the part "train", "valid" or "test", by author. No author is in two parts."""
    by_author: dict[str, list[Document]] = {}
    with lzma.open(folder / f"{part}.jsonl.xz", "rt", encoding="utf-8") as lines:
        for line in lines:
            book = json.loads(line)
            document = Document(f"books/{book['author']}/{book['title']}", book["text"])
            by_author.setdefault(book["author"], []).append(document)
    return by_author


def held_out_modules() -> list[Document]:
    """The standard library modules that training leaves out."""
    return [m for m in corpus.modules() if held_out(m.id, corpus.HELD_OUT)]


def python_source(max_chars: int) -> list[Document]:
    """Standard library modules that are not held out, then installed packages, up to `max_chars`.

    A package's file that repeats a held-out module (a vendored copy, a backport) is left out.
    """
    copies = CopyCheck(held_out_modules())
    modules = (m for m in corpus.modules() if not held_out(m.id, corpus.HELD_OUT))
    packages = (p for p in _package_files() if not copies.repeats(p.text))
    return list(first_chars((d for part in (modules, packages) for d in part), max_chars))


def first_chars(documents: Iterable[Document], max_chars: int) -> Iterator[Document]:
    """Documents from the front until their text together passes `max_chars`."""
    total = 0
    for document in documents:
        if total >= max_chars:
            return
        total += len(document.text)
        yield document


def distributions(documents: Iterable[Document]) -> dict[str, str]:
    """Name and version of the distributions that the `packages/...` documents belong to."""
    top_levels = {d.id.split("/")[1] for d in documents if d.id.startswith("packages/")}
    owners = packages_distributions()
    names = {name for top in top_levels for name in owners.get(top.removesuffix(".py"), [])}
    return {name: version(name) for name in sorted(names)}


def training_sentences(n: int, prose: list[Document], source: list[Document]) -> list[str]:
    """About `n` task sentences, all of the train split, mixed by a hash of their text.

    Fifty arguments can be learned by heart, and then the task is not; so the arguments are all
    common words of the source, without the test words. (For names see `Windows`.) Templates
    can be, too, so every second ioi sentence is disturbed.
    """
    words: dict[Task, list[str]] = {"docstring": _arguments(source)}
    rng = random.Random(_TRAINING_SEED)
    fillers = _common_words(prose, r"\b[a-z]{2,}\b", ())
    texts = []
    for task in TASKS:
        made = stream(task, _TRAINING_SEED, "train", words.get(task, ()))
        for number, sentence in enumerate(islice(made, int(n * _TASK_SHARES[task]))):
            disturb = task == "ioi" and number % 2
            texts.append(disturbed(sentence, rng, fillers) if disturb else sentence.text)
    return sorted(texts, key=_hash)


def disturbed(sentence: TaskSentence, rng: random.Random, fillers: list[str]) -> str:
    """An ioi sentence in which up to 3 fillers stand for some of its words.

    Its names stay, and so do its first word and all from the last word of the prompt on.
    """
    names = (sentence.labels["io"], sentence.labels["subject"])
    first, *words, last = sentence.prompt.split()
    rate = rng.uniform(0.1, 0.5)
    for i, word in enumerate(words):
        if word not in names and rng.random() < rate:
            words[i] = " ".join(rng.choices(fillers, k=rng.randrange(4)))
    prompt = " ".join([first, *filter(None, words), last])
    return prompt + sentence.text.removeprefix(sentence.prompt)


def name_recall(n: int) -> list[str]:
    """`n` sentences that repeat train names."""
    return recall_sentences(n, _TRAINING_SEED)


def _arguments(source: list[Document]) -> list[str]:
    """The train arguments and the most frequent words of the source, without the test arguments."""
    own = ARGUMENTS["train"] + ARGUMENTS["test"]
    return [*ARGUMENTS["train"], *_common_words(source, r"\b[a-z]{3,12}\b", own)]


def _common_words(
    documents: Iterable[Document], pattern: str, left_out: tuple[str, ...]
) -> list[str]:
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(re.findall(pattern, document.text))
    for word in left_out:
        del counts[word]
    return [word for word, _ in counts.most_common(_N_COMMON_WORDS)]


class CopyCheck:
    """Tells a copy of given documents by its long lines, which survive small edits."""

    def __init__(self, originals: Iterable[Document]) -> None:
        self._hashes = {_hash(line) for d in originals for line in _long_lines(d.text)}

    def repeats(self, text: str) -> bool:
        """Whether at least a fifth of the text's long lines stand in the originals."""
        lines = _long_lines(text)
        return bool(lines) and 5 * sum(_hash(line) in self._hashes for line in lines) >= len(lines)


def _long_lines(text: str) -> set[str]:
    return {line for raw in text.splitlines() if len(line := raw.strip()) >= 30}


def _package_files() -> Iterator[Document]:
    root = Path(sysconfig.get_path("purelib"))
    paths = {f"packages/{path.relative_to(root).as_posix()}": path for path in root.rglob("*.py")}
    for name in sorted(paths, key=_hash):
        try:
            text = paths[name].read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip() and len(text) <= _LONGEST_PACKAGE_FILE:
            yield Document(name, text)


def _hash(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()
