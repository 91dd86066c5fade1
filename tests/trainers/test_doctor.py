"""Each cause of death is brought about in a run, and has to be found in what the run left."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from saekit import ActivationCache, train
from saekit.errors import CheckpointError, ConfigError, SaekitError
from saekit.sae import SAE
from saekit.trainers import _life
from saekit.trainers._doctor import (
    ALIVE,
    BY_ITSELF,
    CAUSES,
    DEAD,
    DYING,
    NEVER,
    Diagnosis,
    Examination,
    diagnose,
    examine,
    steps_taken,
)
from saekit.trainers._life import pre_activations
from saekit.trainers._run import Columns, Run
from saekit.trainers.topk import TopKConfig, TopKTrainer

Change = Callable[[TopKTrainer], None]

# What is done to which latents, of which there are 96.
BELOW, SHRUNKEN, CROWDED, THROWN, PUSHED, TWINS, LATE, LIFTED = torch.arange(32).split(4)
REST = torch.arange(32, 96)
DONE_TO = {
    "below zero": BELOW,
    "weights shrank": SHRUNKEN,
    "crowded out": CROWDED,
    "thrown out": THROWN,
    "pushed away": PUSHED,
    "duplicate": TWINS,
}


def names(of: Diagnosis, latents: torch.Tensor) -> list[str]:
    return [CAUSES[i].name if i >= 0 else "" for i in of.cause[latents].tolist()]


def fit(
    cache: ActivationCache,
    out: Path,
    *,
    first: Change | None = None,
    each: Change | None = None,
    **options: Any,
) -> SAE:
    """A run of 200 steps, after each of which (and before the first) something may be done to its
    weights."""
    initialise, after_step = TopKTrainer.initialise, TopKTrainer.after_step

    def start(self: TopKTrainer, sample: torch.Tensor) -> None:
        initialise(self, sample)
        if first is not None:
            with torch.no_grad():
                first(self)

    def go_on(self: TopKTrainer) -> None:
        after_step(self)
        if each is not None:
            with torch.no_grad():
                each(self)

    usual: dict[str, Any] = {"d_sae": 96, "k": 3, "n_tokens": 40_000, "batch_size": 200, "lr": 3e-3}
    usual |= {"dead_after": 8_000, "revive": "none", "checkpoint_every": 50, "encoder_norm": 1.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TopKTrainer, "initialise", start)
        patch.setattr(TopKTrainer, "after_step", go_on)
        return train(TopKConfig(**{**usual, **options}), cache, out=out)


def plant_first(model: TopKTrainer) -> None:
    model.b_enc[BELOW] = -100
    model.W_enc[:, SHRUNKEN] *= 0.02
    model.W_enc[:, CROWDED] *= 0.2


def plant_each(model: TopKTrainer) -> None:
    if model.step == 100:
        model.b_enc[THROWN] -= 10
    if model.step >= 40:
        model.b_enc[PUSHED] -= 0.03
    if model.step == 120:
        models = REST[model.dead.fired[REST].topk(4).indices]
        model.W_dec[TWINS] = model.W_dec[models]
        model.W_enc[:, TWINS] = 0.2 * model.W_enc[:, models]
    if model.step == 180:
        model.b_enc[LATE] -= 10
    if model.step == 60:
        model.b_enc[LIFTED] -= 10
    if model.step == 120:
        model.b_enc[LIFTED] += 10


@pytest.fixture(scope="module")
def ill(planted: ActivationCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which all of this is done."""
    run = tmp_path_factory.mktemp("ill") / "run"
    fit(planted, run, first=plant_first, each=plant_each)
    return run


@pytest.mark.parametrize("cause", DONE_TO)
def test_what_was_done_to_a_latent_is_named(cause: str, ill: Path) -> None:
    of = examine(ill).diagnosis
    assert names(of, DONE_TO[cause]) == 4 * [cause]


def test_what_began_short_and_did_not_learn_has_not_shrunk(
    planted: ActivationCache, tmp_path: Path
) -> None:
    def below(model: TopKTrainer) -> None:
        model.b_enc[BELOW] = -100

    fit(planted, tmp_path / "run", first=below, encoder_norm=0.02, lr=2e-2)
    of = examine(tmp_path / "run").diagnosis
    assert of.after["encoder norm"][BELOW].max() < 0.1
    assert names(of, BELOW) == 4 * ["below zero"]


def test_most_other_latents_are_given_no_cause(ill: Path) -> None:
    of = examine(ill).diagnosis
    assert (of.cause[REST] >= 0).float().mean() < 0.1
    assert of.cause[of.state < DEAD].eq(-1).all() and of.cause[of.state >= DEAD].ge(0).all()


def test_a_latent_is_dead_dying_or_never_fired(ill: Path) -> None:
    of = examine(ill).diagnosis
    assert of.state[THROWN].eq(DEAD).all() and of.state[BELOW].eq(NEVER).all()
    assert of.state[LATE].eq(DYING).all()  # silent for 20 of the 40 steps after which it is dead
    assert of.state[REST].eq(ALIVE).float().mean() > 0.5


def test_the_time_of_death_is_known_to_the_step(ill: Path) -> None:
    of = examine(ill).diagnosis
    # The last on whose batch it fired is the 101st, after which it was thrown.
    assert of.last_fired[THROWN].max() == 101 and of.last_fired[THROWN].min() > 95
    assert of.last_fired[LATE].max() == 181
    assert of.last_fired[BELOW].eq(0).all()
    # The window that holds step 101 ends after 106: 17 / 32 of 200 steps, rounded down.
    assert of.fall_step[THROWN].eq(107).all()
    assert of.fall[THROWN].min() > 5


def test_the_evidence_is_of_the_start_of_the_last_life_and_of_the_end(ill: Path) -> None:
    of = examine(ill).diagnosis
    assert of.start["mean"][PUSHED].abs().max() < 0.3 and of.start["top"][PUSHED].min() > 2
    assert of.before["mean"][PUSHED].max() < of.start["mean"][PUSHED].min()
    assert of.after["mean"][PUSHED].max() < of.before["mean"][PUSHED].min()
    assert of.before["top"][THROWN].min() > 1 > -5 > of.after["top"][THROWN].max()
    torch.testing.assert_close(
        of.start["encoder norm"][SHRUNKEN], torch.full((4,), 0.02), rtol=0.2, atol=0
    )
    for (
        name,
        before,
    ) in of.before.items():  # one that never fired has had one life, and no end of it
        assert before[BELOW].equal(of.start[name][BELOW])


def test_the_twin_is_the_living_latent_with_the_closest_row(ill: Path) -> None:
    of = examine(ill).diagnosis
    rows = load_file(ill / "sae.safetensors")["W_dec"]
    for latent in TWINS.tolist():
        cosines = {
            other: float(rows[latent] @ rows[other])
            for other in range(96)
            if of.state[other] == ALIVE
        }
        assert int(of.twin[latent]) == max(cosines, key=lambda other: cosines[other])
        assert float(of.cosine[latent]) == pytest.approx(max(cosines.values()), abs=1e-5)
    assert of.twin[of.state < DEAD].eq(-1).all()


def test_a_latent_that_only_just_does_not_fire_is_named(
    planted: ActivationCache, tmp_path: Path
) -> None:
    """With k = d_sae every latent above 0 fires; half of them are lifted at the very end, until
    the best of a thousand rows is at 0."""
    x = next(planted.batches("resid_post.0", 1000))
    x = x / x.norm(dim=1).mean() * 32**0.5

    def lift(model: TopKTrainer) -> None:
        model.b_enc[:8] = -100
        if model.step == model.cfg.n_steps - 1:
            model.b_enc[:8] -= pre_activations(model.export(), x)["top"][:8]

    options = {"d_sae": 16, "k": 16, "batch_size": 1000, "n_tokens": 50_000, "life_windows": 1}
    fit(planted, tmp_path / "run", first=lift, each=lift, **options)
    of = examine(tmp_path / "run").diagnosis
    assert of.state[:8].eq(NEVER).all()
    assert names(of, torch.arange(16)) == 8 * ["just below"] + 8 * [""]


@pytest.mark.parametrize(
    ("cause", "options"),
    [
        ("thrown out", {"lr": 0.3, "lr_warmup": 0.0, "n_tokens": 24_000}),
        (
            "crowded out",
            {
                "d_sae": 192,
                "lr": 6e-3,
                "batch_size": 100,
                "n_tokens": 25_000,
                "dead_after": 4_000,
            },
        ),
    ],
)
def test_runs_that_go_wrong_by_themselves_are_seen_through(
    cause: str, options: dict[str, Any], planted: ActivationCache, tmp_path: Path
) -> None:
    fit(planted, tmp_path / "run", **options)
    of = examine(tmp_path / "run").diagnosis
    found = names(of, (of.cause >= 0).nonzero().flatten())
    assert len(found) >= 20 and found.count(cause) > 0.7 * len(found)


def test_nothing_depends_on_the_scale_of_activations_or_weights(ill: Path) -> None:
    life = load_file(ill / _life.FILE)
    W_dec = load_file(ill / "sae.safetensors")["W_dec"]
    scaled = {
        **life,
        **{name: 1000 * life[name] for name in ("top", "mean", "spread", "margin")},
        **{name: 7 * life[name] for name in ("enc_norm", "dec_norm")},
    }
    one, other = (diagnose(held, W_dec, 8_000, "none") for held in (life, scaled))
    assert one.cause.equal(other.cause)
    for name in one.after:
        torch.testing.assert_close(one.after[name], other.after[name])


def test_where_no_latent_lives_the_dead_are_still_explained(
    planted: ActivationCache, tmp_path: Path
) -> None:
    def all_at_once(model: TopKTrainer) -> None:
        if model.step == 50:
            model.b_enc[:] -= 100
            model.W_enc[:, :4] = 0  # no spread at all

    fit(planted, tmp_path / "run", each=all_at_once, n_tokens=20_000)
    of = examine(tmp_path / "run").diagnosis
    assert of.state.eq(DEAD).all()
    assert names(of, torch.arange(4)) == 4 * ["weights shrank"]
    assert names(of, torch.arange(96)).count("thrown out") > 80
    for held in (of.start, of.before, of.after):
        assert torch.stack(list(held.values())).isfinite().all()


def push_down(model: TopKTrainer) -> None:
    model.b_enc[:10] = -2


def hold_down(model: TopKTrainer) -> None:
    model.b_enc[BELOW] = -100


def test_latents_that_come_back_by_themselves_are_told_apart(ill: Path) -> None:
    of = examine(ill).diagnosis
    assert of.revivals[BY_ITSELF][LIFTED].all() and not of.revivals["resample"].any()
    assert of.state[LIFTED].eq(ALIVE).all()
    # Dead 40 steps after 61, in the window that ends at 107; back after 121, in that to 125.
    window = {window.step: window for window in of.windows}
    assert window[107].died >= 4 and window[125].revived >= 4


@pytest.mark.parametrize(
    ("policy", "options"),
    [("auxk", {"auxk_coef": 1.0}), ("ghost", {}), ("resample", {"resample_every": 60})],
)
def test_latents_that_a_policy_brought_back_are_told_apart(
    policy: str, options: dict[str, Any], planted: ActivationCache, tmp_path: Path
) -> None:
    options = {**options, "d_sae": 32, "lr": 0.02, "dead_after": 4_000, "n_tokens": 30_000}
    fit(planted, tmp_path / "run", first=push_down, revive=policy, **options)
    found = examine(tmp_path / "run")
    of = found.diagnosis
    assert found.policy == policy
    assert of.revivals[policy][:10].sum() >= 5
    # 60 and 120 lie in the windows that end at 61 and 122.
    replanted = [window.step for window in of.windows if window.replanted]
    assert replanted == ([61, 122] if policy == "resample" else [])


def test_a_latent_with_new_weights_is_given_time(planted: ActivationCache, tmp_path: Path) -> None:
    """Replanted after 59 of 80 steps, and held down all the time: that is 4,200 tokens from the
    end."""
    options: dict[str, Any] = {"revive": "resample", "resample_every": 59, "n_tokens": 16_000}
    fit(planted, tmp_path / "run", first=hold_down, each=hold_down, **options)
    life = load_file(tmp_path / "run" / _life.FILE)
    for dead_after, cause in ((8_000, "just replanted"), (4_000, "below zero")):
        of = diagnose(life, None, dead_after, "resample")
        assert of.state[BELOW].eq(NEVER).all()
        assert names(of, BELOW) == 4 * [cause]


def test_windows_are_counted_as_by_hand() -> None:
    """Five latents over the start and six windows of two steps with ten rows each; dead after 40
    tokens. Latent 0 fires always; 1 dies and comes back; 2 dies, is replanted and comes back; 3
    dies and is replanted in vain; 4 never fires."""
    fired = torch.tensor(
        [
            [0, 0, 0, 0, 0],
            [9, 5, 5, 5, 0],
            [9, 0, 0, 0, 0],
            [9, 0, 0, 0, 0],
            [9, 3, 0, 0, 0],
            [9, 2, 4, 0, 0],
            [9, 2, 2, 0, 0],
        ]
    )
    since = torch.tensor(
        [
            [0, 0, 0, 0, 0],
            [0, 0, 0, 0, 20],
            [0, 20, 20, 20, 40],
            [0, 40, 40, 40, 60],
            [0, 10, 10, 10, 80],
            [0, 0, 10, 30, 100],
            [0, 0, 0, 50, 120],
        ]
    )
    replanted = torch.zeros(7, 5, dtype=torch.bool)
    replanted[4, 2:4] = True
    figure = torch.ones(7, 5)
    life = {
        "step": torch.arange(0, 14, 2),
        "rows": torch.tensor([0, 20, 20, 20, 20, 20, 20]),
        "fired": fired,
        "since": since,
        "replanted": replanted,
        **dict.fromkeys(("top", "mean", "spread", "margin", "enc_norm", "dec_norm"), figure),
    }
    of = diagnose(life, None, 40, "resample")
    assert [tuple(vars(window).values()) for window in of.windows] == [
        (2, 5, 0, 0, 0, 0),
        (4, 4, 1, 1, 0, 0),
        (6, 1, 4, 3, 0, 0),
        (8, 2, 3, 0, 1, 2),
        (10, 3, 2, 0, 1, 0),
        (12, 3, 2, 0, 0, 0),
    ]
    assert of.state.tolist() == [ALIVE, ALIVE, ALIVE, DEAD, NEVER]
    assert of.last_fired.tolist() == [12, 12, 12, 2, 0]
    assert of.revivals[BY_ITSELF].tolist() == [False, True, False, False, False]
    assert of.revivals["resample"].tolist() == [False, False, True, False, False]


def history(fired: list[list[int]], mean: list[list[float]], top: float = 1.0) -> dict[str, Any]:
    """By record and latent, with a thousand rows a window, where nothing else is remarkable."""
    since = torch.zeros(len(fired), len(fired[0]), dtype=torch.int64)
    for i in range(1, len(fired)):
        since[i] = torch.where(torch.tensor(fired[i]) > 0, 0, since[i - 1] + 1000)
    ones = torch.ones(since.shape)
    return {
        "step": torch.arange(len(fired)) * 10,
        "rows": torch.tensor([0, *[1000] * (len(fired) - 1)]),
        "fired": torch.tensor(fired),
        "since": since,
        "replanted": torch.zeros(since.shape, dtype=torch.bool),
        "mean": torch.tensor(mean),
        "top": top * ones,
        "margin": -5 * ones,
        **dict.fromkeys(("spread", "enc_norm", "dec_norm"), ones),
    }


def test_a_latent_that_always_fired_rarely_is_not_dying() -> None:
    """The first would have fired 500 times in the last window, the second twice."""
    of = diagnose(
        history([[0, 0], [500, 2], [500, 2], [0, 0]], 4 * [[0.0, 0.0]]), None, 5_000, None
    )
    assert of.state.tolist() == [DYING, ALIVE]


def test_a_fall_of_the_silent_is_not_what_silenced_them() -> None:
    """Both last fire in the second window; one sinks in it, the other much later."""
    fired = [[0, 0, 0], *2 * [[9, 9, 9]], *8 * [[9, 0, 0]]]
    mean = [[0.0, -5.0 * (i > 1), -5.0 * (i > 6)] for i in range(11)]
    of = diagnose(history(fired, mean), None, 3_000, None)
    assert names(of, torch.arange(3)) == ["", "thrown out", "pushed away"]
    assert of.fall.tolist() == [0, 5, 0] and of.fall_step[1] == 20


@pytest.mark.parametrize(("top", "cause"), [(-1.0, "pushed away"), (1.0, "crowded out")])
def test_where_all_sink_only_those_below_zero_are_pushed_away(top: float, cause: str) -> None:
    """A sparsity penalty lowers the means of the living, too."""
    fired = [[0, 0], *2 * [[9, 9]], *8 * [[9, 0]]]
    life = history(fired, [[-0.5 * i, -0.5 * i] for i in range(11)])
    life["top"][-1, 1] = top
    assert names(diagnose(life, None, 3_000, None), torch.arange(2)) == ["", cause]


def test_a_replanted_latent_is_judged_by_its_new_weights() -> None:
    """Its old ones fell; the new ones were below zero from the first."""
    fired = [[0, 0], *2 * [[9, 9]], *8 * [[9, 0]]]
    life = history(fired, [[0.0, -5.0 * (i > 1)] for i in range(11)], top=-1.0)
    assert names(diagnose(life, None, 3_000, None), torch.tensor([1])) == ["below zero"]
    life["top"][:2] = 1.0
    assert names(diagnose(life, None, 3_000, None), torch.tensor([1])) == ["thrown out"]
    life["replanted"][6, 1] = True
    of = diagnose(life, None, 3_000, None)
    assert names(of, torch.tensor([1])) == ["below zero"]
    assert of.start["mean"][1] == of.before["mean"][1] == -5


class Killed(Exception):
    pass


def kill(cache: ActivationCache, out: Path, after: int, **options: Any) -> None:
    advance = Run.advance

    def until_killed(self: Run, columns: Columns) -> dict[str, float]:
        if self.step == after:
            raise Killed
        return advance(self, columns)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "advance", until_killed)
        fit(cache, out, first=plant_first, each=plant_each, **options)


def test_a_run_in_training_is_read_from_its_last_checkpoint(
    planted: ActivationCache, ill: Path, tmp_path: Path
) -> None:
    kill(planted, tmp_path / "run", 199, checkpoint_every=175)
    assert steps_taken(tmp_path / "run") == 175
    found, whole = examine(tmp_path / "run"), examine(ill)
    assert whole.finished and not found.finished
    assert found.diagnosis.windows == whole.diagnosis.windows[:28]
    assert found.diagnosis.windows[-1].step == 175
    assert names(found.diagnosis, THROWN) == 4 * ["thrown out"]
    assert names(found.diagnosis, TWINS) == 4 * ["duplicate"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "has no checkpoint yet .* its first comes after 50 steps"),
        ({"checkpoint_every": 2, "life_windows": 10}, r"before the end of the first window \(20 s"),
    ],
)
def test_a_run_too_young_to_be_looked_at_says_when(
    options: dict[str, Any], message: str, planted: ActivationCache, tmp_path: Path
) -> None:
    kill(planted, tmp_path / "run", 10, **options)
    with pytest.raises(SaekitError, match=message):
        examine(tmp_path / "run")


def test_a_run_that_keeps_no_history_says_how_to_keep_one(
    planted: ActivationCache, tmp_path: Path
) -> None:
    fit(planted, tmp_path / "run", life_windows=0, n_tokens=400)
    assert not (tmp_path / "run" / _life.FILE).exists()
    with pytest.raises(ConfigError, match="life_windows=0.*train it again with --life-windows 32"):
        examine(tmp_path / "run")


def test_an_sae_from_elsewhere_has_no_history(ill: Path, tmp_path: Path) -> None:
    for name in ("sae.safetensors", "config.json"):
        (tmp_path / name).write_bytes((ill / name).read_bytes())
    with pytest.raises(ConfigError, match="it was not trained by saekit here"):
        examine(tmp_path)
    (tmp_path / "config.toml").write_bytes((ill / "config.toml").read_bytes())
    with pytest.raises(CheckpointError, match="copy it from where the run was trained"):
        examine(tmp_path)


@pytest.mark.parametrize(
    ("options", "policy", "advice"),
    [
        ({"revive": "none"}, "none", "--revive auxk"),
        ({"revive": "auxk"}, "auxk", "--revive resample"),
        ({"revive": "auxk", "auxk_coef": 0.0}, "none", "--revive auxk"),
        ({"revive": "resample"}, "resample", "a smaller --resample-every"),
    ],
)
def test_the_advice_is_a_way_that_the_run_has_not_tried(
    options: dict[str, Any], policy: str, advice: str, ill: Path
) -> None:
    config = TopKConfig(**options)
    found = Examination(examine(ill).diagnosis, config, True)
    assert found.policy == policy
    (below,) = (i for i, cause in enumerate(CAUSES) if cause.name == "below zero")
    assert found.remedy(below).startswith(advice)
    assert not any("{" in found.remedy(i) for i in range(len(CAUSES)))
