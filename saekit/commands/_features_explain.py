"""Explain latents: saekit features explain RUN [CACHE]"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from saekit.commands._shared import Args, parse, print_table
from saekit.errors import ConfigError

if TYPE_CHECKING:
    from saekit.evals._explain_endpoint import Answers
    from saekit.explanations import Explanation
    from saekit.features import FeatureStore

ANSWERS = "explanations.answers.jsonl"


@dataclass(frozen=True, kw_only=True)
class ExplainArgs(Args):
    """Say in words what latents respond to, and score that on documents kept apart for it.

    Without --endpoint the words are rules about tokens, and nothing leaves this machine. With it, a
    language model is asked: contexts are sent there, what it will cost is said before, and answers
    are kept, so that the same command goes on where it was stopped. The key is read from the
    environment, SAEKIT_API_KEY."""

    run: Positional[Path]
    """Folder of the run, which needs a feature store."""
    cache: Positional[str | None] = None
    """Activation cache to draw plain text from; the one that the run was trained on where none is
    given."""
    latents: tuple[int, ...] = ()
    """Latents to explain, as `--latents 3 14`; all that fire where none is given, with a language
    model the 50 densest."""
    endpoint: str | None = None
    """Address of an OpenAI-compatible endpoint, up to /v1."""
    model: str | None = None
    """Language model to ask there."""
    replay: bool = False
    """Take every answer from those stored, and send nothing."""
    yes: bool = False
    """Begin without asking whether the cost is all right."""
    price_in: float = 0.0
    """Price of a million tokens sent, in whatever currency."""
    price_out: float = 0.0
    """Price of a million tokens answered."""
    concurrency: int = 8
    """Questions sent at once."""
    n_random: int = 256
    """Windows drawn at random from each half of the documents."""
    seed: int = 0
    """Of what is drawn at random."""


def run(argv: list[str]) -> None:
    args = parse(ExplainArgs, argv, "features explain")
    if (args.endpoint is None) != (args.model is None):
        raise ConfigError("--endpoint and --model belong together: give both, or none")
    if args.replay and args.model is None:
        raise ConfigError("--replay plays answers of a language model: give --endpoint and --model")
    from saekit import checkpoint, explanations
    from saekit.activations_cache.store import ActivationCache
    from saekit.activations_cache.unshuffled import unshuffled
    from saekit.commands.eval import cache_of
    from saekit.evals import _explain, _explain_contexts
    from saekit.features import FeatureStore
    from saekit.progress import bar
    from saekit.results import RESULTS

    store = FeatureStore.open(args.run / RESULTS)
    sae = checkpoint.load(args.run)
    fingerprint = checkpoint.fingerprint(sae)
    _explain.check_store(store, fingerprint, args.run)
    cache = unshuffled(ActivationCache.open(args.cache)) if args.cache else cache_of(args.run)
    halves = _explain_contexts.draw(sae, cache, store.header.hook, store, args.n_random, args.seed)
    latents = list(args.latents) or _densest(store, None if args.model is None else 50)
    if args.model is None:
        with bar("explain", len(latents)) as shown:
            found = _explain.by_rules(store, latents, halves, shown.advance)
    else:
        answers = _answers(args)
        asking = _explain.ByModel(store, latents, halves, answers, args.seed)
        if not _agreed(args, asking.cost()):
            return
        with bar("ask", 3 * len(asking.asked)) as shown:
            found = asking.run(shown.advance)
    path = explanations.keep(args.run, found, fingerprint)
    _show(found, len(latents))
    print(f"{path}\nNext: saekit dashboard {args.run}")


def _densest(store: "FeatureStore", n: int | None) -> list[int]:
    density = store.column("density")
    order = (-density).argsort(kind="stable")
    return [int(latent) for latent in order[: int((density > 0).sum())][:n]]


def _answers(args: ExplainArgs) -> "Answers":
    from saekit.evals._explain_endpoint import Answers, Endpoint

    assert args.endpoint is not None and args.model is not None
    endpoint = Endpoint(url=args.endpoint, model=args.model, concurrency=args.concurrency)
    return Answers(args.run / ANSWERS, endpoint, send=not args.replay)


def _agreed(args: ExplainArgs, cost: Any) -> bool:
    """Says what it will cost; whether to begin."""
    price = cost.price(args.price_in, args.price_out)
    priced = f", at most {price:,.2f} by the prices given" if price else ""
    print(
        f"{cost.n:,} questions to {args.model} at {args.endpoint}: about {cost.tokens_in:,} tokens "
        f"sent, at most {cost.tokens_out:,} answered{priced}"
    )
    if args.yes or args.replay or not cost.n:
        return True
    if sys.stdin.isatty():
        return input("Begin? [y/N] ").strip().lower() in ("y", "yes")
    print("Nothing was sent: the same command with --yes begins")
    return False


def _show(found: "dict[int, Explanation]", asked: int) -> None:
    rows = [
        (latent, one.text, _number(one.detection), _number(one.fuzzing))
        for latent, one in list(found.items())[:20]
    ]
    print_table(["latent", "responds to", "detection", "fuzzing"], rows)
    scores = [one.detection for one in found.values() if one.detection is not None]
    mean = (
        f"; detection {sum(scores) / len(scores):.3f} on the mean of {len(scores):,}, 0.5 is chance"
    )
    print(f"{len(found):,} of {asked:,} latents explained{mean if scores else ''}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
