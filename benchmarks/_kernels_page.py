"""The tables of saekit/kernels/README.md, and its figure, docs/step_grow.svg: standard library
only."""

import statistics
from collections.abc import Callable
from typing import Any

from _lines import DOCS, Line, Results, cell, markdown, newest
from _svg import COLOURS, MUTED, Panel, Series, chart

_STEPS = ("topk step", "batch_topk step")
_CASE = ("hardware", "d_in", "d_sae", "k", "batch")


def fused_step(results: Results) -> str:
    """Steps by every implementation, and what did not run."""
    lines = [line for line in _step_lines(results) if line["op"] in _STEPS]
    rows = [
        (
            _sizes(line),
            line["op"].removesuffix(" step"),
            cell(", ".join(filter(None, (line["impl"], line["variant"])))),
            *_figures_of(line),
        )
        for line in newest(lines, *_CASE, "op", "impl", "variant")
    ]
    columns = ("shape", "kind", "step", "ms (least to most)", "tokens/s", "peak GiB")
    return _on(lines) + markdown((*columns, "times plain torch"), rows)


def speed(results: Results) -> str:
    """A TopK step as `saekit train` takes it, beside the quickest way of every other library."""
    lines = newest(
        [line for line in _step_lines(results) if line["op"] == "topk step" and line["ms"]],
        *(*_CASE, "impl", "variant"),
    )
    rows = []
    others: dict[str, None] = {}
    for ours in (line for line in lines if line["variant"] == "as trained"):
        quickest: dict[str, Line] = {}
        for line in lines:
            name = _library(line)
            if all(line[field] == ours[field] for field in _CASE) and not _is_ours(line):
                best = quickest.setdefault(name, line)
                quickest[name] = min(best, line, key=lambda line: line["ms"])
        others |= dict.fromkeys(quickest)
        rows.append((ours, quickest))
    cells = [
        (
            _sizes(ours),
            f"{ours['ms']:.2f} ms, {ours['peak_gib']:.1f} GiB",
            *(_beside(ours, quickest.get(name)) for name in others),
        )
        for ours, quickest in rows
    ]
    return _on(lines) + markdown(("shape", "saekit", *others), cells)


def _is_ours(line: Line) -> bool:
    return line["impl"] in ("fused", "triton ops")


def _library(line: Line) -> str:
    version = str(line["variant"] or "").partition(",")[0]
    return str(line["impl"]) + (f" {version}" if version[:1].isdigit() else "")


def _beside(ours: Line, line: Line | None) -> str:
    if line is None:
        return ""
    return f"{line['ms']:.1f} ms ({line['ms'] / ours['ms']:.1f} times), {line['peak_gib']:.1f} GiB"


def _step_lines(results: Results) -> list[Line]:
    # A check has no times.
    return [line for line in results.get("step", []) if "ms" in line]


def _on(lines: list[Line]) -> str:
    """What the lines of a table were measured on."""
    if not lines:
        return ""
    found = dict.fromkeys(
        f"{line.get('hardware') or line['gpu']}, torch {line['versions']['torch']}"
        for line in lines
    )
    return f"On {'; '.join(found)}.\n\n"


def _sizes(line: Line) -> str:
    sizes = f"{line['d_in']:,} x {line['d_sae']:,}, k {line['k']}, batch {line['batch']:,}"
    return f"{line['shape']}: {sizes}" if line["shape"] else sizes


def _figures_of(line: Line) -> tuple[str, str, str, str]:
    if line["ms"] is None:
        return f"no: {cell(line['error'])}", "", "", ""
    return (
        f"{line['ms']:.2f} ({line['ms_min']:.2f} to {line['ms_max']:.2f})",
        f"{line['tokens_per_s']:,}",
        f"{line['peak_gib']:.1f}" if "peak_gib" in line else "",
        f"{line['ratio']:.2f}" if "ratio" in line else "",
    )


def pursuit(results: Results) -> str:
    """Training steps of matching pursuit."""
    lines = [line for line in results.get("pursuit", []) if line.get("part") == "step"]
    rows = [
        (
            f"{line['shape']}: {line['d_in']:,} x {line['d_sae']:,}, {line['steps']} atoms",
            line["way"],
            f"{line['batch_size']:,}",
            f"{line['ms']['median']:,.1f} ({line['ms']['min']:,.1f} to {line['ms']['max']:,.1f})",
            f"{line['tokens_per_s']:,}",
            f"{line['peak_gib']:.2f}",
            f"{line['mib_per_token']:.2f}",
        )
        for line in newest(lines, "gpu", "shape", "way", "batch_size", "dtype")
    ]
    columns = ("shape", "scores", "batch", "ms (least to most)", "tokens/s", "peak GiB")
    return _on(lines) + markdown((*columns, "MiB a token"), rows)


def growth(results: Results) -> str:
    """A fused step against latents, k and rows, beside the two floors."""
    lines = _grown(results)
    rows = [
        (
            line["variant"],
            f"{line['d_sae']:,}",
            str(line["k"]),
            f"{line['batch']:,}",
            f"no: {cell(line['error'])}" if line["ms"] is None else f"{line['ms']:.2f}",
            f"{line['matmul_ms']:.2f}" if line.get("matmul_ms") else "",
            f"{line['adam_ms']:.2f}",
            f"{line['peak_gib']:.1f}" if "peak_gib" in line else "",
        )
        for line in lines
    ]
    columns = ("against", "latents", "k", "batch", "ms", "product alone, ms", "Adam alone, ms")
    picture = "![A fused step against latents, k and rows](../../docs/step_grow.svg)\n\n"
    return _on(lines) + picture + markdown((*columns, "peak GiB"), rows)


def _grown(results: Results) -> list[Line]:
    lines = [line for line in _step_lines(results) if line["op"] == "grow"]
    shown = newest(lines, *_CASE, "variant")
    return sorted(
        shown, key=lambda line: (line["hardware"], line["variant"], line[line["variant"]])
    )


PLOT = DOCS / "step_grow.svg"


def draw(results: Results) -> None:
    """Draws `growth`, the floors in the same plots."""
    lines = [line for line in _grown(results) if line["ms"] is not None]
    if not lines:
        return
    shown = {"ms": "fused step", "matmul_ms": "its product alone", "adam_ms": "Adam alone"}
    titles = {"d_sae": "latents", "k": "k", "batch": "rows of a batch"}
    panels = []
    for name, title in titles.items():
        those = [line for line in lines if line["variant"] == name]
        sizes = [line[name] for line in those]
        series = [
            Series(label, sizes, [(line[key],) for line in those], colour)
            for (key, label), colour in zip(shown.items(), COLOURS, strict=False)
        ]
        floor = [(line["matmul_ms"] + line["adam_ms"],) for line in those]
        series.append(Series("both, one after the other", sizes, floor, MUTED, dashed=True))
        panels.append(Panel(f"against {title}", series, x_title=title))
    PLOT.write_text(chart(panels, "", "ms", y_log=True), encoding="utf-8")


def most_latents(results: Results) -> str:
    """How many latents fit one card."""
    lines = [line for line in _step_lines(results) if line["op"] == "largest"]
    rows = [
        (
            cell(", ".join(filter(None, (line["impl"], line["variant"])))),
            f"{line['d_in']:,}, k {line['k']}, batch {line['batch']:,}",
            f"{line['d_sae']:,}",
            f"{line['peak_gib']:.1f}",
            cell(line["stopped_by"].partition(". ")[0]),
        )
        for line in newest(lines, "hardware", "d_in", "k", "batch", "impl", "variant")
    ]
    columns = ("step", "width and rows", "latents", "peak GiB", "what stopped the next")
    return _on(lines) + markdown(columns, rows)


def from_cache(results: Results) -> str:
    """Steps of a run that reads a cache, beside the same steps on batches that are there."""
    lines = newest(results.get("end_to_end", []), "gpu", "shape", "batch", "cache_gib", "order")
    rows = [
        (
            _sizes(line),
            line["order"],
            f"{line['cache_gib']:g}",
            _times(line),
            f"{line['held_ms']['median']:.2f}",
            f"{line['tokens_per_s']:,}",
            f"{line['share']['median']:.2f}",
        )
        for line in lines
    ]
    columns: tuple[str, ...] = (
        "shape",
        "cache",
        "GiB",
        "ms (least to most)",
        "without reading, ms",
    )
    return _on(lines) + markdown((*columns, "tokens/s", "share of that"), rows)


LAST = 0.25
"""Share of a run, its end, over which losses are compared."""


def equivalence(results: Results) -> str:
    """By how much a run's loss at last is above that of the eager run of its seed."""
    of = ("data", "kind", "d_in", "d_sae", "k", "batch_size", "steps")
    lines = newest(results.get("equivalence", []), *of, "variant", "seed")
    base = {
        (*(line[field] for field in of), line["seed"]): _ending(line)
        for line in lines
        if line["variant"] == "eager, float32"
    }
    groups: dict[tuple[Any, ...], list[tuple[float, Line]]] = {}
    for line in lines:
        case = tuple(line[field] for field in of)
        against = base.get((*case, line["seed"]))
        if against is not None and line["variant"] != "eager, float32":
            off = 100 * (_ending(line) / against - 1)
            groups.setdefault((*case, line["variant"]), []).append((off, line))
    rows = []
    for (data, kind, d_in, d_sae, k, batch, steps, variant), found in groups.items():
        offs = [off for off, _ in found]
        dead = statistics.mean(line["dead"] for _, line in found)
        rows.append(
            (
                f"{data}, {kind}",
                f"{d_in}, {d_sae:,}, {k}, {batch:,}",
                f"{steps:,}",
                variant,
                str(len(offs)),
                f"{statistics.mean(offs):+.3f} ({min(offs):+.3f} to {max(offs):+.3f})",
                f"{100 * dead:.2f}",
            )
        )
    columns = ("on", "d_in, latents, k, batch", "steps", "run", "seeds", "loss off by %", "dead %")
    return markdown(columns, rows)


def _ending(line: Line) -> float:
    losses: list[float] = line["loss"]
    return statistics.mean(losses[-max(1, round(LAST * len(losses))) :])


def by_kind(results: Results) -> str:
    """Fused steps of kinds beside the TopK step of their shape, in a run's later part."""
    lines = newest(results.get("kind_steps", []), "gpu", "shape", "impl")
    topk = {(line["gpu"], line["shape"]): line for line in lines if line["impl"] == "topk"}
    rows = [
        (
            _sizes(line),
            line["impl"],
            f"{line['settle']:,}",
            _figure(line, "l0", "{:.1f}"),
            _figure(line, "kept", "{:.1f}"),
            _times(line),
            f"{line['ms']['median'] / topk[line['gpu'], line['shape']]['ms']['median']:.2f}",
            f"{line['eager_ms']['median']:.2f}",
        )
        for line in lines
    ]
    columns: tuple[str, ...] = ("shape", "kind", "steps before", "L0", "learnt from, a row")
    columns += ("ms (least to most)", "times TopK", "by ops, ms")
    return _on(lines) + markdown(columns, rows)


def _figure(line: Line, name: str, form: str) -> str:
    value = line["figures"].get(name)
    return "" if value is None else form.format(value)


def _times(line: Line) -> str:
    ms = line["ms"]
    return f"{ms['median']:.2f} ({ms['min']:.2f} to {ms['max']:.2f})"


def sanitized(results: Results) -> str:
    """What compute-sanitizer said, of which tests, with how many launches."""
    lines = results.get("sanitize", [])
    of_several = [line for line in lines if "file" not in line]
    of_files = [line for line in lines if "file" in line]
    rows = [
        (
            line["op"],
            line.get("file", "several").removeprefix("tests/"),
            line["summary"],
            line["tests"],
            f"{sum(line['launches'].values()):,} of {len(line['launches'])} kernels",
            line["commit"],
        )
        for line in [*of_several, *newest(of_files, "op", "file")]
    ]
    return markdown(("tool", "file", "it says", "tests", "launches", "of commit"), rows)


def on_cpu(results: Results) -> str:
    """A TopK step on a CPU beside other libraries."""
    sizes = ("d_in", "d_sae", "k", "batch", "threads")
    lines = newest(results.get("cpu", []), "cpu", *sizes, "impl", "dead")
    rows = [
        (
            f"{line['cpu']}, {line['threads']} threads",
            f"{line['d_in']:,} x {line['d_sae']:,}, k {line['k']}, batch {line['batch']:,}",
            f"{100 * line['dead']:.0f}",
            cell(line["impl"]),
            f"{line['tokens_per_s']:,}",
            f"{1e3 * line['seconds']['median']:,.0f}",
            f"{line['peak_mib']:,.0f}",
        )
        for line in lines
    ]
    columns: tuple[str, ...] = ("on", "shape", "dead latents %", "step", "tokens/s", "ms")
    return markdown((*columns, "memory MiB, rise"), rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "step": fused_step,
    "by kind": by_kind,
    "pursuit": pursuit,
    "growth": growth,
    "largest": most_latents,
    "from a cache": from_cache,
    "cpu": on_cpu,
    "equivalence": equivalence,
    "sanitized": sanitized,
}
