"""The error of an SAE: how it splits, on which tokens it lies, and where it is worst."""

from pathlib import Path

import streamlit as st

from saekit import plot
from saekit.dashboard import _dark, _findings, _live, _render, screen_live
from saekit.dashboard._comparison import Subject
from saekit.dashboard._dark import Errors
from saekit.dashboard._folder import Folder
from saekit.dashboard.compare import parts
from saekit.dashboard.data import Run, eval_command, show_token
from saekit.dashboard.screen_address import Field, default
from saekit.dashboard.screen_parts import chart, lacking, say, strip
from saekit.errors import SaekitError

FIELDS = (Field("document", None),)

_HEADLINES = {
    "fvu_total": "FVU",
    "fvu_nonlinear": "of it nonlinear",
    "fvu_linear": "of it linear",
    "error_r2": "error predicted by x",
}


def show(folder: Folder, run: Run) -> None:
    st.markdown("## Dark matter")
    _split(run)
    st.markdown("#### Where the error lies")
    if run.training:
        lacking("There is no SAE yet.", run.missing(), training=True)
        return
    try:
        errors = _look(run)
    except SaekitError as error:
        say(
            f"The tokens cannot be looked at: {error}. With the cache that it was trained on back "
            "in its place, or a new one from `saekit harvest`, they can.",
            "warning",
        )
        return
    vocab = _vocab(run, errors)
    left, right = st.columns(2, gap="large")
    with left:
        chart(plot.shares(errors.shares), "shares")
    with right:
        st.dataframe(
            _dark.hardest(errors, vocab),
            hide_index=True,
            height=280,
            key="hardest",
            column_config={
                "mean share": st.column_config.NumberColumn(format="%.3f"),
                "of the error": st.column_config.NumberColumn(format="percent"),
            },
        )
    st.html(_render.plain_html(_explained(errors)))
    st.markdown("#### Worst contexts")
    with st.container(border=True, height=430):
        st.html(_render.contexts_html(_dark.worst(errors, vocab), errors.scale))
    _document(errors, vocab)


def _split(run: Run) -> None:
    results = _findings.results(run)
    if "dark_matter" not in results:
        lacking(
            "How much of the error is linear in the activation has not been measured.",
            [eval_command("dark_matter", run.path)],
            training=run.training,
        )
        return
    metrics = results["dark_matter"].metrics
    shown = [name for name in _HEADLINES if name in metrics]
    for column, name in zip(st.columns(max(len(shown), 1)), shown, strict=False):
        said = _render.escape_markdown(metrics[name].definition)
        column.metric(_HEADLINES[name], f"{metrics[name].value:.3f}", border=True, help=said)
    chart(plot.dark_matter(parts([Subject.of(run)])), "split")
    with st.expander(f"All {len(metrics)} numbers"):
        st.html(_render.metrics_html(metrics))


def _look(run: Run) -> Errors:
    return _errors(run.path, run.fingerprint, run)


@st.cache_resource(max_entries=2, show_spinner="Looking at held-out tokens …")
def _errors(path: Path, fingerprint: str | None, _run: Run) -> Errors:
    sae = screen_live.saes(path, fingerprint)
    return _dark.look(sae, _live.open_cache(_run), _run.hook)


def _vocab(run: Run, errors: Errors) -> list[str]:
    """Tokens as text; as numbers where the model is not at hand."""
    made = run.provenance
    try:
        if made is not None:
            return screen_live.models(made.model, made.model_fingerprint).vocab
    except SaekitError as error:
        say(f"Tokens are shown by number, as the model is not at hand: {error}", "warning")
    most = max(int(place.tokens.max()) for place in errors.places)
    return [f" {token}" for token in range(most + 1)]


def _document(errors: Errors, vocab: list[str]) -> None:
    st.markdown("#### Token by token")
    names = errors.documents
    default("document", names[0])
    if (asked := st.session_state["document"]) not in names:
        say(f"There is no document `{show_token(asked)}` among those looked at.", "warning")
        st.session_state["document"] = names[0]
    name = st.selectbox("Document", names, key="document", format_func=show_token)
    spans = _dark.text_of(errors, str(name), vocab)
    with st.container(border=True, height=360):
        strip(
            [span.text for span in spans],
            [plot.shade(span.act, errors.scale) for span in spans],
            [f"share {span.act:.3f}" for span in spans],
            "document-tokens",
        )


def _explained(errors: Errors) -> str:
    return (
        f"Over the first {errors.n:,} tokens of documents held out from training. A token's share "
        "is |x - x_hat|² over the mean of |x - mu|²; their mean is the fraction of variance "
        f"unexplained, here {errors.fvu:.4f}. Colour is full from {errors.scale:.3g}, which one "
        "token in a hundred is above."
    )
