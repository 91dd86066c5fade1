"""The embedded model's card: README.md, made from metrics.json and nothing else."""

from typing import Any

_TASK_WORDS = {
    "ioi": "indirect object preferred over the subject",
    "greater_than": "more probability on greater years than on the others",
    "docstring": "next argument preferred over another argument",
}

_CARD = """\
# The embedded model of saekit

A GPT-2 with 4 layers, d_model 256, 8 heads, context {context} and {millions:.1f} M parameters,
trained by us for trying out sparse autoencoders without a network. It writes no useful text.
This page is made from `metrics.json` by `python -m saekit.demo.eval_model`; do not edit it.

Every window must start with `<bos>` (id 0; the tokenizer does not add it): `<bos>` and up to {rest}
tokens of one document. Weights are stored in half precision, to be computed in float32.

## Held-out figures

| text | bits/byte | nats/token | tokens |
|---|---|---|---|
{text_rows}

Windows of `<bos>` and up to {rest} tokens of one document, without overlap; every token after
`<bos>` is scored. Books are held out by author; code is those modules of the standard library
(Python {python}) for which `held_out(id, 0.05)` is true.

| task | what is counted | share | mean log ratio | n |
|---|---|---|---|---|
{task_rows}

Sentences of the test split of `saekit.demo.tasks`: names, templates, nouns, start years and
arguments that no training sentence of the task has. Its names do stand in books.

## Training

{minutes:g} minutes on one {device}: {steps:,} steps, {billions:.2f} B tokens, AdamW with a
peak rate of {lr:g}, {batch_size} windows of {context} tokens a step, warm-up and cosine, bfloat16
autocast, seed {seed}. The schedule follows the clock, so another run gives a model as good, not the
same weights. In each window of task sentences their names are exchanged for words drawn anew from
{n_names:,}, every second ioi sentence is disturbed, the name that ends a sentence counts for
more, and the token embedding learns from books and source alone.

torch {torch}, transformers {transformers}.

| data | size | licence |
|---|---|---|
| {n_books} English books of {n_authors} authors | {book_megabytes:.1f} MB | public domain |
| {n_source_files:,} Python files, of {n_packages} packages and the standard library | \
{source_megabytes:.1f} MB | each package's own; PSF |
| {n_sentences:,} sentences of our own, for {task_share:.0%} of the tokens | \
{task_tokens:,} tokens | ours |

The packages and their versions are listed in `metrics.json`. Files that repeat lines of held-out
modules were left out. None of the text is part of this repository; the weights are ours.

## Limits

- Held-out modules of another Python version, under another name, may have been seen in part.
- The prose is of 1918 or before, with the views of its time; code may repeat what it was shown.
- The tasks were trained for: a circuit found here shows that a method works, not that it works on a
  model that learned the behaviour by itself.
"""


def render(metrics: dict[str, Any]) -> str:
    """The card's text."""
    training = metrics["training"]
    text_rows = [
        f"| {name} | {m['bits_per_byte']:.3f} | {m['nats_per_token']:.3f} | {m['n_tokens']:,} |"
        for name, m in metrics["text"].items()
    ]
    task_rows = [
        f"| {name} | {_TASK_WORDS[name]} | {m['share_preferred']:.1%} "
        f"| {m['mean_log_ratio']:.2f} | {m['n']:,} |"
        for name, m in metrics["tasks"].items()
    ]
    return _CARD.format(
        **training,
        rest=training["context"] - 1,
        millions=training["n_parameters"] / 1e6,
        billions=training["tokens_seen"] / 1e9,
        n_packages=len(training["packages"]),
        python=metrics["python"],
        text_rows="\n".join(text_rows),
        task_rows="\n".join(task_rows),
    )
