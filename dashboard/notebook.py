"""What report and browser show, piece by piece, for notebooks: each function gives something that a
notebook displays. Charts are in `saekit.plot`.

Tokens and names of documents come from a corpus, and are escaped.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from saekit.dashboard import _render, features
from saekit.dashboard.data import Context, Span, show_token
from saekit.features import FeatureStore, Kind, TokenLogit
from saekit.results import EvalResult, Metric


@dataclass(frozen=True, repr=False)
class Html:
    """A piece of a page; where none can be shown, its words."""

    body: str

    def __repr__(self) -> str:
        return " ".join(Markup(self.body.replace("</", " </")).striptags().split())

    def _repr_html_(self) -> str:
        return f"<style>{_render.style()}</style>{self.body}"


def contexts(
    store: FeatureStore, latent: int, n: int = 5, kind: Kind = "top", group: int | None = None
) -> Html:
    """Where a latent fires: each token coloured by how strongly. `group` is the quantile of
    contexts that were drawn at random, kind "sample"."""
    found = store.latent(latent)
    shown = features.contexts(store, found, kind, group, limit=n)
    return Html(_render.contexts_html(shown, found.numbers["maximum"]))


def text(tokens: Sequence[str], values: Iterable[float], title: str = "") -> Html:
    """Tokens in a row, each coloured by a value: none below 0, the strongest at the largest."""
    each = [float(value) for value in values]
    if len(each) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens and {len(each)} values: give one for each token")
    peak = max(each, default=0.0)
    spans = [
        Span(show_token(token), max(value, 0.0), value == peak)
        for token, value in zip(tokens, each, strict=True)
    ]
    return Html(_render.contexts_html([Context(title, peak, spans)], peak))


def logits(store: FeatureStore, latent: int) -> tuple[list[TokenLogit], list[TokenLogit]]:
    """Output tokens that a latent raises most and lowers most, for `saekit.plot.token_bars`."""
    found = store.latent(latent)
    return features.promoted(store, found), features.suppressed(store, found)


def metrics(found: EvalResult | Mapping[str, Metric], *names: str) -> Html:
    """Numbers with their definitions; those named, or all."""
    known = found.metrics if isinstance(found, EvalResult) else found
    return Html(_render.metrics_html({name: known[name] for name in names or known}))
