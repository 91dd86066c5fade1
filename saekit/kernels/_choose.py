"""Which form of the ops a call takes: the definitions, PyTorch's own operators, or Triton kernels.

SAEKIT_KERNELS says: "auto" (where it is not set) takes Triton on GPUs that can run it and PyTorch's
operators elsewhere; "reference", "eager" and "triton" force one, which then never falls back.
Nothing is decided, and Triton is not imported, before the first call.

Also what a device multiplies matrices in, where no config says.
"""

import importlib
import logging
import os
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Literal, get_args

import torch

from saekit.errors import ConfigError, SaekitError, first_line, nearest
from saekit.kernels import memory

log = logging.getLogger(__name__)

Backend = Literal["reference", "eager", "triton"]

VARIABLE = "SAEKIT_KERNELS"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)
"""The oldest GPUs whose kernels are served: the first with bfloat16."""
MAX_WIDTH = 16_384
"""The widest rows: one program holds several of them in its registers."""
REMEDY = f"set {VARIABLE}=auto or {VARIABLE}=eager"


class KernelUnavailable(SaekitError):
    """A form of an op that was asked for and cannot run here."""


@dataclass(frozen=True)
class Choice:
    backend: Backend
    why: str


def choose(device: torch.device, dtype: torch.dtype = torch.float32, width: int = 1) -> Choice:
    """What an op on tensors of this device and dtype, and on rows of this width, will do, and why.

    Raises KernelUnavailable where SAEKIT_KERNELS forces a form that cannot run here, and
    ConfigError where it names none.
    """
    return _choose(device, dtype, width, os.environ.get(VARIABLE, "auto"))


def require_triton(device: torch.device, dtype: torch.dtype, width: int) -> None:
    """Raises KernelUnavailable where Triton kernels cannot run on such tensors."""
    if obstacle := _cannot_run(device, dtype, width):
        raise KernelUnavailable(f"Triton kernels were asked for, but {obstacle}: {REMEDY}")


@cache
def _choose(device: torch.device, dtype: torch.dtype, width: int, wanted: str) -> Choice:
    choice = _decide(device, dtype, width, wanted)
    _tell(device.type, choice)
    return choice


@cache
def _tell(device: str, choice: Choice) -> None:
    """Once for each choice, whatever the dtypes and widths that it is made for."""
    log.info("kernels on %s: %s (%s)", device, choice.backend, choice.why)


def _decide(device: torch.device, dtype: torch.dtype, width: int, wanted: str) -> Choice:
    forms = ("auto", *get_args(Backend))
    if wanted not in forms:
        raise ConfigError(
            f"{VARIABLE}='{wanted}' is no form of the kernels; {nearest(wanted, forms)}"
        )
    if wanted in ("reference", "eager"):
        return Choice(wanted, f"{VARIABLE}={wanted}")  # type: ignore[arg-type]
    if wanted == "triton":
        if obstacle := triton_obstacle(device, dtype, width):
            raise KernelUnavailable(f"{VARIABLE}=triton, but {obstacle}: {REMEDY}")
        return Choice("triton", f"{VARIABLE}=triton")
    if device.type != "cuda":
        return Choice("eager", f"Triton is for GPUs, and this is {device.type}")
    obstacle = triton_obstacle(device, dtype, width)
    if obstacle:
        log.warning("%s: training is several times slower than with Triton", obstacle)
        return Choice("eager", obstacle)
    return Choice("triton", torch.cuda.get_device_name(device))


def triton_obstacle(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Why Triton kernels cannot serve such tensors; empty where they can."""
    if obstacle := _cannot_run(device, dtype, width):
        return obstacle
    if device.type == "cuda" and (off := self_test(device)):
        listed = "; ".join(f"{name}: {what}" for name, what in off.items())
        return (
            f"on {torch.cuda.get_device_name(device)} Triton kernels are off ({listed}), as their "
            f"self-test found (it is kept in {memory.path()}; delete it to try again)"
        )
    return ""


def _cannot_run(device: torch.device, dtype: torch.dtype, width: int) -> str:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"the tensors are on {device.type} and Triton needs a GPU"
    if dtype not in DTYPES:
        return f"the tensors are {dtype}, and its kernels take float32, bfloat16 and float16"
    if width > MAX_WIDTH:
        return f"rows are {width} wide, and its kernels hold up to {MAX_WIDTH}"
    if device.type == "cuda" and torch.version.hip is not None:
        return "this build of torch is for AMD, on which the kernels were never tried"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < CAPABILITY:
            return (
                f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and "
                f"the kernels need {CAPABILITY[0]}.{CAPABILITY[1]}"
            )
    try:
        triton_backend()
    except ImportError as error:
        return f"Triton cannot be imported ({first_line(error)}); pip install triton"
    return ""


@cache
def self_test(device: torch.device) -> dict[str, str]:
    """The Triton kernels that are off on a GPU; tried out once, and then remembered."""
    known: dict[str, str] | None = memory.recall(device, "self-test")
    if known is None:
        log.info("trying the Triton kernels out on %s, once", torch.cuda.get_device_name(device))
        found: dict[str, str] = importlib.import_module("saekit.kernels.triton_self_test").failures(
            device
        )
        memory.remember(device, "self-test", found)
        return found
    return known


def usual_precision(device: torch.device) -> Literal["float32", "bfloat16"]:
    """bfloat16 on GPUs that multiply it without emulating it, float32 elsewhere."""
    halves = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if halves else "float32"


def triton_backend() -> ModuleType:
    """The module of the Triton kernels, which imports Triton."""
    return importlib.import_module("saekit.kernels.triton_backend")
