"""Measure the ops and the whole training step on this machine, beside plain PyTorch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saekit.commands._shared import Args, parse
from saekit.errors import ConfigError

if TYPE_CHECKING:
    from saekit.kernels.bench_setting import Setting


@dataclass(frozen=True, kw_only=True)
class BenchArgs(Args):
    """Measure what training spends its time in: matrix product, selection, decoding and its
    gradients, and whole steps of TopK and BatchTopK, beside plain PyTorch. All is checked against
    float64 before it is timed."""

    shapes: tuple[str, ...] = ()
    """S (768 dimensions, 24,576 latents, 32 of them active), M (2,048, 65,536, 64), L (4,096,
    131,072, 64). Where no shape is given: S and M on a GPU, and a small one on a CPU."""
    shape: tuple[int, int, int] | None = None
    """One of your own: d_in, d_sae and k."""
    batch_size: int | None = None
    """Rows of activations a step: 8,192 on a GPU and 4,096 on a CPU where none is given."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure: "auto" is a GPU where there is one."""
    rounds: int | None = None
    """Times that each case is timed: 20 on a GPU and 3 on a CPU where none is given."""
    peers: bool = False
    """Also steps of sparsify, dictionary_learning and SAELens, those that are installed."""
    out: Path | None = None
    """File of JSON lines to add the figures to, one line a case."""


def run(argv: list[str]) -> None:
    args = parse(BenchArgs, argv, "bench")
    from datetime import UTC, datetime

    import torch

    from saekit.kernels.bench import every

    torch.manual_seed(0)
    lines: list[dict[str, Any]] = []
    settings = _settings(args)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    for setting in settings:
        for line in every(setting, peers=args.peers):
            dated = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **line}
            lines.append(dated)
            if args.out is not None:
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(dated, allow_nan=False) + "\n")
    print(f"{lines[0]['hardware']}, matrix products in {settings[0].precision}")
    _print(lines)
    if args.out is not None:
        print(f"{len(lines)} lines: {args.out}")


def _print(lines: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from saekit.kernels.bench import COLUMNS, rows

    # Without lines between columns figures stay whole on narrow terminals, and only words break.
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in COLUMNS:
        of_words = column in COLUMNS[:2]
        table.add_column(
            column,
            justify="left" if of_words else "right",
            no_wrap=column not in ("what", COLUMNS[-1]),
        )
    for row in rows(lines):
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def _settings(args: BenchArgs) -> "list[Setting]":
    import torch

    from saekit.kernels.bench_setting import Setting, Shape, shape_named

    there = torch.cuda.is_available()
    if args.device == "cuda" and not there:
        raise ConfigError(
            "device='cuda', but torch sees no GPU here: leave --device out, or say --device cpu"
        )
    on_gpu = there and args.device != "cpu"
    shapes = {name: shape_named(name) for name in args.shapes}
    if args.shape is not None:
        shapes[""] = Shape(*args.shape)
    if not shapes and on_gpu:
        shapes = {name: shape_named(name) for name in ("S", "M")}
    return [
        Setting(
            shape=shape,
            name=name,
            batch_size=(8_192 if on_gpu else 4_096) if args.batch_size is None else args.batch_size,
            device=torch.device("cuda" if on_gpu else "cpu"),
            rounds=(20 if on_gpu else 3) if args.rounds is None else args.rounds,
            warm_ups=5 if on_gpu else 1,
        )
        for name, shape in (shapes or {"": Shape(512, 8_192, 32)}).items()
    ]
