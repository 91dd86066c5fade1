"""Who may import whom, and what no module may do, read from the source: nothing is imported.

A rule takes a root folder and answers with its violations, one line each, so that the same rule
runs over this checkout and over a planted mistake.
"""

import ast
import sys
import tomllib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
MAPPED = ("activations_cache", "dashboard", "evals", "trainers")

# Layer -> the other layers that it may import. "saekit" is the core.
MAY_IMPORT = {
    "saekit": (),
    "activations_cache": ("saekit",),
    "trainers": ("saekit", "activations_cache"),
    "evals": ("saekit", "activations_cache"),
    "dashboard": ("saekit", "activations_cache"),
}

# These reach every layer, but only once somebody asks: `import saekit` and `saekit --help` stay
# quick.
FRONT_DOORS = ("saekit/__init__.py", "saekit/commands/*.py")

# Inside saekit/ the command line is a layer of its own, above all others. Module -> the only files
# that may import it.
ABOVE_ALL = {
    "saekit.cli": ("saekit/__main__.py",),
    "saekit.commands": ("saekit/cli.py", "saekit/commands/*.py"),
}

# Outside package -> the only files that may import it.
_MODEL_FILES = ("activations_cache/model*.py", "evals/_splice.py", "saekit/demo/*.py")
FENCES = {
    "transformers": _MODEL_FILES,
    "transformer_lens": _MODEL_FILES,
    "datasets": ("activations_cache/corpus.py",),
    "streamlit": ("dashboard/app.py", "dashboard/screen_*.py"),
    "triton": ("saekit/kernels/triton_*.py",),
    "tyro": ("saekit/commands/*.py", "saekit/demo/train_model.py", "saekit/demo/eval_model.py"),
    "wandb": ("trainers/_log.py",),
    "tensorboard": ("trainers/_log.py",),
    "torch.utils.tensorboard": ("trainers/_log.py",),
}

# Imported only when asked for: the user installs them, and the code says so when they are absent.
OPT_IN = ("triton", "wandb", "tensorboard")

PICKLERS = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
PICKLING_CALLS = ("torch.load", "torch.save", "pandas.read_pickle")

Module = tuple[str, ast.Module]


def modules(root: Path) -> Iterator[Module]:
    """Each source file below root as (path from root, tree)."""
    for folder in ("saekit", *MAPPED):
        for path in sorted((root / folder).rglob("*.py")):
            yield path.relative_to(root).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imported(node: ast.AST) -> list[str]:
    """The dotted names that a node imports: a.b for `from a import b`, as b may be a module."""
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom(level=0, module=str(module)):
            return [f"{module}.{alias.name}" for alias in node.names]
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[first, *_]) if (
            name in ("import_module", "__import__")
        ):
            return [_leading_text(first)]
    return []


def _leading_text(node: ast.expr) -> str:
    """What is certain of a string: all of a literal, the start of an f-string, else nothing."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=[ast.Constant(value=str(text)), *_]):
            return text
    return ""


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer_of(name: str) -> str | None:
    """The layer of a dotted module name, None for a package from outside."""
    for folder in MAPPED:
        if within(name, f"saekit.{folder}"):
            return folder
    return "saekit" if within(name, "saekit") else None


def _deferred(tree: ast.Module) -> set[ast.AST]:
    """Nodes that do not run at import: function bodies and `if TYPE_CHECKING:`."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                body = node.body
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                body = node.body
            case _:
                continue
        found.update(inner for statement in body for inner in ast.walk(statement))
    return found


def layer_violations(root: Path) -> list[str]:
    found = []
    for path, tree in modules(root):
        own = path.split("/")[0]
        deferred = _deferred(tree) if _matches(path, FRONT_DOORS) else set()
        for node in ast.walk(tree):
            for name in imported(node):
                other = layer_of(name)
                if other in (None, own, *MAY_IMPORT[own]) or node in deferred:
                    continue
                found.append(f"{path}: imports {name}; {own} may not know {other}")
        for module, homes in ABOVE_ALL.items():
            if not _matches(path, homes):
                found += [
                    f"{path}: imports {module}, which stands above every layer"
                    for node in ast.walk(tree)
                    if any(within(name, module) for name in imported(node))
                ]
    return found


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


def relative_or_bare_imports(root: Path) -> list[str]:
    found = []
    for path, tree in modules(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                found.append(f"{path}: relative import of {'.' * node.level}{node.module or ''}")
            found += [
                f"{path}: imports {name} without saekit in front"
                for name in imported(node)
                if name.split(".")[0] in MAPPED
            ]
    return found


def fence_violations(root: Path) -> list[str]:
    found = []
    for path, tree in modules(root):
        for node in ast.walk(tree):
            for name in imported(node):
                for package, homes in FENCES.items():
                    if within(name, package) and not _matches(path, homes):
                        found.append(f"{path}: imports {name}, which belongs in {', '.join(homes)}")
    return found


def undeclared_imports(root: Path) -> list[str]:
    """Outside packages that came with something else: a fresh install might lack them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    homes = packages_distributions()
    found = []
    for path, tree in modules(root):
        for node in ast.walk(tree):
            for name in imported(node):
                top = name.split(".")[0]
                if not top or top in (*sys.stdlib_module_names, "saekit", *OPT_IN):
                    continue
                if not declared & {canonicalize_name(home) for home in homes.get(top, [top])}:
                    found.append(f"{path}: imports {name}, which pyproject.toml does not declare")
    return found


def pickling(root: Path) -> list[str]:
    """Whatever can run code from a file: pickle and its kin, torch.load, allow_pickle."""
    found = []
    for path, tree in modules(root):
        known_as: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                known_as |= {a.asname: a.name for a in node.names if a.asname}
            for name in imported(node):
                if name in PICKLING_CALLS or any(within(name, pickler) for pickler in PICKLERS):
                    found.append(f"{path}: imports {name}")
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=ast.Name(id=owner), attr=attr):
                    called = f"{known_as.get(owner, owner)}.{attr}"
                    if called in PICKLING_CALLS:
                        found.append(f"{path}: uses {called}")
                case ast.keyword(arg="allow_pickle", value=value):
                    if not (isinstance(value, ast.Constant) and value.value is False):
                        found.append(f"{path}: passes allow_pickle")
    return found


def missing_docstrings(root: Path) -> list[str]:
    return [
        f"{path}: opens without a docstring"
        for path, tree in modules(root)
        if (not Path(path).name.startswith("_") or path.endswith("/__init__.py"))
        and not ast.get_docstring(tree)
    ]


def mapped_inits_with_code(root: Path) -> list[str]:
    found = []
    for path, tree in modules(root):
        if path not in [f"{folder}/__init__.py" for folder in MAPPED]:
            continue
        for number, statement in enumerate(tree.body):
            match statement:
                case ast.Import() | ast.ImportFrom():
                    continue
                case ast.Expr(value=ast.Constant(value=str())) if number == 0:
                    continue
                case ast.Assign(targets=[ast.Name(id="__all__")]):
                    continue
            found.append(f"{path}:{statement.lineno}: does more than re-export")
    return found


def test_a_layer_imports_only_the_layers_below_it() -> None:
    assert layer_violations(ROOT) == []


def test_imports_are_absolute_and_begin_with_saekit() -> None:
    assert relative_or_bare_imports(ROOT) == []


def test_an_outside_package_is_imported_only_behind_its_fence() -> None:
    assert fence_violations(ROOT) == []


def test_every_outside_import_is_a_declared_dependency() -> None:
    assert undeclared_imports(ROOT) == []


def test_no_module_reads_or_writes_pickle() -> None:
    assert pickling(ROOT) == []


def test_every_public_module_opens_with_a_docstring() -> None:
    assert missing_docstrings(ROOT) == []


def test_the_init_of_a_mapped_folder_only_re_exports() -> None:
    assert mapped_inits_with_code(ROOT) == []


def test_every_source_folder_is_scanned() -> None:
    """A rule over no files holds by itself."""
    assert {path.split("/")[0] for path, _ in modules(ROOT)} == {"saekit", *MAPPED}


PLANTED: list[tuple[Callable[[Path], list[str]], str, str]] = [
    (layer_violations, "trainers/topk.py", "from saekit.evals.core import Core"),
    (layer_violations, "evals/core.py", "import saekit.trainers._base"),
    (layer_violations, "evals/core.py", "from saekit import trainers"),
    (layer_violations, "evals/core.py", "def f():\n    from saekit.trainers import topk"),
    (
        layer_violations,
        "saekit/sae.py",
        "from saekit.activations_cache.store import ActivationCache",
    ),
    (layer_violations, "saekit/demo/corpus.py", "from saekit.activations_cache import tokens"),
    (layer_violations, "activations_cache/store.py", "from saekit.dashboard import data"),
    (layer_violations, "saekit/cli.py", "def f():\n    from saekit.trainers import topk"),
    (layer_violations, "saekit/commands/train.py", "from saekit.trainers import topk"),
    (layer_violations, "saekit/commands/train.py", "from saekit.cli import main"),
    (layer_violations, "saekit/__init__.py", "from saekit.trainers._loop import train"),
    (layer_violations, "trainers/topk.py", "from saekit.cli import main"),
    (layer_violations, "saekit/sae.py", "import saekit.cli"),
    (layer_violations, "saekit/sae.py", "def f():\n    from saekit.commands import train"),
    (
        layer_violations,
        "saekit/sae.py",
        "from importlib import import_module\nimport_module('saekit.evals.core')",
    ),
    (
        layer_violations,
        "saekit/sae.py",
        "import importlib\nimportlib.import_module(f'saekit.evals.{name}')",
    ),
    (relative_or_bare_imports, "trainers/topk.py", "from ._base import Trainer"),
    (relative_or_bare_imports, "trainers/topk.py", "from . import _base"),
    (relative_or_bare_imports, "trainers/topk.py", "from trainers._base import Trainer"),
    (relative_or_bare_imports, "saekit/cli.py", "import evals.core"),
    (fence_violations, "trainers/topk.py", "import transformers"),
    (fence_violations, "activations_cache/tokens.py", "from transformers import AutoTokenizer"),
    (fence_violations, "evals/core.py", "from transformer_lens import HookedTransformer"),
    (fence_violations, "activations_cache/model.py", "import datasets"),
    (fence_violations, "dashboard/data.py", "import streamlit as st"),
    (fence_violations, "saekit/kernels/reference.py", "import triton.language as tl"),
    (fence_violations, "trainers/topk.py", "def f():\n    import tyro"),
    (fence_violations, "saekit/cli.py", "import tyro"),
    (fence_violations, "trainers/_loop.py", "from torch.utils.tensorboard import SummaryWriter"),
    (fence_violations, "trainers/_loop.py", "from torch.utils import tensorboard"),
    (undeclared_imports, "trainers/topk.py", "import einops"),
    (undeclared_imports, "evals/core.py", "def f():\n    from not_installed import anything"),
    (pickling, "saekit/checkpoint.py", "import pickle"),
    (pickling, "saekit/checkpoint.py", "from pickle import loads"),
    (pickling, "saekit/checkpoint.py", "import torch\ntorch.save({}, 'f')"),
    (pickling, "saekit/checkpoint.py", "import torch as t\nt.load('f', weights_only=True)"),
    (pickling, "saekit/checkpoint.py", "from torch import load as read"),
    (pickling, "saekit/checkpoint.py", "import numpy as np\nnp.load('f', allow_pickle=True)"),
    (missing_docstrings, "trainers/topk.py", "K = 1"),
    (missing_docstrings, "trainers/__init__.py", ""),
    (mapped_inits_with_code, "trainers/__init__.py", "def f(): ..."),
    (mapped_inits_with_code, "evals/__init__.py", "X = 1"),
]


@pytest.mark.parametrize(("rule", "path", "source"), PLANTED)
def test_a_planted_violation_is_found(
    rule: Callable[[Path], list[str]], path: str, source: str, tmp_path: Path
) -> None:
    plant(tmp_path, path, source)
    (violation,) = rule(tmp_path)
    assert violation.startswith(path)


def test_a_tree_that_keeps_the_rules_has_no_violations(tmp_path: Path) -> None:
    lawful = {
        "saekit/__init__.py": (
            '"""Doc."""\nfrom typing import TYPE_CHECKING\n'
            "if TYPE_CHECKING:\n    from saekit.trainers._loop import train\n"
        ),
        "saekit/cli.py": '"""Doc."""\nimport saekit.commands\n',
        "saekit/commands/_shared.py": "import tyro\n",
        "saekit/commands/eval.py": (
            '"""Doc."""\nfrom saekit.commands._shared import parse\n'
            "def run():\n    from saekit.evals import core\n"
        ),
        "saekit/__main__.py": "from saekit.cli import main\n",
        "saekit/kernels/triton_topk.py": '"""Doc."""\nimport triton.language as tl\n',
        "saekit/demo/train_model.py": '"""Doc."""\nimport transformers, tyro\n',
        "activations_cache/corpus.py": '"""Doc."""\nfrom datasets import load_dataset\n',
        "trainers/__init__.py": '"""Doc."""\nfrom saekit.trainers.topk import K\n__all__ = ["K"]\n',
        "trainers/topk.py": '"""Doc."""\nfrom saekit.activations_cache import store\nK = 1\n',
        "trainers/_log.py": "from torch.utils.tensorboard import SummaryWriter\n",
        "evals/_splice.py": "import transformers\n",
        "evals/core.py": '"""Doc."""\nimport numpy as np\nnp.load("f", allow_pickle=False)\n',
        "dashboard/screen_latent.py": '"""Doc."""\nimport streamlit as st\n',
    }
    for path, source in lawful.items():
        plant(tmp_path, path, source)
    rules = {rule for rule, _, _ in PLANTED}
    assert [line for rule in rules for line in rule(tmp_path)] == []


def plant(root: Path, path: str, source: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(source, encoding="utf-8")
