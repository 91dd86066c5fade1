"""Tensors and options of files that come from elsewhere: each is asked for by name, with what it
must be, and what nobody asked for is refused.

Nothing here runs anything that a file says, and whatever is wrong with a file is a CheckpointError
that names the file, the value and the rule.
"""

import json
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saekit.errors import CheckpointError, first_line, nearest

_CONFIG_BYTES = 1 << 22
"""More than any config that was ever met."""

_RATIO = 20
"""How far weights may be compressed; floating-point numbers hardly can."""

_LARGEST = torch.finfo(torch.float32).max

_T = TypeVar("_T", int, float, str, bool)


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Raises CheckpointError where the file is missing, damaged, or no such file."""
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(path, error) from error


def load_npz(path: Path) -> dict[str, Tensor]:
    """Arrays of numbers from an .npz file. Raises CheckpointError for any other content."""
    try:
        with zipfile.ZipFile(path) as archive:
            bounded(path, archive, _RATIO)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: _tensor(path, name, arrays[name]) for name in arrays.files}
    except (OSError, ValueError, KeyError, EOFError, TypeError, SyntaxError) as error:
        raise unreadable(path, error) from error
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, MemoryError) as error:
        raise unreadable(path, error) from error
    except (zlib.error, OverflowError, struct.error, IndexError, AttributeError) as error:
        raise unreadable(path, error) from error


def bounded(path: Path, archive: zipfile.ZipFile, ratio: int = 1) -> None:
    """Raises CheckpointError where a zip file's entries claim to unpack to more than `ratio` times
    what the file holds, overlap, or are encrypted; with 1, where any is compressed."""
    total = 0
    for entry in archive.infolist():
        total += entry.file_size
        packed = entry.compress_type != zipfile.ZIP_STORED
        if entry.flag_bits & 1 or (packed and ratio == 1):
            raise CheckpointError(
                f"{path} has '{entry.filename[:80]}' compressed or encrypted, as no tool writes it"
            )
    if total > ratio * path.stat().st_size:
        raise CheckpointError(
            f"{path} claims to unpack to {total:,} bytes, far more than it can hold: it is not read"
        )


def _tensor(path: Path, name: str, array: Any) -> Tensor:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise CheckpointError(f"{path}: '{name[:80]}' is {kind}, not an array of numbers")
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))


def load_json(path: Path) -> "Options":
    """Raises CheckpointError where the file is missing or holds no JSON object."""
    return _options(path, json.loads)


def load_yaml(path: Path) -> "Options":
    """As `load_json`; only plain values are made, whatever tags the file has."""
    return _options(path, yaml.safe_load)


def _options(path: Path, parse: Any) -> "Options":
    try:
        if path.stat().st_size > _CONFIG_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes: it is no config")
        found = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError, TypeError, KeyError) as error:
        raise unreadable(path, error) from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise CheckpointError(f"{path} holds no object of named values")
    return Options(str(path), found)


def unreadable(path: Path, error: Exception) -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path} is not there")
    return CheckpointError(f"{path} cannot be read: {type(error).__name__}: {first_line(error)}")


class Options:
    """The values of a config."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where = where
        self.left = dict(values)
        """What nobody asked for yet."""

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str, kind: type[_T], default: _T | None = None) -> _T:
        """A value, which must be there unless there is a default; null counts as not there."""
        found = self.left.pop(name, None)
        if found is None:
            if default is None:
                raise CheckpointError(f"{self.where} lacks '{name}', which must be there")
            return default
        return self._as(name, found, kind)

    def take_if(self, name: str, kind: type[_T]) -> _T | None:
        found = self.left.pop(name, None)
        return None if found is None else self._as(name, found, kind)

    def within(self, name: str) -> "Options":
        """The values of an object inside this one; empty where there is none."""
        found = self.left.pop(name, None)
        if found is None:
            found = {}
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            raise self._wrong(name, found, "an object of named values")
        return Options(f"{self.where}, {name}", found)

    def must_be(self, name: str, *allowed: Any, why: str) -> None:
        """Raises CheckpointError, with the reason, where the value is there and another one."""
        found = self.left.pop(name, allowed[0])
        # 1 == True in Python, but not here.
        if not any(found == one and type(found) is type(one) for one in allowed):
            raise CheckpointError(f"{self.where}: {name}={_shown(found)} cannot be held: {why}")

    def finish(self, *harmless: str) -> None:
        """Raises CheckpointError for a value that nobody asked for and that is none of these, which
        have no say in what the SAE computes."""
        for name in self.left:
            if name not in harmless:
                raise CheckpointError(
                    f"{self.where} has '{name[:80]}', which this saekit does not know, so that "
                    "what it changes would be lost: upgrade saekit, or take the value out if it "
                    "changes nothing"
                )

    def scalars(self) -> dict[str, Any]:
        """Of what nobody asked for yet, the texts and numbers: for the record."""
        kept = {
            name: value
            for name, value in self.left.items()
            if value is None or isinstance(value, str | int | float | bool)
        }
        return {
            name: value
            for name, value in kept.items()
            if not isinstance(value, float) or math.isfinite(value)
        }

    def _as(self, name: str, found: Any, kind: type[_T]) -> _T:
        whole = isinstance(found, float) and found.is_integer() and abs(found) < 2**53
        if kind is float and isinstance(found, int) and not isinstance(found, bool):
            found = float(found) if abs(found) < 2**53 else math.inf
        elif kind is int and whole:
            found = int(found)
        if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
            raise self._wrong(name, found, f"a {kind.__name__}")
        if isinstance(found, float) and not abs(found) <= _LARGEST:
            raise self._wrong(name, found, "a number that float32 can hold")
        return found

    def _wrong(self, name: str, found: Any, rule: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name}={_shown(found)} must be {rule}")


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)[:80]


class Tensors:
    """The tensors of a file. Sizes go by name: the first tensor that has an axis says how long it
    is, and all others must agree."""

    def __init__(self, where: Path | str, tensors: Mapping[str, Tensor]) -> None:
        self.where = str(where)
        self.left = dict(tensors)
        """What nobody asked for yet."""
        self.sizes: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str, *axes: str) -> Tensor:
        """A tensor of these axes, in float32 at least.

        Raises CheckpointError where it is missing, of other axes or sizes, not of floating point,
        or holds anything that is not finite.
        """
        if name not in self.left:
            raise CheckpointError(
                f"{self.where} lacks '{name}', which must be there; {nearest(name, self.left)}"
                if self.left
                else f"{self.where} lacks '{name}', which must be there"
            )
        tensor = self.left.pop(name)
        shape = tuple(tensor.shape)
        want = tuple(self.sizes.get(axis, size) for axis, size in zip(axes, shape, strict=False))
        if len(shape) != len(axes) or shape != want or 0 in shape:
            sizes = ", ".join(f"{axis} {self.sizes.get(axis, '(any)')}" for axis in axes)
            raise CheckpointError(
                f"{self.where}: '{name}' has shape {list(shape)}, but must be [{sizes}]"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{self.where}: '{name}' is {tensor.dtype}, but must be of floating point"
            )
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        if not tensor.isfinite().all():
            n = int((~tensor.isfinite()).sum())
            raise CheckpointError(
                f"{self.where}: '{name}' has {n} values that are not finite, of {tensor.numel()}: "
                "the file is damaged, or its training failed"
            )
        self.sizes |= dict(zip(axes, shape, strict=True))
        return tensor

    def take_if(self, name: str, *axes: str) -> Tensor | None:
        return self.take(name, *axes) if name in self.left else None

    def number(self, name: str) -> float:
        """A tensor of one finite number, of any dtype."""
        if name not in self.left:
            raise CheckpointError(f"{self.where} lacks '{name}', which must be there")
        tensor = self.left.pop(name)
        if tensor.numel() != 1 or tensor.dtype == torch.bool or tensor.is_complex():
            raise CheckpointError(
                f"{self.where}: '{name}' is {tensor.dtype} of shape {list(tensor.shape)}, but must "
                "be one number"
            )
        value = float(tensor)
        if not math.isfinite(value):
            raise CheckpointError(f"{self.where}: '{name}' is {value}, but must be finite")
        return value

    def whole(self, name: str) -> int:
        """A tensor of one whole number above 0."""
        value = self.number(name)
        if value != int(value) or value < 1:
            raise CheckpointError(
                f"{self.where}: '{name}' is {value:g}, but must be a whole number from 1"
            )
        return int(value)

    def size(self, axis: str) -> int:
        return self.sizes[axis]

    def finish(self, *harmless: str) -> None:
        """Raises CheckpointError for a tensor that nobody asked for and that is none of these,
        which have no say in what the SAE computes."""
        for name in self.left:
            if name not in harmless:
                raise CheckpointError(
                    f"{self.where} has a tensor '{name[:80]}', which this saekit does not know, so "
                    "that what it changes would be lost: it cannot be held"
                )


def nonnegative(where: str, threshold: Tensor) -> Tensor:
    """The thresholds of a tool that lets a latent through, negative values and all, where it
    exceeds its threshold. Raises CheckpointError for one below 0."""
    low = int((threshold < 0).sum())
    if low:
        raise CheckpointError(
            f"{where}: {low} thresholds are below 0 (the least {float(threshold.min()):.3g}), so "
            "that those latents would fire with negative values, which cannot be held"
        )
    return threshold
