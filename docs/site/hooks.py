# pyright: reportMissingImports=false
"""What `mkdocs build` asks for on its way: pages that are made and not written, links, the list of
pages, and whether everything public is there."""

import re
import tempfile
from pathlib import Path
from typing import Any

import _api
import _commands
import _links
import _metrics
import _notebooks
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]

# Headings of the list of pages. What stands in a folder of its own, and what nobody named, is added
# below.
WRITTEN: dict[str, list[str]] = {
    "Start": ["index.md", "getting_started.md", "browser.md", "concepts.md"],
    "How to": ["distributed.md"],
    "Guide": ["guide/activations_cache.md", "guide/trainers.md", "guide/evals.md"],
    "Metrics": ["metrics.md"],
    "Formats": ["formats.md", "interop.md", "sae_bench.md"],
    "Benchmarks": ["guide/benchmarks.md", "peers.md", "kinds.md", "guide/kernels.md"],
    "Notebooks": [],
    "Command line": [],
    "Python": [],
    "Decisions": [],
    "About": ["changelog.md", "contributing.md", "log.md", "guide/embedded_model.md"],
}
_FOLDERS = {"How to": "how_to/", "Notebooks": "notebooks/", "Command line": "cli/"}
_FOLDERS |= {"Python": "api/", "Decisions": "adr/"}

_sources = tempfile.TemporaryDirectory(prefix="saekit-docs-")
_found: set[str] = set()
_FETCHED = re.compile(r'<(?:script|img|iframe|link)\b[^>]*\s(?:src|href)="(?:https?:)?//[^"]*"')


@event_priority(100)  # before the reference's plugin looks
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The package as an install has it, for the reference: four of its folders lie elsewhere."""
    package = Path(_sources.name) / "saekit"
    if not package.exists():
        package.mkdir()
        for path in [*(ROOT / "saekit").iterdir(), *(ROOT / name for name in _api.MAPPED)]:
            (package / path.name).symlink_to(path)
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [_sources.name]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    notebooks = _notebooks.pages(ROOT)
    made = {page: (ROOT / source).read_text() for source, page in _links.MOVED.items()}
    made |= _api.pages(ROOT) | _commands.pages() | notebooks
    made |= {"metrics.md": _metrics.page(ROOT), "adr/index.md": _decisions()}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    if _notebooks.has_figures(notebooks):
        from plotly.offline import get_plotlyjs

        files.append(File.generated(config, _notebooks.PLOTLY, content=get_plotlyjs()))
    config.nav = navigation([file.src_uri for file in files.documentation_pages()])
    return files


def navigation(pages: list[str]) -> list[dict[str, list[Any]]]:
    """The list of pages. Raises PluginError where a page that it names is not there."""
    nav = {
        heading: named + sorted(page for page in pages if page.startswith(folder))
        for heading, named in WRITTEN.items()
        # No page begins so.
        for folder in [_FOLDERS.get(heading, "\0")]
    }
    for named in nav.values():
        # What lists a folder comes first.
        named.sort(key=lambda page: not page.endswith("/index.md"))
    placed = {page for named in nav.values() for page in named}
    if gone := placed - set(pages):
        raise PluginError(f"{sorted(gone)}: named in docs/site/hooks.py, and not there")
    for page in sorted(set(pages) - placed):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        nav["Benchmarks" if "made by benchmarks/" in text else "About"].append(page)
    modules = [
        {package: [{name: f"api/{name}.md"} for name in names]}
        for package, names in _api.packages(ROOT).items()
    ]
    shown: dict[str, list[Any]] = {**nav, "Python": ["api/index.md", *modules]}
    return [{heading: named} for heading, named in shown.items() if named]


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    there = {made: source for source, made in _links.pages(ROOT).items()}
    source = there.get(page.file.src_uri)
    return markdown if source is None else _links.rewritten(markdown, source, ROOT)


def on_page_content(html: str, **_: Any) -> str:
    _found.update(re.findall(r'id="(saekit\.[\w.]+)"', html))
    return html


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Raises PluginError where a page would fetch something over the network."""
    if fetched := _FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri} needs a network: {fetched[0]}")
    return output


def on_post_build(config: MkDocsConfig) -> None:
    """Raises PluginError where something public is not in the reference."""
    missing = sorted(_api.expected(ROOT) - _found)
    if missing:
        raise PluginError(f"not in the reference: {', '.join(missing)}")
    _sources.cleanup()


def _decisions() -> str:
    text = "# Decisions\n\nOne page each: what was asked, what was decided, what follows.\n\n"
    for path in sorted((ROOT / "docs" / "adr").glob("0*.md")):
        title = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        text += f"- [{title}]({path.name})\n"
    return text
