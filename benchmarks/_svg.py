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


def chart(panels: Sequence[Panel], x_title: str, y_title: str, y_max: float | None = None) -> str:
    """Panels over one logarithmic x axis and one y axis from 0 (below, where values are)."""
    xs = sorted({x for panel in panels for one in panel.series for x in one.x})
    ends = [e for panel in panels for one in panel.series for y in one.y for e in y]
    low = min(0.0, *ends)
    rules = [v for panel in panels for v in panel.rules.values()]
    high = y_max if y_max is not None else 1.06 * max([*ends, *rules])
    step = _step(high - low)
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
        axes = _Axes(left, xs[0], xs[-1], low, high)
        parts += _frame(axes, panel, xs, step, x_title, labels=number == 0)
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

    def x(self, value: float) -> float:
        if self.x_max == self.x_min:
            return self.left + WIDTH / 2
        share = math.log(value / self.x_min) / math.log(self.x_max / self.x_min)
        # A little inside, so that points at the ends are whole.
        return self.left + 16 + share * (WIDTH - 32)

    def y(self, value: float) -> float:
        return TOP + HEIGHT * (1 - (value - self.low) / (self.high - self.low))


def _frame(
    axes: _Axes, panel: Panel, xs: Sequence[float], step: float, x_title: str, *, labels: bool
) -> list[str]:
    right, middle, floor = axes.left + WIDTH, axes.left + WIDTH / 2, TOP + HEIGHT
    parts = [
        f'<text x="{axes.left:g}" y="{TOP - 12}" fill="{INK}" font-weight="bold">'
        f"{escape(panel.title)}</text>",
        f'<text x="{middle:g}" y="{floor + 34}" text-anchor="middle" fill="{INK}">'
        f"{escape(x_title)}</text>",
    ]
    for i in range(math.ceil(axes.low / step), math.floor(axes.high / step) + 1):
        y = axes.y(i * step)
        parts.append(f'<path d="M{axes.left:g} {y:.1f}H{right:g}" stroke="{PALE}"/>')
        if labels:
            parts.append(
                f'<text x="{axes.left - 7:g}" y="{y + 4:.1f}" text-anchor="end" fill="{MUTED}">'
                f"{i * step:.10g}</text>"
            )
    for x in xs:
        parts.append(
            f'<text x="{axes.x(x):.1f}" y="{floor + 16}" text-anchor="middle" fill="{MUTED}">'
            f"{x:,.0f}</text>"
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


def _step(span: float) -> float:
    """Between lines of the grid: 1, 2 or 5 of a power of ten, for four to nine lines."""
    power: float = 10.0 ** math.floor(math.log10(span / 4))
    return next(power * step for step in (1, 2, 5, 10) if span / (power * step) <= 9)
