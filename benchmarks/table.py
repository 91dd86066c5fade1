"""Makes the tables of docs/browser.md, docs/peers.md, docs/interop.md, docs/kinds.md,
docs/dark_matter.md, evals/README.md and saekit/kernels/README.md from benchmarks/results/:

    python benchmarks/table.py

The newest line of each case is shown. Standard library only; where plotly and kaleido are
installed, main also draws docs/step_grow.svg. The figures of docs/dark_matter.md need neither.
"""

import statistics
from collections.abc import Callable

import _dark_matter_page
import _evals_page
import _kernels_page
from _lines import (
    DOCS,
    END,
    Line,
    Results,
    begin,
    cell,
    hardware,
    load,
    markdown,
    named,
    newest,
    spread,
)


def _growth(line: Line) -> str:
    return "" if line.get("growth_mib") is None else f"{line['growth_mib']:,.0f}"


def harvest(results: Results) -> str:
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
            spread(line),
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


def text_to_disk(results: Results) -> str:
    lines = [line for line in results.get("harvest", []) if line["op"] == "text to disk"]
    shown = newest(lines, "impl", "hooks", "device", "gpu", "cpu", "cores")
    rows = [
        (
            named(line),
            hardware(line),
            f"{line['hooks']} in {line['passes']}" if "passes" in line else str(line["hooks"]),
            line["dtype"] or "",
            f"{line['tokens_per_s']:,}" if "seconds" in line else "no",
            f"{line['mb_per_s']:,.1f}" if line.get("bytes") else "",
            _growth(line),
            cell(line["refused"]),
        )
        for line in sorted(shown, key=lambda line: line["hooks"])
    ]
    columns = ("tool", "on", "hook points in passes", "kept as", "tokens/s", "MB/s written")
    return markdown((*columns, "memory MiB, rise", "what it refused"), rows)


def reader(results: Results) -> str:
    lines = [line for line in results.get("reader", []) if line["op"] == "read"]
    key = ("impl", "order", "epoch", "split", "dtype", "given_as", "device", "gpu", "cpu", "cores")
    rows = [
        (
            named(line),
            hardware(line),
            line["order"],
            line["epoch"],
            f"{line.get('dtype') or ''} as {line['given_as']}",
            f"{line['mb_per_s']:,.0f}" if "mb_per_s" in line else "no",
            f"{line['plain_mb_per_s']:,.0f}, {line['page_cache']}" if "ratio" in line else "",
            spread(line) if "ratio" in line else cell(line.get("refused")),
        )
        for line in newest(lines, *key, "page_cache")
    ]
    columns = ("tool", "on", "order", "epoch", "rows", "MB/s", "plain read MB/s, page cache")
    return markdown((*columns, "ratio"), rows)


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


def trained(experiment: str, data: str) -> Callable[[Results], str]:
    """The runs of an experiment on some data: means over seeds, and standard deviations."""

    def table(results: Results) -> str:
        lines = [
            line
            for line in results.get("kinds", [])
            if line["op"] == "train"
            and line["experiment"] == experiment
            and line["data"].startswith(data)
        ]
        groups: Results = {}
        for line in newest(lines, "impl", "key", "seed"):
            groups.setdefault(f"{line['impl']} {line['key']}", []).append(line)
        shown = [name for name in _FIGURES if any(name in line for line in lines)]
        if any("workers" in line for line in lines):
            shown.remove("tokens_per_s")
        rows = [
            (
                group[0]["kind"] if group[0]["impl"] == "saekit" else named(group[0]),
                _options(group[0]),
                str(len(group)),
                *(_mean([line[name] for line in group], name) for name in shown),
            )
            for group in (groups.values() if experiment != "tools" else _by_kind(groups))
        ]
        return markdown(("kind", "options", "seeds", *(_FIGURES[name][0] for name in shown)), rows)

    return table


def _by_kind(groups: Results) -> list[list[Line]]:
    """Runs of tools, those that compare next to each other."""

    def place(group: list[Line]) -> tuple[str, bool, str, float]:
        line = group[0]
        return line["kind"], line["impl"] != "saekit", line["impl"], line["options"]["lr"]

    return sorted(groups.values(), key=place)


def _options(line: Line) -> str:
    data = [] if line["data"] in ("demo", "zipf") else [line["data"]]
    kind = [] if line["impl"] == "saekit" else [line["kind"]]
    return ", ".join([*data, *kind, *(f"{name} {v}" for name, v in line["options"].items())])


def _mean(values: list[float], name: str) -> str:
    digits = _FIGURES[name][1]
    mean = f"{statistics.mean(values):,.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):,.{digits}f}"


def step(results: Results) -> str:
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
            spread(line),
        )
        for line in newest(lines, "kind", "device", "gpu", "cpu", "d_in", "d_sae", "precision")
    ]
    columns = ("kind", "on", "d_in, latents, batch", "L0", "tokens/s", "ms a step")
    return markdown((*columns, "plain PyTorch ms", "times as fast"), rows)


def together(results: Results) -> str:
    lines = [line for line in results.get("train", []) if line["op"] == "together"]
    rows = [
        (
            f"{line['saes']} of {line['kind']}",
            f"{hardware(line)}, {line['precision']}",
            f"{line['d_in']}, {line['d_sae']}, {line['batch']}",
            f"{line['seconds']['median']:,.1f}",
            f"{line['apart_seconds']['median']:,.1f}",
            spread(line),
        )
        for line in newest(lines, "kind", "device", "gpu", "cpu", "d_in", "d_sae", "precision")
    ]
    columns = ("SAEs", "on", "d_in, latents, batch", "seconds together", "one after the other")
    return markdown((*columns, "times as fast"), rows)


def layers(results: Results) -> str:
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


def interop(results: Results) -> str:
    """What was checked against other tools, by version."""
    rows = [
        (
            _peer(line),
            line["way"],
            cell(line["case"]),
            "" if line.get("z") is None else f"{line['z']:.1e}",
            "" if line.get("x_hat") is None else f"{line['x_hat']:.1e}",
            _outcome(line),
        )
        for line in newest(results.get("interop", []), "impl", "way", "case")
    ]
    columns = ("tool", "way", "SAE", "latents apart", "reconstructions apart", "outcome")
    return markdown(columns, rows)


def browser(results: Results) -> str:
    lines = [line for line in results.get("dashboard", []) if "ms" in line]
    found = newest(lines, "d_sae", "op", "cpu", "cores")
    rows = [
        (
            f"{line['d_sae']:,}",
            line["op"],
            _ms(line["ms"]),
            _ms(line.get("ms_done")),
            f"{line['rss_mib']:,.0f}",
            f"{line['peak_mib']:,.0f}",
            hardware(line),
        )
        for line in found
    ]
    return markdown(
        ("latents", "what", "ms, median (least to most)", "ms until all is still")
        + ("server's memory, MiB", "most so far", "hardware"),
        rows,
    )


def _ms(figures: dict[str, float] | None) -> str:
    if figures is None:
        return ""
    if figures["n"] == 1:
        return f"{figures['median']:,.0f}"
    return f"{figures['median']:,.0f} ({figures['min']:,.0f} to {figures['max']:,.0f})"


def store_building(results: Results) -> str:
    lines = [line for line in results.get("dashboard", []) if line["op"] == "build"]
    found = newest(lines, "impl", "d_sae", "tokens", "cpu", "cores")
    return markdown(
        (
            "by",
            "latents, of so many",
            "tokens",
            "seconds",
            "tokens/s",
            "ms a latent",
            "most memory, MiB",
        )
        + ("hardware",),
        [
            (
                line["impl"],
                f"{line['latents']:,} of {line['d_sae']:,}",
                f"{line['tokens']:,}",
                f"{line['seconds']:,.1f}",
                f"{line['tokens_per_s']:,.0f}",
                f"{line['ms_per_latent']:.2f}",
                f"{line['peak_mib']:,.0f}",
                hardware(line),
            )
            for line in found
        ],
    )


def _peer(line: Line) -> str:
    package, version = next(iter(line["peer_versions"].items()))
    return f"{package} {version}"


def _outcome(line: Line) -> str:
    if line.get("refused"):
        return f"refused: {cell(line['refused'])}"
    return "agrees" if line["passed"] else f"**differs** {cell(line.get('error'))}"


KERNELS = "../saekit/kernels/README.md"
EVALS = "../evals/README.md"
PAGES: dict[str, dict[str, Callable[[Results], str]]] = {
    "browser.md": {"browser": browser, "store building": store_building},
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
    "../README.md": {"speed": _kernels_page.speed},
    EVALS: {"cost": _evals_page.cost},
    KERNELS: _kernels_page.TABLES,
}


def with_tables(page: str, name: str, results: Results) -> str:
    """The text of a page of this name with its tables made anew."""
    for title, table in PAGES[name].items():
        before, rest = page.split(begin(title))
        _, after = rest.split(END, 1)
        page = before + begin(title) + table(results) + END + after
    return page


def main() -> None:
    results = load()
    _kernels_page.draw(results)
    _dark_matter_page.draw(results)
    for name in PAGES:
        path = DOCS / name
        made = with_tables(path.read_text(encoding="utf-8"), name, results)
        path.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
