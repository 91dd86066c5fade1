"""The cost model of several GPUs (`saekit.cost`): its figures, from what was measured, and the page
that plans with them.

    python benchmarks/fit_cost.py

Rates of a GPU are a least-squares fit to the fused TopK steps of results/step.jsonl, as trained and
of one size after another; those of links the newest of results/distributed.jsonl. What was not
measured is assumed, and the page says so. Writes saekit/cost_figures.json and docs/plan_10m.md.
"""

from pathlib import Path
from typing import Any

import numpy as np
from _lines import END, RESULTS, load, markdown, newest

from saekit.cost import FILE, Figures, Training, quickest
from saekit.files import write_json

PAGE = Path(__file__).parent.parent / "docs" / "plan_10m.md"
BEGIN = "<!-- plan: made by benchmarks/fit_cost.py -->\n"

ASSUMED = {"near_bytes": 3e11, "far_bytes": 4e10, "exchange_seconds": 3e-5}
"""Of NVLink between H200s, a network of 400 Gb/s for each GPU, and a small exchange."""
GPU_BYTES = 141e9
GPUS = tuple(8 << i for i in range(8))
D_SAE, K, BATCH = 10 * 2**20, 64, 16_384
PER_NODE = 8
SERIES = ("d_sae", "k", "batch")
"""Of bench_step.py --grow."""

Line = dict[str, Any]


def fit(results: dict[str, list[Line]]) -> Figures:
    rows, ms = [], []
    steps = measured_steps(results)
    for line in steps:
        rows.append(of_one(line).amounts())
        ms.append(_median(line))
    # Relative errors count.
    table = np.array(rows) / np.array(ms)[:, None]
    scale = table.max(0)
    found = np.linalg.lstsq(table / scale, np.ones(len(ms)), rcond=None)[0] / scale
    if (found <= 0).any():
        raise SystemExit(f"the steps give no rates above 0: {found.tolist()}")
    rates = 1e3 / found
    links = [line for line in results.get("distributed", []) if _link(line)]
    measured = {}
    if links:
        large, small = (
            [one for one in links if one["variant"] == size][-2:] for size in ("large", "small")
        )
        measured["near_bytes"] = min(one["gb_per_s"] for one in large) * 1e9
        measured["exchange_seconds"] = max(one["ms"] for one in small) / 1e3
    return Figures(
        gpu=str(steps[0]["gpu"]),
        operations=float(f"{rates[0]:.3g}"),
        memory_bytes=float(f"{rates[1]:.3g}"),
        gathered_bytes=float(f"{rates[2]:.3g}"),
        gpu_bytes=GPU_BYTES,
        **{**ASSUMED, **measured},
        measured=("operations", "memory_bytes", "gathered_bytes", *measured),
    )


def measured_steps(results: dict[str, list[Line]]) -> list[Line]:
    """The newest line of each size of a fused TopK step of one GPU."""
    wanted = {("topk step", "as trained"), *(("grow", series) for series in SERIES)}
    lines = [
        line
        for line in results["step"]
        if line["impl"] == "fused"
        and (line["op"], line.get("variant")) in wanted
        and line.get("ms") is not None
    ]
    return list(newest(lines, "op", "variant", "d_in", "d_sae", "k", "batch"))


def of_one(line: Line) -> Training:
    shape = {name: line[name] for name in ("d_in", "d_sae", "k")}
    return Training(**shape, batch_size=line["batch"])


def _link(line: Line) -> bool:
    return str(line["op"]).startswith("link ") and line["device"] == "cuda"


def _median(line: Line) -> float:
    ms = line["ms"]
    return float(ms["median"] if isinstance(ms, dict) else ms)


def page(figures: Figures, results: dict[str, list[Line]]) -> str:
    """The part of the page that is made."""
    parts = [_figures(figures), _against(figures, results)]
    for d_in in (2_048, 4_096):
        rows = []
        for gpus in GPUS:
            plan = quickest(
                figures,
                gpus=gpus,
                per_node=PER_NODE,
                d_in=d_in,
                d_sae=D_SAE,
                k=K,
                batch_size=BATCH,
            )
            rows.append(_row(figures, gpus, plan))
        parts.append(
            f"\n{D_SAE:,} latents, d_in {d_in:,}, k {K}, batch {BATCH:,}:\n\n"
            + markdown(
                (
                    "GPUs",
                    "mesh",
                    "GB each",
                    "MB sent a step",
                    "ms a step",
                    "of that near, far",
                    "tokens/s",
                    "hours for a billion tokens",
                ),
                rows,
            )
        )
    return f"{BEGIN}{''.join(parts)}{END}"


def _figures(figures: Figures) -> str:
    names = {
        "operations": "operations of a product, a second",
        "memory_bytes": "bytes of memory moved, a second",
        "gathered_bytes": "bytes gathered, a second",
        "near_bytes": "bytes sent within a machine, a second",
        "far_bytes": "bytes sent between machines, a second, by a GPU",
        "exchange_seconds": "seconds of a small exchange",
    }
    rows = [
        (what, f"{getattr(figures, name):.3g}", "" if name in figures.measured else "assumed")
        for name, what in names.items()
    ]
    return f"On {figures.gpu}:\n\n{markdown(('figure', '', ''), rows)}"


def _against(figures: Figures, results: dict[str, list[Line]]) -> str:
    """The model beside what was measured."""
    rows = []
    for line in measured_steps(results):
        rows.append(_compared(of_one(line), figures, _median(line), line.get("peak_gib")))
    for line in results.get("distributed", []):
        if line["op"].startswith("topk step") and line["device"] == "cuda":
            sizes = dict(part.split("=") for part in line["mesh"].split(","))
            shape = {name: line[name] for name in ("d_in", "d_sae", "k")}
            mesh = {axis: int(size) for axis, size in sizes.items()}
            one = Training(**shape, **mesh, batch_size=line["batch"])
            rows.append(_compared(one, figures, line["ms"], line["peak_gib"]))
    columns = ("step", "mesh", "ms measured", "ms by the model", "GiB measured", "GiB by the model")
    return f"\n{markdown(columns, list(dict.fromkeys(rows)))}"


def _compared(one: Training, figures: Figures, ms: float, gib: float | None) -> tuple[str, ...]:
    return (
        f"{one.d_in:,} x {one.d_sae:,}, k {one.k}, batch {one.batch_size:,}",
        f"data={one.data},latent={one.latent}",
        f"{ms:.2f}",
        f"{1e3 * sum(one.seconds(figures).values()):.2f}",
        "" if gib is None else f"{gib:.1f}",
        f"{sum(one.memory().values()) / 2**30:.1f}",
    )


def _row(figures: Figures, gpus: int, plan: Training | None) -> tuple[str, ...]:
    if plan is None:
        return (f"{gpus:,}", "does not fit", "", "", "", "", "", "")
    parts = plan.seconds(figures)
    step = sum(parts.values())
    rate = plan.batch_size / step
    return (
        f"{gpus:,}",
        f"data={plan.data},latent={plan.latent}",
        f"{sum(plan.memory().values()) / 1e9:.0f}",
        f"{sum(plan.sent().values()) / 1e6:,.0f}",
        f"{1e3 * step:.1f}",
        f"{1e3 * parts['near']:.1f}, {1e3 * parts['far']:.1f}",
        f"{rate:,.0f}",
        f"{1e9 / rate / 3600:.1f}",
    )


def made(figures: Figures, results: dict[str, list[Line]], text: str) -> str:
    """The page with its made part anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + page(figures, results) + after


def main() -> None:
    results = load(RESULTS)
    figures = fit(results)
    write_json(FILE, figures.to_dict())
    PAGE.write_text(made(figures, results, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
