"""The feature store by several processes, which share the rows and then the files."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saekit import ActivationCache, checkpoint, evaluate
from saekit.distributed import Mesh
from saekit.errors import ConfigError, SaekitError
from saekit.evals._features_build import Workshop
from saekit.evals._features_spool import Coded, Spool, Text, Writer
from saekit.evals.examples import ExamplesConfig
from saekit.features import BUILDING, FeatureStore
from saekit.files import file_checksum
from saekit.results import EvalResult
from saekit.sae import SAE, TopK

SCRIPT = Path(__file__).with_name("_store_ranks.py")
HOOK = "resid_post.0"
PRELOAD = ("saekit.evals.examples", "saekit.activations_cache.model_language")
CONFIG: dict[str, Any] = {"batch_size": 40, "window": 6, "n_contexts": 5}

Start = Callable[..., Any]


def files(out: Path) -> dict[str, str]:
    return {path.name: file_checksum(path) for path in (out / "features").iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the SAE in it: one whose latents are rounded as any are."""
    folder = tmp_path_factory.mktemp("ranks")
    W = torch.randn(40, 16, generator=torch.Generator().manual_seed(3))
    sae = SAE(W.T.contiguous() / 4, torch.zeros(40), W / 4, torch.zeros(16), TopK(4))
    checkpoint.save(sae, folder / "sae")
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path, tiny_cache: ActivationCache) -> Path:
    """By one process, in the same pieces and files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saekit.evals._features_spool.PLACES", 100)
        patch.setattr("saekit.evals.examples.AT_ONCE", 50)
        patch.setattr("saekit.evals.examples.Examples.LATENTS_PER_FILE", 8)
        patch.setattr("saekit.evals.examples.Examples.LATENTS_PER_GROUP", 4)
        sae, config = checkpoint.load(folder / "sae"), ExamplesConfig(**CONFIG)
        evaluate("examples", sae, tiny_cache, hook=HOOK, config=config, out=folder / "alone")
    return folder / "alone"


@pytest.fixture(scope="module")
def start(folder: Path, tiny_cache: ActivationCache, start_ranks: Start) -> Start:
    given = {"SAE": str(folder / "sae"), "CACHE": tiny_cache.location, "HOOK": HOOK}

    def start(n: int, *jobs: dict[str, Any]) -> Any:
        whole = [{"config": CONFIG, **job, "out": str(folder / job["out"])} for job in jobs]
        return start_ranks(n, SCRIPT, PRELOAD, **given, JOBS=whole)

    return start


@pytest.fixture(scope="module")
def left(folder: Path, start: Start) -> dict[str, list[int]]:
    """What killed processes leave of a store, by where one of two was killed: rows that are
    encoded, and files that are written. Before, the two make a store."""
    found = {}
    for jobs in ([{"out": "two"}, {"out": "rows", "kill_in": "rows"}], [{"kill_in": "files"}]):
        phase = jobs[-1].setdefault("out", "files")
        ranks = start(2, *jobs)
        ranks.processes[1].join(120)
        assert ranks.processes[1].exitcode == -signal.SIGKILL
        # As torchrun does.
        ranks.kill()
        making = folder / phase / BUILDING
        text = Text.kept_in(making)
        rows = sum(int(text.keep[first:last].sum()) for first, last in Spool.there(making))
        found[phase] = [rows, len(list((making / "store").glob("latents-*")))]
        assert not (folder / phase / "features").exists()
    return found


@pytest.fixture(scope="module")
def three(left: dict[str, list[int]], start: Start) -> None:
    assert start(3, {"out": "rows"}, {"out": "files"}).wait() == [0, 0, 0]


def done(folder: Path, name: str, ranks: int) -> list[list[int]]:
    """Rows encoded and files written by each."""
    paths = [folder / f"{name}-done-{rank}" for rank in range(ranks)]
    return [[int(number) for number in path.read_text().split()] for path in paths]


def test_two_processes_make_the_files_that_one_makes(
    folder: Path, alone: Path, left: dict[str, list[int]]
) -> None:
    assert files(folder / "two") == files(alone)
    ours, theirs = (EvalResult.load(out, "examples") for out in (folder / "two", alone))
    assert ours.metrics == theirs.metrics
    assert not (folder / "two" / BUILDING).exists()
    rows, written = zip(*done(folder, "two", 2), strict=True)
    assert sum(rows) == FeatureStore.open(alone).header.n_rows
    assert min(rows) > 0.4 * sum(rows)
    assert sum(written) == 5


@pytest.mark.parametrize("phase", ["rows", "files"])
def test_a_killed_process_costs_nothing_that_was_complete(
    phase: str, folder: Path, alone: Path, left: dict[str, list[int]], three: None
) -> None:
    """What two processes began, of which one was killed, three went on with."""
    assert files(folder / phase) == files(alone)
    rows, written = (sum(each) for each in zip(*done(folder, phase, 3), strict=True))
    n_rows = FeatureStore.open(alone).header.n_rows
    assert 0 < left[phase][0] <= n_rows
    assert [rows, written] == [n_rows - left[phase][0], 5 - left[phase][1]]


def test_a_store_that_somebody_else_is_making_is_refused_by_all(folder: Path, start: Start) -> None:
    with Workshop(folder / "held", {}, progress=False).open():
        assert start(2, {"out": "held"}).wait() == [0, 0]
    said = [(folder / f"held-error-{rank}").read_text() for rank in range(2)]
    assert "another process is making the feature store" in said[0]
    assert "rank 1 of 2 lost touch with the others while it ran evaluation 'examples'" in said[1]


def test_processes_need_a_folder_that_all_see(folder: Path, tiny_cache: ActivationCache) -> None:
    sae, mesh = checkpoint.load(folder / "sae"), Mesh(data=2)
    with pytest.raises(ConfigError, match="2 processes make a feature store in a folder that all"):
        evaluate("examples", sae, tiny_cache, hook=HOOK, mesh=mesh)


def test_runs_are_those_of_a_whole_pass_whatever_is_there_of_it(
    folder: Path, tiny_cache: ActivationCache
) -> None:
    text = Text.of(tiny_cache, ExamplesConfig())
    whole = list(text.runs([], 40))
    assert [whole[0][0], whole[-1][1]] == [0, text.n_places]
    for there in ([whole[0]], [whole[-1]], [whole[3], whole[4], whole[9]]):
        assert list(text.runs(there, 40)) == [run for run in whole if run not in there]
    merged = [(whole[2][0], whole[5][1])]
    assert list(text.runs(merged, 40)) == whole[:2] + whole[6:]


def test_pieces_that_overlap_or_leave_gaps_are_refused(
    tmp_path: Path, tiny_cache: ActivationCache
) -> None:
    def piece(first: int, last: int) -> None:
        none, zero = torch.zeros(0).numpy(), torch.zeros(0, dtype=torch.long).numpy()
        writer = Writer(tmp_path, 4)
        writer.add(first, last, Coded(zero, zero, none, zero, none, none))
        writer.flush()

    piece(0, 10)
    piece(20, 30)
    with pytest.raises(SaekitError, match="do not have each place of the text once .see place 10"):
        Spool(tmp_path, 30)
    piece(10, 20)
    assert Spool(tmp_path, 30).count.tolist() == [0] * 4
    piece(5, 15)
    with pytest.raises(SaekitError, match="several starts wrote there at once"):
        Spool(tmp_path, 30)
