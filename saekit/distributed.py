"""Processes that work together, as torchrun starts them: who is who, and what they exchange.

A `Mesh` is a grid of processes. Those of one row of it hold a part of a batch's rows, the same; the
latents are shared out among them. Those of one column hold the same latents. One process is a mesh
of 1 x 1, in which every exchange gives back what it was given: the plain case of the same code.

Everything goes through torch.distributed; nothing is pickled on the way.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.rendezvous import rendezvous

from saekit.errors import ConfigError, SaekitError, first_line
from saekit.watch import Watch

Axis = Literal["data", "latent", "all"]
"""Whom an exchange is between: those that hold the same latents, those that hold the same rows, or
all."""

# The older name is deprecated where there is the newer one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

STALL_SECONDS = 600.0
"""How long one process waits for another before it gives up."""


@dataclass(frozen=True, eq=False)
class Mesh:
    """A grid of `data` x `latent` processes; ranks go along a row first."""

    data: int = 1
    latent: int = 1
    rank: int = 0
    groups: dict[Axis, Any] = field(default_factory=dict)
    """Process groups of torch; empty for one process."""
    watch: Watch | None = None
    store: Store | None = None
    """Where the processes met; None for one."""

    @property
    def size(self) -> int:
        return self.data * self.latent

    @property
    def data_rank(self) -> int:
        return self.rank // self.latent

    @property
    def latent_rank(self) -> int:
        return self.rank % self.latent

    def __str__(self) -> str:
        return f"data={self.data},latent={self.latent}"

    def among(self, axis: Axis) -> int:
        """How many an exchange is between."""
        return {"data": self.data, "latent": self.latent, "all": self.size}[axis]

    def held(self, n: int) -> slice:
        """Which of n latents this process holds."""
        each = n // self.latent
        return slice(self.latent_rank * each, (self.latent_rank + 1) * each)

    def reduce(self, t: Tensor, axis: Axis, how: Literal["sum", "max", "min"] = "sum") -> Tensor:
        """The tensors of all, added up or the largest or smallest of each entry; in place."""
        if self.among(axis) > 1:
            self._enter()
            ops = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
            dist.all_reduce(t, ops[how], group=self.groups[axis])
        return t

    def gather(self, t: Tensor, axis: Axis) -> Tensor:
        """The tensors of all, which have one shape, along a new first axis, in the order of the
        ranks."""
        n = self.among(axis)
        if n == 1:
            return t[None]
        self._enter()
        out = t.new_empty((n * t.numel(),))
        _all_gather(out, t.contiguous().flatten(), group=self.groups[axis])
        return out.view(n, *t.shape)

    def fill(self, t: Tensor, own: slice, axis: Axis) -> None:
        """Fill a tensor of which each has a part, rows `own`, in the order of the ranks; in
        place."""
        if self.among(axis) > 1:
            self._enter()
            # NCCL lets a part lie where it belongs.
            part = t[own] if t.is_cuda else t[own].clone()
            _all_gather(t.flatten(), part.flatten(), group=self.groups[axis])

    def whole(self, t: Tensor, along: int = 0) -> Tensor:
        """The latents of all, which lie along an axis of t."""
        return t if self.latent == 1 else torch.cat(list(self.gather(t, "latent")), along)

    def collect(self, t: Tensor, along: int = 0) -> Tensor:
        """As `whole`, on the CPU, for rank 0 alone; the others get their own part back."""
        here = t.detach().cpu()
        self._enter()
        if self.latent == 1 or self.data_rank > 0:
            return here
        here = here.contiguous()
        parts = None
        if self.rank == 0:
            parts = [torch.empty_like(here) for _ in range(self.latent)]
        dist.gather(here, parts, group=self.groups["latent"], group_dst=0)
        return here if parts is None else torch.cat(parts, along)

    def rows(self, t: Tensor) -> Tensor:
        """The rows of the whole batch, in order."""
        return t if self.data == 1 else self.gather(t, "data").flatten(0, 1)

    def mean(self, t: Tensor) -> Tensor:
        """What is a mean over the rows held here, as one over all rows of the batch."""
        return t if self.data == 1 else self.reduce(t.clone(), "data") / self.data

    def add_up(self, t: Tensor) -> Tensor:
        """The parts that the latents of each process make of something, added up, with a gradient.

        Each process differentiates its share of the loss, 1 / `size` of it, and what every part of
        a sum is told by backward is what the sum is told: by this process alone a share, by all
        that hold these rows `latent` times as much.
        """
        if self.latent == 1:
            return t
        total: Tensor = _AddUp.apply(t, self)  # type: ignore[no-untyped-call]
        return total

    def same(self, t: Tensor) -> None:
        """Give all what rank 0 has; in place."""
        if self.size > 1:
            self._enter()
            dist.broadcast(t, 0, group=self.groups["all"])

    def numbers(self, own: Sequence[int]) -> list[int]:
        """The whole numbers that rank 0 has."""
        count = torch.tensor(len(own))
        self.same(count)
        found = torch.zeros(int(count), dtype=torch.int64)
        if self.rank == 0:
            found[:] = torch.tensor(own, dtype=torch.int64)
        if len(found):
            self.same(found)
        numbers: list[int] = found.tolist()
        return numbers

    def barrier(self) -> None:
        """Wait until all are here."""
        # Of a tensor on the CPU: the host waits, not the device.
        self.reduce(torch.zeros(1), "all")

    @contextmanager
    def taking_steps(self, doing: str) -> Iterator[None]:
        """For what all do together, such as "trained runs/a". Raises SaekitError where others are
        lost."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise SaekitError(
                f"rank {self.rank} of {self.size} lost touch with the others while it {doing} "
                f"({first_line(error)}): one of them ended, and torchrun says which. The same "
                "command goes on behind what is complete on disk, with any number of processes"
            ) from error
        finally:
            if self.watch is not None:
                self.watch.end()

    def _enter(self) -> None:
        if self.watch is not None:
            self.watch.entered += 1

    def begin(self, step: int) -> None:
        """This process begins a step."""
        if self.watch is not None:
            self.watch.begin(step)


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh, ctx.dtype = mesh, t.dtype
        # In float32, whatever the parts were multiplied in.
        return mesh.reduce(t.to(torch.float32, copy=True), "latent")

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return (grads[0] * ctx.mesh.latent).to(ctx.dtype), None


ALONE = Mesh()
"""One process."""

_here = ALONE
_met: Store | None = None


def here() -> Mesh:
    """The mesh that what is made now will be shared out over; see `shared_over`."""
    return _here


@contextmanager
def shared_over(mesh: Mesh) -> Iterator[None]:
    """What is made in the block is shared out over a mesh, as torch.device makes it on a device."""
    global _here
    before, _here = _here, mesh
    try:
        yield
    finally:
        _here = before


def place() -> tuple[int, int]:
    """Which of how many processes this is, as torchrun says it."""
    said = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(number.isdecimal() for number in said) or not int(said[0]) < int(said[1]):
        raise ConfigError(
            f"the environment has RANK={said[0]} and WORLD_SIZE={said[1]}: they must be the number "
            "of this process, from 0, and how many there are, as torchrun sets them. Unset both "
            "for one process"
        )
    return int(said[0]), int(said[1])


def shape_of(text: str | None, ranks: int) -> tuple[int, int]:
    """The mesh that "data=2,latent=4" asks for; where it is None, all share the latents on one
    machine, and machines share the batch.

    Raises ConfigError where that is no mesh, or one of another number of processes.
    """
    if text is None:
        near = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        return (ranks // near, near) if ranks % near == 0 else (1, ranks)
    sizes = {"data": 1, "latent": 1}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in sizes or not number.isdecimal() or int(number) < 1:
            raise ConfigError(
                f"mesh='{text}' is no mesh: give the sizes of its axes, such as data=2,latent=4"
            )
        sizes[name] = int(number)
    if sizes["data"] * sizes["latent"] != ranks:
        raise ConfigError(
            f"mesh='{text}' is of {sizes['data'] * sizes['latent']} processes, and there are "
            f"{ranks}: start as many with torchrun --nproc-per-node, or give another mesh"
        )
    return sizes["data"], sizes["latent"]


def connect(
    shape: tuple[int, int], device: str | torch.device, stall_seconds: float = STALL_SECONDS
) -> Mesh:
    """Join the processes that torchrun started to a mesh of (data, latent); once a process, and of
    one process nothing is done. `device` is where this one works."""
    global _met
    rank, ranks = place()
    if ranks == 1:
        return ALONE
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # The watch comes first, and names who is late.
        timeout = timedelta(seconds=2 * stall_seconds)
        store = next(iter(rendezvous("env://", timeout=timeout)))[0]
        _met = PrefixStore(agreed(store, rank, ranks, stall_seconds), store)
        dist.init_process_group(backend, store=_met, rank=rank, world_size=ranks, timeout=timeout)
    grid = init_device_mesh(device.type, shape, mesh_dim_names=("data", "latent"))
    groups: dict[Axis, Any] = {
        "data": grid.get_group("data"),
        "latent": grid.get_group("latent"),
        "all": dist.group.WORLD,
    }
    return Mesh(*shape, rank, groups, Watch(rank, ranks, stall_seconds), _met)


def agreed(store: Store, rank: int, ranks: int, seconds: float) -> str:
    """A name for this start of all processes, the same in each and never used before.

    torchrun keeps one store over its restarts, and no number in its environment is the same on
    every machine after one (pytorch issues 135712 and 167288): without a name, a process finds the
    addresses of those that have ended. Each other process says a name of its own until the first
    one answers with it, and with the name of the start; what an ended one has said is never
    answered twice.

    Raises SaekitError with the ranks that have not come after so many seconds.
    """
    mine, until = uuid4().hex, time.monotonic() + seconds
    left = set(range(1, ranks)) if rank == 0 else {0}
    name = mine
    if rank > 0:
        store.set(f"hello {rank}", mine)
    while left:
        if time.monotonic() > until:
            raise SaekitError(
                f"rank {rank} of {ranks} has waited {seconds:g} s for the start of rank "
                f"{', '.join(map(str, sorted(left)))}: look at what its machine says, and start "
                "all of them again"
            )
        if rank == 0:
            for other in left:
                store.set(f"answer {other}", f"{mine} {_said(store, f'hello {other}')}")
            left = {other for other in left if _said(store, f"heard {other}") != mine}
        else:
            name, _, answered = _said(store, f"answer {rank}").partition(" ")
            if answered == mine:
                store.set(f"heard {rank}", name)
                return name
        time.sleep(0.02)
    return name


def _said(store: Store, key: str) -> str:
    return str(store.get(key), "ascii") if store.check([key]) else ""


def disconnect() -> None:
    """Part from the others, where there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()
