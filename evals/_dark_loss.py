"""One more baseline of the norm test: how far the model's own loss at a token tells how long an
SAE's error there is (arXiv 2410.14670, the appendix's comparison).

    |e|^2 ~ a * -log p(next token) + b

fitted on the first tokens of the train split that have a next one, and measured on those of the
test split. Axes: token.
"""

from collections.abc import Callable, Collection, Iterator
from functools import reduce
from operator import add
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.activations_cache.model import LanguageModel
from saekit.evals._dark_parts import Rows, Subject
from saekit.evals._dark_table import Table
from saekit.evals._linear import Moments
from saekit.evals._resample import Explained, Resamples
from saekit.evals._splice import token_losses

NAME = "r2_norm_sq_from_loss"

_Seen = tuple[Int[Tensor, " token"], Float[Tensor, "token 1"], Float[Tensor, "token 1"]]
"""Rows of the cache, the model's loss at each, and |e|^2."""


def add_loss_baseline(
    table: Table,
    model: LanguageModel,
    subject: Subject,
    rows: Rows,
    exclude: Collection[str],
    n_tokens: int,
    n_bootstrap: int,
    seed: int,
    advance: Callable[[int], None],
) -> None:
    """Adds `r2_norm_sq_from_loss`; where nothing has a next token, the table says why not."""
    cache = rows.cache

    def seen(split: Literal["train", "test"]) -> Iterator[_Seen]:
        windows = cache.windows(split, exclude)
        for index, loss in token_losses(model, cache, subject.hook, windows, n_tokens, advance):
            if len(index):
                square = subject.see(cache, index).error.square().sum(1, keepdim=True)
                yield index, loss.double()[:, None], square

    moments = [Moments.of(loss, square) for _, loss, square in seen("train")]
    if not moments or sum(some.n for some in moments) < 2:
        table.leave_out(NAME, "too few tokens of the train split have a next one to fit a line to")
        return
    fit = reduce(add, moments).solve(intercept=True)
    held_out = list(seen("test"))
    index = torch.cat([some for some, _, _ in held_out])
    documents = rows.documents(index)
    resamples = Resamples.of(documents, n_bootstrap, seed)
    sizes = [len(some) for some, _, _ in held_out]
    found = reduce(
        add,
        (
            Explained.of(resamples, square, fit(loss), document, fit.y_mean)
            for (_, loss, square), document in zip(held_out, documents.split(sizes), strict=True)
        ),
    )
    table.estimate(
        NAME,
        found.pooled,
        "baseline of r2_norm_sq: the same with |e|^2 predicted by an affine function of the "
        "model's loss at the token, -log p(next token), by least squares on tokens of the train "
        "split; of tokens that have a next one",
        "|e|^2 does not vary over the tokens measured on",
        len(index),
        len(resamples.documents),
    )
