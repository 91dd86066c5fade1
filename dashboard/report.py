"""A run as a document: `report.html`, one file that needs no network, and `report.md`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from saekit import plot
from saekit.dashboard import _findings, _render, data, features
from saekit.dashboard._comparison import Comparison, Subject
from saekit.dashboard.compare import parts
from saekit.dashboard.data import Run, quote
from saekit.errors import SaekitError
from saekit.features import FeatureStore
from saekit.files import write_text
from saekit.results import EvalResult, Metric

N_CONTEXTS, N_LOGITS = 6, 8
"""Contexts and output tokens shown of each latent."""


@dataclass(frozen=True)
class Section:
    """What an evaluation found, beside `core` and `examples`."""

    name: str
    measured_on: str
    metrics: Mapping[str, Metric]
    table: Markup
    figure: Markup | None

    @property
    def count(self) -> int:
        return len(self.metrics)


@dataclass(frozen=True)
class Tile:
    """A headline number."""

    label: str
    value: str
    aside: str
    definition: str


def write_report(run: Path, out: Path | None = None, *, n_latents: int = 24, seed: int = 0) -> Path:
    """Write the report of a finished run and return its path: `report.html` in the run, or `out`.

    The Markdown goes beside it under the same name. `n_latents` are sampled with `seed`. Raises
    SaekitError, with the commands to give, where the SAE or a result is not there yet.
    """
    opened = Run.open(run)
    core, store = opened.core, opened.features
    if opened.training or core is None or store is None:
        commands = "\n".join(f"    {command}" for command in opened.missing())
        raise SaekitError(
            f"a report of {run} needs results that are not there yet; give first:\n{commands}"
        )
    out = opened.path / "report.html" if out is None else Path(out)
    if out.suffix not in (".html", ".htm"):
        raise SaekitError(
            f"{out} must end in .html: that is what is written, with Markdown (.md) beside it"
        )
    chosen = features.sample_latents(store, n_latents, seed)
    subject = Subject.of(opened)
    beside = Comparison([subject]) if subject.controls else None
    values = {
        "run": opened,
        "core": core,
        "facts": facts(opened),
        "tiles": tiles(core),
        "measured_on": measured_on(core),
        "sample_note": _sample_note(store, chosen, seed),
        "context_note": context_note(store),
        "latents": [_latent(store, latent) for latent in chosen],
        "sections": _sections(subject),
        "comparison": beside,
        "commands": _commands(opened, subject),
        "provenance": _provenance(opened, core, subject.results),
    }
    panels = plot.training_panels(opened.curves)
    charts = {
        **{f"training-{name}": figure for name, figure in panels.items()},
        "density": plot.density_histogram(store.column("density")),
        "ladder": plot.ce_ladder(core.metrics),
    }
    page = _render.render(
        "report.html.j2",
        **values,
        training=[f"training-{name}" for name in panels],
        figures={name: Markup(plot.to_html(figure, name)) for name, figure in charts.items()},
        plotly=Markup(plot.plotly_script()),
        style=_render.style(),
        metrics_html=Markup(_render.metrics_html(core.metrics)),
        controls=Markup(_render.compared_html(beside)) if beside else None,
    )
    write_text(out.with_suffix(".md"), _render.render("report.md.j2", **values))
    write_text(out, page)
    return out


def facts(run: Run) -> list[tuple[str, str]]:
    """What the run is, in a line of labels and values."""
    labels = {"kind": run.kind, "d_sae": run.d_sae, "k": run.config.get("k")}
    if run.provenance is not None:
        labels["rows trained on"] = run.provenance.rows_seen
    return [
        (label, f"{value:,}" if isinstance(value, int) else str(value))
        for label, value in labels.items()
        if value is not None
    ]


def tiles(core: EvalResult) -> list[Tile]:
    """The headline numbers that were measured, each with its full definition."""
    kinds = {
        "ev": ("Explained variance", "{:.3f}", "1 is perfect"),
        "ce_recovered_zero": ("CE recovered (zero)", "{:.3f}", "1 is perfect, 0 is zero-ablation"),
        "ce_recovered_mean": ("CE recovered (mean)", "{:.3f}", "1 is perfect, 0 is mean-ablation"),
        "l0_mean": ("L0", "{:.1f}", "active latents a token, mean"),
        "dead_share": ("Dead latents", "{:.1%}", "never fired in the evaluation"),
    }
    return [
        Tile(label, form.format(core.metrics[name].value), aside, core.metrics[name].definition)
        for name, (label, form, aside) in kinds.items()
        if name in core.metrics
    ]


def _sections(subject: Subject) -> list[Section]:
    sections = []
    for name, result in subject.results.items():
        if name in ("core", "examples"):
            continue
        figure = None
        if name == "dark_matter" and (bars := parts([subject])):
            chart = plot.dark_matter(bars)
            figure = Markup(plot.to_html(chart, "dark_matter"))
        table = Markup(_render.metrics_html(result.metrics))
        sections.append(Section(name, measured_on(result), result.metrics, table, figure))
    return sections


def measured_on(core: EvalResult) -> str:
    """Which tokens the numbers are about."""
    left_out = f"without {_listing(core.exclude)} tokens" if core.exclude else "every token counted"
    return f"Measured at {core.hook} on {_split(core.split)}, {left_out}."


def context_note(store: FeatureStore) -> str:
    """Where the contexts are from and how they were picked."""
    of = store.header
    left_out = f", {_listing(of.exclude)} tokens left out" if of.exclude else ""
    return (
        f"Contexts are each latent's strongest among {of.n_rows:,} tokens of "
        f"{_split(of.split)}{left_out}; weaker activations may mean something else."
    )


def _sample_note(store: FeatureStore, chosen: list[int], seed: int) -> str:
    alive = int((~features.is_dead(store)).sum())
    if len(chosen) == alive:
        return f"All {alive:,} latents that fire, the densest first."
    return (
        f"{len(chosen)} of the {alive:,} latents that fire, not picked by hand: one drawn at "
        f"random (seed {seed}) from each of {len(chosen)} equal groups by density, densest first."
    )


def _latent(store: FeatureStore, index: int) -> dict[str, Any]:
    latent = store.latent(index)
    contexts = features.contexts(store, latent, limit=N_CONTEXTS)
    maximum = latent.numbers["maximum"]
    return {
        "index": index,
        "density": latent.numbers["density"],
        "maximum": maximum,
        "contexts": contexts,
        "contexts_html": Markup(_render.contexts_html(contexts, maximum)),
        "histogram": Markup(plot.histogram_svg(latent.lists["histogram"], maximum)),
        "promoted": features.promoted(store, latent)[:N_LOGITS],
        "suppressed": features.suppressed(store, latent)[:N_LOGITS],
    }


def _commands(run: Run, subject: Subject) -> list[str]:
    again = f"{run.path}-again"
    extra = [name for name in subject.results if name not in ("core", "examples")]
    train = f"saekit train {run.kind} {quote(str(run.path / data.CONFIG))}"
    return [
        *([f"{train} --out {quote(again)}"] if (run.path / data.CONFIG).is_file() else []),
        data.eval_command("core", Path(again)),
        data.eval_command("examples", Path(again)),
        *(data.eval_command(name, Path(again)) for name in extra),
        *([_findings.controls_command(Path(again))] if subject.controls else []),
        f"saekit report {quote(again)}",
    ]


def _provenance(
    run: Run, core: EvalResult, results: Mapping[str, EvalResult]
) -> list[tuple[str, list[tuple[str, str]]]]:
    made = run.provenance
    identity = {
        "SAE fingerprint": run.fingerprint,
        "cache fingerprint, trained on": made.cache_fingerprint if made else None,
        "cache fingerprint, evaluated on": core.cache_fingerprint,
        "model": made.model if made else None,
        "model fingerprint": made.model_fingerprint if made else None,
    }
    return [
        ("Identity", _rows(identity)),
        ("Versions, training", _rows(made.versions if made else {})),
        ("Versions, evaluation", _rows(core.versions)),
        ("Config, training", _rows(run.config)),
        *((f"Config of {name}", _rows(result.config)) for name, result in results.items()),
    ]


def _rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key, str(value)) for key, value in values.items() if value is not None]


def _listing(names: Iterable[str]) -> str:
    return ", ".join(names)


def _split(name: str) -> str:
    return "all documents" if name == "all" else f"the {name} split"
