"""A shape on a device, and how what is timed there is measured: a case becomes a line of results.

Times are of the GPU's own clock, or of the CPU's; medians. Four batches in rotation. Memory is the
most that torch had in use for a case, weights and moments with it, the four batches without.
"""

import gc
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import saekit
from saekit import kernels
from saekit.errors import ConfigError, SaekitError, first_line, nearest

Line = dict[str, Any]
"""Of results. `ms` is the median, None where there is an `error`."""
Facts = dict[str, Any]
"""Plain values for a line, or tensors of one number. `loss` must be finite."""
Make = Callable[[], tuple[Callable[[], object], Facts]]
"""Builds what is timed; its call may renew the facts."""

GIB = 1 << 30
PLAIN = "plain torch"
"""What all else is measured against."""


@dataclass(frozen=True)
class Shape:
    d_in: int
    d_sae: int
    k: int

    def __post_init__(self) -> None:
        if self.d_in < 1 or self.d_sae < 1:
            raise ConfigError(
                f"shape {self.d_in} {self.d_sae} {self.k} lacks dimensions or latents: there must "
                "be at least one of each; give d_in, d_sae and k"
            )
        if not 0 < self.k <= self.d_sae:
            raise ConfigError(
                f"k={self.k} must lie in 1..d_sae={self.d_sae}: it is how many latents fire; "
                "give d_in, d_sae and k"
            )


SHAPES = {
    "S": Shape(768, 24_576, 32),
    "M": Shape(2_048, 65_536, 64),
    "L": Shape(4_096, 131_072, 64),
}


def shape_named(name: str) -> Shape:
    if name not in SHAPES:
        raise ConfigError(
            f"'{name}' is no shape that is known (--shape D_IN D_SAE K gives one of your own); "
            f"{nearest(name, SHAPES)}"
        )
    return SHAPES[name]


class Mistaken(SaekitError):
    """Something to be timed does not do what it should."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One shape on one device, and how often each case is timed."""

    shape: Shape
    batch_size: int
    device: torch.device
    rounds: int = 20
    warm_ups: int = 5
    name: str = ""
    """Of the shape."""
    plain: dict[str, list[float]] = field(default_factory=dict)
    """Milliseconds of plain PyTorch by op, once they are known."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "rounds"):
            if (given := getattr(self, name)) < 1:
                raise ConfigError(f"{name}={given} must be at least 1")

    @property
    def precision(self) -> str:
        """What is multiplied; weights and moments are float32."""
        return kernels.usual_precision(self.device)

    @cached_property
    def following(self) -> Callable[[], Float[Tensor, "batch d_in"]]:
        """Gives the next of four batches."""
        return rotation(self.shape.d_in, self.batch_size, self.device)

    @property
    def backend(self) -> str:
        return kernels.choose(self.device, torch.float32, self.shape.d_in).backend

    def line(self, op: str, impl: str, variant: str = "", **more: Any) -> Line:
        return {
            "impl": impl,
            "op": op,
            "variant": variant,
            "shape": self.name,
            "d_in": self.shape.d_in,
            "d_sae": self.shape.d_sae,
            "k": self.shape.k,
            "batch": self.batch_size,
            "precision": self.precision,
            "device": self.device.type,
            "hardware": hardware(self.device),
            "versions": versions(),
            **more,
        }

    def measure(self, op: str, impl: str, make: Make, variant: str = "", **more: Any) -> Line:
        """Time what `make` builds. Where memory does not suffice, the line says so."""
        # The batches are no case's own.
        _ = self.following
        forget(self.device)
        before = allocated(self.device)
        try:
            call, facts = make()
            took = milliseconds(call, self.device, self.rounds, self.warm_ups)
        except torch.OutOfMemoryError as error:
            return self.line(op, impl, variant, ms=None, error=first_line(error), **more)
        facts = {name: _plain_value(fact) for name, fact in facts.items()}
        if not _finite(facts.get("loss", 0.0)):
            raise Mistaken(
                f"the loss of {impl}, {op}, is {facts['loss']}, so its times say nothing; please "
                "report it"
            )
        if impl == PLAIN:
            self.plain[op] = took
        found = self.line(op, impl, variant, **summary(took), **more, **facts)
        if op.endswith("step"):
            found["tokens_per_s"] = round(self.batch_size / found["ms"] * 1e3)
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) - before
            found["peak_gib"] = round(peak / GIB, 3)
        if op in self.plain:
            found |= {"against": PLAIN, **ratio(took, self.plain[op])}
        return found


def _plain_value(fact: Any) -> Any:
    return float(fact) if isinstance(fact, Tensor) else fact


def _finite(loss: float) -> bool:
    return abs(loss) < float("inf")


def smaller(setting: Setting) -> Setting:
    """What float64 is quick at."""
    latents, rows = (8_192, 2_048) if setting.device.type == "cuda" else (2_048, 256)
    shape = setting.shape
    d_sae = min(shape.d_sae, max(latents, shape.k))
    return replace(
        setting, shape=replace(shape, d_sae=d_sae), batch_size=min(setting.batch_size, rows)
    )


def milliseconds(
    call: Callable[[], object], device: torch.device, rounds: int, warm_ups: int
) -> list[float]:
    for _ in range(warm_ups):
        call()
    if device.type != "cuda":
        took = []
        for _ in range(rounds):
            begun = time.perf_counter()
            call()
            took.append((time.perf_counter() - begun) * 1e3)
        return took
    events = []
    for _ in range(rounds):
        begins, ends = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begins.record()
        call()
        ends.record()
        events.append((begins, ends))
    torch.cuda.synchronize(device)
    return [float(begins.elapsed_time(ends)) for begins, ends in events]


def rotation(d_in: int, batch_size: int, device: torch.device) -> Callable[[], Tensor]:
    held = [torch.randn(batch_size, d_in, device=device) for _ in range(4)]
    number = [0]

    def following() -> Tensor:
        number[0] += 1
        return held[number[0] % len(held)]

    return following


def forget(device: torch.device) -> None:
    """Give a GPU's memory back, so that a case is not charged with that of the one before."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def summary(took: list[float]) -> Line:
    return {
        "ms": round(median(took), 5),
        "ms_min": round(min(took), 5),
        "ms_max": round(max(took), 5),
        "rounds": len(took),
    }


def ratio(took: list[float], plain: list[float]) -> dict[str, float]:
    """How many times as fast as plain PyTorch: of the medians, and pair by pair at least and at
    most."""
    pairs = [theirs / ours for ours, theirs in zip(took, plain, strict=True)]
    return {
        "ratio": round(median(plain) / median(took), 4),
        "ratio_min": round(min(pairs), 4),
        "ratio_max": round(max(pairs), 4),
    }


def hardware(device: torch.device) -> str:
    """What a device is called, and how many threads a CPU's work is spread over."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    named = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    name = named[0] if named else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "saekit": saekit.__version__}
    for package in ("torch", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def distance(ours: Tensor, theirs: Tensor) -> float:
    norm = float(theirs.norm())
    return float((ours.double() - theirs).norm()) / (norm or 1.0)
