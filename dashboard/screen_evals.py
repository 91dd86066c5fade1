"""Every result of a run: each number with its definition, its interval and how many rows it is of,
and beside them those of controls."""

import streamlit as st

from saekit.dashboard import _findings, _render
from saekit.dashboard._comparison import Comparison, Subject
from saekit.dashboard._folder import Folder
from saekit.dashboard.data import Run, eval_command, show_token
from saekit.dashboard.report import measured_on
from saekit.dashboard.screen_address import Field, default
from saekit.dashboard.screen_parts import lacking, say
from saekit.results import EvalResult

FIELDS = (Field("eval", None), Field("metric", ""))


def show(folder: Folder, run: Run) -> None:
    st.markdown("## Evaluations")
    subject = Subject.of(run)
    if not subject.results:
        lacking("Nothing has been measured.", _commands(run), training=run.training)
        return
    names = list(subject.results)
    default("eval", names[0])
    if (asked := st.session_state["eval"]) not in names:
        say(f"There is no result of `{show_token(asked)}` here.", "warning")
        st.session_state["eval"] = names[0]
    name = st.segmented_control(
        "Evaluation",
        names,
        key="eval",
        format_func=lambda name: _render.escape_markdown(show_token(name)),
        required=True,
    )
    _one(subject.results[str(name)])
    _controls(run, subject)
    st.caption("Every evaluation that fits this SAE, one after another:")
    st.code(_commands(run)[0], language="bash", wrap_lines=True)


def _one(result: EvalResult) -> None:
    asked = st.text_input(
        "Number", key="metric", type="search", placeholder="Part of a number's name or definition"
    )
    wanted = (asked or "").casefold()
    found = {
        key: metric
        for key, metric in result.metrics.items()
        if wanted in key.casefold() or wanted in metric.definition.casefold()
    }
    st.html(_render.plain_html(measured_on(result)))
    if not found:
        say(f"None of the {len(result.metrics)} numbers has `{asked}` in it.")
    st.html(_render.metrics_html(found))
    with st.expander("How it was measured"):
        values = {
            **result.config,
            "cache fingerprint": result.cache_fingerprint,
            "SAE fingerprint": result.sae_fingerprint,
            **{f"version of {package}": version for package, version in result.versions.items()},
        }
        st.html(_render.render("facts.html.j2", facts=[(k, str(v)) for k, v in values.items()]))


def _controls(run: Run, subject: Subject) -> None:
    st.markdown("#### Beside its controls")
    if not subject.controls:
        command = [_findings.controls_command(run.path)]
        lacking(
            "No controls were measured: SAEs of random directions, principal components and single "
            "neurons, which learnt no features.",
            command,
            training=run.training,
        )
        return
    st.html(_render.compared_html(Comparison([subject])))
    say(
        "Controls learnt no features. ° marks a number that is not clearly better than one of them:"
        " the 95 % intervals overlap, or the control's is the better one."
    )


def _commands(run: Run) -> list[str]:
    return [eval_command("all", run.path)]
