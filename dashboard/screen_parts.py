"""What several screens show alike: charts, messages, a strip of tokens, and ways to other screens.

Streamlit reads most text as Markdown, with signs of its own in it (`:smile:`, `->`, addresses of
pages). So text that is not ours goes through `say`, HTML that is escaped, tables or plain widgets,
and never into st.write and its kin.
"""

from collections.abc import Callable
from typing import Any

import streamlit as st
from streamlit.components.v2 import component

from saekit import plot
from saekit.dashboard import _render

MODEL, HOOK = "--model", "--hook"
"""Options of the app, for an SAE that does not say which model and hook it is of."""


def chart(figure: Any, key: str) -> None:
    st.plotly_chart(of_the_page(figure), theme=None, config=plot.CONFIG, key=key)


def of_the_page(figure: Any) -> Any:
    """A chart in the colours and the letters of the page."""
    figure.update_layout(font_family=f"'Source Sans', {figure.layout.font.family}")
    return plot.in_dark(figure) if st.context.theme.type == "dark" else figure


def say(text: object, kind: str = "info", commands: list[str] | tuple[str, ...] = ()) -> None:
    """A message in which every sign is shown as it is; `kind` is info, warning or error."""
    st.html(_render.message_html(str(text), kind))
    for command in commands:
        st.code(command, language="bash", wrap_lines=True)


def lacking(what: str, commands: list[str], *, training: bool = False) -> None:
    """Says what is not there yet, and which commands make it."""
    say(what + (" Training has to end first." if training else " This makes it:"), "info", commands)


def go_to(screen: str, **values: Any) -> None:
    """For a widget's callback: show another screen, with these of its fields."""
    st.session_state["screen"] = screen
    for name, value in values.items():
        st.session_state[name] = value


_STRIP = component(
    "saekit_tokens",
    html='<div class="strip" role="listbox" aria-label="Tokens"></div>',
    css=_render.render("strip.css.j2"),
    js=_render.render("strip.js.j2"),
)


def strip(
    tokens: list[str],
    shades: list[str],
    titles: list[str],
    key: str,
    *,
    chosen: int | None = None,
    on_pick: Callable[[], None] | None = None,
) -> int | None:
    """Tokens in a row, each with a background and a tooltip; returns the one clicked just now."""
    data = {"tokens": tokens, "shades": shades, "titles": titles, "chosen": chosen}
    picked = _STRIP(key=key, data=data, on_picked_change=on_pick or (lambda: None))
    return None if picked.picked is None else int(picked.picked)
