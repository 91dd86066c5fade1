"""Files that are damaged, or made to do harm: each is read, or refused by a message that says what
is wrong with it; nothing of it runs.

The cases are generated from a sound file of each format. What runs would leave a mark: pickles that
were made to call something write a file, and none may be there afterwards.
"""

import json
import math
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import saekit
from saekit.errors import SaekitError
from saekit.interop._files import load_npz
from saekit.interop._torch_file import load_torch

LEAST = 1000
"""Cases in all; `test_there_are_as_many_cases_as_were_asked_for` counts."""

Change = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    what: str
    change: Change
    must_fail: bool
    """Otherwise the file may be as good as before, and is read."""


def files(root: Path) -> list[Path]:
    folder = root if root.is_dir() else root.parent
    return sorted(path for path in folder.rglob("*") if path.is_file())


# Tensors, whatever file they are in.


def read_tensors(file: Path) -> dict[str, Any] | None:
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    if file.suffix == ".pt":
        found: dict[str, Any] = torch.load(file, weights_only=True)
        return found
    return None


def write_tensors(file: Path, tensors: dict[str, Any]) -> None:
    if file.suffix == ".safetensors":
        save_file({name: t.contiguous() for name, t in tensors.items()}, file)
    elif file.suffix == ".npz":
        arrays: dict[str, Any] = {name: t.numpy() for name, t in tensors.items()}
        np.savez(file, **arrays)
    else:
        torch.save(tensors, file)


def state_of(tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors["ae"] if isinstance(tensors.get("ae"), dict) else tensors


def with_tensor(file: Path, name: str, make: Callable[[Any], Any]) -> Change:
    """One tensor replaced, or taken out where `make` gives None."""

    def change(root: Path) -> None:
        at = (root if root.is_dir() else root.parent) / file
        tensors = read_tensors(at)
        assert tensors is not None
        state = state_of(tensors)
        made = make(state.pop(name))
        if made is not None:
            state[name] = made
        write_tensors(at, tensors)

    return change


def poisoned(value: float) -> Callable[[Tensor], Tensor]:
    def make(tensor: Tensor) -> Tensor:
        made = tensor.contiguous().clone().float()
        made.view(-1)[0] = value
        return made

    return make


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "missing": lambda t: None,
    "longer": lambda t: torch.cat([t, t[:1]]) if t.ndim else torch.stack([t, t]),
    "another axis": lambda t: t[None],
    "whole numbers": lambda t: t.long(),
    "true or false": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "NaN": poisoned(math.nan),
    "infinite": poisoned(math.inf),
    "empty": lambda t: t.reshape(-1)[:0],
}
# Of a count, a bool is one too, and numbers that a format has no use for may be anything.
_COUNTS = {"k", "group_sizes", "stats_last_nonzero", "scaling_factor"}
_UNUSED = {"latents_activation_frequency", "latents_mean_square"} | _COUNTS


def tensor_cases(root: Path) -> Iterator[Case]:
    folder = root if root.is_dir() else root.parent
    for file in files(root):
        # A layer is read by itself.
        if file.name == "layer_0.safetensors":
            continue
        tensors = read_tensors(file)
        if tensors is None:
            continue
        for name, value in state_of(tensors).items():
            if not isinstance(value, Tensor):
                continue
            for what, make in TENSORS.items():
                if file.suffix == ".npz" and what == "complex":
                    continue
                alone = value.ndim == 0 and what not in ("missing", "NaN", "infinite", "empty")
                sure = not (alone or name in _UNUSED or _sound(file.name, name, what))
                change = with_tensor(file.relative_to(folder), name, make)
                yield Case(f"{file.name} {name} {what}", change, sure)
        unknown = with_tensor_added(file.relative_to(folder))
        yield Case(f"{file.name} has one more", unknown, True)


def _sound(file: str, name: str, what: str) -> bool:
    """Changes that make another SAE, and a sound one."""
    names = ("W_skip", "affine_skip_connection", "activation_function.threshold")
    if what == "missing":
        return name in names
    # Nothing else has the axis.
    return (file, name, what) == ("params.npz", "W_enc", "longer")


def with_tensor_added(file: Path) -> Change:
    def change(root: Path) -> None:
        at = (root if root.is_dir() else root.parent) / file
        tensors = read_tensors(at)
        assert tensors is not None
        state_of(tensors)["log_importance"] = torch.ones(3)
        write_tensors(at, tensors)

    return change


# Configs.

VALUES: list[Any] = [None, "x", "", -1, 0, 1, 10**30, -0.5, 1e308, True, [], [1], {}, {"a": {}}]
VALUES += [math.nan, math.inf, "../../etc/passwd", "\x00", "x" * 5000, "__import__('os')"]


def config_cases(root: Path) -> Iterator[Case]:
    folder = root if root.is_dir() else root.parent
    for file in files(root):
        if file.suffix not in (".json", ".yaml"):
            continue
        values = _parsed(file)
        for number, path in enumerate(_paths(values)):
            some = [VALUES[(7 * number + 3 * i) % len(VALUES)] for i in range(6)]
            for value in [..., *some]:
                yield Case(
                    f"{file.name} {'.'.join(path)} {'gone' if value is ... else repr(value)[:20]}",
                    with_value(file.relative_to(folder), path, value),
                    False,
                )
        for text in (
            "",
            "[]",
            "null",
            "3",
            "{",
            "[" * 5000,
            '{"a": ' * 5000,
            "\x00\xff",
            "&a [*a]",
        ):
            yield Case(
                f"{file.name} is {text[:5]!r}", replaced(file.relative_to(folder), text), True
            )


def _parsed(file: Path) -> Any:
    text = file.read_text()
    return json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)


def _paths(values: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield (*at, key)
            yield from _paths(value, (*at, key))


def with_value(file: Path, path: tuple[str, ...], value: Any) -> Change:
    def change(root: Path) -> None:
        at = (root if root.is_dir() else root.parent) / file
        values = _parsed(at)
        inner = values
        for key in path[:-1]:
            inner = inner[key]
        if value is ...:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        at.write_text(json.dumps(values) if at.suffix == ".json" else yaml.safe_dump(values))

    return change


def replaced(file: Path, text: str) -> Change:
    def change(root: Path) -> None:
        ((root if root.is_dir() else root.parent) / file).write_text(text)

    return change


# Bytes.


def byte_cases(root: Path) -> Iterator[Case]:
    folder = root if root.is_dir() else root.parent
    for file in files(root):
        if file.name == "layer_0.safetensors":
            continue
        content, inside = file.read_bytes(), file.relative_to(folder)
        chance = random.Random(len(content))
        for share in (0.0, 0.3, 0.9):
            cut = content[: int(share * len(content))]
            yield Case(f"{file.name} cut to {share}", with_bytes(inside, cut), True)
        yield Case(f"{file.name} is gone", without(inside), False)
        for _ in range(8):
            at = chance.randrange(len(content))
            flipped = content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))])
            change = with_bytes(inside, flipped + content[at + 1 :])
            yield Case(f"{file.name} byte {at} flipped", change, False)


def with_bytes(file: Path, content: bytes) -> Change:
    def change(root: Path) -> None:
        ((root if root.is_dir() else root.parent) / file).write_bytes(content)

    return change


def without(file: Path) -> Change:
    def change(root: Path) -> None:
        ((root if root.is_dir() else root.parent) / file).unlink()

    return change


def all_cases(root: Path) -> list[Case]:
    return [*tensor_cases(root), *config_cases(root), *byte_cases(root)]


def attempt(path: Path) -> SaekitError | None:
    """What reading says; anything but a SaekitError is an error of the test."""
    try:
        saekit.load(path)
    except SaekitError as error:
        return error
    return None


FORMATS = ["native", "sae_lens_gated", "sae_lens_scaled", "sae_lens_whitened", "sae_lens_flat"]
FORMATS += ["sae_lens_pursuit", "sparsify", "dictionary_learning", "dictionary_learning_backup"]
FORMATS += ["gemma_scope", "gemma_scope_2", "llama_scope_v1", "llama_scope_r1", "llamascopium"]
FORMATS += ["openai_gpt2", "circuit_tracer", "overcomplete"]
_SEEN: dict[str, int] = {}


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_not_as_it_should_be_is_refused_in_words(
    name: str, foreign: dict[str, Any], tmp_path: Path
) -> None:
    sound = foreign[name](tmp_path / "sound").path
    assert attempt(sound) is None
    cases = all_cases(sound)
    originals = {file: file.read_bytes() for file in files(sound)}
    for case in cases:
        case.change(sound)
        error = attempt(sound)
        assert error is not None or not case.must_fail, case.what
        assert error is None or len(str(error)) < 2000, case.what
        for file, content in originals.items():
            file.write_bytes(content)
    _SEEN[name] = len(cases)


# Pickles that do something.

MARK = "it-ran"


class Bomb:
    """Whatever unpickles it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def bombs(mark: Path) -> list[Any]:
    text = f"open({str(mark)!r}, 'w').close()"
    shell = f"touch {mark}"
    return [
        Bomb(exec, text),
        Bomb(eval, text),
        Bomb(os.system, shell),
        Bomb(os.mkdir, str(mark)),
        Bomb(open, str(mark), "w"),
        Bomb(getattr, os, "system"),
        Bomb(__import__, "os"),
        Bomb(torch.load, str(mark)),
        Bomb(torch.jit.load, str(mark)),
        Bomb(Path, str(mark)),
        Bomb(print, "x"),
        Bomb(bytearray, 10),
    ]


def wrapped(bomb: Any) -> list[Any]:
    return [
        bomb,
        {"pre_bias": bomb},
        {"ae": {"encoder.weight": bomb}, "norm_factor": 1.0},
        {"activation": "TopK", "activation_state_dict": {"k": bomb}},
        [{"deep": [bomb]}],
        {bomb.call[0].__name__: (1, (2, bomb))},
    ]


def archive(path: Path, script: bytes, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", script)
        file.writestr("archive/byteorder", b"little")
        for name, content in entries.items():
            file.writestr(f"archive/data/{name}", content)
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_calls_something_calls_nothing(protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / MARK
    cases = [value for bomb in bombs(mark) for value in wrapped(bomb)]
    for number, value in enumerate(cases):
        try:
            script = pickle.dumps(value, protocol)
        except (pickle.PicklingError, TypeError, AttributeError):
            script = pickle.dumps({"pre_bias": bombs(mark)[0]}, protocol)
        file = archive(tmp_path / f"ae{number}.pt", script)
        for path in (file, _in_a_folder(tmp_path, number, file)):
            assert attempt(path) is not None
        assert not mark.exists()
    _SEEN[f"bombs {protocol}"] = 2 * len(cases)


def _in_a_folder(tmp_path: Path, number: int, file: Path) -> Path:
    """As dictionary_learning has it."""
    folder = tmp_path / f"trainer_{number}"
    folder.mkdir()
    shutil.copy(file, folder / "ae.pt")
    (folder / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder"}}')
    return folder


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


OPCODES: dict[str, bytes] = {
    "a call by REDUCE": b"\x80\x02" + _global("os", "system") + b"X\x02\x00\x00\x00ls\x85R.",
    "a name alone": b"\x80\x02" + _global("builtins", "eval") + b".",
    "INST": b"\x80\x02(X\x02\x00\x00\x00lsios\nsystem\n.",
    "OBJ": b"\x80\x02(" + _global("os", "system") + b"X\x02\x00\x00\x00lso.",
    "NEWOBJ": b"\x80\x02" + _global("os", "system") + b")\x81.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "STACK_GLOBAL of numbers": b"\x80\x04K\x01K\x02\x93.",
    "an extension": b"\x80\x02\x82\x01.",
    "a text as a reference": b"\x80\x02Pos\n.",
    "a reference that is no storage": b"\x80\x02X\x01\x00\x00\x00xQ.",
    "a name in pieces": b"\x80\x02"
    + _global("torch._utils", "_rebuild_tensor_v2.__globals__")
    + b".",
    "another rebuild": b"\x80\x02" + _global("torch._utils", "_rebuild_sparse_tensor") + b")R.",
    "OrderedDict of something": b"\x80\x02"
    + _global("collections", "OrderedDict")
    + b"K\x01\x85R.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "BUILD on a name": b"\x80\x02" + _global("collections", "OrderedDict") + b"}b.",
    "BUILD with a list": b"\x80\x02}]b.",
    "an empty stack": b"\x80\x02.",
    "too much on the stack": b"\x80\x02K\x01K\x02.",
    "a mark that nobody takes": b"\x80\x02(K\x01.",
    "no mark to take": b"\x80\x02t.",
    "items below a mark": b"\x80\x02}(Ks.",
    "an odd number of items": b"\x80\x02}(K\x01u.",
    "a key that is a list": b"\x80\x02}]K\x01s.",
    "items of a list": b"\x80\x02]K\x01K\x02s.",
    "appended to a dict": b"\x80\x02}K\x01a.",
    "memory that was never kept": b"\x80\x02h\x07.",
    "no end": b"\x80\x02}",
    "nothing": b"",
    "a text that is longer than the file": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "a number of 2 KiB": b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".",
    "a text that is no text": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "a name that is no text": b"\x80\x02c\xff\xfe\n\xff\n.",
    "protocol 5": b"\x80\x05}.",
    "protocol 255": b"\x80\xff}.",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a dict in itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "lists in lists": b"\x80\x02" + b"]" * 20000 + b"a" * 19999 + b".",
    "tuples in tuples": b"\x80\x02N" + b"\x85" * 50000 + b".",
    "a number, not a dict": b"\x80\x02K\x01.",
}


@pytest.mark.parametrize("what", OPCODES)
def test_a_description_that_no_torch_writes_is_refused(what: str, tmp_path: Path) -> None:
    file = archive(tmp_path / "ae.pt", OPCODES[what])
    assert attempt(file) is not None


def storage(kind: str = "FloatStorage", key: str = "0", count: int = 4) -> bytes:
    """A reference to numbers, on top of the stack."""
    text = b"".join(b"X" + struct.pack("<I", len(part)) + part for part in (key.encode(), b"cpu"))
    name = b"X\x07\x00\x00\x00storage" + _global("torch", kind)
    return b"(" + name + text + b"J" + struct.pack("<i", count) + b"tQ"


def tensor(held: bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", v) for v in values) + b"t"

    at = b"\x8a\x08" + struct.pack("<q", offset)
    rest = b"\x89" + _global("collections", "OrderedDict") + b")R"
    rebuild = _global("torch._utils", "_rebuild_tensor_v2")
    return rebuild + b"(" + held + at + numbers(shape) + numbers(strides) + rest + b"tR"


def named(value: bytes) -> bytes:
    return b"\x80\x02}X\x01\x00\x00\x00a" + value + b"s."


FOUR = struct.pack("<4f", 1, 2, 3, 4)
SIZES: dict[str, tuple[bytes, bytes]] = {
    "larger than its numbers": (tensor(storage(), 0, (5,), (1,)), FOUR),
    "spread without end": (tensor(storage(), 0, (2**40,), (0,)), FOUR),
    "out of its numbers": (tensor(storage(), 3, (2,), (1,)), FOUR),
    "strides that leave": (tensor(storage(), 0, (2, 2), (3, 1)), FOUR),
    "a negative size": (tensor(storage(), 0, (-1,), (1,)), FOUR),
    "a negative stride": (tensor(storage(), 3, (2,), (-1,)), FOUR),
    "a negative offset": (tensor(storage(), -1, (2,), (1,)), FOUR),
    "sizes that overflow": (tensor(storage(), 0, (2**40, 2**40), (1, 1)), FOUR),
    "more axes than strides": (tensor(storage(), 0, (2, 2), (1,)), FOUR),
    "too many axes": (tensor(storage(), 0, (1,) * 70, (1,) * 70), FOUR),
    "fewer numbers than announced": (tensor(storage(count=9), 0, (2,), (1,)), FOUR),
    "more numbers than announced": (tensor(storage(count=1), 0, (1,), (1,)), FOUR),
    "a type that there is not": (tensor(storage("QUInt8Storage"), 0, (2,), (1,)), FOUR),
    "numbers elsewhere": (tensor(storage(key="../../../etc/passwd"), 0, (2,), (1,)), FOUR),
    "numbers that are not there": (tensor(storage(key="7"), 0, (2,), (1,)), FOUR),
    "numbers of two types": (
        tensor(storage(), 0, (1,), (1,)) + b"0" + tensor(storage("IntStorage"), 0, (1,), (1,)),
        FOUR,
    ),
}


@pytest.mark.parametrize("what", SIZES)
def test_a_tensor_that_is_not_in_its_numbers_is_refused(what: str, tmp_path: Path) -> None:
    value, numbers = SIZES[what]
    file = archive(tmp_path / "ae.pt", named(value), **{"0": numbers})
    with pytest.raises(SaekitError):
        load_torch(file)


def test_the_hand_made_tensor_is_read_where_nothing_is_wrong_with_it(tmp_path: Path) -> None:
    """Otherwise all of the above would be refused for another reason."""
    file = archive(tmp_path / "a.pt", named(tensor(storage(), 1, (2,), (2,))), **{"0": FOUR})
    assert load_torch(file)["a"].tolist() == [2.0, 4.0]


@pytest.mark.parametrize(
    "names",
    [
        ["../../evil/data.pkl"],
        ["/etc/data.pkl"],
        ["a/data.pkl", "b/data.pkl"],
        ["a/data.pkl", "a/data.pkl"],
        ["data.pkl"],
        ["a/b/data.pkl"],
        [],
    ],
)
def test_an_archive_with_other_names_is_refused(names: list[str], tmp_path: Path) -> None:
    before = sorted(tmp_path.parent.iterdir())
    file = tmp_path / "ae.pt"
    with (
        zipfile.ZipFile(file, "w") as made,
        pytest.warns(UserWarning) if len(names) != len(set(names)) else _nothing(),
    ):
        for name in names:
            made.writestr(name, b"\x80\x02}.")
    error = attempt(file)
    if names not in (["../../evil/data.pkl"], ["/etc/data.pkl"]):
        assert error is not None
    assert sorted(tmp_path.parent.iterdir()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["ae.pt"]


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *args: Any) -> None: ...


def test_archives_that_unpack_to_more_than_they_hold_are_refused(tmp_path: Path) -> None:
    packed = tmp_path / "ae.pt"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/data.pkl", b"\x80\x02" + b"\x00" * 10_000_000)
    with pytest.raises(SaekitError, match="compressed or encrypted"):
        load_torch(packed)
    zeros = tmp_path / "params.npz"
    np.savez_compressed(zeros, W_enc=np.zeros((2000, 2000)))
    with pytest.raises(SaekitError, match="claims to unpack to"):
        load_npz(zeros)
    little = tmp_path / "little.npz"
    np.savez_compressed(little, W_enc=np.random.default_rng(0).normal(size=(50, 50)))
    assert load_npz(little)["W_enc"].shape == (50, 50)


def test_an_npz_of_objects_or_other_files_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / MARK
    file = tmp_path / "params.npz"
    objects: Any = np.array([bombs(mark)[0]], dtype=object)
    np.savez(file, W_enc=objects)
    with pytest.raises(SaekitError, match="allow_pickle"):
        load_npz(file)
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("W_enc", b"no array")
    with pytest.raises(SaekitError, match="not an array of numbers"):
        load_npz(file)
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch it-ran']",
        "model_kind: !!python/name:os.system",
        "a: &a [*a]",
        "a: &a ['x', 'x']\nb: &b [*a, *a]\nc: [*b, *b]",
        "- 1",
        "3: x",
        "a: b: c",
    ],
)
def test_a_yaml_file_makes_plain_values_alone(
    text: str, foreign: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = foreign["circuit_tracer"](tmp_path / "set").path
    (made.parent / "config.yaml").write_text(text)
    error = attempt(made)
    assert error is not None or text.startswith("a: &a")
    assert not (tmp_path / MARK).exists()


def test_there_are_as_many_cases_as_were_asked_for() -> None:
    """In the process that ran them all; another one has seen some."""
    if len(_SEEN) == len(FORMATS) + 6:
        assert sum(_SEEN.values()) + len(OPCODES) + len(SIZES) >= LEAST
