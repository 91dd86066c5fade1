"""The feature browser with a store of many latents, in headless Chromium: what a person waits for,
and the memory that the server takes.

    python benchmarks/bench_dashboard.py [--d-sae 131072]     pages of a synthetic store
    python benchmarks/bench_dashboard.py --build RUN [--peer PYTHON]
                                                              `saekit features build` of a run, and
                                                              SAEDashboard's of as many tokens

Pages are timed in the web browser, from the click or the key until what was asked for is there and
until the app has nothing more to do; every time it is another latent or another text, so that
nothing comes from a cache. Lines go to results/dashboard.jsonl.
"""

import argparse
import json
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import _record
import _synthetic_store
from playwright.sync_api import Page, sync_playwright

import saekit
from saekit.activations_cache.model import LanguageModel
from saekit.dashboard.server import HOST, command
from saekit.features import FeatureStore

NAME = "dashboard"
PEER_LATENTS = 256
MODEL = Path(saekit.__file__).parent / "demo" / "model"

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# Keeps when contexts were painted first, by the clock: a page that is busy answers late.
_PAINT = """
const look = () => requestAnimationFrame(() => {
  if (document.querySelector(".contexts")?.checkVisibility())
    setTimeout(() => { window.painted = Date.now(); });
  else look();
});
look();
"""

# Resolves with the milliseconds from the next click or key until the element `shown` looks
# different, frame by frame, and until the app has run to its end, too. A table is a picture of its
# rows; the text that stands in it for screen readers comes later.
_WATCH = """([shown, limit]) => {
  const app = document.querySelector('[data-testid="stApp"]');
  const look = () => {
    const found = document.querySelector(shown);
    if (!(found instanceof HTMLCanvasElement)) return found?.textContent;
    const picture = found.getContext("2d").getImageData(0, 0, found.width, found.height / 2);
    return new Uint32Array(picture.data.buffer).reduce((sum, dot) => (31 * sum + dot) | 0, 0);
  };
  const before = look();
  let begun = null, changed = null, running = false, ended = null;
  for (const kind of ["pointerdown", "keydown"])
    addEventListener(kind, () => { begun ??= performance.now(); }, {capture: true, once: true});
  const observer = new MutationObserver(() => {
    const state = app.getAttribute("data-test-script-state");
    if (state === "running") running = true;
    else if (running && state === "notRunning") ended ??= performance.now();
  });
  observer.observe(app, {attributeFilter: ["data-test-script-state"]});
  window.timed = new Promise((done, fail) => {
    const frame = () => {
      if (begun !== null && changed === null && look() !== before) changed = performance.now();
      if (changed !== null && ended !== null)
        done([changed - begun, Math.max(changed, ended) - begun]);
      else if (begun !== null && performance.now() - begun > limit)
        fail(new Error(`${shown} ${changed === null ? "stayed as it was" : "changed"}; `
          + `the app ${running ? "ran" : "did not run"}, and ${ended ? "ended" : "did not end"}`));
      else requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  });
}"""


_LIMIT_MS = 30_000
_TABLE = '[data-testid="stDataFrame"] canvas'
_CHART = ".js-plotly-plot .main-svg"


@contextmanager
def _served(path: Path) -> Iterator[tuple[str, int, float]]:
    """Address, process, and milliseconds from the command to the address."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    begun = time.perf_counter()
    with subprocess.Popen(
        command(path, port=port, headless=True),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as server:
        assert server.stdout is not None
        try:
            while f":{port}" not in (said := server.stdout.readline()):
                if not said:
                    raise RuntimeError("the server ended before it listened")
            yield f"http://{HOST}:{port}", server.pid, 1e3 * (time.perf_counter() - begun)
        finally:
            server.terminate()  # else leaving the block would wait for it without end
            server.stdout.read()  # it would not end on a pipe that nobody reads


def _memory(pid: int) -> dict[str, float]:
    """Of a process, in MiB: now, and at most so far."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in status if line.startswith("Vm")}
    return {name: round(int(values[key]) / 1024, 1) for name, key in _MEMORY.items()}


_MEMORY = {"rss_mib": "VmRSS", "peak_mib": "VmHWM"}


def _timed(page: Page, act: Callable[[], object], shown: str) -> list[float]:
    page.evaluate(_WATCH, [shown, _LIMIT_MS])
    act()
    found: list[float] = page.evaluate("window.timed")
    return found


def _still(page: Page) -> None:
    page.locator('[data-testid="stApp"][data-test-script-state="notRunning"]').wait_for()


def pages(d_sae: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        vocab = LanguageModel.load("demo").vocab
        begun = time.perf_counter()
        _synthetic_store.write_run(run, d_sae, vocab)
        size = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
        print(f"store written in {time.perf_counter() - begun:.0f} s, {size / 2**20:.0f} MiB")
        case: dict[str, object] = {"d_sae": d_sae, "store_mib": round(size / 2**20, 1)}
        with _served(run) as (address, pid, start), sync_playwright() as playwright:
            program = shutil.which("chromium") or shutil.which("chromium-browser")
            browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
            context = browser.new_context(viewport={"width": 1400, "height": 900})
            context.set_default_timeout(120_000)
            _write(case, "start of the server", [start], pid)
            for op, times in (("first page after the start", 1), ("first page", 5)):
                page = context.new_page()
                page.add_init_script(_PAINT)
                found = [_opened(page, address, d_sae) for _ in range(times)]
                useful, drawn = zip(*found, strict=True)
                _write(case, op, list(useful), pid, list(drawn))
            _inside(page, case, pid, vocab)
            browser.close()


def _opened(page: Page, address: str, d_sae: int) -> tuple[float, float]:
    """Milliseconds until a latent's contexts can be read, and until the table of all latents and
    the charts are there, too."""
    begun = time.time()
    page.goto(f"{address}/?screen=features")
    page.get_by_text(f"of {d_sae:,} latents").wait_for()
    page.locator(_TABLE).first.wait_for()
    page.locator(_CHART).first.wait_for()
    drawn = 1e3 * (time.time() - begun)
    _still(page)
    return page.evaluate("window.painted") - 1e3 * begun, drawn


def _inside(page: Page, case: dict[str, object], pid: int, vocab: list[str]) -> None:
    _still(page)
    next_ = page.locator(".st-key-next button").first
    for op in ("click to the next latent, beside the table", "click to the next latent, by itself"):
        found = [_timed(page, next_.click, ".contexts") for _ in range(9)]
        _write(case, op, [each[0] for each in found], pid, [each[1] for each in found])
        if op.endswith("table"):
            page.get_by_role("radio", name="Feature", exact=True).click()
            page.wait_for_url("**screen=feature**")
            page.wait_for_timeout(1000)
            _still(page)
    page.get_by_role("radio", name="Features", exact=True).click()
    page.wait_for_url("**screen=features**")
    page.wait_for_timeout(1500)
    _still(page)
    words = [word for word in vocab if word.isalpha() and len(word) > 4][:9]
    box = page.get_by_placeholder("Search for a token or a piece of text")
    found = []
    for word in words[:9]:
        box.fill(word)
        found.append(_timed(page, lambda: page.keyboard.press("Enter"), _TABLE))
        _still(page)
    seen, done = zip(*found, strict=True)
    _write(case, "search in contexts", list(seen), pid, list(done))
    box.fill("")
    _timed(page, lambda: page.keyboard.press("Enter"), _TABLE)
    found = []
    for order in ("maximum ↓", "kurtosis ↑", "nearest cosine ↓", "unexplained ↓", "density ↑"):
        page.locator(".st-key-sort").get_by_role("combobox").click()
        option = page.get_by_role("option", name=order, exact=True)
        found.append(_timed(page, option.click, _TABLE))
        _still(page)
    seen, done = zip(*found, strict=True)
    _write(case, "sort", list(seen), pid, list(done))


def _write(
    case: dict[str, object],
    op: str,
    seen: list[float],
    pid: int,
    done: list[float] | None = None,
) -> None:
    figures = {"ms": _record.summary(seen), **_memory(pid)}
    figures |= {"ms_done": _record.summary(done)} if done else {}
    _record.append(NAME, case | {"op": op} | figures)
    print(op, figures)


def build(run: Path, peer: Path | None) -> None:
    """The feature store of a real run, made anew beside it by the command; and some latents as
    SAEDashboard makes them, of as many tokens, by the Python of its environment."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        told = [sys.executable, "-m", "saekit", "features", "build", str(run), "--out", folder]
        subprocess.run(told, check=True)
        seconds = time.perf_counter() - begun
        store = FeatureStore.open(Path(folder))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    d_sae, tokens = store.d_sae, store.header.n_rows
    _built("saekit", d_sae, d_sae, tokens, seconds, peak)
    if peer is not None:
        driver = Path(__file__).parent / "peers" / "sae_dashboard_store.py"
        k = json.loads((run / "config.json").read_text())["provenance"]["config"]["k"]
        sizes = {"d-sae": d_sae, "k": k, "latents": PEER_LATENTS, "tokens": tokens}
        flags = [f"--{name}={value}" for name, value in sizes.items()]
        told = [str(peer), str(driver), f"--tokenizer={MODEL}", *flags]
        said = subprocess.run(told, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(said.splitlines()[-1])
        name = f"sae_dashboard {found['version']}"
        of = (d_sae, found["latents"], found["tokens"], found["seconds"], found["peak_mib"])
        _built(name, *of)


def _built(
    impl: str, d_sae: int, latents: int, tokens: int, seconds: float, peak_mib: float
) -> None:
    case = {
        "op": "build",
        "impl": impl,
        "d_sae": d_sae,
        "latents": latents,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_s": round(tokens / seconds, 1),
        "ms_per_latent": round(1e3 * seconds / latents, 3),
        "peak_mib": round(peak_mib, 1),
    }
    print(_record.append(NAME, case))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d-sae", type=int, default=131_072)
    parser.add_argument("--build", type=Path)
    parser.add_argument("--peer", type=Path, help="Python of an environment with SAEDashboard")
    args = parser.parse_args()
    if args.build is not None:
        build(args.build, args.peer)
    else:
        pages(args.d_sae)
