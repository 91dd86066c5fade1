"""SAEs on the Hugging Face hub: `hf://owner/name`, `hf://owner/name/path/in/it`, and with a branch,
tag or commit `hf://owner/name@revision/path`.

Of a folder only the files that a format can consist of are fetched, into the cache that all
programs share (HF_HOME). With HF_HUB_OFFLINE=1 nothing else than that cache is looked at.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from saekit.errors import CheckpointError, ConfigError, SaekitError, first_line
from saekit.files import file_sha256

SCHEME = "hf://"
SUMS = "SHA256SUMS"
_ADDRESS = re.compile(
    r"hf://(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w./-]+?))?(/(?P<path>.*))?"
)
# Beside an SAE of any format.
_BESIDE = ("parity.json", SUMS, "README.md")
_SINGLE = (".pt", ".pth", ".npz", ".safetensors")


@dataclass(frozen=True)
class Address:
    repo: str
    revision: str | None
    path: str
    """Inside the repository; "" is its root."""

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Raises ConfigError for what is no address, or leads out of its repository."""
        found = _ADDRESS.fullmatch(text)
        parts = (found["path"] or "").strip("/").split("/") if found else []
        if not found or any(part in (".", "..") or "\\" in part for part in parts):
            raise ConfigError(
                f"'{text}' is no address on the hub: it is hf://owner/name, "
                "hf://owner/name/path or hf://owner/name@revision/path"
            )
        if parts != [""] and not all(parts):
            raise ConfigError(f"'{text}' has an empty part in its path")
        return cls(found["repo"], found["revision"], "/".join(parts))


def local(what: Path | str) -> Path:
    """A path as it is, and an address on the hub as the path where its files are now.

    Raises ConfigError for an address that is none, and CheckpointError where nothing is there, or
    the hub cannot be reached and the files are not in the cache.
    """
    if not str(what).startswith(SCHEME):
        return Path(what)
    address = Address.parse(str(what))
    from huggingface_hub import snapshot_download

    with _in_words(address):
        root = snapshot_download(
            address.repo, revision=address.revision, allow_patterns=_wanted(address.path)
        )
    path = Path(root) / address.path
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(
            f"{what} holds no SAE of a format known here: name the folder inside it that does, "
            f"such as {SCHEME}{address.repo}/layer_3"
        )
    return path


def _wanted(path: str) -> list[str]:
    """Patterns of the files that can belong to an SAE at a path."""
    from saekit.interop import _formats

    names = {name for format in _formats.names() for name in _files_of(format)} | set(_BESIDE)
    at = PurePosixPath(path)
    if at.suffix in _SINGLE:
        configs = {name for name in names if name.endswith((".json", ".yaml"))}
        return [path, *sorted(str(at.parent / name) for name in configs)]
    return sorted(str(at / name) for name in names)


def _files_of(format: str) -> tuple[str, ...]:
    from saekit.interop import _formats

    return tuple(getattr(_formats.find(format), "FILES", ()))


@contextmanager
def _in_words(address: Address) -> Iterator[None]:
    from huggingface_hub import constants, errors

    where = f"{SCHEME}{address.repo}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{where} asks for its terms to be accepted: do so on its page, then `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{where} is not there, or not for you to see: check the name, or `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{where} has no revision '{address.revision}'") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub is out of reach"
        raise CheckpointError(
            f"{where} is not in the cache ({constants.HF_HUB_CACHE}), and {reason}: fetch it once "
            f"where there is a network, `saekit pull {where} FOLDER`, and give the folder"
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise SaekitError(f"{where} asks for a token: `hf auth login`, or set HF_TOKEN") from error
    except Exception as error:
        # The client's own errors of connection and protocol have no common class that it exports.
        what = f"{type(error).__name__}: {first_line(error)}"
        raise SaekitError(f"{where} cannot be reached or refuses ({what})") from error


def pull(address: str, out: Path) -> list[Path]:
    """Fetch an SAE's files into the new folder `out`, and compare them with its SHA256SUMS where it
    has them. Returns the files. Raises ConfigError where `out` holds anything."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already: give a new folder")
    found = local(address)
    folder = found if found.is_dir() else found.parent
    # The cache may have other SAEs of the repository below this one.
    wanted = _wanted("" if found.is_dir() else found.name)
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and any(fnmatchcase(file.relative_to(folder).as_posix(), name) for name in wanted)
    ]
    _compare_sums(folder, address)
    made = out.with_name(f".{out.name}.partial")
    shutil.rmtree(made, ignore_errors=True)
    try:
        for file in files:
            target = made / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        if out.exists():
            out.rmdir()
        made.replace(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return [out / file.relative_to(folder) for file in files]


def _compare_sums(folder: Path, address: str) -> None:
    if not (folder / SUMS).is_file():
        return
    for line in (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        # Files that are not an SAE's are not fetched.
        inside = ".." not in PurePosixPath(name).parts and not PurePosixPath(name).is_absolute()
        if inside and (folder / name).is_file() and file_sha256(folder / name) != digest:
            raise CheckpointError(
                f"{address}: {name} is not what its {SUMS} says: it was altered, or uploaded in "
                "part"
            )


def push(
    files: dict[str, Path | bytes], address: str, *, private: bool = False, message: str = ""
) -> str:
    """Upload files, by their names below the address's path, in one commit to a repository that is
    made where it is not there. Returns where they are to be seen."""
    from huggingface_hub import CommitOperationAdd, HfApi

    at = Address.parse(address)
    api = HfApi()
    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=str(PurePosixPath(at.path) / name), path_or_fileobj=content)
        for name, content in sorted(files.items())
    ]
    with _in_words(at):
        api.create_repo(at.repo, private=private, exist_ok=True)
        done = api.create_commit(
            at.repo,
            operations,
            commit_message=message or "An SAE, with its model card",
            revision=at.revision,
        )
    return str(done.commit_url)
