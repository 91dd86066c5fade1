"""What a training step of a TopK SAE takes: fused in Triton, by saekit's ops, in plain PyTorch.

    python benchmarks/bench_step.py                    # checks, then times; needs a GPU
    python benchmarks/bench_step.py --check-only
    python benchmarks/bench_step.py --peers            # other libraries that are installed, too
    python benchmarks/bench_step.py --shapes S --tune  # other configurations, alone
    python benchmarks/bench_step.py --grow             # against latents, k and rows, with floors
    python benchmarks/bench_step.py --largest          # how many latents fit
    python benchmarks/table.py                         # the page from what was written

`saekit bench` measures the same on any machine (`saekit.kernels.bench`, which says where to read
what is checked and how it is timed); here are the fused step's options, its parts, and the limits.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _record import RESULTS, append, show

from saekit.errors import SaekitError, first_line
from saekit.kernels import bench, bench_peers
from saekit.kernels.bench_ops import check_ops, ops
from saekit.kernels.bench_setting import (
    GIB,
    PLAIN,
    SHAPES,
    Line,
    Make,
    Setting,
    Shape,
    allocated,
    forget,
    milliseconds,
    summary,
)
from saekit.kernels.bench_steps import (
    AS_TRAINED,
    BATCH_TOPK,
    LR,
    TOPK,
    FusedStep,
    check_step,
    impls,
    make_step,
    timed_step,
)

Device = torch.device

OFTEN = 64
GROWN = Shape(2_048, 65_536, 64)
SERIES: dict[str, tuple[int, ...]] = {
    "d_sae": tuple(16_384 << i for i in range(7)),
    "k": tuple(16 << i for i in range(6)),
    "batch": tuple(1_024 << i for i in range(7)),
}
GROWN_OPTIONS = {"deterministic": True, "graph": True}
ADAM_BYTES = 24
"""Of a parameter that Adam moves: weight and two moments, of 4 bytes, read and written."""
MULTIPLE = 16_384
MOST = 256
"""Multiples to look among at first."""
TRIED = 3
"""Steps that a size must take: the second of a graph is captured, the third replayed."""

VARIANTS: dict[str, dict[str, Any]] = {
    "as trained": AS_TRAINED,
    "batch_topk": AS_TRAINED,
    "plain launches": {},
    "graph": {"graph": True},
    "split weights": {"graph": True, "split_master": True},
    "deterministic": {"graph": True, "deterministic": True},
    "skewed": {"graph": True, "often": OFTEN},
    "skewed, deterministic": {"graph": True, "often": OFTEN, "deterministic": True},
    "1,024 rows at a time": {"graph": True, "rows_at_once": 1_024},
    "clipped": {"graph": True, "clip_norm": 1.0},
    "economy": AS_TRAINED | {"economy": True},
}


def op_of(variant: str) -> str:
    return BATCH_TOPK if variant == "batch_topk" else TOPK


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument(
        "--shape", nargs=3, type=int, metavar=("D_IN", "D_SAE", "K"), help="in place of --shapes"
    )
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--batch-size", type=int, default=8_192)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm-ups", type=int, default=5)
    parser.add_argument("--device", default="cuda", help="cpu with TRITON_INTERPRET=1: a try-out")
    parser.add_argument("--peers", action="store_true")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check-only", action="store_true")
    only.add_argument("--tune", action="store_true", help="only candidates of configurations")
    only.add_argument("--grow", action="store_true", help="only against latents, k and rows")
    only.add_argument("--largest", action="store_true", help="only how many latents fit")
    parser.add_argument("--series", nargs="+", default=list(SERIES), choices=list(SERIES))
    parser.add_argument("--impls", nargs="+", help="of --largest: those whose names begin so")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def setting_of(args: argparse.Namespace, shape: Shape, name: str = "", **more: Any) -> Setting:
    given = {
        "batch_size": args.batch_size,
        "device": Device(args.device),
        "rounds": args.rounds,
        "warm_ups": args.warm_ups,
    }
    return Setting(shape=shape, name=name, **(given | more))


def options_of(setting: Setting, variant: str) -> dict[str, Any]:
    """Nothing is split where nothing is rounded."""
    options = dict(VARIANTS[variant])
    if setting.precision == "float32":
        options.pop("split_master", None)
    return options


def check(setting: Setting, variants: list[str]) -> Iterator[Line]:
    check_ops(setting)
    for op in (TOPK, BATCH_TOPK):
        for impl in impls(setting):
            if impl != "fused":
                yield check_step(setting, op, impl, {})
    for variant in variants:
        line = check_step(setting, op_of(variant), "fused", options_of(setting, variant))
        yield line | {"variant": variant}


def every(setting: Setting, args: argparse.Namespace) -> Iterator[Line]:
    yield from ops(setting)
    for op in dict.fromkeys(op_of(variant) for variant in args.variants):
        for impl in impls(setting):
            if impl != "fused":
                yield setting.measure(op, impl, partial(timed_step, setting, op, impl))
    for variant in args.variants:
        op, options = op_of(variant), options_of(setting, variant)
        make = partial(timed_step, setting, op, "fused", **options)
        yield setting.measure(op, "fused", make, variant, options=options)
    if args.peers:
        yield from bench.peer_steps(setting)
    yield from parts(setting)


def fused(setting: Setting, **options: Any) -> FusedStep:
    step = make_step(setting, TOPK, "fused", **options)
    assert isinstance(step, FusedStep)
    step.set_lr(LR)
    return step


def parts(setting: Setting) -> Iterator[Line]:
    """The fused step's kernels, one by one."""
    from saekit.kernels.triton_select import topk_select

    forget(setting.device)
    x = setting.following()
    narrow = replace(setting, shape=replace(setting.shape, d_in=min(128, setting.shape.d_in)))
    try:
        step = fused(setting).fused
        ordered = fused(narrow, deterministic=True).fused._index
        step(x)
    except torch.OutOfMemoryError as error:
        yield setting.line("parts", "fused", ms=None, error=first_line(error))
        return
    W_enc, b_enc, index = step._copies["W_enc_T"].t(), step._copies["b_enc"], step._index
    out = step._values, step._indices

    def select() -> None:
        index.clear()
        topk_select(step._pre, step.k, out=out, count=index.count, rank=step._rank)

    def build() -> None:
        index.totals.zero_()
        step._index_latents()

    def build_in_order() -> None:
        ordered._counters.copy_(index._counters)
        ordered.totals.zero_()
        ordered.rank.copy_(index.rank)
        ordered.build(step._values, step._indices, k=step.k)

    timed: dict[str, Callable[[], object]] = {
        "prepare": lambda: step._prepare(x),
        "encoder matmul": lambda: torch.addmm(b_enc, step._centred, W_enc, out=step._pre),
        "select": select,
        "index": build,
        "index, deterministic": build_in_order,
        "decode and loss": lambda: step._decode(x),
        "heavy latents": step._share_heavy,
        "latents": step._update_latents,
        "b_dec": step._update_b_dec,
    }
    for part, call in timed.items():
        took = milliseconds(call, setting.device, setting.rounds, setting.warm_ups)
        yield setting.line("part", "fused", part, **summary(took))
        if part == "prepare":
            # What it cleared is needed again.
            step._encode()


def tune(setting: Setting) -> Iterator[Line]:
    """Other ways to select, and to hold a latent's rows, whole and split."""
    from saekit.kernels.triton_decode import row_candidates
    from saekit.kernels.triton_select import select_candidates, topk_select

    forget(setting.device)
    shape, x = setting.shape, setting.following()

    def timed(call: Callable[[], object], part: str, config: dict[str, Any]) -> Line:
        took = milliseconds(call, setting.device, setting.rounds, setting.warm_ups)
        variant = ", ".join([part, *(f"{key}={value}" for key, value in config.items())])
        return setting.line("tune", "fused", variant, config=config, **summary(took))

    first = fused(setting).fused
    first(x)
    for config in select_candidates(shape.d_sae, shape.k):
        call = partial(topk_select, first._pre, shape.k, config=config)
        yield timed(call, "select", vars(config))
    base = first.config
    del first
    for split in (False, True)[: 2 if setting.precision == "bfloat16" else 1]:
        for row in row_candidates(shape.d_in):
            forget(setting.device)
            step = fused(setting, config=replace(base, row=row), split_master=split).fused
            try:
                step(x)
                yield timed(step._update_latents, "latents", vars(row) | {"split": split})
            except RuntimeError as error:
                # More registers or shared memory than there are.
                print(f"{setting.name} {row}: {error}")
            del step


def grow(args: argparse.Namespace) -> Iterator[Line]:
    """One line a size; a series ends where memory does."""
    rate = copy_rate(Device(args.device))
    for series in args.series:
        for size in SERIES[series]:
            batch_size = size if series == "batch" else args.batch_size
            shape = GROWN if series == "batch" else replace(GROWN, **{series: size})
            line = grown(setting_of(args, shape, batch_size=batch_size), series, rate)
            yield line
            if line["ms"] is None:
                break


def grown(setting: Setting, series: str, rate: float) -> Line:
    """A fused step beside what it cannot be quicker than: its one large product, and Adam's reading
    and writing; `rate` in bytes a second."""
    shape = setting.shape
    make = partial(timed_step, setting, TOPK, "fused", **GROWN_OPTIONS)
    line = setting.measure("grow", "fused", make, series, options=GROWN_OPTIONS)
    n_parameters = 2 * shape.d_sae * shape.d_in + shape.d_sae + shape.d_in
    line["adam_ms"] = round(ADAM_BYTES * n_parameters / rate * 1e3, 5)
    if line["ms"] is None:
        return line
    line["tokens_per_s"] = round(setting.batch_size / line["ms"] * 1e3)

    def product() -> tuple[Callable[[], object], dict[str, Any]]:
        low = torch.bfloat16 if setting.precision == "bfloat16" else torch.float32
        x = setting.following().to(low)
        W = torch.randn(shape.d_sae, shape.d_in, device=setting.device, dtype=low)
        out = torch.empty(setting.batch_size, shape.d_sae, device=setting.device, dtype=low)
        return lambda: torch.mm(x, W.t(), out=out), {}

    line["matmul_ms"] = setting.measure("matmul", PLAIN, product)["ms"]
    return line


def copy_rate(device: Device, n_bytes: int = 1 << 31) -> float:
    """Bytes read and written a second by a large copy within a device's memory."""
    here = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    took = milliseconds(lambda: there.copy_(here), device, 10, 3)
    return float(2 * n_bytes / summary(took)["ms"] * 1e3)


def largest(args: argparse.Namespace) -> Iterator[Line]:
    """For each way to take a step, the most latents that it has room for."""
    at = partial(setting_of, args)
    setting = at(GROWN)
    makes: dict[str, Callable[[Setting], Make]] = {}
    for impl in impls(setting):
        options: dict[str, Any] = {"rows_at_once": 1_024} if impl == "fused" else {}
        makes[impl] = partial(_own, impl, options)
    for name, mode, _ in peers(setting) if args.peers else ():
        makes[f"{name}, {mode}"] = partial(_peer, name, mode)
    for impl, make in makes.items():
        if args.impls and not impl.startswith(tuple(args.impls)):
            continue
        yield most_latents(setting, impl, make)


def peers(setting: Setting) -> Iterator[bench_peers.Peer]:
    s = setting.shape
    return bench_peers.peers(s.d_in, s.d_sae, s.k, setting.batch_size, setting.following)


def _own(impl: str, options: dict[str, Any], setting: Setting) -> Make:
    return partial(timed_step, setting, TOPK, impl, **options)


def _peer(name: str, mode: str, setting: Setting) -> Make:
    return next(make for n, m, make in peers(setting) if (n, m) == (name, mode))


def most_latents(setting: Setting, impl: str, make: Callable[[Setting], Make]) -> Line:
    """By doubling, then by halving what lies between, in multiples of MULTIPLE."""
    stopped_by = ""

    def peak(multiples: int) -> float | None:
        """GiB in use; None where it does not fit."""
        nonlocal stopped_by
        forget(setting.device)
        before = allocated(setting.device)
        tried = replace(setting, shape=replace(setting.shape, d_sae=multiples * MULTIPLE))
        # Not a second set of batches for each size.
        vars(tried)["following"] = setting.following
        try:
            call, _ = make(tried)()
            for _ in range(TRIED):
                call()
            if setting.device.type != "cuda":
                return 0.0
            torch.cuda.synchronize(setting.device)
            return (torch.cuda.max_memory_allocated(setting.device) - before) / GIB
        except Exception as error:
            stopped_by = first_line(error)
            if not isinstance(error, torch.OutOfMemoryError):
                print(f"{impl}, {multiples * MULTIPLE} latents: {stopped_by}")
            return None

    # Batches of before would count as a size's own.
    setting.following()
    fits, gib, refused = 0, 0.0, 1
    while refused <= MOST and (found := peak(refused)) is not None:
        fits, gib, refused = refused, found, 2 * refused
    while refused <= MOST and refused - fits > 1:
        middle = (fits + refused) // 2
        if (found := peak(middle)) is None:
            refused = middle
        else:
            fits, gib = middle, found
    name, _, mode = impl.partition(", ")
    line = setting.line("largest", name, mode, ms=None, peak_gib=round(gib, 2))
    return line | {"d_sae": fits * MULTIPLE, "stopped_by": stopped_by}


def show_cases(lines: list[Line]) -> None:
    if any(line["op"] == "largest" for line in lines):
        rows = [
            (f"{line['impl']} {line['variant']}", f"{line['d_sae']:,}", f"{line['peak_gib']:.1f}")
            for line in lines
        ]
        show("the most latents that fit", ("step", "latents", "GiB"), rows)
        return
    show("one training step of a TopK SAE", bench.COLUMNS, bench.rows(lines))


def measured(args: argparse.Namespace) -> Iterator[Line]:
    if args.largest:
        yield from largest(args)
        return
    if args.grow:
        yield from grow(args)
        return
    shapes = {name: SHAPES[name] for name in args.shapes}
    if args.shape is not None:
        shapes = {"": Shape(*args.shape)}
    for name, shape in shapes.items():
        setting = setting_of(args, shape, name)
        if args.tune:
            yield from tune(setting)
            continue
        for line in check(setting, args.variants):
            print(line["impl"], line["variant"], append("step", line, args.results)["check"])
        if not args.check_only:
            yield from every(setting, args)


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    lines = []
    try:
        for line in measured(args):
            lines.append(append("step", line, args.results))
    except SaekitError as error:
        raise SystemExit(str(error)) from error
    finally:
        show_cases(lines)


if __name__ == "__main__":
    main()
