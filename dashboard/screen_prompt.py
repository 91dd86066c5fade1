"""A text of one's own: its tokens, the latents that fire on each, and what the SAE costs the model
there."""

from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
from numpy import ndarray

from saekit import plot
from saekit.dashboard import _latents, _prompt, _render, screen_live
from saekit.dashboard._folder import Folder
from saekit.dashboard._prompt import Reading
from saekit.dashboard._steer import Change
from saekit.dashboard.data import Run
from saekit.dashboard.screen_address import Field, default, one_of, whole
from saekit.dashboard.screen_live import TEXT
from saekit.dashboard.screen_parts import go_to, say, strip

SHADES = {
    "cost": "CE added",
    "ce": "CE",
    "error": "error",
    "latent": "one latent",
}
FIELDS = (
    TEXT,
    Field("at", None, whole),
    Field("shade", "cost", one_of(*SHADES)),
    Field("of", 0, whole),
)
N_LATENTS = 12


def show(folder: Folder, run: Run) -> None:
    st.markdown("## Prompt")
    parts = screen_live.model_and_sae(run)
    if parts is None:
        return
    model, _, hook = parts
    text = screen_live.text_area()
    if not text:
        st.caption("The text never leaves this machine.")
        return
    reading = _read(run.path, run.fingerprint, text, parts)
    screen_live.cut_note(reading.n_cut, model)
    _numbers(reading)
    at = _token(reading)
    left, right = st.columns([6, 5], gap="large")
    with left:
        _tokens(reading, at)
    with right:
        _fires(run, reading, at)
    st.html(_render.plain_html(_explained(hook)))


@st.cache_data(max_entries=32, show_spinner="Reading …")
def _read(path: Path, fingerprint: str | None, text: str, _parts: Any) -> Reading:
    model, sae, hook = _parts
    return _prompt.read(model, sae, hook, text)


def _numbers(reading: Reading) -> None:
    clean, spliced = reading.mean(reading.ce), reading.mean(reading.ce_sae)
    if clean is None or spliced is None:
        say("Two tokens at least, and losses are measured too.")
        return
    shown = {
        "CE, model as it is": (f"{clean:.3f}", "nats a token, mean"),
        "CE with the SAE": (f"{spliced:.3f}", f"{spliced - clean:+.3f} nats a token"),
        "L0": (f"{reading.l0[reading.text].mean():.1f}", "active latents a token, mean"),
        "Error": (f"{np.nanmean(reading.error):.1%}", "|x - x_hat| / |x|, mean"),
    }
    for column, (label, (value, aside)) in zip(st.columns(4), shown.items(), strict=True):
        column.metric(label, value, border=True)
        column.caption(aside)


def _token(reading: Reading) -> int:
    """The token chosen: as the address says, else the last one."""
    last = len(reading.tokens) - 1
    default("at", last)
    if st.session_state["at"] > last:
        say(f"There is no token {st.session_state['at']}: the text has 0 to {last}.", "warning")
        st.session_state["at"] = last
    return int(st.session_state["at"])


def _tokens(reading: Reading, at: int) -> None:
    kind = st.segmented_control(
        "Shade by", list(SHADES), key="shade", format_func=lambda name: SHADES[name], required=True
    )
    if kind == "latent":
        st.number_input("Latent", 0, step=1, key="of")
    values = _shown(reading, str(kind))
    most = max(float(np.nanmax(values, initial=0)), 1e-9)
    columns = (each.tolist() for each in (reading.ce, reading.ce_sae, reading.error))
    names = [
        f"{i}: CE {_number(ce)}, with the SAE {_number(with_sae)}; error {_number(error)}"
        for i, (ce, with_sae, error) in enumerate(zip(*columns, strict=True))
    ]
    shades = [plot.shade(0.0 if np.isnan(v) else float(v), most) for v in values]
    with st.container(border=True):
        strip(reading.tokens, shades, names, "strip", chosen=at, on_pick=_pick)
    st.dataframe(
        {
            "at": np.arange(len(reading.tokens)),
            "token": reading.tokens,
            "CE": reading.ce,
            "with the SAE": reading.ce_sae,
            "error": reading.error,
            "L0": reading.l0,
            "strongest latents": [_few(reading, i) for i in range(len(reading.tokens))],
        },
        hide_index=True,
        height=min(380, 35 * (len(reading.tokens) + 1) + 3),
        key="numbers",
        column_config={
            name: st.column_config.NumberColumn(format=form)
            for name, form in (("CE", "%.3f"), ("with the SAE", "%.3f"), ("error", "percent"))
        },
    )


def _pick() -> None:
    picked = st.session_state["strip"]["picked"]
    if picked is not None:
        st.session_state["at"] = int(picked)


def _shown(reading: Reading, kind: str) -> ndarray:
    match kind:
        case "cost":
            return np.asarray(reading.ce_sae - reading.ce)
        case "ce":
            return reading.ce
        case "error":
            return reading.error
    return reading.activation(int(st.session_state["of"]))


def _few(reading: Reading, at: int) -> str:
    pairs = zip(reading.latents[at, :4], reading.values[at, :4], strict=True)
    return "  ".join(f"{latent}: {value:.2f}" for latent, value in pairs if value)


def _fires(run: Run, reading: Reading, at: int) -> None:
    last = len(reading.tokens) - 1
    row = st.container(horizontal=True, vertical_alignment="bottom", gap="xsmall")
    row.button("", icon=":material/chevron_left:", on_click=_step, args=(at - 1,),
               disabled=at == 0, key="before", help="Token before")  # fmt: skip
    row.number_input("Token", 0, last, step=1, key="at", label_visibility="collapsed")
    row.button("", icon=":material/chevron_right:", on_click=_step, args=(at + 1,),
               disabled=at == last, key="after", help="Next token")  # fmt: skip
    st.html(_render.token_html(reading.tokens, at))
    if not reading.text[at]:
        say("A special token: the SAE does not read it, and it is left as it is.")
        return
    active = [
        (int(latent), float(value))
        for latent, value in zip(reading.latents[at], reading.values[at], strict=True)
        if value
    ]
    if not active:
        say("No latent fires on this token.")
    fires_on = _latents.fires_on(run, [latent for latent, _ in active[:N_LATENTS]])
    for (latent, value), tokens in zip(active[:N_LATENTS], fires_on, strict=True):
        row = st.container(
            horizontal=True, vertical_alignment="center", gap="xsmall", key=f"row-{latent}"
        )
        row.button(f"{latent}", key=f"open-{latent}", on_click=go_to, args=("feature",),
                   kwargs={"latent": latent}, help="Open this latent", width=84)  # fmt: skip
        row.html(_render.fires_html(value, tokens))
        row.button("", icon=":material/format_color_fill:", key=f"shade-{latent}",
                   on_click=_shade, args=(latent,), help="Where else it fires here")  # fmt: skip
        row.button("", icon=":material/tune:", key=f"steer-{latent}", on_click=go_to,
                   args=("steer",), help="Steer with it",
                   kwargs={"changes": (Change(latent, "set", round(2 * value, 2)),)})  # fmt: skip
    if len(active) > N_LATENTS:
        st.caption(f"and {len(active) - N_LATENTS} weaker ones")


def _step(at: int) -> None:
    st.session_state["at"] = at


def _shade(latent: int) -> None:
    st.session_state["shade"], st.session_state["of"] = "latent", latent


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"


def _explained(hook: str) -> str:
    return (
        "CE is the cross-entropy of a token given those before, in nats: -log p. With the SAE, its "
        f"reconstruction takes the place of the activation at {hook} on every token but special "
        "ones; means are over the tokens predicted from one of those. Error is |x - x_hat| / |x|."
    )
