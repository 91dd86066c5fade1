"""A run made by hand whose tokens are hostile, beside the real `tiny_run`."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from saekit.dashboard.server import APP
from saekit.results import EvalResult, LatentExamples, Metric, Provenance

SCRIPT = "<script>alert(1)</script>"
VOCAB = ["the", " cat", "\n", "\t", " ", SCRIPT, "</script>", "| a | *b* |", "\u202eevil", "("]
FINGERPRINT = "f" * 64


@pytest.fixture
def hostile_run(tmp_path: Path) -> Path:
    """Three latents: one fires on a script, one on a bracket between letters, one never."""
    run = tmp_path / "a run"
    windows = [[0, 1, 5, 2, 7], [0, 9, 0, 8, -1]]
    shape = (3, 2, 5)
    tokens, acts = np.full(shape, -1), np.zeros(shape, np.float16)
    tokens[0, 0], tokens[0, 1], tokens[1, 0] = windows[0], windows[1], windows[1]
    acts[0, 0, 2], acts[0, 1, 3], acts[1, 0, 1], acts[1, 0, 0] = 4, 2, 1, 0.5
    LatentExamples(
        peak=np.array([[4, 2], [1, 0], [0, 0]], np.float32),
        peak_at=np.array([[2, 3], [1, 0], [0, 0]]),
        tokens=tokens,
        acts=acts,
        document=np.zeros((3, 2), np.int64),
        density=np.array([0.01, 0.2, 0], np.float32),
        histogram=np.array([[3, 1], [20, 0], [0, 0]]),
        maximum=np.array([4, 1, 0], np.float32),
        promoted=np.array([[5, 6], [1, 3], [-1, -1]]),
        promoted_logit=np.array([[1.5, 0.5]] * 3, np.float32),
        suppressed=np.array([[4, 7], [2, 8], [-1, -1]]),
        suppressed_logit=np.array([[-1.5, -0.5]] * 3, np.float32),
        vocab=VOCAB,
        documents=["<img src=x onerror=alert(1)>"],
        n_rows=100,
        split="test",
        exclude=("special",),
        sae_fingerprint=FINGERPRINT,
    ).save(run / "results")
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
