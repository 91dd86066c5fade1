"""Plain line charts as SVG, side by side: standard library only, the same file for the same
numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

INK, MUTED, PALE = "#22272e", "#6b7280", "#e5e7eb"
COLOURS = ("#d9601a", "#2f6690", "#4d8b31", "#8e4585", "#b8860b", "#17877d", "#c2395b", "#4a4a4a")

WIDTH, HEIGHT = 380, 250
"""Of what is inside the axes."""
LEFT, TOP, GAP, BOTTOM = 58, 34, 26, 46
_ROW = 18
"""Height of a line of the legend."""


@dataclass(frozen=True)
class Series:
    """Points joined by a line; each is a value, or a value with the ends of its interval."""

    name: str
    x: Sequence[float]
    y: Sequence[Sequence[float]]
    colour: str
    dashed: bool = False
    """A fitted line: no points are drawn."""


@dataclass(frozen=True)
class Panel:
    title: str
    series: Sequence[Series]
    rules: dict[str, float] = field(default_factory=dict)
    """Horizontal lines to compare with, by name."""
    x_title: str = ""
    """Of an x axis of its own; else it is that of all."""


def chart(
    panels: Sequence[Panel],
    x_title: str,
    y_title: str,
    y_max: float | None = None,
    *,
    y_log: bool = False,
) -> str:
    """Panels over one logarithmic x axis, or each over its own, and one y axis from 0 (below, where
    values are), or a logarithmic one."""
    every_x = {x for panel in panels for one in panel.series for x in one.x}
    ends = [e for panel in panels for one in panel.series for y in one.y for e in y]
    rules = [v for panel in panels for v in panel.rules.values()]
    high = y_max if y_max is not None else 1.06 * max([*ends, *rules])
    low = min(ends) / 1.3 if y_log else min(0.0, *ends)
    grid = _powers(low, high) if y_log else _multiples(low, high)
    names = {one.name: one for panel in panels for one in panel.series}
    total = LEFT + len(panels) * (WIDTH + GAP)
    height = TOP + HEIGHT + BOTTOM + _ROW * math.ceil(len(names) / 3)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" width="{total}" '
        f'height="{height}" font-family="Helvetica, Arial, sans-serif" font-size="12">',
        f'<rect width="{total}" height="{height}" fill="white"/>',
        f'<text transform="translate(14 {TOP + HEIGHT / 2:g}) rotate(-90)" text-anchor="middle" '
        f'fill="{INK}">{escape(y_title)}</text>',
    ]
    for number, panel in enumerate(panels):
        left = LEFT + number * (WIDTH + GAP)
        own = {x for one in panel.series for x in one.x} if panel.x_title else every_x
        axes = _Axes(left, min(own), max(own), low, high, y_log)
        title = panel.x_title or x_title
        parts += _frame(axes, panel, sorted(own), grid, title, labels=number == 0)
        for one in panel.series:
            parts += _drawn(axes, one)
    for number, one in enumerate(names.values()):
        x = LEFT + (number % 3) * (total - LEFT) / 3
        y = TOP + HEIGHT + BOTTOM + _ROW * (number // 3) + 4
        dash = ' stroke-dasharray="5 4"' if one.dashed else ""
        parts.append(
            f'<path d="M{x:.1f} {y - 4:.1f}h22" stroke="{one.colour}" stroke-width="2"{dash}/>'
            f'<text x="{x + 28:.1f}" y="{y:.1f}" fill="{INK}">{escape(one.name)}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


@dataclass(frozen=True)
class _Axes:
    left: float
    x_min: float
    x_max: float
    low: float
    high: float
    y_log: bool

    def x(self, value: float) -> float:
        if self.x_max == self.x_min:
            return self.left + WIDTH / 2
        share = math.log(value / self.x_min) / math.log(self.x_max / self.x_min)
        # A little inside, so that points at the ends are whole.
        return self.left + 16 + share * (WIDTH - 32)

    def y(self, value: float) -> float:
        if self.y_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return TOP + HEIGHT * (1 - share)


def _frame(
    axes: _Axes,
    panel: Panel,
    xs: Sequence[float],
    grid: Sequence[float],
    x_title: str,
    *,
    labels: bool,
) -> list[str]:
    right, middle, floor = axes.left + WIDTH, axes.left + WIDTH / 2, TOP + HEIGHT
    parts = [
        f'<text x="{axes.left:g}" y="{TOP - 12}" fill="{INK}" font-weight="bold">'
        f"{escape(panel.title)}</text>",
        f'<text x="{middle:g}" y="{floor + 34}" text-anchor="middle" fill="{INK}">'
        f"{escape(x_title)}</text>",
    ]
    for value in grid:
        y = axes.y(value)
        parts.append(f'<path d="M{axes.left:g} {y:.1f}H{right:g}" stroke="{PALE}"/>')
        if labels:
            parts.append(
                f'<text x="{axes.left - 7:g}" y="{y + 4:.1f}" text-anchor="end" fill="{MUTED}">'
                f"{value:.10g}</text>"
            )
    for x in xs:
        parts.append(
            f'<text x="{axes.x(x):.1f}" y="{floor + 16}" text-anchor="middle" fill="{MUTED}">'
            f"{_short(x) if panel.x_title else f'{x:,.0f}'}</text>"
        )
    for name, value in panel.rules.items():
        y = axes.y(value)
        parts.append(
            f'<path d="M{axes.left:g} {y:.1f}H{right:g}" stroke="{MUTED}" stroke-dasharray="2 3"/>'
            f'<text x="{right - 4:g}" y="{y - 4:.1f}" text-anchor="end" fill="{MUTED}">'
            f"{escape(name)}</text>"
        )
    return parts


def _drawn(axes: _Axes, one: Series) -> list[str]:
    points = [(axes.x(x), axes.y(y[0])) for x, y in zip(one.x, one.y, strict=True)]
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if one.dashed else ""
    parts = [f'<path d="M{line}" fill="none" stroke="{one.colour}" stroke-width="2"{dash}/>']
    if one.dashed:
        return parts
    for (x, y), value in zip(points, one.y, strict=True):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{one.colour}"/>')
        if len(value) == 3:
            top, end = axes.y(value[2]), axes.y(value[1])
            parts.append(
                f'<path d="M{x:.1f} {top:.1f}V{end:.1f}M{x - 4:.1f} {top:.1f}h8M{x - 4:.1f} '
                f'{end:.1f}h8" stroke="{one.colour}" stroke-width="1.3"/>'
            )
    return parts


def _short(x: float) -> str:
    """A number of an axis: many of six digits would run into each other."""
    for unit, name in ((1 << 20, "Mi"), (1 << 10, "Ki")):
        if x >= 10 * unit or (x >= unit and x % unit == 0):
            return f"{x / unit:g} {name}" if x % unit == 0 else f"{x:,.0f}"
    return f"{x:,.0f}"


def _multiples(low: float, high: float) -> list[float]:
    """Lines of a grid: multiples of 1, 2 or 5 of a power of ten, four to nine of them."""
    span = high - low
    power: float = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * step for step in (1, 2, 5, 10) if span / (power * step) <= 9)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Those of a logarithmic axis: 1, 2 and 5 of each power of ten."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]
    return [value for value in every if low <= value <= high]
