"""A run made by hand whose tokens are hostile, beside the real `tiny_run`."""

import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import (
    BrowserContext,
    ConsoleMessage,
    Dialog,
    Page,
    Request,
    ViewportSize,
    expect,
    sync_playwright,
)
from streamlit.testing.v1 import AppTest

from saekit.dashboard.server import APP, HOST, command
from saekit.features import CONTEXTS, HEADER, LATENTS, LISTS, NAME, SCALARS, Header, file_name
from saekit.results import EvalResult, Metric, Provenance

SCRIPT = "<script>alert(1)</script>"
VOCAB = ["the", " cat", "\n", "\t", " ", SCRIPT, "</script>", "| a | *b* |", "\u202eevil", "("]
FINGERPRINT = "f" * 64
LOGITS = {"promoted_logit": [1.5, 0.5], "suppressed_logit": [-1.5, -0.5]}


def _write_store(
    results: Path,
    latents: list[dict[str, Any]],
    contexts: list[dict[str, Any]],
    vocab: list[str],
    documents: list[str],
    *,
    window: int = 5,
    n_contexts: int = 2,
    **header: Any,
) -> None:
    """A feature store by hand. Numbers that are left out are 0, lists empty; each context has
    `latent` and `tokens`."""
    folder = results / NAME
    folder.mkdir(parents=True)
    d_sae = len(latents)
    rows: list[dict[str, Any]] = [
        {"latent": at} | {name: 0 for name in SCALARS} | {name: [] for name in LISTS} | given
        for at, given in enumerate(latents)
    ]
    texts: list[dict[str, Any]] = [
        {"kind": "top", "group": 0, "rank": 0, "row": 0, "at": 0, "act": 0.0, "unexplained": 0.0}
        | {"document": 0, "acts": [0.0] * len(given["tokens"])}
        | given
        for given in contexts
    ]
    flat = np.full((d_sae, n_contexts, window + 1), len(vocab), dtype=np.uint16)
    for text in texts:
        if text["kind"] == "top":
            flat[text["latent"], text["rank"], : len(text["tokens"])] = text["tokens"]
    tables = {
        "latents": pa.Table.from_pylist(rows, schema=LATENTS),
        "contexts": pa.Table.from_pylist(texts, schema=CONTEXTS),
        "tokens": pa.table({"token": flat.ravel()}),
    }
    for part, table in tables.items():
        pq.write_table(table, folder / file_name(part, 0))
    for name, lines in {"vocab": vocab, "documents": documents}.items():
        pq.write_table(pa.table({"text": lines}), folder / f"{name}.parquet")
    fields: dict[str, Any] = {
        "d_sae": d_sae,
        "hook": "resid_post.0",
        "model": "tiny",
        "n_rows": 100,
        "split": "test",
        "exclude": ("special",),
        "sae_fingerprint": "f" * 64,
        "cache_fingerprint": "c" * 64,
        "config": {},
        "n_contexts": n_contexts,
        "window": window,
        "quantiles": 2,
        "latents_per_file": 4096,
        "latents_per_group": 128,
    }
    (folder / HEADER).write_text(json.dumps(Header(**fields | header).to_dict()))


@pytest.fixture
def hostile_run(tmp_path: Path) -> Path:
    """Three latents: one fires on a script, one on a bracket between letters, one never."""
    run = tmp_path / "a run"
    first, second = [0, 1, 5, 2, 7], [0, 9, 0, 8]
    _write_store(
        run / "results",
        latents=[
            {
                "active": 1,
                "density": 0.01,
                "maximum": 4,
                "kurtosis": 9.0,
                "x": 1,
                "histogram": [3, 1],
                "edges": [2, 3, 4],
                "input_token": [5, 8],
                "input_share": [0.75, 0.25],
                "input_count": [3, 1],
                "promoted": [5, 6],
                "suppressed": [4, 7],
                "near": [1, 2],
                "near_cosine": [0.5, 0.25],
                "coactive": [1],
                "coactive_jaccard": [0.125],
                **LOGITS,
            },
            {
                "active": 20,
                "density": 0.2,
                "maximum": 1,
                "kurtosis": 30.0,
                "histogram": [20, 0],
                "edges": [0.5, 0.5, 1],
                "input_token": [9],
                "input_share": [1.0],
                "input_count": [20],
                "promoted": [1, 3],
                "suppressed": [2, 8],
                "near": [0, 2],
                "near_cosine": [0.5, 0.125],
                **LOGITS,
            },
            {"kurtosis": float("nan")},
        ],
        contexts=[
            {"latent": 0, "at": 2, "act": 4, "tokens": first, "acts": [0, 0, 4, 0, 0]},
            {"latent": 0, "at": 3, "act": 2, "rank": 1, "tokens": second, "acts": [0, 0, 0, 2]},
            {"latent": 0, "at": 2, "act": 4, "tokens": first, "acts": [0, 0, 4, 0, 0]}
            | {"kind": "sample", "group": 1},
            {"latent": 0, "at": 1, "tokens": second, "kind": "silent", "acts": [0, 0, 0, 0]},
            {"latent": 1, "at": 1, "act": 1, "tokens": second, "acts": [0.5, 1, 0, 0]},
        ],
        vocab=VOCAB,
        documents=["<img src=x onerror=alert(1)>"],
        sae_fingerprint=FINGERPRINT,
    )
    EvalResult(
        eval="core",
        metrics={
            "ev": Metric(value=0.75, definition="1 - |x - x_hat|^2 / |x - mean|^2 <b>", n=100),
            "l0_mean": Metric(value=2.5, definition="mean count of active latents", n=100),
            "ce_clean": Metric(value=3.0, definition="the model as it is, nats", n=90),
            "ce_sae": Metric(value=3.25, definition="with x_hat for x, nats", n=90),
        },
        hook="resid_post.0",
        split="test",
        exclude=("special",),
        sae_fingerprint=FINGERPRINT,
        cache_fingerprint="c" * 64,
        config={"n_rows": 100},
        versions={"torch": "2"},
        arrays={"density": np.array([0.01, 0.2, 0], np.float32)},
    ).save(run / "results")
    config = {"kind": "topk", "cache": "c", "hook": "resid_post.0", "d_sae": 3, "k": 2}
    toml = "".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items())
    (run / "config.toml").write_text(toml, encoding="utf-8")
    origin = Provenance(
        kind="topk",
        hook="resid_post.0",
        model="tiny",
        model_fingerprint="b" * 64,
        cache_fingerprint="c" * 64,
        config=config,
        rows_seen=1000,
        versions={"torch": "2"},
    )
    sae = {"d_sae": 3, "fingerprint": FINGERPRINT, "provenance": origin.to_dict()}
    (run / "config.json").write_text(json.dumps(sae), encoding="utf-8")
    log = [
        {"step": 1, "tokens": 10, "loss": 2.0},
        {"step": 2, "tokens": 20, "loss": 1.0, "ev": 0.5},
    ]
    lines = [json.dumps(line) for line in log]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "lo']), encoding="utf-8")
    return run


@pytest.fixture(params=["hostile_run", "tiny_run"])
def any_run(request: pytest.FixtureRequest) -> Path:
    """A finished run with its results: one made by hand, one really trained."""
    run: Path = request.getfixturevalue(request.param)
    return run


@pytest.fixture
def browse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AppTest]:
    """Opens the feature browser, as the command line does: `browse(PATH, screen="prompt")`.

    What comes by name is the address; a latent without a screen is one of the screen of features.
    """

    def open_app(*arguments: Path | str, **address: str) -> AppTest:
        monkeypatch.setattr("sys.argv", [str(APP), *map(str, arguments)])
        app = AppTest.from_file(APP, default_timeout=60)
        if "latent" in address:
            address = {"screen": "features", **address}
        for name, value in address.items():
            app.query_params[name] = value
        app.run()
        assert not app.exception
        return app

    return open_app


# Without these Chromium looks for hosts outside, which a machine for tests may not have.
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[BrowserContext]:
    """A real web browser, without a window. It ends with the module: while Playwright runs, no
    other event loop can."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if program is None:
        pytest.skip("there is no Chromium here; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=CHROMIUM_FLAGS)
        size: ViewportSize = {"width": 1400, "height": 900}
        context = browser.new_context(viewport=size, accept_downloads=True)
        context.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        yield context
        browser.close()


@pytest.fixture
def page(chromium: BrowserContext) -> Iterator[Page]:
    """A page of its own. At the end nothing may have gone wrong on it: no error in its console, no
    dialog, which a script that was let in would open, and no request to another machine."""
    page = chromium.new_page()
    wrong: list[str] = []

    def refuse(dialog: Dialog) -> None:
        wrong.append(f"a dialog: {dialog.message}")
        dialog.dismiss()

    def listen(line: ConsoleMessage) -> None:
        if line.type == "error":
            wrong.append(f"in the console: {line.text}")

    def look(request: Request) -> None:
        if not request.url.startswith((f"http://{HOST}:", "file:", "data:", "blob:")):
            wrong.append(f"a request: {request.url}")

    page.on("dialog", refuse)
    page.on("request", look)
    page.on("pageerror", lambda error: wrong.append(f"an exception: {error}"))
    page.on("console", listen)
    yield page
    page.close()
    assert wrong == []


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., str]]:
    """Starts the feature browser as the command line does; gives its address."""
    with ExitStack() as running:
        yield lambda path, write=False: running.enter_context(_served(path, write=write))


@contextmanager
def _served(path: Path, *, write: bool) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    line = command(path, port=port, headless=True, write=write)
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        assert server.stdout is not None
        said: list[str] = []
        try:
            while f":{port}" not in (said or [""])[-1]:
                said.append(server.stdout.readline())
                assert said[-1], "".join(said)
            yield f"http://{HOST}:{port}"
        finally:
            server.kill()  # at once; without, a failure would wait for it without end
            server.stdout.read()
