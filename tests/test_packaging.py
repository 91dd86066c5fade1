"""What an install contains, and what an import costs."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import saekit

ROOT = Path(__file__).parents[1]
MAPPED = ("activations_cache", "dashboard", "evals", "trainers")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]


def folder_of(package: str) -> Path:
    """Where the files of a package lie in the checkout, as package-dir maps it."""
    parts = package.split(".")
    if len(parts) > 1 and parts[1] in MAPPED:
        parts = parts[1:]
    return ROOT.joinpath(*parts)


def test_every_folder_with_modules_is_a_listed_package() -> None:
    """An unlisted folder works in an editable install and is silently absent from the wheel."""
    on_disk = {
        path.parent for folder in ("saekit", *MAPPED) for path in (ROOT / folder).rglob("*.py")
    }
    assert {folder_of(package) for package in SETUPTOOLS["packages"]} == on_disk


def test_every_mapped_folder_is_mapped_to_its_package() -> None:
    expected = {"saekit": "saekit"} | {f"saekit.{folder}": folder for folder in MAPPED}
    assert SETUPTOOLS["package-dir"] == expected


def test_every_data_file_of_a_package_is_in_the_wheel() -> None:
    shipped = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in folder_of(package).glob(pattern)
        if path.suffix != ".md"
    }
    on_disk = {
        path
        for folder in ("saekit", *MAPPED)
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".md")
    }
    assert on_disk == shipped


def test_the_links_for_the_type_checkers_lead_to_the_folders() -> None:
    links = {path.name: path.readlink().as_posix() for path in (ROOT / ".types/saekit").iterdir()}
    expected = {folder: f"../../{folder}" for folder in MAPPED}
    assert links == expected | {"__init__.py": "../../saekit/__init__.py"}


def test_the_version_is_one() -> None:
    assert saekit.__version__ == importlib.metadata.version("saekit")
    assert "version" in PROJECT["dynamic"]


def test_the_constraints_pin_each_dependency_within_its_range() -> None:
    pins = {canonicalize_name(name): pin for name, pin in constraints()}
    for text in [*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["docs"]]:
        requirement = Requirement(text)
        if requirement.name == "triton":
            continue  # GPU builds of torch pin their own
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, text


def test_the_constraints_hold_on_any_machine() -> None:
    for name, pin in constraints():
        assert re.fullmatch(r"[\w.]+", pin), f"{name}: a plain version only, no +cpu, no URL"
        assert not re.match("nvidia|cuda|triton", name), f"{name}: torch brings its CUDA packages"


def constraints() -> list[tuple[str, str]]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.partition("==") for line in lines if not line.startswith("#")]
    return [(name, pin) for name, _, pin in pairs]


def test_both_type_checkers_see_every_folder_of_python() -> None:
    """mypy refuses a folder without Python, so the list cannot simply be longer."""
    on_disk = {path.parts[len(ROOT.parts)] for path in ROOT.glob("*/**/*.py")}
    on_disk = {name for name in on_disk if name[0] != "." and name not in ("build", "dist")}
    tool = PYPROJECT["tool"]
    assert {Path(name).name for name in tool["mypy"]["files"]} == on_disk
    assert set(tool["pyright"]["include"]) == on_disk


@pytest.mark.parametrize("arguments", [["-c", "import saekit"], ["-m", "saekit", "--help"]])
def test_torch_is_not_imported_before_it_is_needed(arguments: list[str], tmp_path: Path) -> None:
    """From another folder, so that it is the install that answers and not the checkout."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.splitlines()[-1]
    names = [line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()]
    assert "saekit" in names
    assert [name for name in names if name.split(".")[0] in ("torch", "transformers")] == []
