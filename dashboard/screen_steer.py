"""Steering: latents set, scaled or taken away, and how the model goes on with and without that."""

from pathlib import Path
from typing import Any

import streamlit as st

from saekit import plot
from saekit.dashboard import _latents, _render, _steer, screen_live
from saekit.dashboard._folder import Folder
from saekit.dashboard._steer import HOWS, Change, Settings, Steered
from saekit.dashboard.data import Run
from saekit.dashboard.screen_address import Field, flag, whole
from saekit.dashboard.screen_live import TEXT
from saekit.dashboard.screen_parts import chart, say

MAX_TOKENS, MAX_SAMPLES, MAX_CHANGES = 120, 6, 12


def _up_to(most: int, least: int = 0) -> Any:
    def read(text: str) -> int:
        if not least <= (value := whole(text)) <= most:
            raise ValueError(text)
        return value

    return read


def _temperature(text: str) -> float:
    if not 0 <= (value := float(text)) <= 2:
        raise ValueError(text)
    return value


FIELDS = (
    TEXT,
    Field("changes", (), _steer.read_changes, _steer.write_changes),
    Field("keep", True, flag, lambda value: str(int(value))),
    Field("new", False, flag, lambda value: str(int(value))),
    Field("tokens", 24, _up_to(MAX_TOKENS, 1)),
    Field("samples", 2, _up_to(MAX_SAMPLES, 1)),
    Field("temperature", 0.8, _temperature, lambda value: f"{value:g}"),
    Field("seed", 0, whole),
)

_LABELS = {"set": "set to", "scale": "times", "ablate": "ablate"}


def show(folder: Folder, run: Run) -> None:
    st.markdown("## Steer")
    parts = screen_live.model_and_sae(run)
    if parts is None:
        return
    model, sae, hook = parts
    text = screen_live.text_area()
    left, right = st.columns([5, 4], gap="large")
    with left:
        changes = _changes(run, sae.d_sae)
    with right:
        settings = _settings()
    if not text:
        st.caption("With a text, the model goes on with it here: as it is, and steered.")
        return
    steered = _steered(run.path, run.fingerprint, text, changes, settings, parts)
    screen_live.cut_note(steered.n_cut, model)
    _results(steered, changes, settings)
    st.html(_render.plain_html(_explained(hook)))


@st.cache_data(max_entries=64, show_spinner="Writing …")
def _steered(
    path: Path,
    fingerprint: str | None,
    text: str,
    changes: tuple[Change, ...],
    settings: Settings,
    _parts: Any,
) -> Steered:
    model, sae, hook = _parts
    return _steer.steer(model, sae, hook, text, changes, settings)


def _changes(run: Run, d_sae: int) -> tuple[Change, ...]:
    changes: tuple[Change, ...] = st.session_state["changes"]
    beyond = [change.latent for change in changes if change.latent >= d_sae]
    if beyond:
        say(f"The SAE has latents 0 to {d_sae - 1}; left out: {beyond}.", "warning")
        changes = tuple(change for change in changes if change.latent < d_sae)
        st.session_state["changes"] = changes
    fires_on = _latents.fires_on(run, [change.latent for change in changes])
    for at, change in enumerate(changes):
        _row(at, change, d_sae, len(changes), fires_on[at])
    st.button(
        "Add a latent",
        icon=":material/add:",
        key="add",
        on_click=_add,
        args=(_latents.most_active(run, 1),),
        disabled=len(changes) >= MAX_CHANGES,
    )
    return changes


def _row(at: int, change: Change, d_sae: int, n: int, fires_on: str) -> None:
    state = st.session_state
    state[f"latent-{at}"], state[f"how-{at}"] = change.latent, change.how
    state[f"amount-{at}"] = float(change.amount)
    latent, how, amount, away = st.columns([3, 3, 3, 1], vertical_alignment="bottom")
    latent.number_input(
        "Latent", 0, d_sae - 1, step=1, key=f"latent-{at}", on_change=_changed, args=(n,)
    )
    how.selectbox(
        "How",
        HOWS,
        key=f"how-{at}",
        format_func=lambda name: _LABELS[name],
        on_change=_changed,
        args=(n,),
    )
    amount.number_input(
        "Amount",
        -1e6,
        1e6,
        step=1.0,
        key=f"amount-{at}",
        disabled=change.how == "ablate",
        on_change=_changed,
        args=(n,),
    )
    away.button("", icon=":material/close:", key=f"away-{at}", on_click=_away, args=(at,),
                help="Leave it as it is")  # fmt: skip
    if fires_on:
        st.html(_render.plain_html(f"fires on {fires_on}"))


def _changed(n: int) -> None:
    state = st.session_state
    state["changes"] = tuple(
        Change(int(state[f"latent-{at}"]), state[f"how-{at}"], float(state[f"amount-{at}"]))
        for at in range(n)
    )


def _add(first: list[int]) -> None:
    changes = st.session_state["changes"]
    new = Change(changes[-1].latent if changes else (first or [0])[0], "set", 10.0)
    st.session_state["changes"] = (*changes, new)


def _away(at: int) -> None:
    changes = st.session_state["changes"]
    st.session_state["changes"] = (*changes[:at], *changes[at + 1 :])


def _settings() -> Settings:
    keep = st.toggle(
        "Keep the error",
        key="keep",
        help="The activation itself is changed; otherwise the SAE's reconstruction takes its place",
    )
    new = st.toggle(
        "Only new tokens",
        key="new",
        help="Steer from the last token of the text on; otherwise on every token of it, too",
    )
    left, right = st.columns(2)
    n_tokens = left.number_input("Tokens to write", 1, MAX_TOKENS, step=4, key="tokens")
    samples = right.number_input("Continuations", 1, MAX_SAMPLES, step=1, key="samples")
    temperature = left.number_input("Temperature", 0.0, 2.0, step=0.1, key="temperature")
    seed = right.number_input("Seed", 0, 10**9, step=1, key="seed")
    return Settings(
        n_tokens=int(n_tokens),
        temperature=float(temperature),
        seed=int(seed),
        n_samples=int(samples),
        keep_error=bool(keep),
        new_only=bool(new),
    )


def _results(steered: Steered, changes: tuple[Change, ...], settings: Settings) -> None:
    st.markdown("#### Next token")
    if not changes and settings.keep_error:
        st.caption("Nothing is changed yet: both are the untouched model.")
    chart(plot.next_tokens(steered.next_tokens), "next")
    st.caption(f"KL(untouched ‖ steered) = {steered.kl:.4f} nats")
    st.markdown("#### How it goes on")
    for one in steered.continued:
        left, right = st.columns(2)
        for column, title, tokens, other in (
            (left, "untouched", one.clean, one.clean),
            (right, "steered", one.steered, one.clean),
        ):
            with column.container(border=True):
                st.caption(f"{title}, seed {one.seed}")
                st.html(_render.continuation_html(steered.prompt, tokens, other))


def _explained(hook: str) -> str:
    return (
        f"At {hook}, on every token that is no special one, latent j's value z becomes z': what is "
        "added is (z' - z) times its decoder row, to the activation itself where its error is kept,"
        " to the reconstruction otherwise. Untouched and steered continuations of a seed are drawn "
        "with the same random numbers. Marked: where the steered one differs."
    )
