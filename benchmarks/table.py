"""Makes the tables of docs/peers.md, docs/interop.md, docs/kinds.md, docs/dark_matter.md,
evals/README.md and saekit/kernels/README.md from benchmarks/results/:

    python benchmarks/table.py

The newest line of each case is shown. Standard library only; where plotly and kaleido are
installed, main also draws docs/step_grow.svg. The figures of docs/dark_matter.md need neither.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import _dark_matter_page
import _evals_page

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
DOCS = FOLDER.parent / "docs"
END = "<!-- end -->\n"

Line = dict[str, Any]


def begin(name: str) -> str:
    return f"<!-- {name}: made by benchmarks/table.py -->\n"


def load(results: Path = RESULTS) -> dict[str, list[Line]]:
    """Lines of each file of results, oldest first."""
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted(results.glob("*.jsonl"))
    }


def newest(lines: list[Line], *key: str) -> list[Line]:
    """Of the lines that agree in these fields the last, in the order in which they first came."""
    found: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        found[tuple(line.get(field) for field in key)] = line
    return list(found.values())


def hardware(line: Line) -> str:
    # A line of a GPU machine may be of its CPU.
    on_gpu = str(line.get("device", "")).startswith("cuda")
    return str(line["gpu"]) if on_gpu else f"{line['cpu']}, {line['cores']} cores"


def markdown(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _spread(line: Line) -> str:
    return f"{line['ratio']:.2f} ({line['ratio_min']:.2f} to {line['ratio_max']:.2f})"


def _growth(line: Line) -> str:
    return "" if line.get("growth_mib") is None else f"{line['growth_mib']:,.0f}"


def harvest(results: dict[str, list[Line]]) -> str:
    lines = [line for line in results.get("harvest", []) if line["op"] == "harvest"]
    of = ("model", "device", "gpu", "cpu", "cores", "hooks", "dtype", "file_system", "tokens")
    rows = [
        (
            f"{line['model']}, {line['model_dtype']}",
            hardware(line),
            f"{line['hooks']}, {line['dtype']}",
            f"{line['bytes'] / 1e9:.1f} GB, {line['seconds']['n']}",
            f"{line['bare_tokens_per_s']:,}",
            f"{line['disk_tokens_per_s']:,}, {line['file_system']}",
            f"{line['tokens_per_s']:,}",
            _spread(line),
            f"{_of_the_slower(line):.2f}",
            f"{line['stages']['into memory']['ratio']:.2f}" if line.get("stages") else "",
            f"{line['bare_growth_mib']:,.0f}, {_growth(line)}, {line['memory_mib']:,.0f}"
            if _growth(line)
            else f"?, ?, {line['memory_mib']:,.0f}",
        )
        for line in newest(lines, *of)
    ]
    columns: tuple[str, ...] = (
        "model",
        "on",
        "hook points, on disk",
        "cache, pairs",
        "bare pass tokens/s",
        "plain write tokens/s",
        "harvest tokens/s",
        "of the bare pass",
    )
    columns += (
        "of the slower of both",
        "without the disk",
        "memory MiB: rise in a bare pass, in a harvest, limit of its rows",
    )
    return markdown(columns, rows)


def _of_the_slower(line: Line) -> float:
    """Of what the model and the disk would each do alone, the harvest's speed as a part of the
    lesser."""
    return float(line["tokens_per_s"] / min(line["bare_tokens_per_s"], line["disk_tokens_per_s"]))


def text_to_disk(results: dict[str, list[Line]]) -> str:
    lines = [line for line in results.get("harvest", []) if line["op"] == "text to disk"]
    shown = newest(lines, "impl", "hooks", "device", "gpu", "cpu", "cores")
    rows = [
        (
            _named(line),
            hardware(line),
            f"{line['hooks']} in {line['passes']}" if "passes" in line else str(line["hooks"]),
            line["dtype"] or "",
            f"{line['tokens_per_s']:,}" if "seconds" in line else "no",
            f"{line['mb_per_s']:,.1f}" if line.get("bytes") else "",
            _growth(line),
            _cell(line["refused"]),
        )
        for line in sorted(shown, key=lambda line: line["hooks"])
    ]
    columns = ("tool", "on", "hook points in passes", "kept as", "tokens/s", "MB/s written")
    return markdown((*columns, "memory MiB, rise", "what it refused"), rows)


def reader(results: dict[str, list[Line]]) -> str:
    lines = [line for line in results.get("reader", []) if line["op"] == "read"]
    key = ("impl", "order", "epoch", "split", "dtype", "given_as", "device", "gpu", "cpu", "cores")
    rows = [
        (
            _named(line),
            hardware(line),
            line["order"],
            line["epoch"],
            f"{line.get('dtype') or ''} as {line['given_as']}",
            f"{line['mb_per_s']:,.0f}" if "mb_per_s" in line else "no",
            f"{line['plain_mb_per_s']:,.0f}, {line['page_cache']}" if "ratio" in line else "",
            _spread(line) if "ratio" in line else _cell(line.get("refused")),
        )
        for line in newest(lines, *key, "page_cache")
    ]
    columns = ("tool", "on", "order", "epoch", "rows", "MB/s", "plain read MB/s, page cache")
    return markdown((*columns, "ratio"), rows)


def _named(line: Line) -> str:
    name = str(line["impl"])
    versions: dict[str, str] = line.get("peer_versions") or line["versions"]
    version = versions.get(name.replace("_", "-"))
    return name if version is None else f"{name} {version}"


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


# How a figure of a trained SAE is called, and its decimals.
_FIGURES = {
    "l0": ("L0", 1),
    "ev": ("explained variance", 4),
    "ce_recovered_zero": ("loss recovered", 4),
    "dead": ("dead", 4),
    "found": ("features found", 3),
    "mcc": ("mean cosine", 3),
    "f1": ("F1", 3),
    "tokens_per_s": ("tokens/s", 0),
}


def trained(experiment: str, data: str) -> Callable[[dict[str, list[Line]]], str]:
    """The runs of an experiment on some data: means over seeds, and standard deviations."""

    def table(results: dict[str, list[Line]]) -> str:
        lines = [
            line
            for line in results.get("kinds", [])
            if line["op"] == "train"
            and line["experiment"] == experiment
            and line["data"].startswith(data)
        ]
        groups: dict[str, list[Line]] = {}
        for line in newest(lines, "impl", "key", "seed"):
            groups.setdefault(f"{line['impl']} {line['key']}", []).append(line)
        shown = [name for name in _FIGURES if any(name in line for line in lines)]
        if any("workers" in line for line in lines):
            shown.remove("tokens_per_s")
        rows = [
            (
                group[0]["kind"] if group[0]["impl"] == "saekit" else _named(group[0]),
                _options(group[0]),
                str(len(group)),
                *(_mean([line[name] for line in group], name) for name in shown),
            )
            for group in groups.values()
        ]
        return markdown(("kind", "options", "seeds", *(_FIGURES[name][0] for name in shown)), rows)

    return table


def _options(line: Line) -> str:
    data = [] if line["data"] in ("demo", "zipf") else [line["data"]]
    kind = [] if line["impl"] == "saekit" else [line["kind"]]
    return ", ".join([*data, *kind, *(f"{name} {v}" for name, v in line["options"].items())])


def _mean(values: list[float], name: str) -> str:
    digits = _FIGURES[name][1]
    mean = f"{statistics.mean(values):,.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):,.{digits}f}"


def step(results: dict[str, list[Line]]) -> str:
    lines = [line for line in results.get("train", []) if line["op"] == "step"]
    rows = [
        (
            line["kind"],
            f"{hardware(line)}, {line['precision']}",
            f"{line['d_in']}, {line['d_sae']}, {line['batch']}",
            f"{line['l0']:g}",
            f"{line['tokens_per_s']:,}",
            f"{1e3 * line['seconds']['median']:,.0f}",
            f"{1e3 * line['plain_seconds']['median']:,.0f}",
            _spread(line),
        )
        for line in newest(lines, "kind", "device", "gpu", "cpu", "d_in", "d_sae", "precision")
    ]
    columns = ("kind", "on", "d_in, latents, batch", "L0", "tokens/s", "ms a step")
    return markdown((*columns, "plain PyTorch ms", "times as fast"), rows)


def together(results: dict[str, list[Line]]) -> str:
    lines = [line for line in results.get("train", []) if line["op"] == "together"]
    rows = [
        (
            f"{line['saes']} of {line['kind']}",
            f"{hardware(line)}, {line['precision']}",
            f"{line['d_in']}, {line['d_sae']}, {line['batch']}",
            f"{line['seconds']['median']:,.1f}",
            f"{line['apart_seconds']['median']:,.1f}",
            _spread(line),
        )
        for line in newest(lines, "kind", "device", "gpu", "cpu", "d_in", "d_sae", "precision")
    ]
    columns = ("SAEs", "on", "d_in, latents, batch", "seconds together", "one after the other")
    return markdown((*columns, "times as fast"), rows)


def layers(results: dict[str, list[Line]]) -> str:
    """How alike the ITDA dictionaries of two models' layers are."""
    lines = [line for line in results.get("kinds", []) if line["op"] == "jaccard"]
    rows = [
        (
            f"{line['jitter']:g}",
            line["hooks"][i],
            *(f"{value:.3f}" for value in row),
            "yes" if max(range(len(row)), key=lambda j: row[j]) == i else "no",
        )
        for line in newest(lines, "jitter")
        for i, row in enumerate(line["jaccard"])
    ]
    hooks = lines[-1]["hooks"] if lines else []
    return markdown(("jitter", "layer", *hooks, "its own is nearest"), rows)


_STEPS = ("topk step", "batch_topk step")
_CASE = ("hardware", "d_in", "d_sae", "k", "batch")


def fused_step(results: dict[str, list[Line]]) -> str:
    """Steps by every implementation, and what did not run."""
    lines = [line for line in _step_lines(results) if line["op"] in _STEPS]
    rows = [
        (
            _sizes(line),
            line["op"].removesuffix(" step"),
            _cell(", ".join(filter(None, (line["impl"], line["variant"])))),
            *_figures_of(line),
        )
        for line in newest(lines, *_CASE, "op", "impl", "variant")
    ]
    columns = ("shape", "kind", "step", "ms (least to most)", "tokens/s", "peak GiB")
    return _on(lines) + markdown((*columns, "times plain torch"), rows)


def _step_lines(results: dict[str, list[Line]]) -> list[Line]:
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
        return f"no: {_cell(line['error'])}", "", "", ""
    return (
        f"{line['ms']:.2f} ({line['ms_min']:.2f} to {line['ms_max']:.2f})",
        f"{line['tokens_per_s']:,}",
        f"{line['peak_gib']:.1f}" if "peak_gib" in line else "",
        f"{line['ratio']:.2f}" if "ratio" in line else "",
    )


def pursuit(results: dict[str, list[Line]]) -> str:
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


def growth(results: dict[str, list[Line]]) -> str:
    """A fused step against latents, k and rows, beside the two floors."""
    lines = _grown(results)
    rows = [
        (
            line["variant"],
            f"{line['d_sae']:,}",
            str(line["k"]),
            f"{line['batch']:,}",
            f"no: {_cell(line['error'])}" if line["ms"] is None else f"{line['ms']:.2f}",
            f"{line['matmul_ms']:.2f}" if line.get("matmul_ms") else "",
            f"{line['adam_ms']:.2f}",
            f"{line['peak_gib']:.1f}" if "peak_gib" in line else "",
        )
        for line in lines
    ]
    columns = ("against", "latents", "k", "batch", "ms", "product alone, ms", "Adam alone, ms")
    return _on(lines) + _picture() + markdown((*columns, "peak GiB"), rows)


def _grown(results: dict[str, list[Line]]) -> list[Line]:
    lines = [line for line in _step_lines(results) if line["op"] == "grow"]
    shown = newest(lines, *_CASE, "variant")
    return sorted(
        shown, key=lambda line: (line["hardware"], line["variant"], line[line["variant"]])
    )


PLOT = DOCS / "step_grow.svg"


def _picture() -> str:
    if not PLOT.exists():
        return ""
    return "![A fused step against latents, k and rows](../../docs/step_grow.svg)\n\n"


def draw(results: dict[str, list[Line]]) -> bool:
    """Whether `growth` was drawn: not without lines, nor without plotly and what it writes with."""
    lines = [line for line in _grown(results) if line["ms"] is not None]
    if not lines or not all(find_spec(name) for name in ("plotly", "kaleido")):
        return False
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    series = list(dict.fromkeys(line["variant"] for line in lines))
    figure = make_subplots(1, len(series), shared_yaxes=True)
    shown = {"ms": "fused step", "matmul_ms": "product alone", "adam_ms": "Adam alone"}
    for number, name in enumerate(series, 1):
        those = [line for line in lines if line["variant"] == name]
        for key, label in shown.items():
            trace = graph_objects.Scatter(
                x=[line[name] for line in those],
                y=[line.get(key) for line in those],
                name=label,
                legendgroup=label,
                showlegend=number == 1,
                line={
                    "color": dict(zip(shown, ("#1f77b4", "#888888", "#d62728"), strict=True))[key]
                },
            )
            figure.add_trace(trace, 1, number)
        figure.update_xaxes(type="log", title=name, row=1, col=number)
    figure.update_yaxes(type="log", title="ms", col=1)
    figure.update_yaxes(type="log")
    figure.write_image(PLOT, width=360 * len(series), height=360)
    return True


def most_latents(results: dict[str, list[Line]]) -> str:
    """How many latents fit one card."""
    lines = [line for line in _step_lines(results) if line["op"] == "largest"]
    rows = [
        (
            _cell(", ".join(filter(None, (line["impl"], line["variant"])))),
            f"{line['d_in']:,}, k {line['k']}, batch {line['batch']:,}",
            f"{line['d_sae']:,}",
            f"{line['peak_gib']:.1f}",
            _cell(line["stopped_by"]),
        )
        for line in newest(lines, "hardware", "d_in", "k", "batch", "impl", "variant")
    ]
    columns = ("step", "width and rows", "latents", "peak GiB", "what stopped the next")
    return _on(lines) + markdown(columns, rows)


LAST = 0.25
"""Share of a run, its end, over which losses are compared."""


def equivalence(results: dict[str, list[Line]]) -> str:
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


def interop(results: dict[str, list[Line]]) -> str:
    """What was checked against other tools, by version."""
    rows = [
        (
            _peer(line),
            line["way"],
            _cell(line["case"]),
            "" if line.get("z") is None else f"{line['z']:.1e}",
            "" if line.get("x_hat") is None else f"{line['x_hat']:.1e}",
            _outcome(line),
        )
        for line in newest(results.get("interop", []), "impl", "way", "case")
    ]
    columns = ("tool", "way", "SAE", "latents apart", "reconstructions apart", "outcome")
    return markdown(columns, rows)


def _peer(line: Line) -> str:
    package, version = next(iter(line["peer_versions"].items()))
    return f"{package} {version}"


def _outcome(line: Line) -> str:
    if line.get("refused"):
        return f"refused: {_cell(line['refused'])}"
    return "agrees" if line["passed"] else f"**differs** {_cell(line.get('error'))}"


KERNELS = "../saekit/kernels/README.md"
EVALS = "../evals/README.md"
PAGES: dict[str, dict[str, Callable[[dict[str, list[Line]]], str]]] = {
    "interop.md": {"interop": interop},
    "peers.md": {
        "harvest": harvest,
        "text to disk": text_to_disk,
        "reader": reader,
        "core": _evals_page.agreement,
    },
    "kinds.md": {
        "demo": trained("kinds", "demo"),
        "zipf": trained("kinds", "zipf"),
        "correlated": trained("kinds", "correlated"),
        "hierarchy": trained("kinds", "hierarchy"),
        "tools on demo": trained("tools", "demo"),
        "tools on zipf": trained("tools", "zipf"),
        "gradient on demo": trained("gradient", "demo"),
        "gradient on zipf": trained("gradient", "zipf"),
        "tree": trained("tree", "tree"),
        "variational": trained("variational", "demo"),
        "wrong k": trained("wrong_k", "zipf"),
        "wrong k, apart": trained("wrong_k", "apart"),
        "itda": trained("itda", "demo"),
        "layers": layers,
        "learning rate": trained("lr", "demo"),
        "thresholds": trained("thresholds", "demo"),
        "encoder on demo": trained("encoder", "demo"),
        "encoder on zipf": trained("encoder", "zipf"),
        "step": step,
        "together": together,
    },
    "dark_matter.md": _dark_matter_page.TABLES,
    EVALS: {"cost": _evals_page.cost},
    KERNELS: {
        "step": fused_step,
        "pursuit": pursuit,
        "growth": growth,
        "largest": most_latents,
        "equivalence": equivalence,
    },
}


def with_tables(page: str, name: str, results: dict[str, list[Line]]) -> str:
    """The text of a page of this name with its tables made anew."""
    for title, table in PAGES[name].items():
        before, rest = page.split(begin(title))
        _, after = rest.split(END, 1)
        page = before + begin(title) + table(results) + END + after
    return page


def main() -> None:
    results = load()
    draw(results)
    _dark_matter_page.draw(results)
    for name in PAGES:
        path = DOCS / name
        made = with_tables(path.read_text(encoding="utf-8"), name, results)
        path.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
