"""Starts the feature browser as a process of its own; knows streamlit only as a command."""

import errno
import signal
import socket
import subprocess
import sys
from pathlib import Path

from saekit.dashboard.data import Run
from saekit.errors import SaekitError

APP = Path(__file__).with_name("app.py")
HOST = "localhost"
OPTIONS = {
    "server.address": HOST,
    "server.fileWatcherType": "none",
    "server.showEmailPrompt": "false",
    "browser.gatherUsageStats": "false",
    "client.toolbarMode": "minimal",
    "theme.base": "light",
    "theme.primaryColor": "#d9601a",
    "theme.textColor": "#1f2933",
}


def serve(run: Path, *, port: int = 8501, headless: bool = False) -> int:
    """Serve the feature browser of a run until Ctrl-C; returns the exit code.

    Call it from the main thread. Only this machine can reach the browser; `headless` opens no
    window. Raises SaekitError where the run cannot be read or the port is taken.
    """
    Run.open(run)
    _check_free(port)
    process = subprocess.Popen(command(run, port=port, headless=headless))
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)


def command(run: Path, *, port: int, headless: bool) -> list[str]:
    """The command line that `serve` starts."""
    options = OPTIONS | {"server.port": str(port), "server.headless": str(headless).lower()}
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "streamlit", "run", str(APP), *flags, "--", str(run)]


def _check_free(port: int) -> None:
    if not 0 < port < 65536:
        raise SaekitError(f"port {port} must lie in 1..65535; 8501 is the usual one")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            why = "in use" if error.errno == errno.EADDRINUSE else "not open to you"
            other = port + 1 if 1023 < port < 65535 else 8501
            raise SaekitError(
                f"port {port} is {why}: another program (maybe another feature browser) holds it. "
                f"Stop that, or give another port: `--port {other}`"
            ) from error
