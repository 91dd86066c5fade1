"""Starts the feature browser as a process of its own; knows streamlit only as a command."""

import errno
import logging
import signal
import socket
import subprocess
import sys
from pathlib import Path

from saekit.dashboard._folder import Folder
from saekit.dashboard.data import Run
from saekit.errors import SaekitError

log = logging.getLogger(__name__)

APP = Path(__file__).with_name("app.py")
SERVER = "saekit.dashboard.screen_server"
HOST = "127.0.0.1"
OPTIONS = {
    "server.fileWatcherType": "none",
    "server.showEmailPrompt": "false",
    "browser.gatherUsageStats": "false",
    # Leaves the choice of light or dark in the menu; the system's is the default.
    "client.toolbarMode": "viewer",
    "theme.light.primaryColor": "#d9601a",
    "theme.light.textColor": "#1f2933",
    "theme.dark.primaryColor": "#e8783a",
    "theme.dark.backgroundColor": "#14181c",
    "theme.dark.secondaryBackgroundColor": "#1d2329",
}


def serve(
    path: Path,
    *,
    port: int = 8501,
    host: str = HOST,
    headless: bool = False,
    write: bool = False,
) -> int:
    """Serve the feature browser of a run, or of a folder of runs, until Ctrl-C; returns the exit
    code.

    Call it from the main thread. Only this machine can reach it, unless `host` is another address
    of this machine; the log then says what that means. `headless` opens no window;
    `write` lets the browser make the runs' feature stores and keep notes in them. Raises
    SaekitError where what is there cannot be read, the host is not this machine's, or the port is
    taken.
    """
    folder = Folder.open(path)
    if folder.single:
        Run.open(path)
    _check_free(host, port)
    if not _is_local(host):
        log.warning(
            "--host %s: everybody who reaches this machine there can read every run in %s and run "
            "its models on text of their own. There is no password, and nothing is encrypted. To "
            "look from another machine alone, leave --host out and forward the port: `ssh -L "
            "%d:%s:%d THIS_MACHINE`",
            *(host, path, port, HOST, port),
        )
    process = subprocess.Popen(command(path, port=port, host=host, headless=headless, write=write))
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)


def command(
    path: Path, *, port: int, host: str = HOST, headless: bool, write: bool = False
) -> list[str]:
    """The command line that `serve` starts."""
    options = OPTIONS | {
        "server.address": host,
        "server.port": str(port),
        "server.headless": str(headless).lower(),
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    extra = ["--write"] if write else []
    return [sys.executable, "-m", SERVER, str(APP), *flags, "--", str(path), *extra]


def _is_local(host: str) -> bool:
    return host == "localhost" or (host.replace(".", "").isdigit() and host.startswith("127."))


def _check_free(host: str, port: int) -> None:
    if not 0 < port < 65536:
        raise SaekitError(f"port {port} must lie in 1..65535; 8501 is the usual one")
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise SaekitError(
            f"host '{host}' is no address or name that is known: leave it out ({HOST}), or give an "
            "address of this machine; 0.0.0.0 is all of them"
        ) from error
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise SaekitError(
                    f"host '{host}' is no address of this machine: leave it out ({HOST}), or give "
                    "one that is; 0.0.0.0 is all of them"
                ) from error
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            why = "in use" if error.errno == errno.EADDRINUSE else "not open to you"
            other = port + 1 if 1023 < port < 65535 else 8501
            raise SaekitError(
                f"port {port} is {why}: another program (maybe another feature browser) holds it. "
                f"Stop that, or give another port: `--port {other}`"
            ) from error
