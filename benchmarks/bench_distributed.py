"""What several GPUs make of a training step, a harvest and the largest dictionary, against one.

    torchrun --nproc-per-node 2 benchmarks/bench_distributed.py
    torchrun --nproc-per-node 2 benchmarks/bench_distributed.py --parts link latent data
    TRITON_INTERPRET=1 torchrun --nproc-per-node 2 benchmarks/bench_distributed.py --device cpu \\
        --latent 16 64 4 --data 16 64 4 --batch-size 8 --rounds 2 --parts link check latent data

- link: bytes a second of the exchanges, and how long a small one takes
- check: a step by all against one by one process, before anything is timed
- latent: TopK's fused step with the latents shared out; the same batch for all
- data: the same with the rows shared out; a batch of the one's size for each
- largest: how many latents fit, on one and on all
- harvest: rows a second through a random model and onto the disk, by one and by all

Efficiency is what one process takes by what all take a piece of the same work. Each process runs
the one-process case by itself at the same time, and the slowest counts.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _record import RESULTS, append, show
from torch import Tensor

from saekit import distributed
from saekit.distributed import ALONE, Mesh
from saekit.kernels.bench_setting import GIB, forget, milliseconds

PARTS = ("link", "check", "latent", "data", "largest", "harvest")
MULTIPLE = 4_096
"""Latents that sizes are multiples of when looking for the largest."""
NEAR = 2e-2
"""Relative to the largest entry: what rounding to bfloat16 makes of three steps of Adam."""

Line = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shape: dict[str, Any] = {"nargs": 3, "type": int, "metavar": ("D_IN", "D_SAE", "K")}
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--latent", **shape, default=[4_096, 262_144, 64])
    parser.add_argument("--data", **shape, default=[2_048, 65_536, 64])
    parser.add_argument("--largest", **shape, default=[4_096, 0, 64], help="D_SAE is looked for")
    parser.add_argument("--batch-size", type=int, default=8_192)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warm-ups", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--harvest-model", default="gpt-1b")
    parser.add_argument("--harvest-tokens", type=int, default=262_144, help="of each process")
    parser.add_argument("--harvest-out", type=Path, help="a folder; else one in /dev/shm")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


class Bench:
    """All processes of a mesh, which make every call together."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        rank, self.n = distributed.place()
        on_gpu = args.device == "cuda"
        self.device = torch.device(f"cuda:{rank % torch.cuda.device_count()}" if on_gpu else "cpu")
        self.low = "bfloat16" if on_gpu else "float32"
        self.by_latents = distributed.connect((1, self.n), self.device)
        self.by_rows = distributed.connect((self.n, 1), self.device)
        self.rank = rank

    def slowest(self, value: float) -> float:
        return float(self.by_rows.reduce(torch.tensor(value, dtype=torch.float64), "all", "max"))

    def timed(self, call: Callable[[], object]) -> float:
        """Milliseconds, the median of the process that took longest."""
        took = milliseconds(call, self.device, self.args.rounds, self.args.warm_ups)
        return self.slowest(statistics.median(took))

    def link(self) -> list[Line]:
        lines = []
        for name, n_bytes in (("small", 4 << 10), ("middle", 64 << 20), ("large", 512 << 20)):
            if self.device.type == "cpu":
                n_bytes //= 64
            t = torch.zeros(n_bytes // 4, device=self.device)
            parts = list(torch.empty(self.n * t.numel(), device=self.device).chunk(self.n))
            for op, moved, call in (
                # What each process sends, by the ring: an all-reduce each byte twice but for its
                # own part.
                ("all_reduce", 2 * (self.n - 1) / self.n, lambda t=t: dist.all_reduce(t)),
                ("all_gather", self.n - 1, lambda t=t, parts=parts: dist.all_gather(parts, t)),
            ):
                ms = self.timed(call)
                sent = moved * n_bytes
                lines.append(
                    {"op": f"link {op}", "variant": name, "bytes": n_bytes, "ms": round(ms, 4)}
                    | {"gb_per_s": round(sent / ms / 1e6, 2)}
                )
        return lines

    def step(self, mesh: Mesh, shape: list[int], batch: int) -> tuple[Any, Callable[[], Tensor]]:
        """A step as trainers take it, from random weights, and a call that takes one."""
        from saekit.kernels.triton_step import FusedTopKStep
        from saekit.kernels.triton_step_mesh import FusedMeshStep

        d_in, d_sae, k = shape
        given = parameters(d_in, d_sae, mesh, self.device)
        counts = (
            torch.zeros(len(given[1]), dtype=torch.int64, device=self.device) for _ in range(2)
        )
        options: dict[str, Any] = dict(zip(("since", "fired"), counts, strict=True))
        options |= {"k": k, "batch_size": batch, "precision": self.low, "deterministic": True}
        options["split_master"] = self.low == "bfloat16"
        if mesh.size == 1:
            step: Any = FusedTopKStep(*given, graph=True, **options)
        else:
            step = FusedMeshStep(*given, mesh=mesh, **options)
        step.lr.fill_(1e-4)
        rows = batch // mesh.data
        held = [rows_of(i, batch, d_in, self.device)[:batch] for i in range(2)]
        held = [x[mesh.data_rank * rows : (mesh.data_rank + 1) * rows].clone() for x in held]
        number = [0]

        def call() -> Tensor:
            number[0] += 1
            loss: Tensor = step(held[number[0] % 2])
            return loss

        return step, call

    def check(self) -> list[Line]:
        lines: list[Line] = []
        shape = [512, 8_192, 32] if self.device.type == "cuda" else self.args.latent
        batch = 1_024 if self.device.type == "cuda" else self.args.batch_size
        for name, mesh in (("latent", self.by_latents), ("data", self.by_rows)):
            found: list[tuple[list[float], Tensor, float]] = []
            for one in (ALONE, mesh):
                step, call = self.step(one, shape, batch)
                losses = [call().item() for _ in range(3)]
                step.write_back()
                W_dec = step._whole["W_dec"] if one.size > 1 else step.parameters["W_dec"]
                found.append((losses, one.whole(W_dec).float(), float(step.l0)))
            (losses, wanted, l0), (ours, W_dec, our_l0) = found
            off = float((W_dec - wanted).abs().max() / wanted.abs().max())
            of_loss = max(abs(a / b - 1) for a, b in zip(ours, losses, strict=True))
            if off > NEAR or of_loss > NEAR or abs(our_l0 - l0) > 0.01:
                raise SystemExit(
                    f"{name}: a step by {self.n} is not that of one: weights off by {off:.1e}, the "
                    f"loss by {of_loss:.1e}, L0 {our_l0:g} for {l0:g}"
                )
            lines.append({"op": f"check {name}", "weights": off, "loss": of_loss})
        return lines

    def against_one(self, name: str, mesh: Mesh, shape: list[int], batches: int) -> list[Line]:
        """One process with one batch, and all with `batches` of them."""
        found = []
        for one, batch in ((ALONE, self.args.batch_size), (mesh, batches * self.args.batch_size)):
            forget(self.device)
            step, call = self.step(one, shape, batch)
            ms = self.timed(call)
            gib = 0.0
            if self.device.type == "cuda":
                gib = torch.cuda.max_memory_allocated(self.device) / GIB
            found.append((ms, self.slowest(gib)))
            del step, call
        (alone, gib), (all_ms, all_gib) = found
        ideal = alone * batches / self.n
        return [
            {
                "op": f"topk step, {name}",
                "mesh": str(mesh),
                **dict(zip(("d_in", "d_sae", "k"), shape, strict=True)),
                "batch": batches * self.args.batch_size,
                "ms_alone": round(alone, 3),
                "ms": round(all_ms, 3),
                "efficiency": round(ideal / all_ms, 4),
                "peak_gib_alone": round(gib, 2),
                "peak_gib": round(all_gib, 2),
            }
        ]

    def latent(self) -> list[Line]:
        return self.against_one("latents shared", self.by_latents, self.args.latent, 1)

    def data(self) -> list[Line]:
        return self.against_one("rows shared", self.by_rows, self.args.data, self.n)

    def fits(self, mesh: Mesh, d_sae: int) -> bool:
        forget(self.device)
        d_in, _, k = self.args.largest
        good = 1.0
        step = call = None
        try:
            step, call = self.step(mesh, [d_in, d_sae, k], self.args.batch_size)
        except torch.OutOfMemoryError:
            good = 0.0
        # All or none go on, as a step needs all.
        if self.slowest(1 - good) > 0:
            return False
        assert call is not None
        try:
            for _ in range(3):
                call()
            torch.cuda.synchronize(self.device)
        except torch.OutOfMemoryError:
            good = 0.0
        del step, call
        return self.slowest(1 - good) == 0

    def largest(self) -> list[Line]:
        if self.device.type != "cuda":
            return []
        found = []
        total = torch.cuda.get_device_properties(self.device).total_memory
        for mesh in (ALONE, self.by_latents):
            # 12 bytes a weight that is trained and 4 that is given, and pre-activations.
            each = 2 * self.args.largest[0] * 16 + 2 * self.args.batch_size
            guess = int(mesh.latent * total / each) // MULTIPLE
            low, high = int(0.85 * guess), int(1.05 * guess)
            while high - low > max(1, guess // 200):
                middle = (low + high) // 2
                multiple = middle - middle % mesh.latent
                low, high = (
                    (middle, high) if self.fits(mesh, multiple * MULTIPLE) else (low, middle)
                )
            found.append(low * MULTIPLE)
        return [
            {
                "op": "largest",
                "d_in": self.args.largest[0],
                "k": self.args.largest[2],
                "batch": self.args.batch_size,
                "d_sae_alone": found[0],
                "d_sae": found[1],
                "ratio": round(found[1] / found[0], 4),
            }
        ]

    def harvest(self) -> list[Line]:
        from bench_harvest import random_batches, random_model, spread

        from saekit import HarvestConfig, harvest

        forget(self.device)
        args = argparse.Namespace(batch_size=16, context=512, n_tokens=self.args.harvest_tokens)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        model = random_model(self.args.harvest_model, str(self.device), dtype)
        batches = random_batches(32_000, args)
        hooks = spread(model, 4)
        cfg = HarvestConfig(
            model=model.name,
            dataset="batches",
            hooks=hooks,
            n_tokens=args.n_tokens,
            context=args.context,
            batch_size=args.batch_size,
            dtype="bfloat16",
            memory_mib=4096,
            shard_mib=512,
            device=str(self.device),
        )
        seconds: dict[str, list[float]] = {"one": [], "all": []}
        for turn in range(3):
            for who in seconds:
                took = 0.0
                self.by_rows.barrier()
                if who == "all" or self.rank == 0:
                    with tempfile.TemporaryDirectory(
                        dir=self.args.harvest_out or "/dev/shm"
                    ) as out:
                        begun = time.perf_counter()
                        harvest(cfg, f"{out}/cache", model=model, data=lambda _: iter(batches))
                        took = time.perf_counter() - begun
                took = self.slowest(took)
                if turn > 0:
                    seconds[who].append(took)
        one, every = (statistics.median(took) for took in seconds.values())
        return [
            {
                "op": "harvest",
                "model": model.name,
                "hooks": len(hooks),
                "n_tokens": args.n_tokens,
                "tokens_per_s_alone": round(args.n_tokens / one),
                "tokens_per_s": round(self.n * args.n_tokens / every),
                "ratio": round(self.n * one / every, 4),
            }
        ]


def parameters(d_in: int, d_sae: int, mesh: Mesh, device: torch.device) -> list[Tensor]:
    """Of the latents that are held here; the same for a latent, however they are shared out."""
    held = mesh.held(d_sae)
    W_dec = torch.empty(held.stop - held.start, d_in, device=device)
    # So that up to 64 processes draw what one does.
    at_once = max(1, d_sae // 64)
    for first in range(held.start, held.stop, at_once):
        n = min(at_once, held.stop - first)
        g = torch.Generator(device).manual_seed(1 + first)
        rows = torch.randn(n, d_in, device=device, generator=g)
        W_dec[first - held.start : first - held.start + n] = rows / rows.norm(dim=1, keepdim=True)
    b_enc = torch.zeros(len(W_dec), device=device)
    return [W_dec.clone(), W_dec, b_enc, torch.zeros(d_in, device=device)]


def rows_of(number: int, batch: int, d_in: int, device: torch.device) -> Tensor:
    g = torch.Generator(device).manual_seed(10_000 + number)
    return torch.randn(batch, d_in, device=device, generator=g)


def main() -> None:
    args = arguments()
    bench = Bench(args)
    lines: list[Line] = []
    begun = time.perf_counter()
    for part in PARTS:
        if part not in args.parts:
            continue
        for line in getattr(bench, part)():
            took = round(time.perf_counter() - begun, 1)
            lines.append({"impl": "saekit", "processes": bench.n, "device": args.device, **line})
            if bench.rank == 0:
                append("distributed", lines[-1], args.results)
                print(f"{took:7.1f} s  {line}", flush=True)
    distributed.disconnect()
    if bench.rank == 0:
        keys = ("op", "ms_alone", "ms", "efficiency", "ratio", "gb_per_s")
        show(
            f"{bench.n} processes",
            keys,
            [[str(line.get(key, "")) for key in keys] for line in lines],
        )


if __name__ == "__main__":
    main()
