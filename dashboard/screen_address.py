"""The address holds what a screen shows: the screen, the run, and every choice on it.

A screen names its fields. A field is the key of a widget (or of any value) in the session, and a
parameter of the address; what is at its default is left out of the address. So an address says
everything, may be kept and sent, and survives reload, back and forward.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import streamlit as st

_SEEN, _SHOWN, _KEPT, _LATE = "_address", "_shown", "_kept", "_late"


@dataclass(frozen=True)
class Field:
    """A value of a screen that is in the address."""

    name: str
    default: Any
    read: Callable[[str], Any] = str
    """From the address. Raises ValueError for a text that is no such value."""
    write: Callable[[Any], str] = str
    max_length: int = 4000
    """Characters that the address may hold of it; a longer value stays out of it."""


def whole(text: str) -> int:
    """A whole number from 0 up, in plain digits."""
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise ValueError(text)
    return int(text)


def one_of(*names: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    return read


def flag(text: str) -> bool:
    return {"0": False, "1": True}[one_of("0", "1")(text)]


def follow(fields: Iterable[Field]) -> list[str]:
    """Take over what the address says where it is not what this session left there: where it was
    opened, typed, or gone back to. Returns the parameters that it could not read.

    Call it before the first widget. A choice made since the address was written goes before it: the
    web browser may send the choice while it still has the address before.
    """
    state, params = st.session_state, st.query_params.to_dict()
    fields = list(fields)
    if _SEEN in state:
        shown = [field for field in fields if field.name in state[_SHOWN]]
        left = {name: text for name, text in state[_SEEN].items() if name in state[_SHOWN]}
        if params == state[_SEEN] or _said(shown) != left:
            return []
    refused = []
    for field in fields:
        state[field.name] = field.default
        try:
            if field.name in params:
                state[field.name] = field.read(params[field.name])
        except ValueError:
            refused.append(field.name)
    state[_KEPT], state[_LATE], state[_SEEN], state[_SHOWN] = {}, {}, params, ()
    return refused


def default(name: str, value: Any) -> None:
    """Give a field whose own default is None one that depends on the run. It is left out of the
    address, too: to open an address never changes it. Call it before the field's widget."""
    st.session_state[_LATE][name] = value
    if st.session_state[name] is None:
        st.session_state[name] = value


def begin(fields: Iterable[Field]) -> None:
    """Give the fields of a screen their values: of the address, else as they were when the screen
    was last shown, else their defaults. Call it before the screen's widgets."""
    state = st.session_state
    for field in fields:
        if field.name not in state:
            state[field.name] = state[_KEPT].get(field.name, field.default)


def settle(fields: Iterable[Field]) -> None:
    """Write the fields of the screen shown into the address, in one step of the history. Call it
    at the end."""
    state = st.session_state
    fields = list(fields)
    for field in fields:
        if field.name in state:
            state[_KEPT][field.name] = state[field.name]
    said = _said(fields)
    if said != st.query_params.to_dict():
        st.query_params.from_dict(said)
    state[_SEEN], state[_SHOWN] = said, tuple(field.name for field in fields)


def _said(fields: Iterable[Field]) -> dict[str, str]:
    """What the address says of the values in the session."""
    state = st.session_state
    said = {}
    for field in fields:
        value = state.get(field.name, field.default)
        if value in (field.default, state[_LATE].get(field.name, field.default)):
            continue
        if len(text := field.write(value)) <= field.max_length:
            said[field.name] = text
    return said
