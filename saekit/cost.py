"""What a training by several GPUs will take: memory, bytes exchanged, time of a step.

Of a TopK SAE by the fused step (`kernels.triton_step_mesh`). A step's time is a sum of parts, each
an amount by a rate that was measured; nothing is taken to overlap. The amounts are counted here,
as the kernels have them:

    product    2 rows d_in latents operations
    weights    24 bytes read and written of each weight that is updated, and pre-activations
    gathered   rows of weights and of the batch that entries ask for, mostly from a cache
    near, far  bytes that a process sends, by rings, on links within a machine and between them

Rows are those of one process (batch / data), latents those that it holds (d_sae / latent); each
updates a part of these (latents / data).
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from saekit.errors import ConfigError

FILE = Path(__file__).with_name("cost_figures.json")
"""Written by benchmarks/fit_cost.py."""

_ENTRY_BYTES = 30
"""What an entry of a code takes, in the code and in its index by latent."""
_HEAVY = 256
"""Entries of a chunk, whose sums have places of their own."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a kind of GPU and its links do. Rates are a second."""

    gpu: str
    operations: float
    """Of the product of the batch with the encoder, in bfloat16."""
    memory_bytes: float
    """Of the GPU's memory that a kernel moves."""
    gathered_bytes: float
    """That entries gather, mostly from a cache."""
    gpu_bytes: float
    """Memory of a GPU."""
    near_bytes: float
    """That a GPU sends to another of its machine."""
    far_bytes: float
    """That a GPU sends to another machine."""
    exchange_seconds: float
    """What an exchange of hardly anything takes."""
    measured: tuple[str, ...]
    """Which of these are from a measurement; the others are assumed."""

    @classmethod
    def load(cls) -> "Figures":
        """Those that come with saekit."""
        held = json.loads(FILE.read_text(encoding="utf-8"))
        return cls(**{**held, "measured": tuple(held["measured"])})

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "measured": list(self.measured)}


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained, and by whom."""

    d_in: int
    d_sae: int
    k: int
    batch_size: int
    data: int = 1
    latent: int = 1
    per_node: int = 8
    """GPUs of a machine."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ConfigError(f"{field.name}={getattr(self, field.name)} must be at least 1")
        if self.d_sae % (self.latent * self.data) or self.batch_size % self.data:
            raise ConfigError(
                f"d_sae={self.d_sae} must be a multiple of data x latent={self.data} x "
                f"{self.latent}, and batch_size={self.batch_size} of data: give other sizes"
            )

    @property
    def rows(self) -> int:
        return self.batch_size // self.data

    @property
    def latents(self) -> int:
        return self.d_sae // self.latent

    @property
    def updated(self) -> int:
        return self.latents // self.data

    @property
    def entries(self) -> int:
        """Of the whole batch, of which a process has places for those of its row of the mesh."""
        return self.batch_size * min(self.k, self.latents)

    def memory(self) -> dict[str, float]:
        """Bytes that a process holds."""
        weights = 2.0 * self.d_in
        chunks = (2 * self.entries / _HEAVY + 1) * (2 * self.d_in * 4 + self.batch_size)
        return {
            # In float32 and bfloat16, with two moments, and the lower bits of what is updated.
            "weights": weights * (self.latents * (4 + 2 + 8) + self.updated * 2),
            "pre-activations": 2.0 * self.rows * self.latents,
            "codes": self.entries * _ENTRY_BYTES + chunks,
            "rows": self.batch_size * self.d_in * 4.0
            + self.rows * self.d_in * (4 + 4 * (self.latent > 1)),
        }

    def sent(self) -> dict[str, float]:
        """Bytes that a process sends a step, by what for."""
        data, latent, rows = self.data, self.latent, self.rows
        return {
            "candidates": (latent - 1) * rows * min(self.k, self.latents) * 2.0,
            "reconstructions": 2 * (latent - 1) / latent * rows * self.d_in * 4,
            "codes": (data - 1) * rows * min(self.k, self.latents) * 6.0,
            "errors and rows": (data - 1) * rows * self.d_in * 4.0,
            "weights": (data - 1) * self.updated * 2 * self.d_in * 2.0,
        }

    def seconds(self, figures: Figures) -> dict[str, float]:
        """Of a step, by part."""
        amounts = self.amounts()
        sent, exchanges = self.sent(), {"latent": 3, "data": 7}
        near = far = 0.0
        for axis, names in (
            ("latent", ("candidates", "reconstructions")),
            ("data", ("codes", "errors and rows", "weights")),
        ):
            size = self.latent if axis == "latent" else self.data
            if size == 1:
                continue
            # Ranks go along the latents first: those of a machine share latents, if they fit.
            crosses = (self.latent if axis == "latent" else self.data * self.latent) > self.per_node
            rate = figures.far_bytes if crosses else figures.near_bytes
            took = sum(sent[name] for name in names) / rate
            took += exchanges[axis] * figures.exchange_seconds
            near, far = (near, far + took) if crosses else (near + took, far)
        return {
            "product": amounts[0] / figures.operations,
            "weights": amounts[1] / figures.memory_bytes,
            "gathered": amounts[2] / figures.gathered_bytes,
            "near": near,
            "far": far,
        }

    def amounts(self) -> tuple[float, float, float]:
        """Operations of the product, bytes of memory moved, bytes gathered."""
        product = 2.0 * self.rows * self.d_in * self.latents
        moved = 24.0 * 2 * self.d_in * self.updated + 2 * 2.0 * self.rows * self.latents
        # An entry asks for a row of W_dec, and then for its row of the batch and of the error.
        each = self.batch_size * self.k / (self.data * self.latent)
        return product, moved, each * self.d_in * (2 + 4)


def quickest(
    figures: Figures, *, gpus: int, per_node: int, d_in: int, d_sae: int, k: int, batch_size: int
) -> Training | None:
    """The mesh of so many GPUs with the shortest step of those that fit; None where none does."""
    found: list[tuple[float, Training]] = []
    for data in range(1, gpus + 1):
        if gpus % data or d_sae % gpus or batch_size % data:
            continue
        one = Training(
            d_in=d_in,
            d_sae=d_sae,
            k=k,
            batch_size=batch_size,
            data=data,
            latent=gpus // data,
            per_node=per_node,
        )
        if sum(one.memory().values()) <= figures.gpu_bytes:
            found.append((sum(one.seconds(figures).values()), one))
    return min(found, key=lambda pair: pair[0])[1] if found else None
