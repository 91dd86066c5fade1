"""The page of metrics: what each evaluation measures, with its equations, from its docstring; and
the figures of every accumulator, from theirs."""

import ast
from pathlib import Path

INTRODUCTION = """\
# Metrics, with their equations

Each number in a result carries its definition, its count and, where documents can be drawn again,
a 95 % interval. What follows is from the source of the evaluations themselves. The core row's
table, and how every number shares one mask of tokens, is on the page of
[evaluations](guide/evals.md#definitions).

Letters: `x` activations, `x_hat` reconstruction, `e = x - x_hat`, `mu` the mean of the rows looked
at, `z` latents, `d_i` the i-th row of the decoder.
"""


def page(root: Path) -> str:
    text = INTRODUCTION + "\n## Reconstruction, sparsity and loss\n\n| metric | is |\n|---|---|\n"
    text += "".join(
        f"| `{name}` | {' '.join(doc.split())} |\n"
        for name, doc in _properties(root / "evals")
        if doc
    )
    for path in sorted((root / "evals").glob("[a-z]*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        flags = f"[flags](cli/eval.md#saekit-eval-{path.stem})"
        python = f"[Python](api/saekit.evals.{path.stem}.md)"
        text += f"\n## {path.stem}\n\n{doc}\n\n{flags}, {python}\n"
    return text


def _properties(evals: Path) -> list[tuple[str, str]]:
    """Those of the accumulators: each is a number of a result, under the same name."""
    tree = ast.parse((evals / "_metrics.py").read_text(encoding="utf-8"))
    return [
        (f.name, (ast.get_docstring(f) or "").replace("|", "\\|").replace("<", "&lt;"))
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for f in node.body
        if isinstance(f, ast.FunctionDef)
        and any(getattr(by, "id", "") == "property" for by in f.decorator_list)
    ]
