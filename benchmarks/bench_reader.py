# pyright: reportPossiblyUnboundVariable=false
"""Shuffled batches from a cache against a plain sequential read of its files.

    python benchmarks/bench_reader.py --mib 2048
    python benchmarks/bench_reader.py --peers /path/to/a/peer's/python ...

The cache is made here, of random rows; one shuffled on disk is made from it. Plain read, first
epoch (every shard's checksum is compared) and a later epoch take turns in one process. Rates are
bytes of activations as they are stored, whatever type they are given in, over the plain read's. The
files are in the page cache where memory holds them; `--cold` drops them before each turn, where the
system allows that. Before anything is timed, the rows that come out are compared with those that
went in. With `--peers`, caches are made from text by SAELens and by saekit and each is read by its
own maker, and dictionary_learning's buffer, which has nothing on disk, runs the model.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _record import MIB, RESULTS, append, clear, file_system, ratio, show, summary
from bench_harvest import peer_of, text_file, told
from peers._driver import measured, plain_read
from torch import nn

from saekit import ActivationCache, HarvestConfig, harvest
from saekit.activations_cache.model_module import ModuleModel
from saekit.activations_cache.reader import Reader, threads_here
from saekit.activations_cache.shuffle import shuffle
from saekit.activations_cache.tokens import Cursor, TokenBatch
from saekit.demo import MODEL_DIR

HOOK = "rows"
_WINDOW = 256
_BATCH = 32


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=1024, help="size of the cache")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--prefetch", type=int, help="not given: as the reader has it")
    parser.add_argument("--threads", type=int, help="not given: as the reader has it")
    parser.add_argument("--split", default="train", choices=("train", "all"))
    parser.add_argument("--device", default="cpu", help="where the batches go")
    parser.add_argument("--out", type=Path, default=Path("bench-reader"), help="made and removed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-ups", type=int, default=1)
    parser.add_argument("--shard-mib", type=float, default=128.0)
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache")
    parser.add_argument("--peers", nargs="*", default=[], help="pythons that have a peer installed")
    parser.add_argument("--peer-tokens", type=int, default=131_072)
    parser.add_argument("--peers-only", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


class _Table(nn.Module):
    """A model whose activation at a position is the row of a table that the token names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rows = nn.Embedding(65_536, width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.rows(ids)
        return rows


def make(args: argparse.Namespace) -> tuple[ActivationCache, torch.Tensor]:
    """A cache of random rows, and the table that each row's token looks up."""
    torch.manual_seed(0)
    table = _Table(args.width)
    model = ModuleModel(table, "table", example={"ids": torch.zeros((2, 3), dtype=torch.long)})
    itemsize = 4 if args.dtype == "float32" else 2
    shape = _BATCH, _WINDOW
    n_batches = max(1, args.mib * MIB // (args.width * itemsize * _BATCH * _WINDOW))
    position = torch.arange(_WINDOW).expand(shape)

    def batches(start: Cursor) -> Iterator[TokenBatch]:
        generator = torch.Generator().manual_seed(1)
        for number in range(n_batches):
            ids = torch.randint(len(table.rows.weight), shape, generator=generator)
            first = number * _BATCH
            yield TokenBatch(
                inputs={"ids": ids},
                kept=torch.ones(shape, dtype=torch.bool),
                token=ids,
                position=position,
                mask=torch.zeros(shape, dtype=torch.long),
                document=torch.arange(_BATCH)[:, None].expand(shape),
                names=tuple(f"random/{i}" for i in range(first, first + _BATCH)),
                end=Cursor(first + _BATCH, 0, (first + _BATCH) * _WINDOW),
            )

    cfg = HarvestConfig(
        model="table",
        dataset="random",
        hooks=(HOOK,),
        n_tokens=n_batches * _BATCH * _WINDOW,
        context=_WINDOW,
        batch_size=_BATCH,
        dtype=args.dtype,
        shard_mib=args.shard_mib,
        device="cpu",
    )
    cache = harvest(cfg, args.out / "rows", model=model, data=batches)
    return cache, table.rows.weight.detach()


def check(args: argparse.Namespace, cache: ActivationCache, table: torch.Tensor) -> None:
    """Every row of the split comes out once, as it went in, beside its own token."""
    stored = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    want = table.to(stored[args.dtype]).float()
    seen = torch.zeros(len(table), dtype=torch.long)
    columns = (HOOK, "token")
    for batch in Reader(cache, columns, args.batch_size, split=args.split, exclude=()):
        token = batch["token"].long()
        if not torch.equal(batch[HOOK], want[token]):
            raise SystemExit("the rows that came out are not those that went in")
        seen += torch.bincount(token, minlength=len(table))
    index = cache.indices(args.split, exclude=())
    there = torch.bincount(cache.take("token", index).long(), minlength=len(table))
    if not torch.equal(seen, there):
        raise SystemExit("an epoch did not give every row of its split once")


def epoch(
    args: argparse.Namespace, cache: ActivationCache, dtype: torch.dtype | None, number: int
) -> tuple[float, int]:
    """Seconds of an epoch, from making the reader on, and how many rows it gave."""
    begun, rows = time.perf_counter(), 0
    with Reader(
        cache,
        (HOOK,),
        args.batch_size,
        seed=number,
        split=args.split,
        exclude=(),
        dtype=dtype,
        device=args.device,
        prefetch=args.prefetch,
        threads=args.threads,
        reuse=True,
    ) as reader:
        for batch in reader:
            rows += len(batch[HOOK])
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - begun, rows


def drop(folder: Path) -> None:
    """Have the system forget the files' pages."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_into_new(where: Path, n_bytes: int) -> float:
    """Seconds of a plain read in which every so many bytes get memory of their own, as the rows of
    every batch do. No ratio is made with it: it says how much of the distance to the plain read is
    the system's part."""
    begun = time.perf_counter()
    for path in sorted(where.rglob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(torch.empty(n_bytes, dtype=torch.uint8).numpy().data):
                pass
    return time.perf_counter() - begun


def run(args: argparse.Namespace, where: Path, dtype: torch.dtype | None) -> list[dict[str, Any]]:
    took: dict[str, list[float]] = {"plain": [], "new": [], "first": [], "later": []}
    itemsize = 4 if args.dtype == "float32" else 2
    batch_bytes = args.batch_size * args.width * itemsize
    growth = []
    for number in range(args.warm_ups + args.rounds):
        if args.cold:
            drop(where)
        total, seconds = plain_read(str(where), "*.safetensors")
        took["plain"].append(seconds)
        took["new"].append(read_into_new(where, batch_bytes))
        # Opened anew: a cache remembers which checksums it has compared.
        cache = ActivationCache.open(where)
        for name in ("first", "later"):
            if args.cold:
                drop(where)
            with measured() as found:
                seconds, rows = epoch(args, cache, dtype, number)
            took[name].append(seconds)
            growth.append(found.growth_mib or 0.0)
    took = {name: values[args.warm_ups :] for name, values in took.items()}
    given = rows * args.width * itemsize
    cases = []
    for name in ("first", "later"):
        # As if the plain read had read no more than was given.
        plain = [seconds * given / total for seconds in took["plain"]]
        cases.append(
            {
                "op": "read",
                "impl": "saekit",
                "against": "plain sequential read",
                "order": "shuffled on disk, blocks" if cache.shuffled else "rows",
                "epoch": name,
                "split": args.split,
                "dtype": args.dtype,
                "given_as": "stored" if dtype is None else str(dtype).removeprefix("torch."),
                "device": args.device,
                "width": args.width,
                "batch_size": args.batch_size,
                "prefetch": args.prefetch,
                "threads": args.threads or threads_here(),
                "bytes": total,
                "given_bytes": given,
                "page_cache": "dropped" if args.cold else "warm",
                "seconds": summary(took[name]),
                "plain_seconds": summary(took["plain"]),
                "rows_per_s": round(rows / statistics.median(took[name])),
                "mb_per_s": round(given / statistics.median(took[name]) / 1e6, 1),
                "plain_mb_per_s": round(total / statistics.median(took["plain"]) / 1e6, 1),
                "new_memory_mb_per_s": round(total / statistics.median(took["new"]) / 1e6, 1),
                "file_system": file_system(where),
                **ratio(took[name], plain),
                "growth_mib": max(growth),
            }
        )
    return cases


def against_peers(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each peer reads what it made itself, from the same text; saekit the same."""
    text = args.out / "text.jsonl"
    text_file(text, args.peer_tokens)
    layer = 3
    shared = {"model": MODEL_DIR, "text": text, "layer": layer, "n_tokens": args.peer_tokens}
    shared |= {"read_batch": args.batch_size, "rounds": args.rounds}
    cases = []
    pythons = {"saekit": sys.executable} | {peer_of(python): python for python in args.peers}
    for name, python in pythons.items():
        out = args.out / "peer"
        clear(out)
        given: dict[str, Any] = {**shared, "out": out, "dtype": "float32"}
        told_of_it = told(python, f"{name}_harvest", args, **given)
        case = {
            "op": "read",
            "impl": name,
            "against": "plain sequential read",
            "order": "shuffled",
            "epoch": "later",
            "given_as": "float32",
            "device": args.device,
            "batch_size": args.batch_size,
            "page_cache": "warm",
            "peer_versions": told_of_it["versions"],
            "refused": told_of_it.get("refused"),
        }
        if told_of_it.get("bytes"):
            found = told(python, f"{name}_read", args, **given)
            plain = [
                s * found["given_bytes"] / found["plain_bytes"] for s in found["plain_seconds"]
            ]
            case |= {
                "dtype": "float32",
                "bytes": found["plain_bytes"],
                "given_bytes": found["given_bytes"],
                "seconds": summary(found["seconds"]),
                "plain_seconds": summary(found["plain_seconds"]),
                "mb_per_s": round(
                    found["given_bytes"] / statistics.median(found["seconds"]) / 1e6, 1
                ),
                "plain_mb_per_s": round(
                    found["plain_bytes"] / statistics.median(found["plain_seconds"]) / 1e6, 1
                ),
                **ratio(found["seconds"], plain),
            }
        elif "seconds" in told_of_it:
            # Nothing to read: every row is computed again.
            width = 256
            rate = told_of_it["rows"] * width * 4 / told_of_it["seconds"] / 1e6
            case |= {"dtype": told_of_it["dtype"], "mb_per_s": round(rate, 1)}
        cases.append(case)
        clear(out)
    return cases


def show_cases(lines: list[dict[str, Any]]) -> None:
    show(
        f"batches from a cache against a plain sequential read ({lines[0]['page_cache']})",
        (
            "implementation",
            "order",
            "epoch",
            "given as",
            "MB/s",
            "plain MB/s",
            "ratio",
            "min..max",
            "new mem",
        ),
        [
            (
                line["impl"],
                line["order"],
                line["epoch"],
                f"{line.get('dtype', '')} > {line['given_as']}",
                f"{line['mb_per_s']:,.0f}" if "mb_per_s" in line else "",
                f"{line['plain_mb_per_s']:,.0f}" if "ratio" in line else "nothing on disk",
                f"{line['ratio']:.3f}" if "ratio" in line else "",
                f"{line['ratio_min']:.3f}..{line['ratio_max']:.3f}" if "ratio" in line else "",
                f"{line['new_memory_mb_per_s']:,.0f}" if "new_memory_mb_per_s" in line else "",
            )
            for line in lines
        ],
    )


def main() -> None:
    args = arguments()
    lines: list[dict[str, Any]] = []
    clear(args.out)
    if not args.peers_only:
        cache, table = make(args)
        shuffled = shuffle(cache, args.out / "shuffled", shard_mib=args.shard_mib)
        for one in (cache, shuffled):
            check(args, one, table)
            for dtype in (None, torch.float32):
                cases = run(args, one.path, dtype)
                lines += [append("reader", case, args.results) for case in cases]
    peers = []
    if args.peers:
        peers = [append("reader", case, args.results) for case in against_peers(args)]
    clear(args.out)
    for shown in (peers, lines):
        if shown:
            show_cases(shown)


if __name__ == "__main__":
    main()
