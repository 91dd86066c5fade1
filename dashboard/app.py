"""The feature browser: `streamlit run app.py -- PATH`, or `saekit dashboard PATH`.

This module opens the run or the folder of runs and chooses the screen; each screen is a module
`screen_*`. Which screen and which run are shown, and every choice on the screen, are in the
address (see `screen_address`). Nothing here writes.
"""

import sys
from argparse import ArgumentParser
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from types import ModuleType

import streamlit as st

from saekit.dashboard import _render, screen_address, screen_features, screen_parts
from saekit.dashboard._folder import Folder
from saekit.dashboard._opened import State, opened, state
from saekit.dashboard.data import Run, show_token
from saekit.dashboard.report import facts
from saekit.errors import SaekitError


@dataclass(frozen=True)
class Screen:
    """A screen, whose module is loaded when it is first shown: some need torch and a model."""

    title: str
    name: str

    @property
    def module(self) -> ModuleType:
        return import_module(f"saekit.dashboard.{self.name}")

    @property
    def loaded(self) -> bool:
        return f"saekit.dashboard.{self.name}" in sys.modules

    @property
    def fields(self) -> tuple[screen_address.Field, ...]:
        found: tuple[screen_address.Field, ...] = self.module.FIELDS
        return found

    def show(self, folder: Folder, run: Run) -> None:
        self.module.show(folder, run)


# By their names in the address. A comment, as streamlit would show a string on the page.
SCREENS = {
    "runs": Screen("Runs", "screen_runs"),
    "features": Screen("Features", "screen_features"),
    "feature": Screen("Feature", "screen_one_feature"),
    "prompt": Screen("Prompt", "screen_prompt"),
    "steer": Screen("Steer", "screen_steer"),
    "compare": Screen("Compare", "screen_compare"),
    "dark": Screen("Dark matter", "screen_dark_matter"),
    "evals": Screen("Evals", "screen_evals"),
}


def main(arguments: list[str]) -> None:
    st.set_page_config(page_title="saekit", page_icon="🔎", layout="wide")
    st.html(f"<style>{_render.browser_style()}</style>")
    paths = _paths(arguments)
    if len(paths) != 1:
        screen_parts.say(
            "Give one folder, of a run or of runs: `streamlit run app.py -- PATH`, or "
            "`saekit dashboard PATH`",
            "error",
        )
        return
    try:
        folder = Folder.open(paths[0])
    except SaekitError as error:
        screen_parts.say(error, "error")
        return
    shell = (
        screen_address.Field("screen", "runs", screen_address.one_of(*SCREENS)),
        screen_address.Field("run", folder.names[0]),
    )
    # A screen that was never loaded has left nothing that an address could change.
    asked = st.query_params.get("screen")
    there = (each.fields for name, each in SCREENS.items() if each.loaded or name == asked)
    fields = [*shell, *chain.from_iterable(there)]
    refused = screen_address.follow(fields)
    screen_address.begin(shell)
    screen = SCREENS[_navigation()]
    for name in refused:
        screen_parts.say(
            f"The address gives `{show_token(name)}` a value that it cannot have: "
            f"`{show_token(st.query_params.get(name, ''))}`. Its default is shown.",
            "warning",
        )
    screen_address.begin(screen.fields)
    run = _run(folder)
    if run is not None:
        try:
            screen.show(folder, run)
        except SaekitError as error:
            screen_parts.say(error, "error")
    elif screen.title == "Runs":
        screen.module.table(folder)
    screen_address.settle([*shell, *screen.fields])
    if run is not None and run.training:
        _watch(run.path, state(run.path))


def _paths(arguments: list[str]) -> list[str]:
    """The arguments without the options, which the screens that take them read."""
    parser = ArgumentParser(add_help=False)
    for option in (screen_parts.MODEL, screen_parts.HOOK):
        parser.add_argument(option)
    parser.add_argument("paths", nargs="*")
    return list(parser.parse_known_args(arguments)[0].paths)


def _navigation() -> str:
    screen = st.segmented_control(
        "Screen",
        list(SCREENS),
        key="screen",
        format_func=lambda name: SCREENS[name].title,
        required=True,
        label_visibility="collapsed",
    )
    return str(screen)


def _run(folder: Folder) -> Run | None:
    """The run to show, with what it is at the side; None where there is none to show."""
    name = _chosen(folder)
    if name is None:
        return None
    try:
        run = opened(folder.run(name))
    except SaekitError as error:
        screen_parts.say(error, "error")
        return None
    with st.sidebar:
        _side(run)
    return run


def _chosen(folder: Folder) -> str | None:
    """The name of the run: of this session or of the address, else the first."""
    asked = st.session_state["run"]
    if asked not in folder.names:
        screen_parts.say(folder.refusal(asked), "error")
        return None
    with st.sidebar:
        st.markdown("### saekit")
        if folder.single:
            return ""
        st.selectbox("Run", folder.names, key="run", format_func=show_token)
    return str(st.session_state["run"])


def _side(run: Run) -> None:
    if run.training:
        st.badge(
            "not finished",
            color="orange",
            help="The SAE is still being trained, or was stopped.",
        )
    info = [("run", run.path), ("model", run.model), ("hook", run.hook), *facts(run)]
    shown = [(label, show_token(str(value))) for label, value in info]
    st.html(_render.render("facts.html.j2", facts=shown))
    for command in run.missing():
        st.caption("still to do")
        st.code(command, language="bash", wrap_lines=True)
    st.button("Read again", icon=":material/refresh:", help="Look for new lines and results.")


@st.fragment(run_every=5)
def _watch(path: Path, shown: State) -> None:
    """Show a run that trains anew whenever it has written something."""
    if state(path) != shown:
        st.rerun()


main([argument for argument in sys.argv[1:] if argument != screen_features.WRITE])
