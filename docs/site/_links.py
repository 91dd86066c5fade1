"""Which file of the repository is which page of the site, and what links become of it.

Pages are written to be read in the repository. Here a link to a file that has a page leads to it, a
link to a module to its part of the reference, and a link to anything else is its text alone.
"""

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path

import _api

# A page's folder in the site is that of what it is about; everything in docs/ stands where it is.
MOVED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "saekit/interop/README.md": "formats.md",
    "activations_cache/README.md": "guide/activations_cache.md",
    "trainers/README.md": "guide/trainers.md",
    "evals/README.md": "guide/evals.md",
    "saekit/kernels/README.md": "guide/kernels.md",
    "saekit/demo/model/README.md": "guide/embedded_model.md",
    "benchmarks/README.md": "guide/benchmarks.md",
}

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_FENCE = re.compile(r"^(```.*?^```|~~~.*?^~~~)", re.MULTILINE | re.DOTALL)


def pages(root: Path) -> dict[str, str]:
    """The site's page of each Markdown file and notebook, both by path from the root of the
    repository and of the site."""
    own = {
        path.relative_to(root).as_posix(): path.relative_to(root / "docs").as_posix()
        for path in sorted((root / "docs").rglob("*.md"))
    }
    books = sorted((root / "notebooks").glob("*.ipynb"))
    return {**MOVED, **own, **{f"notebooks/{p.name}": f"notebooks/{p.stem}.md" for p in books}}


def rewritten(text: str, source: str, root: Path) -> str:
    """A page's Markdown with links as they are in the site.

    `source` is its path in the repository. Code is left alone.
    """
    there = pages(root)
    parts = _FENCE.split(text)
    return "".join(
        part if _FENCE.match(part) else _LINK.sub(lambda m: _link(m, source, there, root), part)
        for part in parts
    )


def _link(found: re.Match[str], source: str, there: Mapping[str, str], root: Path) -> str:
    image, text, target = found.groups()
    path, hash, anchor = target.partition("#")
    if re.match(r"[a-z]+:", target) or not path:
        return found[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    page = page_of(path, there, root)
    if page is None:
        return found[0] if image else text
    here = posixpath.dirname(there[source])
    return f"{image}[{text}]({posixpath.relpath(page, here or '.')}{hash}{anchor})"


def page_of(path: str, there: Mapping[str, str], root: Path) -> str | None:
    """Where a file or folder of the repository is in the site; None where it is not."""
    readme = f"{path}/README.md"
    if path in there or readme in there:
        return there.get(path) or there[readme]
    if path.startswith("docs/"):
        # Pictures and figures lie beside the pages, and folders have a page that lists them.
        inside = path.removeprefix("docs/")
        return f"{inside}/index.md" if (root / path).is_dir() else inside
    if path.startswith("saekit/commands/"):
        return f"cli/{Path(path).stem}.md"
    module = _api.module_of(path)
    return f"api/{module}.md" if module in _api.modules(root) else None
