"""The feature browser: `streamlit run app.py -- RUN`, or `saekit dashboard RUN`.

This module opens the run and chooses the screen; each screen is a module `screen_*`.
"""

import sys
from pathlib import Path

import streamlit as st

from saekit.dashboard import _render, screen_features, screen_overview
from saekit.dashboard.data import Run
from saekit.dashboard.report import facts
from saekit.errors import SaekitError

# Less empty space than streamlit leaves. A comment, as streamlit would show a string on the page.
PAGE_STYLE = ".stMainBlockContainer { padding: 3rem 2.5rem; }"

SCREENS = {"Overview": screen_overview.show, "Features": screen_features.show}


def main(arguments: list[str]) -> None:
    st.set_page_config(page_title="saekit", page_icon="🔎", layout="wide")
    if len(arguments) != 1:
        st.error(
            "Give the folder of one run: `streamlit run app.py -- RUN`, or `saekit dashboard RUN`"
        )
        return
    path = Path(arguments[0])
    try:
        state = _state(path)
        run = _open(path, state)
    except SaekitError as error:
        st.error(str(error))
        return
    st.html(f"<style>{_render.style()}{PAGE_STYLE}</style>")
    SCREENS[_sidebar(run)](run)
    if run.training:
        _watch(path, state)


@st.cache_resource(max_entries=2, show_spinner="Reading the run …")
def _open(path: Path, state: tuple[tuple[str, int], ...]) -> Run:
    """The run, read once for each state of its files. Shared: nothing may change it."""
    return Run.open(path)


def _state(path: Path) -> tuple[tuple[str, int], ...]:
    """When each file of the run was last written, so that a run still training is read afresh."""
    files = [*path.glob("*.*"), *path.glob("results/*.*")]
    return tuple(sorted((str(file), file.stat().st_mtime_ns) for file in files if file.is_file()))


@st.fragment(run_every=5)
def _watch(path: Path, state: tuple[tuple[str, int], ...]) -> None:
    """Show a run that trains anew whenever it has written something."""
    if _state(path) != state:
        st.rerun()


def _sidebar(run: Run) -> str:
    with st.sidebar:
        st.markdown("### saekit")
        if "screen" not in st.session_state:
            st.session_state["screen"] = "Features" if "latent" in st.query_params else "Overview"
        screen = st.radio("Screen", list(SCREENS), key="screen", label_visibility="collapsed")
        st.divider()
        if run.training:
            st.badge(
                "not finished",
                color="orange",
                help="The SAE is still being trained, or was stopped.",
            )
        info = [("run", run.path), ("model", run.model), ("hook", run.hook), *facts(run)]
        st.html(_render.render("facts.html.j2", facts=info))
        for command in run.missing():
            st.caption("still to do")
            st.code(command, language="bash", wrap_lines=True)
        st.button("Read again", icon=":material/refresh:", help="Look for new lines and results.")
    return screen


main(sys.argv[1:])
