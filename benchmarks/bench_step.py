"""What a training step of a TopK SAE takes: fused in Triton, and on the eager path.

    python benchmarks/bench_step.py                    # checks, then times; needs a GPU
    python benchmarks/bench_step.py --check-only
    python benchmarks/bench_step.py --shapes S --tune  # other configurations, alone

Each shape is checked first, with fewer latents: loss, gradients (what Adam holds after a first
step) and the selection against float64, given the same codes. A timed step is the bare one:
forward, backward, projection, Adam, unit rows, the batch's copy into the step's own memory; no
AuxK, no data. Times are of the GPU's own clock, medians; four batches in rotation.
"""

import argparse
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _record import RESULTS, append, ratio, show, summary
from torch import Tensor, nn

from saekit import kernels
from saekit.kernels.triton_decode import row_candidates
from saekit.kernels.triton_select import select_candidates, topk_select
from saekit.kernels.triton_step import FusedTopKStep

GIB = 1 << 30
NAMES = ("W_enc_T", "W_dec", "b_enc", "b_dec")
LR = 1e-4

LOSS = 1e-3
SELECTED = 0.0
GRADIENT = {"W_enc_T": 2e-2, "W_dec": 1e-2, "b_enc": 1e-2, "b_dec": 1e-2}
"""Largest ||ours - theirs|| / ||theirs||: operands are rounded to 8 bits. That of b_dec is the
difference of two sums, and small where few latents fire often."""

OFTEN = 64
OFTEN_BIAS = 2.8
"""Added to the pre-activations of as many latents, of variance 1: they fire on almost half the
rows."""


@dataclass(frozen=True)
class Shape:
    d_in: int
    d_sae: int
    k: int


SHAPES = {
    "S": Shape(768, 24_576, 32),
    "M": Shape(2_048, 65_536, 64),
    "L": Shape(4_096, 131_072, 64),
}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain launches": {},
    "graph": {"graph": True},
    "split weights": {"graph": True, "split_master": True},
    "deterministic": {"graph": True, "deterministic": True},
    "skewed": {"graph": True, "often": OFTEN},
    "skewed, deterministic": {"graph": True, "often": OFTEN, "deterministic": True},
    "1,024 rows at a time": {"graph": True, "rows_at_once": 1_024},
    "clipped": {"graph": True, "clip_norm": 1.0},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--batch-size", type=int, default=8_192)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm-ups", type=int, default=5)
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument(
        "--tune", action="store_true", help="only time candidates of configurations"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def weights(shape: Shape, often: int = 0) -> dict[str, Tensor]:
    W_dec = torch.randn(shape.d_sae, shape.d_in, device="cuda")
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    b_enc = 0.02 * torch.randn(shape.d_sae, device="cuda")
    b_enc[:often] += OFTEN_BIAS
    b_dec = 0.1 * torch.randn(shape.d_in, device="cuda")
    return dict(zip(NAMES, (W_dec.clone(), W_dec, b_enc, b_dec), strict=True))


def fused(
    shape: Shape,
    batch_size: int,
    *,
    often: int = 0,
    **options: Any,
) -> FusedTopKStep:
    return FusedTopKStep(
        *weights(shape, often).values(),
        k=shape.k,
        batch_size=batch_size,
        since=torch.zeros(shape.d_sae, dtype=torch.int64, device="cuda"),
        fired=torch.zeros(shape.d_sae, dtype=torch.int64, device="cuda"),
        **options,
    )


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


def check(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Against float64 with the codes that the step chose; at lr 0, so that Adam's first moment is a
    tenth of the gradient."""
    shape, batch_size = replace(SHAPES[name], d_sae=8_192), 2_048
    step = fused(shape, batch_size, **options)
    parameters = [nn.Parameter(t.double()) for t in step.parameters.values()]
    W_enc_T, W_dec, b_enc, b_dec = parameters
    x = torch.randn(batch_size, shape.d_in, device="cuda")
    loss = float(step(x))
    pre, indices = step._pre, step._indices.long()
    theirs = pre.relu().float().topk(shape.k).values
    selected = float((step._values.float().sort(descending=True).values - theirs).abs().max())
    assert (indices.diff() > 0).all()
    centred = x.double() - b_dec
    values = (centred @ W_enc_T.T + b_enc).gather(1, indices).relu()
    z = torch.zeros(batch_size, shape.d_sae, dtype=torch.double, device="cuda")
    error = z.scatter(1, indices, values) @ W_dec - centred
    wanted = error.square().sum(1).mean()
    grads = dict(zip(NAMES, torch.autograd.grad(wanted, parameters), strict=True))
    grads["W_dec"] = grads["W_dec"] - (grads["W_dec"] * W_dec).sum(1, keepdim=True) * W_dec
    found = {n: distance(step.state[n]["exp_avg"] * 10, grads[n].detach()) for n in NAMES}
    of_loss = abs(loss / wanted.item() - 1)
    bad = [n for n in NAMES if not found[n] <= GRADIENT[n]]
    if bad or not of_loss <= LOSS or not selected <= SELECTED:
        raise SystemExit(f"{name} {options}: loss {of_loss:.1e}, values {selected}, {found}")
    return {
        "op": "step",
        "check": name,
        "options": options,
        "loss": float(f"{of_loss:.1e}"),
        "gradients": {n: float(f"{d:.1e}") for n, d in found.items()},
    }


def milliseconds(call: Callable[[], object], rounds: int, warm_ups: int) -> list[float]:
    for _ in range(warm_ups):
        call()
    events = []
    for _ in range(rounds):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        call()
        ended.record()
        events.append((begun, ended))
    torch.cuda.synchronize()
    return [begun.elapsed_time(ended) for begun, ended in events]


def batches(shape: Shape, batch_size: int) -> Callable[[], Tensor]:
    held = [torch.randn(batch_size, shape.d_in, device="cuda") for _ in range(4)]
    number = [0]

    def following() -> Tensor:
        number[0] += 1
        return held[number[0] % len(held)]

    return following


def forget() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def case(name: str, args: argparse.Namespace, took: list[float], **more: Any) -> dict[str, Any]:
    shape = SHAPES[name]
    return {
        "op": "step",
        "shape": name,
        "d_in": shape.d_in,
        "d_sae": shape.d_sae,
        "k": shape.k,
        "batch_size": args.batch_size,
        "dtype": "bfloat16, float32 master",
        "ms": summary(took),
        **more,
    }


def every(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    eager, line = eager_step(name, args)
    yield line
    yield from whole(name, args, eager)
    yield from parts(name, args)


def whole(name: str, args: argparse.Namespace, eager: list[float]) -> Iterator[dict[str, Any]]:
    shape = SHAPES[name]
    following = batches(shape, args.batch_size)
    for variant in args.variants:
        forget()
        before = torch.cuda.memory_allocated()
        step = fused(shape, args.batch_size, **VARIANTS[variant])
        step.lr.fill_(LR)
        mine = torch.empty(args.batch_size, shape.d_in, device="cuda")

        def one(step: FusedTopKStep = step, mine: Tensor = mine) -> None:
            # A graph copies the batch into its own memory.
            step(following() if step._wants_graph else mine.copy_(following()))

        took = milliseconds(one, args.rounds, args.warm_ups)
        if not step.loss.isfinite():
            raise SystemExit(f"{name}, {variant}: the loss is {float(step.loss)}")
        yield case(
            name,
            args,
            took,
            impl="fused",
            variant=variant,
            options=VARIANTS[variant],
            tokens_per_s=round(args.batch_size / summary(took)["median"] * 1e3),
            peak_gib=round((torch.cuda.max_memory_allocated() - before) / GIB, 2),
            most_hits=int(step._index.count.max()),
            loss=float(step.loss),
            against="eager",
            **ratio(took, eager),
        )
        del step, one


def eager_step(name: str, args: argparse.Namespace) -> tuple[list[float], dict[str, Any]]:
    """The same step by saekit's stock PyTorch operators and torch's fused Adam."""
    forget()
    shape, following = SHAPES[name], batches(SHAPES[name], args.batch_size)
    before = torch.cuda.memory_allocated()
    parameters = [nn.Parameter(t) for t in weights(shape).values()]
    W_enc_T, W_dec, b_enc, b_dec = parameters
    optimiser = torch.optim.Adam(parameters, lr=LR, fused=True)

    def one() -> None:
        x = following()
        centred = x - b_dec
        with torch.autocast("cuda", torch.bfloat16):
            values, indices = kernels.topk_encode(centred, W_enc_T.T, b_enc, shape.k)
            error = centred - kernels.sparse_decode(values, indices, W_dec)
            loss = error.square().sum(1).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            assert W_dec.grad is not None
            along = (W_dec.grad * W_dec).sum(1, keepdim=True)
            W_dec.grad.addcmul_(along, W_dec, value=-1)
            optimiser.step()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    took = milliseconds(one, args.rounds, args.warm_ups)
    peak = (torch.cuda.max_memory_allocated() - before) / GIB
    return took, case(name, args, took, impl="eager", variant="", peak_gib=round(peak, 2))


def parts(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    forget()
    shape = SHAPES[name]
    step = fused(shape, args.batch_size)
    ordered = fused(replace(shape, d_in=128), args.batch_size, deterministic=True)._index
    x = torch.randn(args.batch_size, shape.d_in, device="cuda")
    step.lr.fill_(LR)
    step(x)
    W_enc, b_enc, index = step._copies["W_enc_T"].t(), step._copies["b_enc"], step._index
    out = step._values, step._indices

    def select() -> None:
        index.clear()
        topk_select(step._pre, shape.k, out=out, count=index.count, rank=step._rank)

    def build() -> None:
        index.totals.zero_()
        step._index_latents()

    def build_in_order() -> None:
        ordered._counters.copy_(index._counters)
        ordered.totals.zero_()
        ordered.rank.copy_(index.rank)
        ordered.build(step._values, step._indices, k=shape.k)

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
        took = milliseconds(call, args.rounds, args.warm_ups)
        yield case(name, args, took, impl="fused", part=part)
        if part == "prepare":
            # What it cleared is needed again.
            step._encode()


def tune(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Other ways to select, and to hold a latent's rows, whole and split."""
    forget()
    shape = SHAPES[name]
    x = torch.randn(args.batch_size, shape.d_in, device="cuda")
    first = fused(shape, args.batch_size)
    first(x)
    for config in select_candidates(shape.d_sae, shape.k):
        call = partial(topk_select, first._pre, shape.k, config=config)
        took = milliseconds(call, args.rounds, args.warm_ups)
        yield case(name, args, took, impl="fused", part="select", config=vars(config))
    for split in (False, True):
        for row in row_candidates(shape.d_in):
            step = FusedTopKStep(
                *first.parameters.values(),
                k=shape.k,
                batch_size=args.batch_size,
                state=first.state,
                config=replace(first.config, row=row),
                split_master=split,
            )
            step.lr.fill_(LR)
            try:
                step(x)
                took = milliseconds(step._update_latents, args.rounds, args.warm_ups)
            except RuntimeError as error:
                # More registers or shared memory than there are.
                print(f"{name} {row}: {error}")
                continue
            yield case(
                name, args, took, impl="fused", part="latents", config=vars(row) | {"split": split}
            )
            del step


def show_cases(lines: list[dict[str, Any]]) -> None:
    rows = []
    for line in lines:
        what = line.get("variant") or line.get("part") or line["impl"]
        if "config" in line:
            what += "".join(f", {key}={value}" for key, value in line["config"].items())
        rows.append(
            (
                line["shape"],
                what,
                f"{line['ms']['median']:.3f}",
                f"{line['ms']['min']:.3f}..{line['ms']['max']:.3f}",
                f"{line['peak_gib']:.2f}" if "peak_gib" in line else "",
                f"{line['tokens_per_s']:,}" if "tokens_per_s" in line else "",
                f"{line['ratio']:.2f}" if "ratio" in line else "",
            )
        )
    columns = ("shape", "what", "ms", "min..max", "peak GiB", "tokens/s", "times eager")
    show("one training step of a TopK SAE", columns, rows)


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    for name in [] if args.tune else args.shapes:
        for options in ({}, {"often": OFTEN, "deterministic": True, "split_master": True}):
            print(append("step", check(name, options), args.results)["gradients"])
    if args.check_only:
        return
    lines = []
    for name in args.shapes:
        for one in tune(name, args) if args.tune else every(name, args):
            lines.append(append("step", one, args.results))
    show_cases(lines)


if __name__ == "__main__":
    main()
