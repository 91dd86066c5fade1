"""Tensors out of a file that `torch.save` wrote, without running what the file says.

Such a file is a zip archive: `data.pkl` says in the opcodes of Python's pickle what there is, and
`data/0`, `data/1`, ... hold the numbers. A pickle can name any function and have it called. Here
its opcodes are read by an interpreter of our own that knows only what a state dict needs: plain
values, lists, tuples and dicts of them, and four names, none of which is ever looked up or called:

    collections.OrderedDict          a dict
    torch.<Type>Storage              the type of a tensor's numbers
    torch._utils._rebuild_tensor_v2  a tensor, of a storage, an offset, a shape and strides
    torch._utils._rebuild_parameter  the tensor inside it

Anything else is refused by its name. Whatever a file claims is bounded by its size: archives must
not be compressed, a tensor may not be larger than its storage, and a storage not than its entry.
Files from before torch 1.6, which are no archives, are refused.
"""

import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.errors import CheckpointError
from saekit.interop._files import bounded, unreadable

_PICKLE_BYTES = 1 << 26

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Refused(Exception):
    """What a file asks for, and may not have."""


@dataclass(frozen=True)
class _Name:
    """One of the names above. It stands for itself: nothing is imported."""

    text: str


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    numbers: Tensor


_ORDERED_DICT = _Name("collections.OrderedDict")
_TENSOR = _Name("torch._utils._rebuild_tensor_v2")
_PARAMETER = _Name("torch._utils._rebuild_parameter")
_NAMES = {
    name.text: name
    for name in (_ORDERED_DICT, _TENSOR, _PARAMETER, *(_Name(f"torch.{s}") for s in _STORAGES))
}


def load_torch(path: Path) -> dict[str, Any]:
    """What a file of `torch.save` holds, where that is a dict with names as its keys: tensors,
    plain values, and dicts, lists and tuples of them.

    Raises CheckpointError for whatever else there is, and for a file that is damaged.
    """
    return _load_dict(path, numbers=True)


def is_torch(path: Path) -> bool:
    """Whether it is a file that says by its name that torch wrote it."""
    return path.suffix in (".pt", ".pth") and path.is_file()


def names_in(path: Path) -> set[str]:
    """The names that `load_torch` would give, without reading any numbers."""
    return set(_load_dict(path, numbers=False))


def _load_dict(path: Path, numbers: bool) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            bounded(path, archive)
            found = _load(archive, numbers)
    except Refused as error:
        raise CheckpointError(
            f"{path} holds {error}, which no state dict needs: it is not read. Save the state dict "
            "alone, tensors by name"
        ) from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} is no archive of torch.save ({error}): it is damaged, or from before torch "
            "1.6; load it with that torch, and save its state dict as safetensors"
        ) from error
    except (OSError, EOFError, ValueError, KeyError, IndexError, struct.error) as error:
        raise unreadable(path, error) from error
    except (NotImplementedError, RuntimeError, OverflowError, MemoryError, TypeError) as error:
        raise unreadable(path, error) from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise CheckpointError(f"{path} holds no dict of named values, as a state dict is")
    return found


def _load(archive: zipfile.ZipFile, numbers: bool) -> Any:
    names = archive.namelist()
    if len(set(names)) != len(names):
        raise Refused("two entries of one name")
    scripts = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(scripts) != 1:
        raise Refused(f"{len(scripts)} entries called data.pkl, not one")
    root = scripts[0].removesuffix("data.pkl")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise Refused("numbers in big-endian order")
    if archive.getinfo(scripts[0]).file_size > _PICKLE_BYTES:
        raise Refused("a description of more than 64 MiB")
    storages: dict[str, _Storage] = {}

    def storage(dtype: torch.dtype, key: str, count: int) -> _Storage:
        if key not in storages:
            if not key.isascii() or not key.isalnum():
                raise Refused(f"numbers called '{key[:80]}'")
            entry = archive.getinfo(f"{root}data/{key}")
            if entry.file_size != count * dtype.itemsize:
                raise Refused(f"{entry.file_size} bytes where {count} numbers are announced")
            if numbers and count:
                read = torch.frombuffer(bytearray(archive.read(entry)), dtype=dtype)
            else:
                read = torch.empty(count, dtype=dtype, device="meta" if count else "cpu")
            storages[key] = _Storage(dtype, read)
        if storages[key].dtype != dtype:
            raise Refused(f"numbers '{key}' in two types")
        return storages[key]

    return _Machine(archive.read(scripts[0]), storage).run()


class _Machine:
    """Reads the opcodes of a pickle of protocol 2 to 4, of those that a state dict needs."""

    def __init__(self, script: bytes, storage: Callable[[torch.dtype, str, int], _Storage]) -> None:
        self.script = script
        self.at = 0
        self.storage = storage
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while True:
            code = self.bytes(1)
            if code == b".":
                if len(self.stack) != 1 or self.marks:
                    raise Refused("a description that ends in the middle")
                return self.stack[0]
            if code not in _OPCODES:
                raise Refused(f"the opcode {code!r} at byte {self.at - 1}")
            _OPCODES[code](self)

    def bytes(self, n: int) -> bytes:
        if n > len(self.script) - self.at:
            raise Refused("a description that ends in the middle")
        self.at += n
        return self.script[self.at - n : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.bytes(struct.calcsize(form)))[0]

    def line(self) -> str:
        end = self.script.find(b"\n", self.at)
        if end < 0:
            raise Refused("a description that ends in the middle")
        return self.bytes(end + 1 - self.at)[:-1].decode("utf-8")

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Refused("a description that takes more than it put down")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise Refused("a description that takes more than it put down")
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def top(self, kind: type[Any]) -> Any:
        value = self.pop()
        if not isinstance(value, kind):
            raise Refused(f"a {type(value).__name__} where a {kind.__name__} belongs")
        self.stack.append(value)
        return value

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise Refused(f"a value {index} that was never kept")
        self.stack.append(self.memo[index])

    def put(self, index: int) -> None:
        self.memo[index] = self.pop()
        self.stack.append(self.memo[index])

    def name(self, module: str, name: str) -> None:
        text = f"{module}.{name}"
        if text not in _NAMES:
            raise Refused(f"the name {text[:120]}")
        self.stack.append(_NAMES[text])

    def name_of_stack(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise Refused("a name that is no text")
        self.name(module, name)

    def items(self, pairs: list[Any]) -> None:
        target = self.top(dict)
        if len(pairs) % 2:
            raise Refused("a dict with a key and no value")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | int):
                raise Refused(f"a dict with a {type(key).__name__} as its key")
            target[key] = value

    def append(self, values: list[Any]) -> None:
        target = self.top(list)
        target.extend(values)

    def tuple_of(self, n: int) -> None:
        self.stack.append(tuple([self.pop() for _ in range(n)][::-1]))

    def persistent(self) -> None:
        """A storage: ("storage", its type, its key, where it was, how many numbers)."""
        match self.pop():
            case ("storage", _Name(text), str(key), str(), int(count)) if count >= 0:
                dtype = _STORAGES.get(text.removeprefix("torch."))
                if dtype is None:
                    raise Refused(f"a storage of type {text}")
                self.stack.append(self.storage(dtype, key, count))
            case _:
                raise Refused("a reference that is no tensor's")

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        match function, arguments:
            case _Name("collections.OrderedDict"), ():
                self.stack.append({})
            case _Name("torch._utils._rebuild_tensor_v2"), (
                _Storage() as storage,
                int(offset),
                tuple(shape),
                tuple(strides),
                _,
                dict(),
            ):
                self.stack.append(_tensor(storage, offset, shape, strides))
            case _Name("torch._utils._rebuild_parameter"), (Tensor() as tensor, _, dict()):
                self.stack.append(tensor)
            case _Name(text), _:
                raise Refused(f"a call of {text} with other arguments than torch.save writes")
            case _:
                raise Refused("a call of what is no name")

    def build(self) -> None:
        """Attributes of a dict, as torch gives a state dict its versions; of no use here."""
        if not isinstance(self.pop(), dict):
            raise Refused("attributes that are no dict")
        self.top(dict)


def _tensor(storage: _Storage, offset: int, shape: Any, strides: Any) -> Tensor:
    sizes = (offset, *shape, *strides)
    if len(shape) != len(strides) or len(shape) > 8:
        raise Refused("a tensor with another number of strides than axes")
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**48 for n in sizes):
        raise Refused("a tensor of sizes that cannot be")
    count = len(storage.numbers)
    numel = 1
    for n in shape:
        numel *= n
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if numel > count or (numel and last >= count):
        raise Refused("a tensor larger than its numbers")
    if not numel:
        return torch.empty(shape, dtype=storage.dtype)
    # A view: however often a file names its numbers, they are in memory once.
    return storage.numbers.as_strided(shape, strides, offset)


def _long(machine: _Machine) -> None:
    n = machine.number("<B")
    if n > 16:
        raise Refused("a number of more than 128 bits")
    machine.stack.append(int.from_bytes(machine.bytes(n), "little", signed=True))


def _frame(machine: _Machine) -> None:
    machine.bytes(8)


def _protocol(machine: _Machine) -> None:
    if not 2 <= (version := machine.number("<B")) <= 4:
        raise Refused(f"pickle protocol {version}")


_OPCODES: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _protocol,
    b"\x95": _frame,
    b"}": lambda m: m.stack.append({}),
    b"]": lambda m: m.stack.append([]),
    b")": lambda m: m.stack.append(()),
    b"(": lambda m: m.marks.append(len(m.stack)),
    b"t": lambda m: m.stack.append(tuple(m.pop_mark())),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"N": lambda m: m.stack.append(None),
    b"\x88": lambda m: m.stack.append(True),
    b"\x89": lambda m: m.stack.append(False),
    b"J": lambda m: m.stack.append(m.number("<i")),
    b"K": lambda m: m.stack.append(m.number("<B")),
    b"M": lambda m: m.stack.append(m.number("<H")),
    b"G": lambda m: m.stack.append(m.number(">d")),
    b"\x8a": _long,
    b"X": lambda m: m.stack.append(m.bytes(m.number("<I")).decode("utf-8")),
    b"\x8c": lambda m: m.stack.append(m.bytes(m.number("<B")).decode("utf-8")),
    b"q": lambda m: m.put(m.number("<B")),
    b"r": lambda m: m.put(m.number("<I")),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"h": lambda m: m.get(m.number("<B")),
    b"j": lambda m: m.get(m.number("<I")),
    b"c": lambda m: m.name(m.line(), m.line()),
    b"\x93": lambda m: m.name_of_stack(),
    b"Q": lambda m: m.persistent(),
    b"R": lambda m: m.reduce(),
    b"b": lambda m: m.build(),
    b"s": lambda m: m.items([m.pop(), m.pop()][::-1]),
    b"u": lambda m: m.items(m.pop_mark()),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.pop_mark()),
}
