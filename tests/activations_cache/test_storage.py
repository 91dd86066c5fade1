import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from saekit import files
from saekit.activations_cache import storage_remote
from saekit.activations_cache.storage import LocalStorage, RemoteStorage, Storage, storage
from saekit.activations_cache.storage_base import HOLDER, Holder
from saekit.errors import CacheError, ConfigError, SaekitError

# The contract: a folder, fsspec's memory and S3 answer alike.


def put(where: Storage, name: str, content: bytes, scratch: Path) -> str:
    """Store a file; gives its checksum."""
    with where.new_file(name) as path:
        path.write_bytes(content)
    (scratch / "content").write_bytes(content)
    return files.file_checksum(scratch / "content")


def test_nothing_is_there_before_something_is_written(any_storage: Storage) -> None:
    assert any_storage.names() == []
    assert not any_storage.exists("manifest.json")
    with pytest.raises(FileNotFoundError):
        any_storage.read_text("manifest.json")
    with pytest.raises(FileNotFoundError):
        any_storage.local("shard", "0" * 32)
    any_storage.remove("manifest.json")


def test_text_comes_back_and_is_replaced(any_storage: Storage) -> None:
    for text in ("one\n", "größer"):
        any_storage.write_text("manifest.json", text)
        assert any_storage.read_text("manifest.json") == text
    assert any_storage.exists("manifest.json")
    any_storage.remove("manifest.json")
    assert not any_storage.exists("manifest.json")


def test_names_go_down_into_folders_and_leave_hidden_ones_out(any_storage: Storage) -> None:
    for name in ("b", "rank-1/a", "rank-0/deep/c", ".hidden", ".folder/x", "rank-0/.lock.json"):
        any_storage.write_text(name, "x")
    assert any_storage.names() == ["b", "rank-0/deep/c", "rank-1/a"]
    assert any_storage.sub("rank-0").names() == ["deep/c"]
    assert not any_storage.exists("rank-0")


def test_a_file_is_there_whole_when_its_block_ends(any_storage: Storage) -> None:
    content = bytes(range(256)) * 5000
    with any_storage.new_file("rank-0/shard") as path:
        path.write_bytes(content)
        checksum = files.file_checksum(path)
        assert not any_storage.exists("rank-0/shard")
    assert any_storage.local("rank-0/shard", checksum).read_bytes() == content


def test_a_block_that_fails_leaves_nothing(any_storage: Storage) -> None:
    any_storage.write_text("old", "whole")
    for name in ("old", "new"):
        with pytest.raises(KeyboardInterrupt), any_storage.new_file(name) as path:
            path.write_text("half")
            raise KeyboardInterrupt
        assert not path.exists()
    assert any_storage.names() == ["old"]
    assert any_storage.read_text("old") == "whole"


def test_a_full_disk_is_said_in_words_everywhere(any_storage: Storage) -> None:
    with pytest.raises(SaekitError, match="no space left"), any_storage.new_file("shard"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert any_storage.names() == []


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "a/../../b", "", "a\\..\\b"])
def test_a_name_that_leads_out_is_refused(any_storage: Storage, name: str) -> None:
    calls: tuple[Callable[[], object], ...] = (
        lambda: any_storage.read_text(name),
        lambda: any_storage.exists(name),
        lambda: any_storage.local(name, "0" * 32),
        lambda: any_storage.write_text(name, "x"),
        lambda: any_storage.remove(name),
        lambda: any_storage.sub(name),
    )
    for call in calls:
        with pytest.raises(CacheError, match="must be relative and stay inside"):
            call()


def test_a_second_writer_is_told_who_the_first_is(any_storage: Storage) -> None:
    again = storage(any_storage.url)
    with any_storage.lock():
        with pytest.raises(CacheError) as refused, again.lock():
            pass
        assert any_storage.names() == []
    assert re.match(
        rf"{re.escape(any_storage.url)} is being written by process {os.getpid()} on \S+ since "
        r"\d{4}-\d\d-\d\dT\S+ \(command: .+\): wait for it, stop it, or give another --out",
        str(refused.value),
    )
    with again.lock():
        assert again.exists(HOLDER)
    assert not again.exists(HOLDER)


def test_an_error_under_the_lock_frees_it(any_storage: Storage) -> None:
    with pytest.raises(KeyboardInterrupt), any_storage.lock():
        raise KeyboardInterrupt
    with any_storage.lock():
        pass


def test_a_folder_inside_has_its_own_lock(any_storage: Storage) -> None:
    with any_storage.lock(), any_storage.sub("rank-0").lock(), any_storage.sub("rank-1").lock():
        any_storage.sub("rank-1").write_text("a", "x")
    assert any_storage.names() == ["rank-1/a"]


def test_two_views_of_one_place_see_each_others_changes(any_storage: Storage) -> None:
    """fsspec remembers listings, and what is not there."""
    other = storage(any_storage.url)
    assert other.names() == [] and not other.exists("rank-0/a")
    any_storage.write_text("rank-0/a", "x")
    assert other.names() == ["rank-0/a"] and other.exists("rank-0/a")
    any_storage.remove("rank-0/a")
    assert other.names() == [] and not other.exists("rank-0/a")


def test_another_clients_change_in_s3_is_seen(s3_url: str) -> None:
    ours = storage(s3_url)
    ours.write_text("a", "x")
    assert ours.names() == ["a"]
    theirs = fsspec.filesystem("s3", skip_instance_cache=True)
    theirs.pipe_file(f"{s3_url}/b", b"x")
    theirs.rm_file(f"{s3_url}/a")
    assert ours.names() == ["b"]
    assert ours.exists("b") and not ours.exists("a")


def test_folders_that_an_s3_console_made_are_no_files(s3_url: str) -> None:
    client = fsspec.filesystem("s3", skip_instance_cache=True)
    for marker in ("/", "/rank-0/"):
        client.call_s3(
            "put_object", Bucket="bucket", Key=s3_url.removeprefix("s3://bucket/") + marker
        )
    where = storage(s3_url)
    assert where.names() == []
    where.write_text("rank-0/a", "x")
    assert where.names() == ["rank-0/a"]


# Local.


def test_free_room_is_known_before_the_folder_is_made(tmp_path: Path) -> None:
    free = storage(tmp_path / "not" / "yet").free_bytes()
    assert free is not None and free > 0


HOLD = """
import sys
from pathlib import Path
from saekit.activations_cache.storage import LocalStorage
with LocalStorage(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `tmp_path / "cache"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "cache")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdin
    assert process.stdout.readline() == "held\n"
    yield process
    with suppress(BrokenPipeError):
        process.stdin.close()
    process.wait()
    process.stdout.close()


def test_another_process_is_named_and_keeps_the_lock(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    cache = storage(tmp_path / "cache")
    for _ in range(2):  # the first attempt must not disturb what the second one reads
        with pytest.raises(CacheError, match=rf"process {holder.pid} on "), cache.lock():
            pass


def test_a_killed_writer_lets_go_and_its_remains_are_cleared(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    cache = storage(tmp_path / "cache")
    (tmp_path / "cache" / ".shard.abc.partial").write_text("half")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads(cache.read_text(HOLDER))["pid"] == holder.pid
    with cache.lock():
        assert json.loads(cache.read_text(HOLDER))["pid"] == os.getpid()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_holder_that_left_no_word_is_still_respected(tmp_path: Path) -> None:
    cache = storage(tmp_path)
    with cache.lock():
        for text in ("", "[]", '{"pid": 1}'):
            cache.write_text(HOLDER, text)
            with pytest.raises(CacheError, match="written by another process"):
                storage(tmp_path).lock().__enter__()


# URLs.


def test_a_file_url_is_a_local_folder(tmp_path: Path) -> None:
    where = storage(f"file://{tmp_path}")
    assert isinstance(where, LocalStorage) and where.path == tmp_path


def test_a_driver_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match="^gs://bucket/x needs a driver.*pip install gcsfs$"):
        storage("gs://bucket/x")


def test_an_unknown_kind_of_url_is_refused() -> None:
    with pytest.raises(ConfigError, match="^nope://x is of no kind that fsspec .* knows"):
        storage("nope://x")


@pytest.mark.parametrize("where", [Path("s3://bucket/x"), "s3:/bucket/x"])
def test_a_url_that_lost_a_slash_is_refused(where: Path | str) -> None:
    with pytest.raises(ConfigError, match="looks like a URL with one slash"):
        storage(where)


# Fetching.


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAEKIT_CACHE_DIR", str(tmp_path / "fetched"))
    return tmp_path / "fetched"


class FlakyFileSystem(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Memory that fails with each of `errors` in turn before it works, and counts its calls."""

    protocol = "flaky"
    errors: list[Exception] = []
    calls: list[str] = []

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).replace("flaky://", "memory://"))

    def _try(self, method: str) -> None:
        self.calls.append(method)
        if self.errors:
            raise self.errors.pop(0)

    def info(self, *args: Any, **kwargs: Any) -> Any:
        self._try("info")
        return super().info(*args, **kwargs)

    def ls(self, *args: Any, **kwargs: Any) -> Any:
        self._try("ls")
        return super().ls(*args, **kwargs)

    def cat_file(self, *args: Any, **kwargs: Any) -> Any:
        self._try("cat_file")
        return super().cat_file(*args, **kwargs)

    def get_file(self, *args: Any, **kwargs: Any) -> Any:
        self._try("get_file")
        return super().get_file(*args, **kwargs)

    def put_file(self, *args: Any, **kwargs: Any) -> Any:
        self._try("put_file")
        return super().put_file(*args, **kwargs)

    def rm_file(self, path: Any) -> Any:
        self._try("rm_file")
        return super()._rm(path)


@pytest.fixture
def waits() -> list[float]:
    """How long the flaky storage would have slept."""
    return []


@pytest.fixture
def flaky(waits: list[float], monkeypatch: pytest.MonkeyPatch, fetched: Path) -> RemoteStorage:
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    monkeypatch.setattr(FlakyFileSystem, "errors", [])
    monkeypatch.setattr(FlakyFileSystem, "calls", [])
    return RemoteStorage(f"flaky://{uuid.uuid4().hex}", sleep=waits.append)


def test_a_shard_is_fetched_once(flaky: RemoteStorage, fetched: Path, tmp_path: Path) -> None:
    checksum = put(flaky, "rank-0/shard.safetensors", b"content", tmp_path)
    paths = {flaky.local("rank-0/shard.safetensors", checksum) for _ in range(3)}
    paths.add(storage(flaky.url).local("rank-0/shard.safetensors", checksum))
    assert paths == {fetched / f"{checksum}.safetensors"}
    assert FlakyFileSystem.calls.count("get_file") == 1


def test_a_shard_that_is_not_what_the_manifest_says_is_refused(
    flaky: RemoteStorage, fetched: Path, tmp_path: Path
) -> None:
    put(flaky, "shard", b"altered", tmp_path)
    match = rf"^{flaky.url}/shard does not match .*`saekit verify {flaky.url} --repair`"
    with pytest.raises(CacheError, match=match):
        flaky.local("shard", "0" * 32)
    assert not [path for path in fetched.iterdir() if not path.name.endswith(".lock")]


def test_a_copy_that_was_damaged_here_is_fetched_anew(flaky: RemoteStorage, tmp_path: Path) -> None:
    checksum = put(flaky, "shard", b"content", tmp_path)
    flaky.local("shard", checksum).write_bytes(b"c0ntent")
    assert flaky.local("shard", checksum).read_bytes() == b"content"


@pytest.mark.parametrize("checksum", ["", "../" * 10 + "x", "0" * 31])
def test_a_checksum_that_is_none_names_no_file(flaky: RemoteStorage, checksum: str) -> None:
    with pytest.raises(CacheError, match="is no checksum"):
        flaky.local("shard", checksum)


def test_the_folder_for_fetched_shards_follows_the_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SAEKIT_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    where = RemoteStorage(f"memory://{uuid.uuid4().hex}")
    checksum = put(where, "shard", b"content", tmp_path)
    assert where.local("shard", checksum).parent == tmp_path / "home/.cache/saekit/shards"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert where.local("shard", checksum).parent == tmp_path / "xdg/saekit/shards"


# Failures that pass, and others.

CALLS: dict[str, Callable[[Storage, str], object]] = {
    "exists": lambda where, _: where.exists("shard"),
    "names": lambda where, _: where.names(),
    "read_text": lambda where, _: where.read_text("shard"),
    "write_text": lambda where, _: where.write_text("other", "x"),
    "local": lambda where, checksum: where.local("shard", checksum),
    "remove": lambda where, _: where.remove("shard"),
    "lock": lambda where, _: where.lock().__enter__(),
}


class EndpointConnectionError(Exception):
    """As botocore's: no OSError."""


class HttpError(Exception):
    """As gcsfs's."""

    def __init__(self, code: int) -> None:
        super().__init__("from the server")
        self.code = code


PASSING = [
    OSError(errno.EIO, "I/O"),
    ConnectionResetError("reset"),
    TimeoutError("slow"),
    EndpointConnectionError("gone"),
    HttpError(503),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
@pytest.mark.parametrize("call", [name for name in CALLS if name != "lock"])
def test_what_may_pass_is_tried_again(
    call: str,
    error: Exception,
    flaky: RemoteStorage,
    waits: list[float],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    checksum = put(flaky, "shard", b"content", tmp_path)
    expected = CALLS[call](storage(flaky.url), checksum)
    if call == "remove":
        put(flaky, "shard", b"content", tmp_path)
    FlakyFileSystem.errors.extend([error] * 3)
    if call == "local":
        Path(str(expected)).unlink()
    with caplog.at_level(logging.WARNING, "saekit"):
        assert CALLS[call](flaky, checksum) == expected
    assert waits == [2, 4, 8]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert "try 2 of 6 in 2 s" in caplog.text and flaky.url in caplog.text


@pytest.mark.parametrize("error", PASSING, ids=repr)
@pytest.mark.parametrize("call", CALLS)
def test_what_does_not_pass_in_a_minute_is_an_error_that_says_what_to_do(
    call: str, error: Exception, flaky: RemoteStorage, waits: list[float]
) -> None:
    FlakyFileSystem.errors.extend([error] * 6)
    with pytest.raises(CacheError, match=rf"^{flaky.url}\S* could not be reached in 6 tries") as e:
        CALLS[call](flaky, "0" * 32)
    assert "Give the same command again" in str(e.value)
    assert waits == [2, 4, 8, 16, 30]


REFUSED = [PermissionError("Forbidden"), HttpError(403), type("NoCredentials", (Exception,), {})()]


@pytest.mark.parametrize("error", REFUSED, ids=repr)
@pytest.mark.parametrize("call", CALLS)
def test_a_refusal_is_not_tried_again(
    call: str, error: Exception, flaky: RemoteStorage, waits: list[float]
) -> None:
    FlakyFileSystem.errors.append(error)
    with pytest.raises(CacheError, match=rf"^{flaky.url}\S* refuses .*Check the URL and the cred"):
        CALLS[call](flaky, "0" * 32)
    assert waits == []


def test_an_absent_file_is_not_waited_for(flaky: RemoteStorage, waits: list[float]) -> None:
    with pytest.raises(FileNotFoundError):
        flaky.read_text("absent")
    with pytest.raises(FileNotFoundError):
        flaky.local("absent", "0" * 32)
    assert not flaky.exists("absent") and waits == []


def test_a_mistake_in_the_code_is_not_dressed_up(flaky: RemoteStorage, waits: list[float]) -> None:
    FlakyFileSystem.errors.append(TypeError("ours"))
    with pytest.raises(TypeError, match="ours"):
        flaky.names()
    assert waits == []


def test_a_full_disk_here_while_fetching_is_not_the_servers_fault(
    flaky: RemoteStorage, waits: list[float]
) -> None:
    FlakyFileSystem.errors.append(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(SaekitError, match="no space left while writing .*fetched"):
        flaky.local("shard", "0" * 32)
    assert waits == []


def test_a_bucket_that_is_not_there_is_said_when_written_to(s3_url: str) -> None:
    missing = storage(s3_url.replace("//bucket/", "//absent-bucket/"))
    assert missing.names() == []
    with pytest.raises(CacheError, match="cannot be written to .*Make the bucket first"):
        missing.write_text("manifest.json", "{}")


# The remote lock.


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def two(clock: Clock) -> tuple[RemoteStorage, RemoteStorage]:
    """Two writers' views of one remote place."""
    url = f"memory://{uuid.uuid4().hex}"
    return RemoteStorage(url, clock=clock), RemoteStorage(url, clock=clock)


def test_what_a_killed_writer_held_is_free_after_five_minutes(
    two: tuple[RemoteStorage, RemoteStorage], clock: Clock
) -> None:
    killed, next_one = two
    held = killed.lock()
    held.__enter__()
    clock.now += 299
    with pytest.raises(CacheError, match="last sign of life was 299 s ago"), next_one.lock():
        pass
    clock.now += 2
    with next_one.lock():
        held.__exit__(None, None, None)  # it was only slow: it must leave the new holder alone
        assert next_one.exists(HOLDER)
    assert not next_one.exists(HOLDER)


def test_a_living_writer_renews_its_lock(
    two: tuple[RemoteStorage, RemoteStorage], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_remote, "_HEARTBEAT", 0.001)
    living, other = two
    renewed = threading.Event()
    write, later = living.write_text, clock.now + 1000

    def watched(name: str, text: str) -> None:
        write(name, text)
        if json.loads(text)["refreshed"] == later:
            renewed.set()

    monkeypatch.setattr(living, "write_text", watched)
    with living.lock():
        clock.now = later
        assert renewed.wait(20)
        with pytest.raises(CacheError, match="last sign of life was 0 s ago"), other.lock():
            pass
    assert not other.exists(HOLDER)


def test_a_lock_that_was_lost_is_reported_and_not_taken_back(
    two: tuple[RemoteStorage, RemoteStorage], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    slow, other = two
    with slow.lock():
        mine = Holder.parse(slow.read_text(HOLDER))
        assert mine
        clock.now += 301
        with other.lock():
            theirs = other.read_text(HOLDER)
            assert not slow._renew(mine)
            assert other.read_text(HOLDER) == theirs
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "the lock was lost" in caplog.text


def test_the_loser_of_a_race_for_the_lock_withdraws(
    two: tuple[RemoteStorage, RemoteStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    loser, winner = two
    write = loser.write_text

    def overtaken(name: str, text: str) -> None:
        write(name, text)
        winner.write_text(HOLDER, json.dumps(json.loads(text) | {"token": "other", "pid": 77}))

    monkeypatch.setattr(loser, "write_text", overtaken)
    with pytest.raises(CacheError, match="is being written by process 77"), loser.lock():
        pass
    assert json.loads(winner.read_text(HOLDER))["pid"] == 77


def test_a_failure_to_release_does_not_undo_the_work(
    flaky: RemoteStorage, caplog: pytest.LogCaptureFixture
) -> None:
    with flaky.lock():
        FlakyFileSystem.errors.extend([TimeoutError("slow")] * 6)
    assert "the lock could not be released" in caplog.text
