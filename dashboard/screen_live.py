"""The model, the SAE and the cache behind the screens that run them: each is loaded once and shared
by everybody who looks."""

import sys
from argparse import ArgumentParser
from pathlib import Path

import streamlit as st

from saekit.activations_cache.model import LanguageModel
from saekit.activations_cache.store import ActivationCache
from saekit.dashboard import _live
from saekit.dashboard._live import Origin
from saekit.dashboard.data import Run, show_token
from saekit.dashboard.screen_address import Field
from saekit.dashboard.screen_parts import HOOK, MODEL, lacking, say
from saekit.sae import SAE

TEXT = Field("text", "")
"""The text that screens read; all of them have the same."""


def model_and_sae(run: Run) -> tuple[LanguageModel, SAE, str] | None:
    """What it takes to run the model, and the hook; None, and a word on why, where it lacks.

    Raises SaekitError where they cannot be loaded or do not belong together.
    """
    if run.training:
        lacking("There is no SAE yet.", run.missing(), training=True)
        return None
    origin = Origin.of(run, *_options())
    if missing := origin.lacking(run.path):
        say(missing[0], "info", [missing[1]])
        return None
    assert origin.model is not None and origin.hook is not None
    sae = saes(run.path, run.fingerprint)
    model = models(origin.model, origin.fingerprint)
    _live.check_width(model, origin.hook, sae)
    return model, sae, origin.hook


def _options() -> tuple[str | None, str | None]:
    parser = ArgumentParser(add_help=False)
    parser.add_argument(MODEL)
    parser.add_argument(HOOK)
    known, _ = parser.parse_known_args(sys.argv[1:])
    return known.model, known.hook


@st.cache_resource(max_entries=3, show_spinner="Reading the SAE …")
def saes(path: Path, fingerprint: str | None) -> SAE:
    return _live.load_sae(path)


@st.cache_resource(max_entries=2, show_spinner="Loading the language model …")
def models(name: str, fingerprint: str | None) -> LanguageModel:
    return _live.load_model(name, fingerprint)


@st.cache_resource(max_entries=2, show_spinner="Opening the cache …")
def caches(path: Path, fingerprint: str | None, _run: Run) -> ActivationCache:
    return _live.open_cache(_run)


def text_area() -> str:
    """The text to read."""
    return st.text_area(
        "Text",
        key=TEXT.name,
        height=110,
        max_chars=TEXT.max_length,
        placeholder="Type a text for the model to read, then press Ctrl+Enter",
    )


def cut_note(n_cut: int, model: LanguageModel) -> None:
    if n_cut:
        say(
            f"The last {n_cut} tokens were left out: '{show_token(model.name)}' reads "
            f"{model.context} at once.",
            "warning",
        )
