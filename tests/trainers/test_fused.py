"""Fused steps beside those of autograd, as the loop takes them."""

import logging
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from saekit import ActivationCache, train
from saekit.errors import ConfigError
from saekit.trainers import _fused
from saekit.trainers._base import Batch, Step
from saekit.trainers._fused import FusedStep
from saekit.trainers._resume_check import check_resume
from saekit.trainers._run import _optimiser
from saekit.trainers._step import EagerStep
from saekit.trainers.batch_topk import BatchTopKTrainer
from saekit.trainers.feature_choice import FeatureChoiceConfig, FeatureChoiceTrainer
from saekit.trainers.gradient_topk import GradientTopKConfig, GradientTopKTrainer
from saekit.trainers.jumprelu import JumpReLUTrainer
from saekit.trainers.mutual_choice import MutualChoiceTrainer
from saekit.trainers.topk import TopKConfig, TopKTrainer
from saekit.trainers.variational import VariationalConfig, VariationalTrainer

INTERPRET = Path(__file__).parents[1] / "kernels" / "_interpret.py"
DEVICE = runpy.run_path(str(INTERPRET))["DEVICE"]
triton_step = pytest.importorskip("saekit.kernels.triton_step")
triton_step_forms = pytest.importorskip("saekit.kernels.triton_step_forms")

BATCH, D_IN = 6, 8

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "topk": (TopKTrainer, {"k": 2}),
    "batch_topk": (BatchTopKTrainer, {"k": 2}),
    "mutual_choice": (MutualChoiceTrainer, {"k": 2, "budget": 13, "density_rate": 0.4}),
    "mutual_choice without zipf": (MutualChoiceTrainer, {"k": 2, "zipf": False}),
    "jumprelu": (JumpReLUTrainer, {"l0_coef": 0.1, "sparsity_warmup": 0.0}),
    "jumprelu to an L0": (JumpReLUTrainer, {"target_l0": 2.0, "bandwidth": 0.3}),
}


@pytest.fixture(autouse=True)
def few_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs one after another."""
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_step, "_RESIDUAL_PARTS", 3)
        monkeypatch.setattr(triton_step, "_ENCODER_PARTS", 2)
        monkeypatch.setattr(
            triton_step, "row_config", lambda *_, **__: triton_step.RowConfig(1, 2, 2)
        )
        monkeypatch.setattr(triton_step_forms, "_LEAST_PLACES", 16)
    # Else the few entries of these batches would be many.
    monkeypatch.setattr(_fused, "DENSE_ABOVE", 1.0)


def made(name: str, fused: bool, **options: Any) -> tuple[Any, torch.optim.Optimizer, Step]:
    kind, own = KINDS[name]
    values: dict[str, Any] = {"d_sae": 14, "batch_size": BATCH, "dead_after": 12, **own}
    cfg = kind.Config(**values | {"precision": "float32", **options})
    torch.manual_seed(3)
    trainer = kind(cfg, D_IN)
    trainer.to_device(DEVICE)
    trainer.initialise(torch.randn(100, D_IN, device=DEVICE))
    with torch.no_grad():
        trainer.b_enc[:3] = -100  # will be dead, and negative everywhere
    optimiser = _optimiser(cfg, list(trainer.parameters()))
    assert optimiser is not None
    if not fused:
        return trainer, optimiser, EagerStep(cfg, trainer, optimiser, DEVICE)
    step = trainer.fused_step(optimiser, DEVICE)
    assert isinstance(step, FusedStep)
    return trainer, optimiser, step


CASES: dict[str, dict[str, Any]] = {
    "auxk": {},
    "auxk with more dead than it uses": {"k_aux": 2},
    "auxk, clipped": {"clip_norm": 2.0},
    "none": {"revive": "none"},
    "adamw": {"optimiser": "adamw", "weight_decay": 0.1, "adam_betas": (0.5, 0.9)},
}


def after_steps(name: str, fused: bool, **options: Any) -> dict[str, Any]:
    """All that a run has after a few steps."""
    trainer, optimiser, step = made(name, fused, **options)
    torch.manual_seed(4)
    losses = []
    for number in range(6):
        trainer.step = number
        x = torch.randn(BATCH, D_IN, device=DEVICE)
        losses.append(step(Batch(x), 1e-2 / (1 + number)))
    step.settle()
    moments = [
        optimiser.state[p][key]
        for p in trainer.parameters()
        for key in ("step", "exp_avg", "exp_avg_sq")
    ]
    return {
        **{f"loss {i} {n}": t for i, one in enumerate(losses) for n, t in one.items()},
        **dict(trainer.state_dict()),
        **{f"moment {i}": t for i, t in enumerate(moments)},
        "clipped": step.clipped,
        "l0": trainer.l0,
        "lr": torch.tensor(optimiser.param_groups[0]["lr"]),
    }


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, rtol=1e-4, atol=1e-5, msg=name)


EACH = [
    *(
        (case, name)
        for case in CASES
        for name in ("topk", "batch_topk", "mutual_choice", "jumprelu")
    ),
    ("auxk, clipped", "mutual_choice without zipf"),
    ("auxk", "jumprelu to an L0"),
]


@pytest.mark.parametrize(("case", "name"), EACH)
def test_fused_steps_are_those_of_autograd_dead_latents_with_them(
    case: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for backend in ("eager", "triton"):
        monkeypatch.setenv("SAEKIT_KERNELS", backend)
        results.append(after_steps(name, backend == "triton", **CASES[case]))
    theirs, ours = results
    same(ours, theirs)
    assert int(theirs["dead.since"].max()) == 6 * BATCH
    if case.startswith("auxk"):
        revival = "aux_zipf" if name == "mutual_choice" else "auxk"
        assert theirs[f"loss 5 {revival}"] > 0
        assert theirs[f"loss 0 {revival}"] == 0
    if "clip_norm" in CASES[case]:
        assert theirs["clipped"] > 0


@pytest.mark.parametrize("name", ["batch_topk", "jumprelu"])
@pytest.mark.parametrize("clip_norm", [None, 2.0])
def test_latents_with_many_entries_are_shared_among_programs(
    name: str, clip_norm: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = triton_step.step_config
    monkeypatch.setattr(triton_step, "step_config", lambda *shape: replace(usual(*shape), heavy=2))
    monkeypatch.setenv("SAEKIT_KERNELS", "eager")
    theirs = after_steps(name, False, clip_norm=clip_norm)
    monkeypatch.setenv("SAEKIT_KERNELS", "triton")
    same(after_steps(name, True, clip_norm=clip_norm), theirs)


def test_a_jumprelu_goes_to_and_fro_between_eager_and_fused_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"l0_coef": 0.1, "threshold_init": 0.5, "bandwidth": 0.2}
    monkeypatch.setenv("SAEKIT_KERNELS", "eager")
    theirs = after_steps("jumprelu", False, **options)
    monkeypatch.setenv("SAEKIT_KERNELS", "triton")
    taken: list[str] = []
    for form, method in ((EagerStep, "__call__"), (triton_step_forms.FusedJumpReLUStep, "take")):
        monkeypatch.setattr(form, method, noting(getattr(form, method), form.__name__, taken))
    for most in (0.25, 0.3, 0.35):
        taken.clear()
        monkeypatch.setattr(_fused, "DENSE_ABOVE", most)
        same(after_steps("jumprelu", True, **options), theirs)
        if len(set(taken)) == 2:
            break
    assert len(set(taken)) == 2, "one of the shares lies between the batches' own"


def noting(call: Any, name: str, into: list[str]) -> Any:
    def noted(*args: Any) -> Any:
        into.append(name)
        return call(*args)

    return noted


def test_a_run_by_fused_steps_is_that_of_the_eager_path(
    planted: ActivationCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = TopKConfig(
        d_sae=24, k=3, n_tokens=30, batch_size=10, precision="float32", lr_warmup=0.0, dead_after=15
    )
    found = []
    for backend in ("eager", "triton"):
        monkeypatch.setenv("SAEKIT_KERNELS", backend)
        with caplog.at_level(logging.INFO, "saekit.trainers._fused"):
            found.append(train(cfg, planted, device=DEVICE))
    assert "fused (Triton)" in caplog.text
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        one, other = (getattr(sae, name) for sae in found)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("topk", {"freeze": "decoder"}, "freeze='decoder'"),
        ("topk", {"revive": "ghost"}, "revive='ghost'"),
        ("jumprelu", {"penalty": "tanh"}, "penalty='tanh'"),
        ("jumprelu", {"pre_act_coef": 1e-6}, "pre_act_coef=1e-06"),
        ("jumprelu", {"economy": True}, "its first steps are eager, and economy is for fused ones"),
    ],
)
def test_what_has_no_fused_step_is_said(
    name: str,
    options: dict[str, Any],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SAEKIT_KERNELS", "triton")
    kind, own = KINDS[name]
    trainer = kind(kind.Config(d_sae=14, batch_size=BATCH, **own, **options), D_IN)
    with caplog.at_level(logging.INFO):
        assert trainer.fused_step(torch.optim.Adam(trainer.parameters()), DEVICE) is None
    assert f"eager ({reason})" in caplog.text


def test_kinds_made_from_topk_keep_their_own_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEKIT_KERNELS", "triton")
    for trainer in (
        FeatureChoiceTrainer(FeatureChoiceConfig(d_sae=14, k=2), D_IN),
        GradientTopKTrainer(GradientTopKConfig(d_sae=14, k=2), D_IN),
        VariationalTrainer(VariationalConfig(d_sae=14, k=2), D_IN),
    ):
        assert trainer.fused_step(torch.optim.Adam(trainer.parameters()), DEVICE) is None


def test_economy_without_fused_steps_is_refused(
    planted: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEKIT_KERNELS", "eager")
    cfg = TopKConfig(d_sae=24, k=3, batch_size=10, economy=True)
    with pytest.raises(ConfigError, match="economy=True is for fused steps, which topk on"):
        train(cfg, planted, device=DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("economy", [False, True])
@pytest.mark.parametrize("revive", ["none", "auxk", "resample"])
@pytest.mark.parametrize("name", KINDS)
def test_a_run_that_is_stopped_ends_in_the_same_bits(
    planted: ActivationCache,
    name: str,
    revive: Any,
    precision: Any,
    economy: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SAEKIT_KERNELS", "triton")
    kind, own = KINDS[name]
    if economy and kind is JumpReLUTrainer:
        pytest.skip("JumpReLU has no economy")
    sizes = {key: type(value)(4) for key, value in own.items() if key in ("k", "target_l0")}
    cfg = kind.Config(
        **own | sizes | ({"budget": 1_000} if "budget" in own else {}),
        d_sae=512,
        batch_size=256,
        revive=revive,
        resample_every=5,
        precision=precision,
        economy=economy,
    )
    assert check_resume(cfg, planted, device="cuda") == []


@pytest.mark.gpu
@pytest.mark.parametrize("economy", [False, True])
@pytest.mark.parametrize("revive", ["none", "auxk", "resample"])
@pytest.mark.parametrize("name", KINDS)
def test_in_bfloat16_a_run_learns_as_well_as_the_eager_path(
    planted: ActivationCache,
    name: str,
    revive: Any,
    economy: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, own = KINDS[name]
    if economy and kind is JumpReLUTrainer:
        pytest.skip("JumpReLU has no economy")
    sizes = {key: type(value)(3) for key, value in own.items() if key in ("k", "target_l0")}
    cfg = kind.Config(
        **own | sizes | ({"budget": 1_500} if "budget" in own else {}),
        d_sae=256,
        n_tokens=100_000,
        batch_size=500,
        lr=3e-3,
        dead_after=5_000,
        revive=revive,
        resample_every=50,
    )
    x = torch.cat([batch for batch in planted.batches("resid_post.0", 1_000)])
    errors = []
    for backend in ("eager", "triton"):
        monkeypatch.setenv("SAEKIT_KERNELS", backend)
        fused = backend == "triton"
        sae = train(replace(cfg, economy=economy and fused), planted, device="cuda")
        monkeypatch.setenv("SAEKIT_KERNELS", "eager")
        errors.append(float((sae(x) - x).square().sum(1).mean()))
    assert errors[1] < 1.1 * errors[0]
