"""Takes the pictures of docs/browser.md from a finished `make demo`, in headless Chromium:

    saekit features explain demo_run/run
    python docs/walk.py demo_run [LATENT]

LATENT is the one that is looked at and steered; without it, one whose explanation names a word and
holds up well on documents kept apart, and that fires on one token in 200 or so.
"""

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
from playwright.sync_api import Page, sync_playwright

from saekit import explanations
from saekit.dashboard.server import HOST, command
from saekit.features import FeatureStore, results_of

FOLDER = Path(__file__).parent
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
TEXT = "def read_lines(path):\n    with open(path) as file:\n        "


def well_explained(run: Path) -> int:
    density = FeatureStore.open(results_of(run)).column("density")
    scored = [
        ((one.detection or 0) - abs(np.log10(density[latent] / 0.005)) / 5, latent)
        for latent, one in explanations.read(run).items()
        if one.n > 20 and density[latent] > 0 and re.search('"[^"]*[a-z]{4,}', one.text)
    ]
    return max(scored)[1]


def take(page: Page, address: str, name: str, height: int, **fields: str) -> None:
    page.goto(f"{address}/?{urlencode(fields)}")
    page.locator('[data-testid="stMainBlockContainer"] h3, h2').first.wait_for()
    page.wait_for_timeout(2000)
    page.locator('[data-testid="stApp"][data-test-script-state="notRunning"]').wait_for()
    page.set_viewport_size({"width": 1280, "height": height})
    page.wait_for_timeout(1500)
    page.screenshot(path=FOLDER / f"walk-{name}.png")


def main(run: Path, latent: int) -> None:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    line = command(run, port=port, headless=True)
    with (
        subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as server,
        sync_playwright() as playwright,
    ):
        assert server.stdout is not None
        try:
            while f":{port}" not in (said := server.stdout.readline()):
                if not said:
                    raise RuntimeError("the server ended before it listened")
            program = shutil.which("chromium") or shutil.which("chromium-browser")
            browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
            page = browser.new_page()
            page.set_default_timeout(120_000)
            of, address = str(latent), f"http://{HOST}:{port}"
            most = FeatureStore.open(results_of(run)).latent(latent).numbers["maximum"]
            take(page, address, "runs", 760, screen="runs")
            take(page, address, "features", 820, screen="features", latent=of)
            take(page, address, "feature", 980, screen="feature", latent=of)
            take(page, address, "prompt", 900, screen="prompt", text=TEXT)
            change = f"{latent}:set:{2 * most:.1f}"
            steer = {"changes": change, "tokens": "16", "samples": "2"}
            take(page, address, "steer", 1400, screen="steer", text=TEXT, **steer)
            browser.close()
        finally:
            server.terminate()  # else leaving the block would wait for it without end
            server.stdout.read()  # it would not end on a pipe that nobody reads


if __name__ == "__main__":
    demo = Path(sys.argv[1]) / "run"
    main(demo, int(sys.argv[2]) if len(sys.argv) > 2 else well_explained(demo))
