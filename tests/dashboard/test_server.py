import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from saekit.dashboard import screen_server, serve, server
from saekit.dashboard._opened import opened
from saekit.errors import SaekitError


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((server.HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_folder_that_is_no_run_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(SaekitError, match="is no run and holds none"):
        serve(tmp_path)


def test_a_port_in_use_is_refused_with_another(hostile_run: Path) -> None:
    with socket.socket() as taken:
        taken.bind((server.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SaekitError, match=rf"port {port} is in use.*--port \d+"):
            serve(hostile_run, port=port)


@pytest.mark.parametrize("port", [0, 70000])
def test_a_port_that_cannot_be_is_refused(port: int, hostile_run: Path) -> None:
    with pytest.raises(SaekitError, match=r"must lie in 1\.\.65535"):
        serve(hostile_run, port=port)


def test_the_command_sends_nothing_out_and_listens_here_only() -> None:
    line = server.command(Path("a run"), port=1234, headless=True)
    assert line[-2:] == ["--", "a run"]
    for flag in ("--server.address=127.0.0.1", "--browser.gatherUsageStats=false"):
        assert flag in line
    assert "--server.headless=true" in line
    assert "--server.port=1234" in line


def test_another_host_is_served_and_what_that_means_is_said(
    hostile_run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lines = []

    class Ended:
        def __init__(self, line: list[str]) -> None:
            lines.append(line)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(subprocess, "Popen", Ended)
    serve(hostile_run, port=free_port())
    assert not caplog.messages
    serve(hostile_run, port=free_port(), host="0.0.0.0")
    assert "--server.address=0.0.0.0" in lines[1]
    assert "There is no password" in caplog.text
    assert "ssh -L" in caplog.text


def test_what_the_server_sends_goes_out_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    listen = screen_server.at_once(socket.socket.listen)
    monkeypatch.setattr(socket.socket, "listen", listen)
    with socket.socket() as listener, socket.socket() as client:
        listener.bind((server.HOST, 0))
        listener.listen()
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_server_prepares_what_the_first_page_reads(hostile_run: Path) -> None:
    screen_server.prepare(hostile_run)
    store = opened(hostile_run).features
    assert store is not None
    assert {"density", "kurtosis", "unexplained"} <= set(store._columns)
    assert {"input_token", "promoted"} <= set(store._lists)


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_a_host_that_is_not_of_this_machine_is_refused(host: str, hostile_run: Path) -> None:
    with pytest.raises(SaekitError, match=r"host .* leave it out"):
        serve(hostile_run, port=free_port(), host=host)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_browser_answers_and_stops_with_its_parent(stop: int, hostile_run: Path) -> None:
    port = free_port()
    code = (
        "import signal, sys; from pathlib import Path; from saekit.dashboard import serve\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "serve(Path(sys.argv[1]), port=int(sys.argv[2]), headless=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(hostile_run), str(port)],
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        while f":{port}" not in (line := parent.stdout.readline()):
            assert line, "it ended before it listened"
        with urllib.request.urlopen(f"http://{server.HOST}:{port}/_stcore/health") as answer:
            assert answer.status == 200
        parent.send_signal(stop)
        parent.wait(timeout=30)
    with socket.socket() as probe:
        assert probe.connect_ex((server.HOST, port)) != 0
