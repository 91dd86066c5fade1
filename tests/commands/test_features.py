from pathlib import Path

import numpy as np
import pytest

from saekit import ActivationCache
from saekit.cli import main
from saekit.features import FeatureStore, results_of

HOOK = "resid_post.0"


@pytest.fixture
def foreign(tiny_run: Path, tmp_path: Path) -> Path:
    """The tiny run's SAE as SAELens keeps it: no run, so it says nothing of a cache."""
    folder = tmp_path / "foreign"
    assert main(["convert", str(tiny_run), str(folder), "--format", "sae_lens"]) == 0
    assert not (folder / "config.toml").exists()
    return folder


def test_the_store_of_another_tools_sae_is_that_of_the_run_it_was_written_from(
    foreign: Path,
    tiny_run: Path,
    tiny_cache: ActivationCache,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["features", "build", str(foreign), tiny_cache.location, "--hook", HOOK]) == 0
    assert "Next: saekit dashboard" in capsys.readouterr().out
    ours, theirs = (FeatureStore.open(results_of(run)) for run in (tiny_run, foreign))
    assert theirs.header.hook == HOOK and theirs.header.n_rows == ours.header.n_rows
    assert ours.column("active").any()
    np.testing.assert_array_equal(theirs.column("active"), ours.column("active"))
    np.testing.assert_allclose(theirs.column("maximum"), ours.column("maximum"), rtol=1e-5)
    strongest = int(ours.column("maximum").argmax())
    places = [[(p.row, p.at) for p in s.latent(strongest).of("top")] for s in (ours, theirs)]
    assert places[0] and places[0] == places[1]


def test_the_text_for_another_tools_sae_is_read_by_the_model_that_is_named(
    foreign: Path, tiny_lm: Path, corpus_file: Path
) -> None:
    text = ["--dataset", str(corpus_file), "--n-tokens", "300", "--split", "all"]
    origin = ["--model", str(tiny_lm), "--hook", HOOK]
    assert main(["features", "build", str(foreign), *text, *origin]) == 0
    header = FeatureStore.open(results_of(foreign)).header
    cache = ActivationCache.open(foreign.with_name("foreign-features-cache"))
    assert header.cache_fingerprint == cache.fingerprint and header.model == str(tiny_lm)
    assert cache.hooks == {HOOK: 16}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "does not say which cache it was trained on: give the cache behind the SAE's folder"),
        (["--dataset", "demo"], "which model and hook point it was trained on: give --model and"),
    ],
)
def test_what_another_tools_sae_does_not_say_is_asked_for(
    flags: list[str], message: str, foreign: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["features", "build", str(foreign), *flags]) == 2
    assert message in capsys.readouterr().err
