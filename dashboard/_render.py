"""Templates to text. HTML is escaped by default; Markdown by the filters `md` and `md_context`.

Tokens and document names come from a corpus and are treated as hostile everywhere.
"""

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from saekit import plot
from saekit.dashboard._comparison import Comparison
from saekit.dashboard.data import Context, Span, show_token
from saekit.dashboard.features import InputToken
from saekit.results import Metric

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """The template of that name, filled; a value that it asks for and is not given raises."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_spelled,
    )
    environment.filters.update(
        interval=interval,
        short=lambda value: f"{value:.3g}",
        md=escape_markdown,
        md_context=markdown_context,
        number=number,
        percent=percent,
        shade=plot.shade,
    )
    return environment


def _spelled(value: Any) -> Any:
    """Signs that would hide or reorder others are spelled out in all that a template shows; what
    is HTML already has been through here."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "\n".join(show_token(line) for line in value.split("\n"))


def contexts_html(contexts: Sequence[Context], maximum: float) -> str:
    """Contexts as HTML: each token coloured by its activation, which its tooltip gives."""
    return render("contexts.html.j2", contexts=contexts, maximum=maximum)


def bars_html(tokens: Sequence[InputToken]) -> str:
    """Tokens that a latent fires on as HTML, each with a bar of its share."""
    return render("bars.html.j2", tokens=tokens)


def metrics_html(metrics: Mapping[str, Metric]) -> str:
    """Every metric with its definition, as an HTML table."""
    return render("metrics.html.j2", metrics=metrics)


def compared_html(comparison: Comparison) -> str:
    """SAEs and their controls in rows, headline numbers in columns, as an HTML table."""
    return render("compared.html.j2", comparison=comparison, colour=plot.colour)


def legend_html(names: Sequence[tuple[int, str]]) -> str:
    """Which number and colour stands for which SAE, as an HTML list."""
    return render("legend.html.j2", names=names, colour=plot.colour)


def plain_html(text: str) -> str:
    """A remark as HTML; what stands between backticks is set as code."""
    return render("plain.html.j2", parts=_parts(text))


def token_html(tokens: Sequence[str], at: int) -> str:
    """A token among its neighbours."""
    return render("token.html.j2", tokens=tokens, at=at)


def fires_html(value: float, tokens: str) -> str:
    """How strongly a latent fires, and what it fires on elsewhere."""
    return render("fires.html.j2", value=value, tokens=tokens)


def continuation_html(prompt: Sequence[str], tokens: Sequence[str], other: Sequence[str]) -> str:
    """A text and what was written behind it, marked where that differs from `other`."""
    return render("continuation.html.j2", prompt=prompt, tokens=tokens, other=other)


def message_html(text: str, kind: str) -> str:
    """A message as HTML; what stands between backticks is set as code."""
    return render("message.html.j2", parts=_parts(text), kind=kind)


def _parts(text: str) -> list[str]:
    """Pieces of plain text and of code, in turn."""
    return text.split("`")


def interval(ends: tuple[float, float] | None) -> str:
    """The ends of an interval; nothing where there is none."""
    return "" if ends is None else f"{number(ends[0])} to {number(ends[1])}"


def style() -> Markup:
    """The style that the pieces of HTML above need; for the inside of a style element."""
    return Markup(render("style.css.j2"))


def browser_style() -> Markup:
    """That style, and what the feature browser's own pieces need."""
    return Markup(render("browser.css.j2"))


def number(value: float) -> str:
    """Four significant digits, thousands grouped; whole numbers whole."""
    if math.isfinite(value) and value == int(value):
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.1f}"


def percent(value: float) -> str:
    """A share as percent: one decimal, small shares with two significant digits."""
    return f"{value:.1%}" if value == 0 or abs(value) >= 0.01 else f"{100 * value:.2g}%"


def escape_markdown(text: object) -> str:
    """Text that Markdown (GitHub's and Streamlit's) shows as it is: no markup, no HTML, no table
    cells, no emoji for `:name:`, which no backslash prevents, so an invisible sign stands in it."""
    return _without_emoji(re.sub(r"([\\`*_\[\]~|$])", r"\\\1", escape(str(text), quote=False)))


def _without_emoji(markdown: str) -> str:
    return re.sub(r":(?=[\w\\+/-]+:)", ":\N{WORD JOINER}", markdown)


def markdown_context(context: Context) -> str:
    """One context in a line, its peak bold.

    Asterisks open and close bold only beside letters and digits, so other peaks get a `b` element.
    """
    # A name between colons may be of several tokens.
    return _without_emoji(
        "".join(
            _bold(span) if span.is_peak else escape_markdown(span.text) for span in context.spans
        )
    )


def _bold(span: Span) -> str:
    core = span.text.strip(" ")
    if not core:
        return "<b>" + "␣" * len(span.text) + "</b>"
    before, after = span.text.split(core, 1)
    text = escape_markdown(core)
    plain = core[0].isalnum() and core[-1].isalnum()
    return f"{before}**{text}**{after}" if plain else f"{before}<b>{text}</b>{after}"
