"""The hub: what lies in its client's cache, offline; and uploads, to a hub of our own on this
machine."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import pytest

import saekit
from saekit import interop
from saekit.cli import main
from saekit.errors import CheckpointError, ConfigError, SaekitError
from saekit.interop import _card, _hub, _parity

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository as the hub's client keeps it: where `owner/saes` is, with nothing in it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--owner--saes"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "snapshots" / COMMIT).mkdir(parents=True)
    return repo / "snapshots" / COMMIT


@pytest.mark.parametrize("name", ["sparsify", "gemma_scope", "openai_gpt2", "circuit_tracer"])
def test_an_address_on_the_hub_is_loaded_from_the_cache_without_a_network(
    name: str, cached: Path, foreign: dict[str, Any]
) -> None:
    made = foreign[name](cached / "layer_3")
    address = f"hf://owner/saes/{made.path.relative_to(cached).as_posix()}"
    ours, theirs = saekit.load(address), interop.read(made.path)
    assert all(ours.tensors()[key].equal(tensor) for key, tensor in theirs.tensors().items())
    assert saekit.load(address.replace("owner/saes", f"owner/saes@{COMMIT}")).d_in == 5


def test_what_is_not_in_the_cache_is_said_with_the_remedy(cached: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"hf://owner/other is not in the cache .*_OFFLINE is set"
    ):
        saekit.load("hf://owner/other/layer_3")
    with pytest.raises(CheckpointError, match=r"holds no SAE of a format known here: name the fol"):
        saekit.load("hf://owner/saes/layer_9")


@pytest.mark.parametrize(
    "address",
    [
        "hf://owner",
        "hf://owner/saes/../../etc",
        "hf://owner/saes/a/./b",
        "hf://owner/saes/a//b",
        "hf://../saes",
        "hf://owner/saes/a\\b",
        "hf://",
        "https://huggingface.co/owner/saes",
    ],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"is no address on the hub|has an empty part"):
        _hub.Address.parse(address)


def test_an_address_is_taken_apart() -> None:
    parse = _hub.Address.parse
    assert parse("hf://a/b") == _hub.Address("a/b", None, "")
    assert parse("hf://a/b/c/d.npz") == _hub.Address("a/b", None, "c/d.npz")
    assert parse("hf://a/b@v1/c") == _hub.Address("a/b", "v1", "c")


def test_only_files_that_an_sae_can_consist_of_are_asked_for() -> None:
    wanted = _hub._wanted("layer_3")
    assert "layer_3/cfg.json" in wanted and "layer_3/checkpoints/final.safetensors" in wanted
    assert not any(name.endswith(("optimizer_0.pt", "*")) for name in wanted)
    assert "layer_3/params.npz" in _hub._wanted("layer_3/params.npz")
    assert not any(name.endswith("sae.safetensors") for name in _hub._wanted("a/0.pt"))


def test_pull_copies_what_belongs_to_the_sae_and_compares_checksums(
    cached: Path, foreign: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = foreign["sparsify"](cached)
    (made.path / "state.pt").write_text("an optimiser's")
    (made.path / "another").mkdir()
    (made.path / "another" / "cfg.json").write_text("of an SAE that is not this one")
    sums = [f"{'0' * 64}  ../../etc/passwd\n"]
    (made.path / "SHA256SUMS").write_text("".join(sums))
    address = f"hf://owner/saes/{made.path.name}"
    assert main(["pull", address, str(tmp_path / "layers.2")]) == 0
    assert "sparsify, TopK, 12 latents of width 5" in capsys.readouterr().out
    names = sorted(p.name for p in (tmp_path / "layers.2").iterdir())
    assert names == ["SHA256SUMS", "cfg.json", "sae.safetensors"]
    (made.path / "SHA256SUMS").write_text(f"{'0' * 64}  cfg.json\n")
    with pytest.raises(CheckpointError, match=r"cfg\.json is not what its SHA256SUMS says"):
        _hub.pull(address, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    with pytest.raises(ConfigError, match="is there already"):
        _hub.pull(address, tmp_path / "layers.2")


def test_a_conversion_takes_an_address(
    cached: Path, foreign: dict[str, Any], tmp_path: Path
) -> None:
    foreign["gemma_scope_2"](cached)
    address = "hf://owner/saes/transcoder/layer_3_width_16k_l0_small_affine"
    record = _parity.convert([address], tmp_path / "out", "sae_lens")
    assert record["asked_for"] == [address]
    assert _parity.check(tmp_path / "out")["passed"]


@dataclass
class Hub:
    """What a hub was told."""

    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    denied: bool = False


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, as far as an upload of small files needs one."""
    told = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if told.denied:
                self._answer(401, {"error": "no"})
            elif self.path == "/api/repos/create":
                told.created.append(json.loads(body))
                self._answer(200, {"url": f"{constants.ENDPOINT}/owner/saes"})
            elif self.path == "/api/validate-yaml":
                self._answer(200, {"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
                self._answer(200, {"files": modes})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        told.files[line["value"]["path"]] = content
                url = f"{constants.ENDPOINT}/owner/saes/commit/{COMMIT}"
                self._answer(200, {"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None})
            else:
                self._answer(404, {"error": self.path})

        def _answer(self, code: int, value: dict[str, Any]) -> None:
            content = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield told
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_run_is_pushed_with_its_results_a_card_and_checksums(
    hub: Hub, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = "hf://owner/saes/resid_post.0"
    assert (
        main(["push", str(tiny_run), address, "--licence", "mit", "--private", "--keep-paths"]) == 0
    )
    assert f"/owner/saes/commit/{COMMIT}" in capsys.readouterr().out
    assert hub.created[0]["visibility"] == "private"
    names = {name.removeprefix("resid_post.0/") for name in hub.files}
    assert {"sae.safetensors", "config.json", "README.md", "SHA256SUMS"} <= names
    assert "results/core.json" in names and not any("train_state" in name for name in names)
    weights = hub.files["resid_post.0/sae.safetensors"]
    assert weights == (tiny_run / "sae.safetensors").read_bytes()


def test_a_card_says_what_is_known_and_every_figure_is_that_of_a_file(tiny_run: Path) -> None:
    card = _card.parcel(tiny_run, "hf://owner/saes", "cc-by-4.0").card
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    metrics = json.loads((tiny_run / "results" / "core.json").read_text())["metrics"]
    for name, metric in metrics.items():
        (row,) = re.findall(rf"^\| `{name}` \| (\S+) \|", card, re.MULTILINE)
        assert row == f"{metric['value']:.4g}"
    sums = dict(re.findall(r"^\| `(\S+)` \| `([0-9a-f]{64})` \|", card, re.MULTILINE))
    assert set(sums) >= {"sae.safetensors", "config.json", "results/core.json"}
    assert "`resid_post.0`" in card and "TopK (4), 64 latents of width 16" in card
    assert "{{" not in card and "{%" not in card


def test_a_licence_has_to_be_said(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["push", str(tiny_run), "hf://owner/saes", "--dry-run", "--keep-paths"]
    assert main(command) == 2
    assert "say what others may do with it" in capsys.readouterr().err
    assert main([*command, "--licence", "mit"]) == 0
    assert "SHA256SUMS" in capsys.readouterr().out


def test_paths_of_this_machine_are_uploaded_only_where_asked_for(
    hub: Hub, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run / "config.json"
    values = json.loads(config.read_text())
    values["provenance"]["model"] = "/home/somebody/model"
    config.write_text(json.dumps(values))
    command = ["push", str(tiny_run), "hf://owner/saes", "--licence", "mit"]
    assert main(command) == 2
    assert "'/home/somebody/model' in config.json. Upload them with" in capsys.readouterr().err
    assert not hub.files
    assert main([*command, "--keep-paths"]) == 0
    assert "/home/somebody/model" in hub.files["config.json"].decode()


def test_which_texts_are_paths_of_this_machine() -> None:
    texts = {"a": "~/model", "b": ["file:///x"], "c": "a//[b", "d": "~ 3 of 4", "e": "https://x/y"}
    files: dict[str, Path | bytes] = {
        "a.json": json.dumps(texts).encode(),
        "b.yaml": b"model: /home/me/model",
        "c.txt": b"/home",
    }
    found = ["'~/model' in a.json", "'file:///x' in a.json", "'/home/me/model' in b.yaml"]
    assert _card.machine_paths(files) == found


def test_what_a_hub_refuses_is_said_in_a_sentence(hub: Hub, tiny_run: Path) -> None:
    hub.denied = True
    made = _card.parcel(tiny_run, "hf://owner/saes", "mit")
    with pytest.raises(SaekitError, match=r"hf://owner/saes (is not there, or not for you|cannot)"):
        _hub.push(made.files, "hf://owner/saes")


def test_a_converted_sae_is_pushed_with_its_proof(
    hub: Hub, foreign: dict[str, Any], tmp_path: Path
) -> None:
    made = foreign["llama_scope_v1"](tmp_path / "foreign")
    _parity.convert([made.path], tmp_path / "out", "sae_lens")
    parcel = _card.parcel(tmp_path / "out", "hf://owner/saes", "other")
    assert "Converted with `saekit convert`; on 256 rows" in parcel.card
    assert "SAE.load_from_disk(folder)" in parcel.card
    assert not _card.machine_paths(parcel.files)
    _hub.push(parcel.files, "hf://owner/saes")
    assert {"cfg.json", "sae_weights.safetensors", "parity.json"} <= set(hub.files)
    proof = json.loads(hub.files["parity.json"])
    assert proof["passed"] and proof["sources"] == [Path(made.path).name]
    assert sha256(hub.files["parity.json"]).hexdigest() in hub.files["SHA256SUMS"].decode()
