"""The command line on the tiny model: what it does, what it says, and its exit codes."""

import json
import shlex
import shutil
import sys
import uuid
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import saekit.commands
from saekit import ActivationCache, checkpoint, cli
from saekit.activations_cache import plan
from saekit.activations_cache.shuffle import shuffle
from saekit.cli import main
from saekit.commands import inspect
from saekit.errors import SaekitError
from saekit.trainers._doctor import CAUSES, DEAD, STATES, examine
from saekit.trainers._run import Columns, Run


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    try:
        code = main([str(arg) for arg in argv])
    except SystemExit as stopped:  # argparse and tyro end a wrong call so
        code = stopped.code if isinstance(stopped.code, int) else 1
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_harvest_train_evaluate_and_report_by_command(
    tiny_lm: Path, corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, sae = tmp_path / "c", tmp_path / "r"
    harvest = ["harvest", "--model", tiny_lm, "--dataset", corpus_file, "--context", 24]
    harvest += ["--hooks", "resid_post.0", "mlp_out.1", "--n-tokens", 900, "--holdout", 0.25]
    code, out, _ = run(capsys, *harvest, "--out", cache)
    assert code == 0 and "900 rows at resid_post.0 (16), mlp_out.1 (16)" in out
    assert run(capsys, "verify", cache)[0] == 0

    train = ["train", "topk", "--cache", cache, "--d-sae", 32, "--k", 4, "--n-tokens", 2_000]
    train += ["--batch-size", 100, "--hook", "resid_post.0", "--out", sae]
    assert run(capsys, *train)[0] == 0
    assert checkpoint.load(sae).d_sae == 32

    code, out, _ = run(capsys, "eval", "core", "--sae", sae)
    assert code == 0 and "ce_recovered_zero" in out
    assert "ev" in json.loads((sae / "results" / "core.json").read_text())["metrics"]
    assert run(capsys, "eval", "examples", "--sae", sae)[0] == 0
    code, out, _ = run(capsys, "report", sae)
    assert code == 0 and (sae / "report.html").exists() and (sae / "report.md").exists()
    code, out, _ = run(capsys, "inspect", sae)
    assert code == 0 and "resid_post.0" in out
    # A run's own config, given back, is the same run; a flag on top of it wins.
    again = ["train", "topk", sae / "config.toml", "--seed", 1, "--out", tmp_path / "again"]
    code, _, err = run(capsys, *again)
    assert code == 0, err
    provenance = checkpoint.load(tmp_path / "again").provenance
    assert provenance is not None
    assert provenance.config["seed"] == 1 and provenance.config["d_sae"] == 32


def test_train_harvests_where_no_cache_is_given(
    tiny_lm: Path, corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["train", "topk", "--model", tiny_lm, "--dataset", corpus_file, "--hook", "attn_z.0"]
    args += ["--harvest-tokens", 900, "--d-sae", 32, "--k", 2]
    args += ["--n-tokens", 1_000, "--batch-size", 100, "--out", tmp_path / "r"]
    assert run(capsys, *args)[0] == 0
    assert ActivationCache.open(tmp_path / "r-cache").hooks == {"attn_z.0": 16}


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A folder of its own that is no path; what is fetched from it goes into the test's folder."""
    monkeypatch.setenv("SAEKIT_CACHE_DIR", str(tmp_path / "fetched"))
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def copy(tiny_cache: ActivationCache, tmp_path: Path) -> Path:
    """The tiny cache, to be damaged."""
    return shutil.copytree(tiny_cache.path, tmp_path / "copy")


def cells(table: str) -> dict[str, list[str]]:
    """The rows of the tables in a text, by their first cell."""
    rows = [line.strip("│").split("│") for line in table.splitlines() if line.startswith("│")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def damage(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def harvest_flags(of: ActivationCache, *hooks: str, n_tokens: int = 300) -> list[str]:
    """A smaller harvest of the model and the text that a cache is of."""
    config = of.manifest.config
    flags = ["--model", config["model"], "--dataset", config["dataset"], "--context", "24"]
    hooks = hooks or ("resid_post.0",)
    return [*flags, "--batch-size", "4", "--hooks", *hooks, "--n-tokens", str(n_tokens)]


def test_a_file_among_the_commands_is_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = '"""Say hello."""\n\ndef run(argv):\n    print("hello", *argv)\n'
    (tmp_path / "greet.py").write_text(source)
    (tmp_path / "_machinery.py").write_text("")
    monkeypatch.setattr(saekit.commands, "__path__", [str(tmp_path)])
    try:
        assert cli.commands() == {"greet": "say hello"}
        assert run(capsys, "greet", "you") == (0, "hello you\n", "")
    finally:
        sys.modules.pop("saekit.commands.greet", None)


@pytest.mark.parametrize("command", cli.commands())
def test_every_command_says_what_it_takes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and f"usage: saekit {command}" in out


def test_train_on_a_shuffled_cache_and_evaluate_on_the_one_that_it_was_made_from(
    tiny_cache: ActivationCache,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    mixed, twice, sae = tmp_path / "mixed", tmp_path / "twice", tmp_path / "r"
    code, out, err = run(capsys, "shuffle", tiny_cache.path, "--out", mixed, "--seed", 3)
    assert code == 0, err
    assert "900 rows in random order" in out
    assert f"Next: saekit train topk --cache {mixed} --hook resid_post.0" in out
    assert ActivationCache.open(mixed).shuffled
    assert run(capsys, "shuffle", mixed, "--out", twice)[0] == 0

    train = ["train", "topk", "--cache", twice, "--d-sae", 32, "--k", 4, "--n-tokens", 2_000]
    train += ["--batch-size", 100, "--hook", "resid_post.0", "--out", sae]
    code, _, err = run(capsys, *train)
    assert code == 0, err
    with caplog.at_level("INFO", "saekit"):
        code, out, err = run(capsys, "eval", "core", "--sae", sae, "--max-rows", 100)
    assert code == 0, err
    (line,) = [line for line in caplog.messages if "evaluating on" in line]
    assert line.startswith(f"{twice} is shuffled: evaluating on {tiny_cache.url}, ")
    result = json.loads((sae / "results" / "core.json").read_text())
    assert result["cache_fingerprint"] == tiny_cache.fingerprint


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "another"])
def test_an_evaluation_needs_the_very_cache_that_was_shuffled(
    gone: bool,
    tiny_cache: ActivationCache,
    copy: Path,
    tiny_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mixed, sae = tmp_path / "mixed", tmp_path / "sae"
    shuffle(ActivationCache.open(copy), mixed)
    shutil.copytree(tiny_run, sae)
    (sae / "config.toml").write_text(f'cache = "{mixed}"\n')
    shutil.rmtree(copy)
    if not gone:
        assert run(capsys, "harvest", *harvest_flags(tiny_cache), "--out", copy)[0] == 0
    code, _, err = run(capsys, "eval", "core", "--sae", sae)
    assert code == 1 and "--cache CACHE" in err
    assert ("cannot be opened" if gone else "is not the cache any more") in err


def test_shuffle_keeps_to_the_memory_that_it_is_given(
    tiny_cache: ActivationCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["shuffle", tiny_cache.path, "--out", tmp_path / "m"]
    assert run(capsys, *args, "--memory-mib", 0.1)[0] == 0
    assert len(ActivationCache.open(tmp_path / "m").manifest.shards) > 1
    code, _, err = run(capsys, *args, "--memory-mib", 0.0001)
    assert code == 2 and "memory_mib=0.0001 is too little" in err


@pytest.mark.parametrize("shuffled", [False, True], ids=["harvested", "shuffled"])
def test_verify_lists_what_is_wrong_and_repairs_it(
    shuffled: bool, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy
    if shuffled:
        folder = tmp_path / "mixed"
        shuffle(ActivationCache.open(copy), folder, memory_mib=0.1)
    shards = sorted(folder.glob("*.safetensors"))
    whole = f"{folder}: {len(shards)} shards and 900 rows are whole\n"
    assert run(capsys, "verify", folder) == (0, whole, "")

    before = [shard.read_bytes() for shard in shards]
    damage(shards[0])
    shards[1].unlink()
    code, out, err = run(capsys, "verify", folder)
    assert code == 1
    assert "what is wrong" in out and all(shard.name in out for shard in shards[:2])
    assert "are whole" not in out
    assert f"in 2 of its files: `saekit verify {folder} --repair`" in err

    code, out, err = run(capsys, "verify", folder, "--repair")
    assert code == 0, err
    assert "what was wrong" in out and all(shard.name in out for shard in shards[:2])
    assert out.endswith(whole)
    assert [shard.read_bytes() for shard in shards] == before
    assert run(capsys, "verify", folder) == (0, whole, "")


def test_the_processes_of_torchrun_share_a_harvest(
    tiny_cache: ActivationCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["harvest", *harvest_flags(tiny_cache), "--out", tmp_path / "c"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code, out, err = run(capsys, *args)
    assert code == 0, err
    assert "the share of rank 0 of 2" in out and "Next" not in out
    monkeypatch.setenv("RANK", "1")
    code, out, err = run(capsys, *args)
    assert code == 0, err
    assert "300 rows at resid_post.0 (16)" in out and "Next" in out
    assert ActivationCache.open(tmp_path / "c").manifest.ranks == 2


@pytest.mark.parametrize(
    "command",
    [
        ["report", "run"],
        ["features", "explain", "run"],
        ["features", "export", "run"],
        ["eval", "all", "--sae", "run"],
        ["demo"],
    ],
)
def test_what_cannot_be_shared_is_refused_to_the_processes_of_torchrun(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    code, _, err = run(capsys, *command)
    name = " ".join(command[: 1 + (command[0] in ("features", "eval"))])
    assert code == 2
    assert f"'saekit {name}' runs in one process, and there are 2: start it without tor" in err
    assert "Several share the work of: harvest, train, features build, eval core" in err


def test_several_processes_do_not_harvest_for_a_feature_store(
    tiny_cache: ActivationCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code, _, err = run(capsys, "features", "build", tmp_path, "--dataset", "demo")
    assert code == 2 and "2 processes build from a cache that is there: leave out --dataset" in err


def test_the_processes_of_torchrun_take_the_runs_of_a_sweep_in_turn(
    tiny_cache: ActivationCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(
        f'cache = "{tiny_cache.url}"\nhook = "resid_post.0"\nd_sae = 24\nn_tokens = 400\n'
        "batch_size = 100\n[[run]]\nkind = 'topk'\nk = [2, 3, 4]\n"
    )
    assert run(capsys, "train", sweep, "--out", tmp_path / "one")[0] == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, runs in (("0", ["topk-k2", "topk-k4"]), ("1", ["topk-k2", "topk-k3", "topk-k4"])):
        monkeypatch.setenv("RANK", rank)
        code, _, err = run(capsys, "train", sweep, "--out", tmp_path / "two")
        assert code == 0, err
        assert sorted(path.name for path in (tmp_path / "two").iterdir()) == runs
    for name in runs:
        one, two = (checkpoint.load(tmp_path / where / name) for where in ("one", "two"))
        assert checkpoint.fingerprint(one) == checkpoint.fingerprint(two)
    monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.setenv("RANK", "3")
    code, out, _ = run(capsys, "train", sweep, "--out", tmp_path / "five")
    assert code == 0 and "rank 3 of 5 has no run to train" in out
    assert not (tmp_path / "five").exists()


def test_torchrun_is_told_why_a_process_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = tmp_path / "error.json"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(told))
    code, _, err = run(capsys, "report", tmp_path)
    assert code == 2 and err.startswith("saekit (rank 1): 'saekit report' runs in one process")
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=code, error_file=str(told))
    assert failure.timestamp > 0
    # What torchrun prints last.
    assert err.strip() in str(ChildFailedError("saekit", {1: failure}))
    # Of a disk with no room, say: what is printed still is.
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "error.json"))
    assert run(capsys, "report", tmp_path) == (2, "", err)


@pytest.mark.parametrize(("rank", "ranks"), [("2", "2"), ("1", None), ("0", "0"), ("x", "2")])
def test_a_process_number_that_cannot_be_is_refused(
    rank: str,
    ranks: str | None,
    tiny_cache: ActivationCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("WORLD_SIZE", ranks)
    args = ["harvest", *harvest_flags(tiny_cache), "--out", tmp_path / "c"]
    code, _, err = run(capsys, *args)
    assert code == 2 and f"RANK={rank} and WORLD_SIZE={ranks or 1}" in err
    assert not (tmp_path / "c").exists()


def test_plan_says_what_a_harvest_will_take(
    tiny_cache: ActivationCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*harvest_flags(tiny_cache, n_tokens=1_000), "--dtype", "float32", "--shard-mib", 0.01]
    args = ["plan", *flags, "--memory-mib", 0.05, "--seconds", 0.1, "--out", tmp_path / "c"]
    code, out, err = run(capsys, *args)
    assert code == 0, err
    said = {name: value for name, (value,) in cells(out).items()}
    assert said["rows"] == "1,000 at most"
    assert said["disk: resid_post.0"] == "64.0 kB"  # 16 numbers of 4 bytes, a thousand times
    assert said["disk: token"] == "13.0 kB"
    assert said["disk: all"] == "77.0 kB"
    assert said["disk: free"] != "unknown"
    assert {"memory: rows on their way", "memory: device", "time"} <= said.keys()
    assert said["speed"].endswith(" tokens/s")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(("free", "code", "word"), [(None, 0, "unknown"), (10, 1, "10 bytes")])
def test_plan_refuses_what_will_not_fit_and_only_that(
    free: int | None,
    code: int,
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    planned = plan.Plan(rows=9, disk={"h": 99}, free=free, host=1, device=1, tokens_per_s=1.0)
    monkeypatch.setattr(plan, "plan", lambda *args, **options: planned)
    actual, out, err = run(capsys, "plan", "--out", "c")
    assert actual == code and word in out
    assert ("does not fit on the disk" in err) == (code == 1)


def test_a_url_is_as_good_as_a_folder(
    url: str, tiny_cache: ActivationCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, mixed, sae = f"{url}/c", f"{url}/m", tmp_path / "r"
    flags = harvest_flags(tiny_cache)
    code, out, err = run(capsys, "plan", *flags, "--seconds", 0.1, "--out", cache)
    assert code == 0 and "unknown" in out, err
    code, out, err = run(capsys, "harvest", *flags, "--holdout", 0.25, "--out", cache)
    assert code == 0 and f"--cache {cache} " in out, err
    assert run(capsys, "shuffle", cache, "--out", mixed)[0] == 0
    assert run(capsys, "verify", mixed)[0] == 0
    code, out, _ = run(capsys, "inspect", mixed)
    assert code == 0 and "300 (complete)" in out and cache in out
    train = ["train", "topk", "--cache", mixed, "--d-sae", 32, "--k", 4, "--n-tokens", 500]
    code, _, err = run(capsys, *train, "--batch-size", 50, "--out", sae)
    assert code == 0, err
    code, _, err = run(capsys, "eval", "examples", "--sae", sae)
    assert code == 0, err
    code, _, err = run(capsys, "eval", "core", "--sae", sae, "--cache", cache)
    assert code == 0, err
    code, _, err = run(capsys, "inspect", f"{url}/nothing")
    assert code == 1 and "is no activation cache" in err


def test_inspect_says_what_a_cache_holds(
    tiny_cache: ActivationCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*harvest_flags(tiny_cache, "resid_post.0", "attn_z.1"), "--dtype", "int8"]
    assert run(capsys, "harvest", *flags, "--out", tmp_path / "c")[0] == 0
    cache = ActivationCache.open(tmp_path / "c")
    code, out, _ = run(capsys, "inspect", tmp_path / "c")
    assert code == 0
    assert "300 (complete)" in out and "int8" in out and "shuffled" not in out
    marked = cells(out)["special"]
    assert marked == [f"{cache.manifest.marked['special']:,}"]
    assert cells(out)["padding dropped"] == [f"{cache.manifest.n_padding:,}"]
    stats = cache.stats("attn_z.1")
    assert stats.rounding_error is not None
    assert cells(out)["attn_z.1"] == [
        "16",
        f"{stats.mean_norm:.4g}",
        f"{stats.covariance_trace:.4g}",
        f"{stats.rounding_error:.2g}",
    ]


def test_inspect_says_of_a_shuffled_cache_how_it_was_made(
    tiny_cache: ActivationCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shuffle(tiny_cache, tmp_path / "m", seed=5)
    code, out, _ = run(capsys, "inspect", tmp_path / "m")
    assert code == 0
    assert cells(out)["source_fingerprint"] == [tiny_cache.fingerprint]
    assert cells(out)["seed"] == ["5"]
    # Of bfloat16 the error is not measured.
    assert cells(out)["resid_post.0"][-1] == "-"


def test_inspect_lists_the_modules_that_can_be_harvested(
    tiny_lm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "inspect", tiny_lm, "--modules")
    assert code == 0, err
    listed = cells(out)
    assert listed["transformer.h.1.mlp.c_fc"] == ["64"]
    assert listed["transformer.h.0.attn"] == ["16"]  # gives several things, the first of them
    assert "transformer.h" not in listed  # a list of modules, which never runs
    assert "transformer" not in run(capsys, "inspect", tiny_lm)[1]


def test_inspect_lists_a_models_hook_points_with_widths(
    tiny_lm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "inspect", tiny_lm)
    assert code == 0
    for name in ("embed", "resid_pre.0", "attn_z.1", "mlp_hidden.1", "resid_post.1"):
        assert name in out


def train_badly(
    cache: ActivationCache, out: Path, capsys: pytest.CaptureFixture[str], *more: object
) -> Path:
    """Eighty steps at a learning rate that kills most latents at once."""
    args = ["train", "topk", "--cache", cache.path, "--hook", "resid_post.0", "--revive", "none"]
    args += ["--d-sae", 64, "--k", 4, "--n-tokens", 4_000, "--batch-size", 50, "--lr", 0.3]
    args += ["--lr-warmup", 0, "--dead-after", 1_000, "--checkpoint-every", 20, *more]
    assert run(capsys, *args, "--out", out)[0] == 0
    return out


def test_inspect_says_which_latents_died_and_why(
    tiny_cache: ActivationCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae = train_badly(tiny_cache, tmp_path / "r", capsys)
    code, out, err = run(capsys, "inspect", sae, "--dead")
    assert code == 0, err
    of = examine(sae).diagnosis
    listed = cells(out)
    for i, state in enumerate(STATES):
        assert listed[state][0].split()[0] == str(int((of.state == i).sum()))
    assert int((of.state == DEAD).sum()) >= 10
    last = of.windows[-1]
    assert listed["80"] == [str(n) for n in list(vars(last).values())[1:]]
    assert listed["revive"] == ["none"]
    (thrown,) = (i for i, cause in enumerate(CAUSES) if cause.name == "thrown out")
    example = str(int(of.of(thrown)[0]))
    rows = [line for line in out.splitlines() if line.startswith("│ thrown out")]
    assert f"{len(of.of(thrown))} (" in rows[0] and example in rows[0]  # of the causes
    assert f"{float(of.before['margin'][of.of(thrown)].median()):.3g}" in rows[1]  # of the evidence
    assert "thrown out: its mean pre-activation sank" in out and "Try a lower --lr" in out


def test_inspect_reads_a_run_in_training(
    tiny_cache: ActivationCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    advance = Run.advance

    def until_killed(self: Run, columns: Columns) -> dict[str, float]:
        if self.step == 70:
            raise SaekitError("killed")
        return advance(self, columns)

    monkeypatch.setattr(Run, "advance", until_killed)
    with pytest.raises(AssertionError):
        train_badly(tiny_cache, tmp_path / "r", capsys)
    code, out, err = run(capsys, "inspect", tmp_path / "r")
    assert code == 0, err
    assert cells(out)["state"] == ["not finished: 60 steps at the last checkpoint"]
    assert cells(out)["hook"] == ["resid_post.0"]
    code, out, err = run(capsys, "inspect", tmp_path / "r", "--dead")
    assert code == 0, err
    assert "is not finished" in out and "60" in cells(out) and "80" not in cells(out)


def test_inspect_says_where_no_latent_is_dead(
    tiny_cache: ActivationCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--k", 64, "--dead-after", 5_000, "--lr", 0.001]
    sae = train_badly(tiny_cache, tmp_path / "r", capsys, *more)
    code, out, err = run(capsys, "inspect", sae, "--dead")
    assert code == 0, err
    assert "No latent is dead." in out and "likely cause" not in out
    assert "4,000 tokens were seen, and a latent is dead after 5,000 without firing" in out


def test_inspect_refuses_to_look_for_the_dead_where_there_are_none(
    tiny_cache: ActivationCache,
    tiny_lm: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sae = train_badly(tiny_cache, tmp_path / "r", capsys, "--life-windows", 0)
    for what, message in {
        tiny_cache.path: f"{tiny_cache.path} is a cache",
        tiny_lm: f"{tiny_lm} is no run's folder; a model has no latents",
        "demo": "demo is no run's folder",
        sae: "--life-windows 32",
    }.items():
        code, _, err = run(capsys, "inspect", what, "--dead")
        assert code == 2 and message in err


# {cache} holds three hooks of the tiny model, {tmp} an unknown key in run.toml and a folder of
# somebody's own.
TRAIN = "train topk --cache {cache} --hook resid_post.0"
WRONG = {
    "no command": ("", 2, "COMMAND"),
    "unknown command": ("harvets", 2, "invalid choice"),
    "unknown flag": (f"{TRAIN} --out r --kk 3", 2, "--kk"),
    "unknown kind": ("train topp --out r", 2, "did you mean 'topk'?"),
    "unknown eval": ("eval cor --sae r", 2, "did you mean 'core'?"),
    "unknown key": ("train topk {tmp}/run.toml --out r", 2, "did you mean 'd_sae'?"),
    "k > d_sae": (f"{TRAIN} --out r --d-sae 8 --k 9", 2, "k=9 must lie in 1..d_sae=8"),
    "folder exists": (f"{TRAIN} --out {{tmp}}/thesis", 2, "exists and is no run of saekit"),
    "no cache": ("train topk --cache gone --out r", 1, "is no activation cache"),
    "hook not in cache": (
        "train topk --cache {cache} --hook mlp_out.0 --out r",
        1,
        "has no activations at 'mlp_out.0'",
    ),
    "several hooks": ("train topk --cache {cache} --out r", 2, "say which with --hook"),
    "no sae": ("eval core --sae {tmp}", 1, "holds no finished SAE"),
    "no run": ("report gone", 1, "is no run"),
    "no model": ("inspect /no/such/model", 1, "cannot be loaded"),
}


@pytest.mark.parametrize("call", WRONG)
def test_a_wrong_call_says_what_is_wrong_and_leaves_nothing_behind(
    call: str,
    tiny_cache: ActivationCache,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "run.toml").write_text("d_sea = 64\n")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    line, code, message = WRONG[call]
    argv = shlex.split(line.format(cache=tiny_cache.path, tmp=tmp_path))
    actual, _, err = run(capsys, *argv)
    assert message in err
    assert actual == code
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(SaekitError):
        main(["eval", "core", "--sae", str(tmp_path), "--debug"])


def test_an_unforeseen_error_is_named_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(argv: list[str]) -> None:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(inspect, "run", broken)
    code, _, err = run(capsys, "inspect", "x")
    assert code == 1 and "ZeroDivisionError: of all things" in err and "--debug" in err


def test_interruption_says_that_the_same_command_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(argv: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "run", interrupted)
    code, _, err = run(capsys, "inspect", "x")
    assert code == 130 and "the same command goes on" in err
