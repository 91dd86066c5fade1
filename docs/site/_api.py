"""The reference of the Python interface: a page for each public module.

Public is what has no leading underscore, in a module whose path has none either, and what a package
lists in its `__all__`, wherever it is defined. Commands have pages of their own.
"""

import ast
from functools import cache
from pathlib import Path

MAPPED = ("activations_cache", "dashboard", "evals", "trainers")
# Programs that made the embedded model, and the feature browser's screens, which streamlit runs.
_LEFT_OUT = (
    "saekit.commands",
    "saekit.__main__",
    "saekit.demo.train_model",
    "saekit.demo.eval_model",
    "saekit.dashboard.screen_",
    "saekit.dashboard.app",
)


def module_of(path: str) -> str:
    """The module that a file of the repository is: `saekit.trainers.topk` of trainers/topk.py."""
    parts = list(Path(path).with_suffix("").parts)
    if parts[0] in MAPPED:
        parts.insert(0, "saekit")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules(root: Path) -> dict[str, Path]:
    """Public modules by name, with their files."""
    files = [
        path.relative_to(root)
        for folder in ("saekit", *MAPPED)
        for path in sorted((root / folder).rglob("*.py"))
    ]
    named = {module_of(path.as_posix()): root / path for path in files}
    return {
        name: path
        for name, path in sorted(named.items())
        if not name.startswith(_LEFT_OUT) and not any(p.startswith("_") for p in name.split("."))
    }


def own(path: Path) -> list[str]:
    """Public functions and classes that a module defines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [n.name for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]


def exported(name: str, path: Path) -> dict[str, str]:
    """What a package lists in `__all__`, and has from elsewhere: where each is defined."""
    if path.name != "__init__.py":
        return {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # Those under `if TYPE_CHECKING` say where names are that load on first use.
    homes = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    listed: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            listed = ast.literal_eval(node.value)
    return {each: homes[each] for each in listed if each in homes}


def expected(root: Path) -> set[str]:
    """Dotted names of everything public, as the reference must have them."""
    there = modules(root)
    defined = {f"{name}.{each}" for name, path in there.items() for each in own(path)}
    return defined | {
        home for name, path in there.items() for home in exported(name, path).values()
    }


def packages(root: Path) -> dict[str, list[str]]:
    """Pages by package, its own first; the modules of saekit itself under its name."""
    there = modules(root)
    made: dict[str, list[str]] = {}
    for name in sorted(there, key=lambda name: (name != "saekit", name)):
        package = ".".join(name.split(".")[:2])
        a_package = there.get(package, Path()).name == "__init__.py"
        made.setdefault(package if a_package else "saekit", []).append(name)
    return made


def pages(root: Path) -> dict[str, str]:
    """Markdown by page. What a package has from a module that is not public stands on the page of
    the first package that lists it."""
    there = modules(root)
    made, shown = {}, set[str]()
    # Subpackages list what saekit itself lists again.
    for name in sorted(there, key=lambda name: (name == "saekit", name)):
        text = f"::: {name}\n"
        links = ""
        for each, home in exported(name, there[name]).items():
            links += f"| [`{name}.{each}`][{home}] | `{home.rpartition('.')[0]}` |\n"
        if links:
            text += "    options:\n      members: false\n\n| name | defined in |\n|---|---|\n"
            text += links
            text += "".join(_shown(f"{name}.{each}", each, name) for each in own(there[name]))
        for each, home in exported(name, there[name]).items():
            if home.rpartition(".")[0] not in there and home not in shown:
                shown.add(home)
                text += _shown(home, each, name)
        made[f"api/{name}.md"] = text
    lines = [f"| [`{name}`]({name}.md) | {_line(path)} |\n" for name, path in there.items()]
    made["api/index.md"] = "# Python\n\n| module | holds |\n|---|---|\n" + "".join(lines)
    return made


def _shown(home: str, name: str, package: str) -> str:
    """Something on the page of a package, under the name that it has there."""
    options = f"heading_level: 2\n      heading: {package}.{name}\n      toc_label: {name}"
    return f"\n::: {home}\n    options:\n      {options}\n"


def _line(path: Path) -> str:
    """The first sentence of a module's docstring."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    line = " ".join(doc.split("\n\n")[0].split()).partition(". ")[0]
    return line.replace("|", "\\|").replace("<", "&lt;")
