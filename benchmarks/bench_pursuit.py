"""What matching pursuit takes in Triton, by either way to find scores, and a training step with it.

    python benchmarks/bench_pursuit.py                    # checks, then times; needs a GPU
    python benchmarks/bench_pursuit.py --check-only
    python benchmarks/bench_pursuit.py --only crossover   # from which batch the Gram matrix pays
    python benchmarks/bench_pursuit.py --only tune        # other configurations
    python benchmarks/bench_pursuit.py --only step --peers

Each shape is checked first, with fewer atoms: what is left of the rows against scores in float32,
each atom taken against the best one, values and gradients against float64 given the same atoms. A
timed step is that of trainers.matching_pursuit: forward, backward, projection, torch's fused Adam,
unit rows; no data, no count of dead latents. Times are of the GPU's own clock, medians; four
batches in rotation. A peer's batches are its own, and so tokens/s are to be compared.
"""

import argparse
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _record import RESULTS, append, show, summary
from torch import Tensor, nn

from saekit.kernels import bench_setting, pursuit, reference
from saekit.kernels import triton_pursuit as ours
from saekit.kernels.bench_peers import pursuit as peer_steps

GIB = 1 << 30
LR = 1e-4
STEPS = 32
PEER_BATCH = 1_024
"""What overcomplete has memory for at the largest shape."""
EAGER_ROUNDS = 3

Pursuit = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Of x and W_dec."""

NORMS = 2e-4
SCORES = {
    ("gram", "bfloat16"): 2**-4,
    ("products", "bfloat16"): 2**-6,
    ("gram", "float32"): 1e-5,
    ("products", "float32"): 1e-5,
}
VALUES = 1e-5
GRADIENTS = 1e-4
"""Of what is left: the share by which it may be longer or shorter than with exact scores. Of a
row's largest score: by how much an atom taken may be worse than the best (in bfloat16 scores are
rounded to 8 bits; with the Gram matrix in each step). Of values and of gradients:
||ours - theirs|| / ||theirs||."""


@dataclass(frozen=True)
class Shape:
    d_in: int
    d_sae: int


SHAPES = {"S": Shape(768, 24_576), "M": Shape(2_048, 65_536), "L": Shape(4_096, 131_072)}
WAYS = {"gram": True, "products": False}
SHARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.5)
"""Rows for each atom, counted in every step but the first."""
PARTS = ("parts", "step", "crossover", "tune")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--only", nargs="+", default=["parts", "step"], choices=PARTS)
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--batch-size", type=int, default=8_192)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm-ups", type=int, default=5)
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--peers", action="store_true", help="also time the libraries installed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def atoms(d_sae: int, d_in: int) -> Tensor:
    W_dec = torch.randn(d_sae, d_in, device="cuda")
    return W_dec.div_(W_dec.norm(dim=1, keepdim=True))


def in_triton(args: argparse.Namespace, way: str, **options: Any) -> Pursuit:
    def call(x: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=args.precision == "bfloat16"):
            return ours.matching_pursuit(x, W_dec, STEPS, gram=WAYS[way], **options)

    return call


def in_eager(args: argparse.Namespace) -> Pursuit:
    def call(x: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=args.precision == "bfloat16"):
            out: tuple[Tensor, Tensor, Tensor]
            out = pursuit._MatchingPursuit.apply(x, W_dec, STEPS, 0.0, False)  # type: ignore[no-untyped-call]
            return out

    return call


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


def replay(x: Tensor, W_dec: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, float]:
    """Values, what is left, and by how much the worst of the atoms given missed the best, as a part
    of its row's largest score."""
    left, values, missed = x, [], 0.0
    largest = (x @ W_dec.T).detach().abs().amax(1)
    for step in range(indices.shape[1]):
        chosen = W_dec[indices[:, step]]
        values.append((left * chosen).sum(1))
        best = (left @ W_dec.T).detach().amax(1)
        missed = max(missed, float(((best - values[-1].detach()) / largest).max()))
        left = left - values[-1][:, None] * chosen
    return torch.stack(values, 1), left, missed


def check(name: str, args: argparse.Namespace, way: str, planted: bool) -> dict[str, Any]:
    """Rows are noise, or some atoms and a little of it."""
    shape, d_sae = SHAPES[name], 8_192
    # Where atoms are as good as each other chance decides, and by how much evens out over rows.
    n_rows = 2**22 // shape.d_in
    W_dec = atoms(d_sae, shape.d_in).requires_grad_()
    x = torch.randn(n_rows, shape.d_in, device="cuda")
    if planted:
        few = torch.randint(0, d_sae, (n_rows, 16), device="cuda")
        weights = 0.5 + torch.rand(n_rows, 16, 1, device="cuda")
        x = (weights * W_dec.detach()[few]).sum(1) + x / shape.d_in**0.5
    x.requires_grad_()
    values, indices, rest = in_triton(args, way)(x, W_dec)
    upstream = [torch.randn_like(t) for t in (values, rest)]
    grads = torch.autograd.grad((values, rest), (x, W_dec), upstream)
    with torch.no_grad():
        *_, exact = reference.matching_pursuit(x, W_dec, STEPS)
    x_64, W_64 = (t.detach().double().requires_grad_() for t in (x, W_dec))
    values_64, rest_64, missed = replay(x_64, W_64, indices)
    grads_64 = torch.autograd.grad(
        (values_64, rest_64), (x_64, W_64), [grad.double() for grad in upstream]
    )
    found = {
        "norm of the rest": abs(float(rest.detach().norm() / exact.norm()) - 1),
        "scores": missed,
        "values": distance(values, values_64),
        "d_x": distance(grads[0], grads_64[0]),
        "d_W_dec": distance(grads[1], grads_64[1]),
    }
    limits = (NORMS, SCORES[way, args.precision], VALUES, GRADIENTS, GRADIENTS)
    if not all(value <= limit for value, limit in zip(found.values(), limits, strict=True)):
        raise SystemExit(f"{name}, {way}, planted={planted}: {found}, and limits are {limits}")
    return {
        "op": "pursuit",
        "check": name,
        "way": way,
        "planted": planted,
        "dtype": args.precision,
        **{key: float(f"{value:.1e}") for key, value in found.items()},
    }


def milliseconds(call: Callable[[], object], rounds: int, warm_ups: int) -> list[float]:
    return bench_setting.milliseconds(call, torch.device("cuda"), rounds, warm_ups)


def batches(shape: Shape, batch_size: int) -> Callable[[], Tensor]:
    held = [torch.randn(batch_size, shape.d_in, device="cuda") for _ in range(4)]
    number = [0]

    def following() -> Tensor:
        number[0] += 1
        return held[number[0] % len(held)]

    return following


def on(following: Callable[[], Tensor], W_dec: Tensor, call: Pursuit) -> Callable[[], object]:
    return lambda: call(following(), W_dec)


def forget() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def case(
    name: str, args: argparse.Namespace, took: list[float], n_rows: int | None = None, **more: Any
) -> dict[str, Any]:
    shape = SHAPES[name]
    batch_size = n_rows or args.batch_size
    return {
        "op": "pursuit",
        "shape": name,
        "d_in": shape.d_in,
        "d_sae": shape.d_sae,
        "steps": STEPS,
        "batch_size": batch_size,
        "dtype": args.precision,
        "ms": summary(took),
        "tokens_per_s": round(batch_size / summary(took)["median"] * 1e3),
        **more,
    }


def parts(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What a forward and a backward pass are made of."""
    forget()
    shape, following = SHAPES[name], batches(SHAPES[name], args.batch_size)
    W_dec = atoms(shape.d_sae, shape.d_in)
    table = W_dec.to(getattr(torch, args.precision))
    timed = partial(milliseconds, rounds=args.rounds, warm_ups=args.warm_ups)
    took = timed(lambda: table.copy_(W_dec))
    yield case(name, args, took, part="W_dec, rounded")
    yield case(name, args, timed(lambda: ours.gram_matrix(table)), part="Gram matrix")
    took = timed(lambda: table @ table.T)
    yield case(name, args, took, part="Gram matrix, all of it multiplied")
    out = table.new_empty(args.batch_size, shape.d_sae)
    took = timed(partial(lambda out: torch.mm(following().to(out.dtype), table.T, out=out), out))
    yield case(name, args, took, part="scores, once")
    del out
    for way in WAYS:
        took = timed(on(following, W_dec, in_triton(args, way)))
        yield case(name, args, took, part="forward", way=way)
    values, indices, rest = in_triton(args, "gram")(following(), W_dec)
    d_values, d_rest = torch.randn_like(values), torch.randn_like(rest)
    for want_atoms, deterministic in ((True, True), (True, False), (False, True)):
        took = timed(
            partial(
                ours.gradients,
                *(W_dec, values, indices, rest, d_values, d_rest),
                want_atoms=want_atoms,
                deterministic=deterministic,
            )
        )
        part = "backward" if want_atoms else "backward, x alone"
        yield case(name, args, took, part=part, deterministic=deterministic)


def train_step(shape: Shape, following: Callable[[], Tensor], pursue: Pursuit) -> Callable[[], Any]:
    W_dec = nn.Parameter(atoms(shape.d_sae, shape.d_in))
    b_dec = nn.Parameter(torch.zeros(shape.d_in, device="cuda"))
    optimiser = torch.optim.Adam([W_dec, b_dec], lr=LR, fused=True)

    def one() -> Tensor:
        _, _, rest = pursue(following() - b_dec, W_dec)
        loss = rest.square().sum(1).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            assert W_dec.grad is not None
            along = (W_dec.grad * W_dec).sum(1, keepdim=True)
            W_dec.grad.addcmul_(along, W_dec, value=-1)
            optimiser.step()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        return loss

    return one


def step(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A whole training step, by each way."""
    shape = SHAPES[name]
    ways = {way: in_triton(args, way) for way in WAYS} | {"eager": in_eager(args)}
    for way, pursue in ways.items():
        forget()
        following = batches(shape, args.batch_size)
        before = torch.cuda.memory_allocated()
        one = train_step(shape, following, pursue)
        few = way == "eager"
        took = milliseconds(one, EAGER_ROUNDS if few else args.rounds, 1 if few else args.warm_ups)
        peak = torch.cuda.max_memory_allocated() - before
        if not one().isfinite():
            raise SystemExit(f"{name}, {way}: the loss is no number")
        yield case(name, args, took, part="step", way=way, **memory(peak, args.batch_size))
        del one
    if args.peers:
        yield from peers(name, args)


def memory(peak: int, batch_size: int) -> dict[str, Any]:
    return {
        "peak_gib": round(peak / GIB, 2),
        "mib_per_token": round(peak / batch_size / (1 << 20), 3),
    }


def peers(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    shape, n_rows = SHAPES[name], min(PEER_BATCH, args.batch_size)
    following = batches(shape, n_rows)
    for library, mode, make in peer_steps(shape.d_in, shape.d_sae, STEPS, n_rows, following):
        forget()
        before = torch.cuda.memory_allocated()
        try:
            one, facts = make()
            took = milliseconds(one, EAGER_ROUNDS, 2)
        except (ImportError, RuntimeError) as error:
            print(f"{name} {library}: {error}")
            continue
        peak = torch.cuda.max_memory_allocated() - before
        plain = {key: float(v) if isinstance(v, Tensor) else v for key, v in facts.items()}
        more = {"mode": mode, **plain, **memory(peak, n_rows)}
        yield case(name, args, took, n_rows, part="step", way=library, **more)
        del one


def crossover(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Both ways forward, for batches around those from which the Gram matrix pays."""
    shape = SHAPES[name]
    W_dec = atoms(shape.d_sae, shape.d_in)
    found: list[tuple[float, float]] = []
    for share in SHARES:
        forget()
        n_rows = max(8, round(share * shape.d_sae / (STEPS - 1)) // 8 * 8)
        rows_per_atom = round((STEPS - 1) * n_rows / shape.d_sae, 3)
        following = batches(shape, n_rows)
        took = {}
        for way in WAYS:
            call = on(following, W_dec, in_triton(args, way))
            took[way] = milliseconds(call, args.rounds, args.warm_ups)
            yield case(
                name,
                args,
                took[way],
                n_rows,
                part="crossover",
                way=way,
                rows_per_atom=rows_per_atom,
            )
        medians = [summary(took[way])["median"] for way in WAYS]
        found.append((rows_per_atom, medians[1] / medians[0] - 1))
    for (few, loss), (many, gain) in pairwise(found):
        if loss < 0 <= gain:
            at = few + (many - few) * loss / (loss - gain)
            print(f"{name}: GRAM_ROWS is {ours.GRAM_ROWS}, and it pays from {at:.2f} on")


def tune(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Other configurations of the forward pass; with the Gram matrix the time holds its making."""
    forget()
    shape, following = SHAPES[name], batches(SHAPES[name], args.batch_size)
    W_dec = atoms(shape.d_sae, shape.d_in)
    for way, gram in WAYS.items():
        usual = ours.pursuit_config(shape.d_sae, shape.d_in, gram)
        for config in ours.pursuit_candidates(shape.d_sae, shape.d_in, gram):
            call = on(following, W_dec, in_triton(args, way, config=config))
            try:
                took = milliseconds(call, max(3, args.rounds // 4), 1)
            except RuntimeError as error:
                # More registers or shared memory than there are.
                print(f"{name} {config}: {error}")
                continue
            facts = {"config": vars(config), "usual": config == usual}
            yield case(name, args, took, None, part="tune", way=way, **facts)


def show_cases(lines: list[dict[str, Any]]) -> None:
    rows = []
    for line in lines:
        what = ", ".join(str(line[key]) for key in ("part", "way", "rows_per_atom") if key in line)
        if not line.get("deterministic", True):
            what += ", in any order"
        if "config" in line:
            what += "".join(f", {key}={value}" for key, value in line["config"].items())
            what += ", as usual" * line["usual"]
        rows.append(
            (
                line["shape"],
                what,
                f"{line['batch_size']:,}",
                f"{line['ms']['median']:.3f}",
                f"{line['ms']['min']:.3f}..{line['ms']['max']:.3f}",
                f"{line['tokens_per_s']:,}",
                f"{line['peak_gib']:.2f}" if "peak_gib" in line else "",
                f"{line['mib_per_token']:.2f}" if "peak_gib" in line else "",
            )
        )
    columns = ("shape", "what", "batch", "ms", "min..max", "tokens/s", "peak GiB", "MiB a token")
    show(f"matching pursuit, {STEPS} steps", columns, rows)


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    for name in args.shapes:
        for way in WAYS:
            for planted in (False, True):
                found = check(name, args, way, planted)
                append("pursuit", found, args.results)
                print(*(f"{key} {value}" for key, value in found.items()), sep=", ")
    if args.check_only:
        return
    measures = {"parts": parts, "step": step, "crossover": crossover, "tune": tune}
    lines = []
    for name in args.shapes:
        for what in args.only:
            lines += [append("pursuit", one, args.results) for one in measures[what](name, args)]
    show_cases(lines)


if __name__ == "__main__":
    main()
