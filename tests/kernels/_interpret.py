"""Triton kernels without a GPU: in Triton's interpreter, which runs their programs one after
another.

To be run before a kernel's module is imported: `runpy.run_path` gives DEVICE.
"""

import importlib
import os
import sys
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    os.environ["TRITON_INTERPRET"] = "1"
    # Triton's own functions are made for the interpreter or not when they are imported, which
    # torch may have done already. What is compiled can only be loaded once.
    for name in list(sys.modules):
        if name.split(".")[0] == "triton" and not name.startswith("triton._C"):
            del sys.modules[name]

pytest.importorskip("triton")


def _count_with_single_numbers() -> None:
    """The interpreter (3.6) holds a number as an array of one, of which numpy 2.4 makes no int."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    if hasattr(interpreter, "_counts"):
        return
    interpreter._counts = True
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda number: number.handle.data.item())

    interpreter._patch_lang_tensor = patched


if DEVICE == "cpu":
    _count_with_single_numbers()
