"""One latent, on all of the page."""

import numpy as np
import streamlit as st

from saekit.dashboard import features, screen_feature, screen_features
from saekit.dashboard._folder import Folder
from saekit.dashboard.data import Run

FIELDS = screen_feature.FIELDS


def show(folder: Folder, run: Run) -> None:
    """The arrow keys step through those listed last."""
    store = screen_features.store_of(run)
    if store is None:
        return
    listed = st.session_state.get("listed")
    found = features.select(store) if listed is None or not len(listed) else listed
    if not len(found):
        found = np.arange(store.d_sae)
    latent = screen_features.chosen(store, found)
    writable = screen_features.writable()
    screen_feature.panel(run, store, latent, found, writable=writable)
