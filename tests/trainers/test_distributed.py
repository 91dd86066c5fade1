"""One SAE trained by several processes, which share out its latents and the rows of each batch:
what comes out is what one process makes. They are started a few times, with many jobs each."""

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

from saekit import ActivationCache, checkpoint, train
from saekit.config import TrainConfig
from saekit.distributed import Mesh, shape_of
from saekit.errors import ConfigError
from saekit.trainers import _base, _kinds
from saekit.trainers._base import unit_rows
from saekit.trainers._run import Columns, Run, check_mesh
from saekit.watch import stalled

RANKS = Path(__file__).with_name("_ranks.py")
OURS = runpy.run_path(str(RANKS), run_name="_ranks")
config: Callable[..., TrainConfig] = OURS["config"]

# The same sums in another order: some float32 roundings of numbers near 1, over 20 steps.
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}

KINDS = ["topk", "batch_topk", "mutual_choice", "jumprelu", "matching_pursuit"]
PRELOAD = tuple(f"saekit.trainers.{kind}" for kind in KINDS)
Job = dict[str, Any]
Start = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


def job(out: Path, cache: ActivationCache, mesh: tuple[int, int], kind: str, **more: Any) -> Job:
    return {"mesh": mesh, "out": str(out), "cache": cache.location, "kind": kind, **more}


@pytest.fixture(scope="module")
def two(folder: Path, planted: ActivationCache, start_ranks: Start) -> list[int | None]:
    jobs: list[Job] = []
    for mesh in ((1, 2), (2, 1)):
        name = f"{mesh[0]}x{mesh[1]}"
        jobs.append({"do": "choose", "mesh": mesh, "out": str(folder / f"{name}.choices")})
        jobs += [job(folder / f"{name}-{kind}", planted, mesh, kind) for kind in KINDS]
    jobs.append(job(folder / "resumed", planted, (1, 2), "mutual_choice", stop=6))
    killed = job(folder / "killed", planted, (1, 2), "topk", kill=[1, 10])
    codes: list[int | None] = start_ranks(2, RANKS, PRELOAD, JOBS=[*jobs, killed]).wait()
    return codes


@pytest.fixture(scope="module")
def four(
    folder: Path, planted: ActivationCache, two: list[int | None], start_ranks: Start
) -> list[int | None]:
    stop_after(folder / "resumed", planted, 11)
    clipped = {"options": {"clip_norm": 3.0}}
    lowered = {"options": {"threshold_init": 100.0}}
    jobs: list[Job] = [
        {"do": "choose", "mesh": (2, 2), "out": str(folder / "2x2.choices")},
        job(folder / "2x2-topk", planted, (2, 2), "topk", **clipped),
        job(folder / "2x2-mutual_choice", planted, (2, 2), "mutual_choice"),
        job(folder / "2x2-jumprelu", planted, (2, 2), "jumprelu", **lowered),
        job(folder / "1x4-matching_pursuit", planted, (1, 4), "matching_pursuit"),
        job(folder / "resumed", planted, (1, 4), "mutual_choice"),
    ]
    codes: list[int | None] = start_ranks(4, RANKS, PRELOAD, JOBS=jobs).wait()
    return codes


class Stopped(Exception):
    pass


def stop_after(out: Path, cache: ActivationCache, steps: int) -> None:
    """Go on alone with a run, for some steps."""
    advance = Run.advance

    def until(self: Run, columns: Columns) -> dict[str, float]:
        if self.step == steps:
            raise Stopped
        return advance(self, columns)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Run, "advance", until)
        train(config("mutual_choice"), cache, out=out)


@pytest.fixture(scope="module")
def alone(folder: Path, planted: ActivationCache) -> Callable[..., Path]:
    """Where one process has trained the same."""

    def run(kind: str, **options: Any) -> Path:
        out = folder / "-".join(["alone", kind, *options])
        train(config(kind, **options), planted, out=out)
        return out

    return run


def assert_same(ours: Path, theirs: Path, cache: ActivationCache) -> None:
    """The same SAE, up to roundings, with the same latents on each row, and the same records."""
    sae, other = checkpoint.load(ours), checkpoint.load(theirs)
    for name, tensor in other.tensors().items():
        torch.testing.assert_close(sae.tensors()[name], tensor, **TOLERANCE, msg=name)
    x = next(cache.batches("resid_post.0", 1000))
    assert (sae.encode(x) != 0).equal(other.encode(x) != 0)
    assert sae.provenance is not None and other.provenance is not None
    assert sae.provenance.config == other.provenance.config
    life, others = (load_file(run / "latent_life.safetensors") for run in (ours, theirs))
    for name in others:
        if others[name].is_floating_point():
            torch.testing.assert_close(life[name], others[name], **TOLERANCE, msg=name)
        else:
            assert life[name].equal(others[name]), name
    assert not (ours / "train_state").exists()


@pytest.mark.parametrize("mesh", ["1x2", "2x1"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_the_sae_that_one_trains(
    kind: str,
    mesh: str,
    two: list[int | None],
    alone: Callable[..., Path],
    folder: Path,
    planted: ActivationCache,
) -> None:
    assert_same(folder / f"{mesh}-{kind}", alone(kind), planted)


@pytest.mark.parametrize(
    ("run", "options"),
    [
        ("2x2-topk", {"clip_norm": 3.0}),
        ("2x2-mutual_choice", {}),
        # At which nothing would fire: where thresholds start is found together.
        ("2x2-jumprelu", {"threshold_init": 100.0}),
        ("1x4-matching_pursuit", {}),
    ],
)
def test_four_processes_train_the_sae_that_one_trains(
    run: str,
    options: dict[str, float],
    four: list[int | None],
    alone: Callable[..., Path],
    folder: Path,
    planted: ActivationCache,
) -> None:
    assert four == [0] * 4
    assert_same(folder / run, alone(run.partition("-")[2], **options), planted)


def test_a_run_goes_on_with_any_number_of_processes(
    four: list[int | None], alone: Callable[..., Path], folder: Path, planted: ActivationCache
) -> None:
    """Two take 6 steps, one goes on from the checkpoint behind the 4th to the 11th, and four from
    that behind the 8th to the end."""
    assert_same(folder / "resumed", alone("mutual_choice"), planted)


@pytest.mark.parametrize("mesh", ["1x2", "2x1", "2x2"])
def test_of_equal_entries_those_are_kept_that_come_first(
    mesh: str, two: list[int | None], four: list[int | None], folder: Path
) -> None:
    pre: torch.Tensor = OURS["tied"]()
    for name, mask in load_file(folder / f"{mesh}.choices").items():
        how, _, n = name.partition("-")
        table = pre if how == "row" else pre.flatten()[None]
        kept = torch.zeros_like(table, dtype=torch.uint8)
        for row, entries in enumerate(table.tolist()):
            # A stable sort.
            best = sorted(range(len(entries)), key=lambda i: -entries[i])[: int(n)]
            kept[row, [i for i in best if entries[i] > 0]] = 1
        assert mask.equal(kept.view_as(pre)), (mesh, name)


def test_a_killed_process_costs_nothing_behind_the_last_checkpoint(
    two: list[int | None], alone: Callable[..., Path], folder: Path, planted: ActivationCache
) -> None:
    """Rank 1 is killed in the 11th step; checkpoints are every 4 steps."""
    assert two == [0, -signal.SIGKILL]
    said = (folder / "killed-error-0").read_text()
    assert "rank 0 of 2 lost touch with the others" in said
    assert "with any number of processes" in said
    state = folder / "killed" / "train_state"
    assert sorted(path.name for path in state.iterdir()) == [
        "part-000000008-0-of-2.safetensors",
        "part-000000008-1-of-2.safetensors",
        "state.safetensors",
    ]
    train(config("topk"), planted, out=folder / "killed")
    assert_same(folder / "killed", alone("topk"), planted)


def test_torchrun_starts_the_command_again_from_the_last_checkpoint(
    alone: Callable[..., Path], folder: Path, planted: ActivationCache, tmp_path: Path
) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text(tomli_w.dumps({**config("topk").to_dict(), "cache": planted.url}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", "1", str(RANKS), str(tmp_path / "flag")]
    command += ["train", "topk", str(toml), "--out", str(tmp_path / "run"), "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "flag").exists()
    assert "a topk SAE of 48 latents" in done.stdout
    assert_same(tmp_path / "run", alone("topk"), planted)


def test_a_process_that_stands_still_is_named_and_the_others_end(
    folder: Path, planted: ActivationCache, start_ranks: Start
) -> None:
    still = job(folder / "still", planted, (1, 2), "topk", stand=[1, 6], stall=1.0)
    ranks = start_ranks(2, RANKS, PRELOAD, JOBS=[still])
    ranks.processes[0].join(120)
    assert ranks.processes[0].exitcode == 1
    ranks.kill()
    said = (folder / "still-said-0").read_text()
    assert "rank 0 of 2 has waited 1 s in step 7. Behind it: rank 1 (in step 7)." in said
    assert (folder / "still" / "train_state" / "state.safetensors").exists()


def test_who_has_not_come_as_far_is_named() -> None:
    said = stalled({0: (7, 90), 1: (7, 90), 3: (7, 89)}, rank=0, ranks=4, seconds=600.0)
    assert "Behind it: rank 2 (in no step), rank 3 (in step 7)." in said
    said = stalled({0: (7, 90), 1: (7, 90)}, rank=0, ranks=2, seconds=600.0)
    assert "look at the network" in said


def test_a_slice_of_the_latents_is_drawn_as_one_process_draws_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_base, "DRAWN_AT_ONCE", 16)

    def drawn(mesh: Mesh) -> torch.Tensor:
        torch.manual_seed(5)
        return unit_rows(126, 5, mesh)

    parts = [drawn(Mesh(1, 3, rank)) for rank in range(3)]
    assert torch.cat(parts).equal(drawn(Mesh()))
    assert torch.randn(1) == torch.randn(1, generator=_behind(126 * 5))


def _behind(n: int) -> torch.Generator:
    """The numbers that come after n others."""
    g = torch.Generator().manual_seed(5)
    torch.randn(n, generator=g)
    return g


def test_a_kind_that_cannot_be_shared_out_is_refused_by_name() -> None:
    mesh = Mesh(2, 2)
    gated, topk = _kinds.kind("gated"), _kinds.kind("topk")
    with pytest.raises(ConfigError, match=r"gated cannot be trained by several .* in a sweep"):
        check_mesh(gated, gated.Config(), mesh)
    with pytest.raises(ConfigError, match="revive='resample' looks at the whole SAE"):
        check_mesh(topk, config("topk", revive="resample"), mesh)
    with pytest.raises(ConfigError, match="d_sae=47 is no multiple of the mesh's latent=2"):
        check_mesh(topk, config("topk", d_sae=47), mesh)
    with pytest.raises(ConfigError, match="to batch_size=122 for instance"):
        check_mesh(topk, config("topk", batch_size=121), mesh)
    # Made from BatchTopK, with losses of its own.
    assert "LATENTS" not in vars(_kinds.kind("matryoshka"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("data=2", "is of 2 processes, and there are 4"),
        ("rows=4", "is no mesh"),
        ("data=", "is no"),
    ],
)
def test_a_mesh_of_another_size_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        shape_of(text, 4)


def test_a_mesh_that_is_not_given_shares_latents_on_a_machine_and_rows_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert shape_of("latent=2, data=4", 8) == (4, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert shape_of(None, 8) == (2, 4)
    assert shape_of(None, 6) == (1, 6)
