"""The `saekit` command: finds the command asked for, turns errors into one paragraph and an exit
code.

The commands are the modules of `saekit.commands`; one that says SHARED shares its work among the
processes of torchrun, and the others refuse to do it once in each. Exit codes: 0 done, 1 failed, 2
wrong usage, 130 interrupted.
"""

import argparse
import json
import logging
import os
import pkgutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

import saekit.commands
from saekit import __version__
from saekit.commands._shared import refuse_several
from saekit.errors import SaekitError
from saekit.files import disk_full


def commands() -> dict[str, str]:
    """Every command by name, with its line of help."""
    names = sorted(module.name for module in pkgutil.iter_modules(saekit.commands.__path__))
    return {name: _help(name) for name in names if not name.startswith("_")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="saekit",
        description="Find and study the features inside transformers with sparse autoencoders.",
        epilog="saekit COMMAND --help says what a command takes. Start with: saekit demo",
    )
    parser.add_argument("--version", action="version", version=f"saekit {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, line in commands().items():
        subparsers.add_parser(name, help=line, add_help=False)
    args, rest = parser.parse_known_args(argv)
    debug = args.debug or "--debug" in rest
    _show_log()
    try:
        command = import_module(f"saekit.commands.{args.command}")
        if not getattr(command, "SHARED", False):
            refuse_several(args.command)
        command.run([arg for arg in rest if arg != "--debug"])
        return 0
    except KeyboardInterrupt:
        _complain("interrupted: the same command goes on from where it was")
        return 130
    except SaekitError as error:
        if debug:
            raise
        _complain(str(error))
        return error.exit_code
    except Exception as error:
        if debug:
            raise
        if disk_full(error):
            _complain("no space left on the disk: make room, then give the same command again")
        else:
            _complain(
                f"an error that saekit did not foresee: {type(error).__name__}: {error}. The same "
                "command with --debug shows where; please report it"
            )
        return 1


def _help(name: str) -> str:
    doc = import_module(f"saekit.commands.{name}").__doc__ or ""
    line = doc.partition("\n")[0].rstrip(".")
    return line[:1].lower() + line[1:]


def _show_log() -> None:
    """What saekit logs, on standard error; other libraries keep their own ways."""
    ours = logging.getLogger("saekit")
    # What several processes would all say, the first of them says.
    ours.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    if not ours.handlers:
        ours.addHandler(logging.StreamHandler())


def _complain(message: str) -> None:
    rank = os.environ.get("RANK")
    text = f"saekit{f' (rank {rank})' if rank else ''}: {message}"
    print(text, file=sys.stderr)
    _tell_torchrun(text)


def _tell_torchrun(text: str) -> None:
    """So that its own last words, the report of who failed, say why, in place of where to read how
    a traceback is had (torch.distributed.elastic, error propagation)."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    more = {"py_callstack": text, "timestamp": str(int(time.time()))}
    # A full disk, say, is no matter: the text is printed already.
    with suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": text, "extraInfo": more}}, file)
