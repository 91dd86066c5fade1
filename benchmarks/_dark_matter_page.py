"""The tables and figures of docs/dark_matter.md, from lines of results/dark_matter.jsonl: standard
library only.

A figure of a line is a list: a value, and where it has one the ends of its 95 % interval.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from _lines import DOCS, Line, Results, markdown
from _svg import COLOURS, Panel, Series, chart

Value = Sequence[float]

NAME = "dark_matter"

HALF, NORM, SAME, FLAT, SLIGHT = (0.4, 0.6), 0.9, 0.5, (0.9, 1.1), 0.1
"""Where a claim is called confirmed: see `claims`."""


def lines_of(results: Results, op: str) -> list[Line]:
    """The newest line of each case."""
    found: dict[tuple[Any, ...], Line] = {}
    for line in results.get(NAME, []):
        if line["op"] == op:
            case = (line["hook"], line.get("width"), line.get("part"), line["k"], line["seed"])
            found.pop(case, None)
            found[case] = line
    return sorted(found.values(), key=lambda line: (line["hook"], line.get("width") or 0))


def by_hook(lines: Iterable[Line]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line["hook"], []).append(line)
    return found


def text(value: Value | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    ends = f" [{value[1]:.{digits}f}, {value[2]:.{digits}f}]" if len(value) == 3 else ""
    return f"{value[0]:.{digits}f}{ends}"


def how(results: Results) -> str:
    """What the study took, in a sentence."""
    saes = lines_of(results, "sae")
    if not saes:
        return "The study is still to be run.\n"
    last = saes[-1]
    on = (
        last["gpu"]
        if last["device"].startswith("cuda")
        else f"{last['cpu']}, {last['cores']} cores"
    )
    minutes = sum(line["train_seconds"] + line["eval_seconds"] for line in saes) / 60
    config, rows = last["config"], last["rows"]
    return (
        f"{len(saes)} TopK SAEs with k = {last['k']} of {', '.join(by_hook(saes))}, each trained "
        f"on {config['n_tokens']:,} activations in batches of {config['batch_size']:,} from a "
        f"cache of {last['cache_rows']:,}; maps fitted on {rows['fit']:,} of its rows and measured "
        f"on {rows['held_out']:,} of documents that neither SAE nor map had seen. Training and "
        f"measuring took {minutes:.0f} minutes in all ({on}, torch {last['versions']['torch']}).\n"
    )


def claims(results: Results) -> str:
    """What was published, what was found, and whether the one is the other."""
    rows: list[tuple[str, ...]] = []
    scaling = {line["hook"]: line for line in lines_of(results, "scaling")}
    parts = by_hook(lines_of(results, "part"))
    for hook, lines in by_hook(lines_of(results, "sae")).items():
        for claim, called, judged in _CLAIMS:
            found, verdict = judged(lines, scaling.get(hook), parts.get(hook, []))
            if found:
                rows.append((claim, hook, found, verdict, called))
    rows.sort(key=lambda row: [claim for claim, _, _ in _CLAIMS].index(row[0]))
    columns = (
        "published",
        "layer",
        "found here, with 95 % intervals",
        "so it is",
        "called so where",
    )
    return markdown(columns, rows)


Judged = tuple[str, str]
Judge = Callable[[list[Line], Line | None, list[Line]], Judged]
_NOTHING: Judged = ("", "")


def _verdict(held: Sequence[bool | None], names: Sequence[str]) -> str:
    """Of each case: held, did not, or cannot be told (None)."""
    words = {True: "confirmed", False: "refuted", None: "undecided"}
    if len(set(held)) == 1:
        return f"**{words[held[0]]}**"
    groups = [
        f"{word} at {', '.join(n for n, h in zip(names, held, strict=True) if h is key)}"
        for key, word in words.items()
        if key in held
    ]
    return "; ".join(groups)


def _extremes(values: Sequence[Value], names: Sequence[str]) -> str:
    """The least and the greatest."""
    order = sorted(range(len(values)), key=lambda i: values[i][0])
    least, most = order[0], order[-1]
    if least == most:
        return f"{text(values[least])} at {names[least]}"
    return f"{text(values[least])} at {names[least]} to {text(values[most])} at {names[most]}"


def _over_widths(
    figure: str, held: Callable[[Value], bool | None]
) -> Callable[[list[Line], Line | None, list[Line]], Judged]:
    def judge(lines: list[Line], scaling: Line | None, parts: list[Line]) -> Judged:
        some = [line for line in lines if figure in line["figures"]]
        if not some:
            return _NOTHING
        values = [line["figures"][figure] for line in some]
        names = [f"{line['width']:,}" for line in some]
        return f"`{figure}` {_extremes(values, names)}", _verdict(list(map(held, values)), names)

    return judge


def _above(least: float) -> Callable[[Value], bool | None]:
    def held(value: Value) -> bool | None:
        low, high = value[-2:] if len(value) == 3 else (value[0], value[0])
        return True if low > least else False if high < least else None

    return held


def _between(ends: tuple[float, float]) -> Callable[[Value], bool | None]:
    def held(value: Value) -> bool | None:
        low, high = value[-2:] if len(value) == 3 else (value[0], value[0])
        if high < ends[0] or low > ends[1]:
            return False
        return True if ends[0] <= low and high <= ends[1] else None

    return held


def _same_tokens(lines: list[Line], scaling: Line | None, parts: list[Line]) -> Judged:
    pairs = [
        (value, f"{line['width']:,} from {smaller['width']:,}")
        for line in lines
        for smaller in lines
        if (value := line["figures"].get(f"length_r2_from_{_name(smaller)}")) is not None
    ]
    if not pairs:
        return _NOTHING
    values, names = [v for v, _ in pairs], [n for _, n in pairs]
    held = list(map(_above(SAME), values))
    return f"R² of the length, {_extremes(values, names)}", _verdict(held, names)


def _name(line: Line) -> str:
    return f"{line['hook']}-{line['width']}"


def _costs(lines: list[Line], scaling: Line | None, parts: list[Line]) -> Judged:
    shares = ("ce_recovered_from_sae_nonlinear", "variance_recovered_from_sae_nonlinear")
    some = [line for line in lines if all(name in line["figures"] for name in shares)]
    if not some:
        return _NOTHING
    both = [[line["figures"][name] for name in shares] for line in some]
    names = [f"{line['width']:,}" for line in some]
    held = [a[1] <= b[2] and b[1] <= a[2] for a, b in both if len(a) == len(b) == 3]
    loss, variance = ([pair[i] for pair in both] for i in (0, 1))
    found = (
        f"the nonlinear part wins back of the loss {_extremes(loss, names)}; of the variance "
        f"{_extremes(variance, names)}"
    )
    return found, _verdict(held, names) if len(held) == len(names) else ""


def _floor(lines: list[Line], scaling: Line | None, parts: list[Line]) -> Judged:
    if scaling is None:
        return _NOTHING
    ends = f"{scaling['widths'][-1]:,} latents of that at {scaling['widths'][0]:,}"
    ratio, total = scaling["nonlinear_ratio"], scaling["total_ratio"]
    found = f"at {ends}: nonlinear {text(ratio)}, the whole error {text(total)}"
    return found, _verdict([_between(FLAT)(ratio)], [""])


def _pursuit(lines: list[Line], scaling: Line | None, parts: list[Line]) -> Judged:
    some = [(less, line["width"]) for line in lines if (less := _saved(line)) is not None]
    if not some:
        return _NOTHING
    names = [f"{width:,}" for _, width in some]
    held = [less < SLIGHT for less, _ in some]
    found = f"less by {_extremes([[less] for less, _ in some], names)}, as a share"
    return found, _verdict(held, names)


def _saved(line: Line) -> float | None:
    """The share of the nonlinear error that pursuit takes off."""
    own, pursuit = (
        line["figures"].get(f"{name}_fvu_nonlinear") for name in ("pursuit_sae", "pursuit")
    )
    return 1 - pursuit[0] / own[0] if own and pursuit else None


def _earlier(lines: list[Line], scaling: Line | None, parts: list[Line]) -> Judged:
    found = [
        (value, line)
        for line in lines
        for name, value in line["figures"].items()
        if name.startswith("r2_nonlinear_pooled_from_")
        and name.endswith(f"-{line['width']}")
        and not name.endswith(f"from_{_name(line)}")
    ]
    saved = [_saved(line) for _, line in found]
    if not found:
        return _NOTHING
    names = [f"{line['width']:,}" for _, line in found]
    held = [None if s is None else v[0] > s for (v, _), s in zip(found, saved, strict=True)]
    return (
        f"R² of the nonlinear part {_extremes([v for v, _ in found], names)}",
        _verdict(held, names),
    )


def _of_parts(lines: list[Line], scaling: Line | None, parts: list[Line]) -> Judged:
    ev = {line["part"]: line["core"]["ev"] for line in parts}
    if not {"linear_error", "nonlinear_error"} <= ev.keys():
        return _NOTHING
    linear, nonlinear = ev["linear_error"], ev["nonlinear_error"]
    found = (
        f"explained variance {text(nonlinear)} on the nonlinear part, {text(linear)} on the linear"
    )
    if len(linear) < 3:
        return found, ""
    held = True if nonlinear[2] < linear[1] else False if nonlinear[1] > linear[2] else None
    return found, _verdict([held], [""])


_CLAIMS: tuple[tuple[str, str, Judge], ...] = (
    (
        "About half of the error vector is linear in the activation",
        f"all of the interval lies between {HALF[0]} and {HALF[1]}; refuted where none of it does",
        _over_widths("r2_vec_pooled", _between(HALF)),
    ),
    (
        "More than 90 % of its norm is",
        f"all of the interval lies above {NORM}; refuted where none of it does",
        _over_widths("r2_norm_sq", _above(NORM)),
    ),
    (
        "Larger SAEs fail on the same tokens as smaller ones",
        "the length of the smaller one's error explains more than half of the variance of the "
        "larger one's, over tokens",
        _same_tokens,
    ),
    (
        "The nonlinear part stays as dictionaries grow",
        f"it stays between {FLAT[0]} and {FLAT[1]} of what it is at the smallest",
        _floor,
    ),
    (
        "A part of the error costs loss as it has variance",
        "the intervals of the two shares overlap",
        _costs,
    ),
    (
        "A better encoder, gradient pursuit, takes little off the nonlinear part",
        f"less than {SLIGHT:.0%} of it (no interval)",
        _pursuit,
    ),
    (
        "Earlier SAEs' reconstructions tell more of it than that",
        "their R² is above that share (no interval)",
        _earlier,
    ),
    (
        "SAEs trained on the nonlinear part do worse than on the linear",
        "their explained variances' intervals are apart",
        _of_parts,
    ),
)


def sizes(results: Results) -> str:
    shown = {
        "fvu_total": "FVU",
        "fvu_linear": "its linear part",
        "fvu_nonlinear": "its nonlinear part",
        "r2_vec_pooled": "R² of the error, pooled",
        "r2_vec_uniform": "mean over dimensions",
        "r2_vec_pooled_no_intercept": "pooled, no intercept",
        "r2_vec_pooled_rescaled": "pooled, after the best gain",
        "gain_star": "best gain",
    }
    rows = [
        (
            line["hook"],
            f"{line['width']:,}",
            f"{line['core']['l0_mean'][0]:.1f}",
            f"{line['core']['dead_share'][0]:.2%}",
            *(text(line["figures"].get(name)) for name in shown),
        )
        for line in lines_of(results, "sae")
    ]
    return _picture("linear", "R² of the error and of its squared length over widths") + markdown(
        ("layer", "latents", "L0", "dead", *shown.values()), rows
    )


def norms(results: Results) -> str:
    shown = {
        "r2_norm_sq": "from x",
        "r2_norm_sq_no_intercept": "from x, no intercept",
        "r2_norm_sq_from_token": "from the token's id",
        "r2_norm_sq_from_length": "from \\|x\\|",
        "r2_norm_sq_from_l0": "from L0",
        "r2_norm_sq_from_loss": "from the model's loss",
        "r2_norm_sq_x": "of x",
        "r2_norm_sq_x_hat": "of x_hat",
        "r2_norm_sq_linear": "of the linear part",
        "r2_norm_sq_nonlinear": "of the nonlinear part",
    }
    lines = lines_of(results, "sae")
    shown = {n: title for n, title in shown.items() if any(n in line["figures"] for line in lines)}
    rows = [
        (line["hook"], f"{line['width']:,}", *(text(line["figures"].get(n)) for n in shown))
        for line in lines
    ]
    return markdown(("layer", "latents", *shown.values()), rows)


def laws(results: Results) -> str:
    rows = [
        (
            line["hook"],
            what,
            text(line[what]["floor"]),
            text(line[what]["scale"]),
            text(line[what]["exponent"]),
            f"{line['reference']:,.0f}",
            f"{line[what]['largest_miss']:.4f}",
            _edge(line[what]),
        )
        for line in lines_of(results, "scaling")
        for what in ("total", "nonlinear")
    ]
    columns = ("layer", "FVU", "floor", "scale", "exponent", "reference width", "largest miss", "")
    return _picture("sizes", "The error and its parts over widths") + markdown(columns, rows)


def _edge(law: Line) -> str:
    if law["scale"][0] == 0:
        return "it does not fall: the floor is its mean"
    return "the exponent is at the edge of what was looked at" if law["at_edge"] else ""


def tokens(results: Results) -> str:
    """R2 of the length of an SAE's error by that of a smaller one's on the same token."""
    rows = []
    for lines in by_hook(lines_of(results, "sae")).values():
        for line in lines:
            found = line["figures"]
            others = [other for other in lines if other["width"] < line["width"]]
            named = {f"{o['width']:,} latents": _name(o) for o in others}
            named["random directions"] = f"{_name(line)}-random"
            for what, name in named.items():
                rows.append(
                    (
                        line["hook"],
                        f"{line['width']:,}",
                        what,
                        text(found.get(f"length_r2_from_{name}")),
                        text(found.get(f"length_gain_from_{name}")),
                    )
                )
    columns = ("layer", "latents", "from the error's length of", "R²")
    return _picture("tokens", "R² of the error's length by that of smaller SAEs") + markdown(
        (*columns, "share of the rest that its nonlinear part's length adds"), rows
    )


def costs(results: Results) -> str:
    rows = [
        (
            line["hook"],
            f"{line['width']:,}",
            text(line["figures"].get("ce_clean"), 4),
            text(line["figures"].get("ce_sae"), 4),
            *(
                text(line["figures"].get(f"{share}_recovered_from_sae_{part}"))
                for part in ("linear", "nonlinear")
                for share in ("ce", "variance")
            ),
        )
        for line in lines_of(results, "sae")
    ]
    columns: tuple[str, ...] = (
        "layer",
        "latents",
        "loss",
        "with the SAE",
        "linear part: share of the loss",
    )
    columns += ("of the variance", "nonlinear part: share of the loss", "of the variance")
    return markdown(columns, rows)


def others(results: Results) -> str:
    """Pursuit, and what SAEs of the layer before tell."""
    rows = []
    for line in lines_of(results, "sae"):
        found = line["figures"]
        saved = _saved(line)
        before = sorted(
            name.removeprefix("r2_nonlinear_pooled_from_")
            for name in found
            if name.startswith("r2_nonlinear_pooled_from_") and name.endswith(f"-{line['width']}")
        )
        for name in before or [""]:
            rows.append(
                (
                    line["hook"],
                    f"{line['width']:,}",
                    text(found.get("pursuit_sae_fvu_nonlinear")),
                    text(found.get("pursuit_fvu_nonlinear")),
                    "–" if saved is None else f"{saved:.1%}",
                    name,
                    *(
                        text(found.get(f"r2_{part}_pooled_from_{name}"))
                        for part in ("error", "linear", "nonlinear")
                    ),
                )
            )
    columns: tuple[str, ...] = (
        "layer",
        "latents",
        "nonlinear FVU of the encoder",
        "of pursuit",
        "taken off",
    )
    columns += ("SAE of an earlier layer", "R² of the error", "of the linear", "of the nonlinear")
    return markdown(columns, rows)


def parts(results: Results) -> str:
    rows = [
        (
            line["hook"],
            f"{line['width']:,}",
            line["part"].replace("_", " "),
            text(line["core"]["ev"]),
            f"{line['core']['l0_mean'][0]:.1f}",
            f"{line['core']['dead_share'][0]:.2%}",
        )
        for line in lines_of(results, "part")
    ]
    columns = ("layer", "latents", "trained on the", "explained variance of it", "L0", "dead")
    return markdown(columns, rows)


def _picture(name: str, text: str) -> str:
    path = DOCS / f"dark_matter_{name}.svg"
    return f"![{text}]({path.name})\n\n" if path.exists() else ""


TABLES: dict[str, Callable[[Results], str]] = {
    "how": how,
    "claims": claims,
    "sizes": sizes,
    "norms": norms,
    "laws": laws,
    "tokens": tokens,
    "costs": costs,
    "others": others,
    "parts": parts,
}


def draw(results: Results) -> bool:
    """Whether there was anything to draw."""
    saes = by_hook(lines_of(results, "sae"))
    if not saes:
        return False
    _draw_sizes(saes, {line["hook"]: line for line in lines_of(results, "scaling")})
    shown = {"r2_vec_pooled": "the error vector", "r2_norm_sq": "its squared length"}
    shown["r2_norm_sq_from_token"] = "its squared length, from the token's id alone"
    panels = [
        Panel(
            hook,
            [_series(lines, n, name, COLOURS[i]) for i, (n, name) in enumerate(shown.items())],
            {"published: half": 0.5, "published: 90 %": NORM},
        )
        for hook, lines in saes.items()
    ]
    _write("linear", chart(panels, "latents", "R² on held-out documents", 1.0))
    if any(len(lines) > 1 for lines in saes.values()):
        _draw_tokens(saes)
    return True


def _series(lines: list[Line], figure: str, name: str, colour: str) -> Series:
    some = [line for line in lines if figure in line["figures"]]
    return Series(name, [x["width"] for x in some], [x["figures"][figure] for x in some], colour)


def _draw_sizes(saes: dict[str, list[Line]], scaling: dict[str, Line]) -> None:
    shown = {
        "fvu_total": "whole error",
        "fvu_nonlinear": "nonlinear part",
        "fvu_linear": "linear part",
    }
    panels = []
    for hook, lines in saes.items():
        series = [
            _series(lines, f, name, c)
            for (f, name), c in zip(shown.items(), COLOURS[:3], strict=True)
        ]
        if line := scaling.get(hook):
            for what, colour in (("total", COLOURS[0]), ("nonlinear", COLOURS[1])):
                series.append(_law(line, what, colour))
        panels.append(Panel(hook, series))
    _write("sizes", chart(panels, "latents", "share of the variance of x"))


def _law(line: Line, what: str, colour: str) -> Series:
    floor, scale, exponent = (line[what][name][0] for name in ("floor", "scale", "exponent"))
    widths = line["widths"]
    y = [[floor + scale * (width / line["reference"]) ** -exponent] for width in widths]
    name = {"total": "power law of the whole", "nonlinear": "power law of the nonlinear part"}
    return Series(name[what], widths, y, colour, dashed=True)


def _draw_tokens(saes: dict[str, list[Line]]) -> None:
    panels = []
    for hook, lines in saes.items():
        series = []
        for number, smaller in enumerate(lines[:-1]):
            figure = f"length_r2_from_{_name(smaller)}"
            series.append(
                _series(lines, figure, f"from {smaller['width']:,} latents", COLOURS[number])
            )
        random = [line["figures"].get(f"length_r2_from_{_name(line)}-random") for line in lines]
        if all(random):
            x = [line["width"] for line in lines]
            series.append(Series("from random directions", x, random, COLOURS[-1]))
        panels.append(Panel(hook, series))
    title = "R² of the error's length, token by token"
    _write("tokens", chart(panels, "latents of the larger SAE", title, 1.0))


def _write(name: str, svg: str) -> None:
    (DOCS / f"dark_matter_{name}.svg").write_text(svg, encoding="utf-8")
