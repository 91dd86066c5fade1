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
from saekit.trainers._base import Batch, Step
from saekit.trainers._fused import FusedStep
from saekit.trainers._resume_check import check_resume
from saekit.trainers._run import _optimiser
from saekit.trainers._step import EagerStep
from saekit.trainers.batch_topk import BatchTopKConfig, BatchTopKTrainer
from saekit.trainers.gradient_topk import GradientTopKConfig, GradientTopKTrainer
from saekit.trainers.topk import TopKConfig, TopKTrainer
from saekit.trainers.variational import VariationalConfig, VariationalTrainer

INTERPRET = Path(__file__).parents[1] / "kernels" / "_interpret.py"
DEVICE = runpy.run_path(str(INTERPRET))["DEVICE"]
triton_step = pytest.importorskip("saekit.kernels.triton_step")

BATCH, D_IN = 6, 8


@pytest.fixture(autouse=True)
def few_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs one after another."""
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_step, "_RESIDUAL_PARTS", 3)
        monkeypatch.setattr(triton_step, "_ENCODER_PARTS", 2)
        monkeypatch.setattr(triton_step, "row_config", lambda _: triton_step.RowConfig(1, 2, 2))


def made(
    kind: Any, fused: bool, **options: Any
) -> tuple[TopKTrainer | BatchTopKTrainer, torch.optim.Optimizer, Step]:
    values: dict[str, Any] = {"d_sae": 14, "k": 2, "batch_size": BATCH, "dead_after": 12}
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


@pytest.mark.parametrize("kind", [TopKTrainer, BatchTopKTrainer])
@pytest.mark.parametrize("case", CASES)
def test_fused_steps_are_those_of_autograd_dead_latents_with_them(
    case: str, kind: type[TopKTrainer | BatchTopKTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    batches = [torch.randn(BATCH, D_IN, device=DEVICE) for _ in range(5)]
    for fused in (False, True):
        monkeypatch.setenv("SAEKIT_KERNELS", "triton" if fused else "eager")
        trainer, optimiser, step = made(kind, fused, **CASES[case])
        losses = []
        for number, x in enumerate(batches):
            losses.append(step(Batch(x), 1e-2 / (1 + number)))
        step.settle()
        moments = [
            optimiser.state[p][key]
            for p in trainer.parameters()
            for key in ("step", "exp_avg", "exp_avg_sq")
        ]
        results.append(
            {
                **{f"loss {i} {n}": t for i, one in enumerate(losses) for n, t in one.items()},
                **dict(trainer.state_dict()),
                **{f"moment {i}": t for i, t in enumerate(moments)},
                "clipped": step.clipped,
                "l0": trainer.l0,
                "lr": torch.tensor(optimiser.param_groups[0]["lr"]),
            }
        )
    theirs, ours = results
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, rtol=1e-4, atol=1e-5, msg=name)
    assert int(theirs["dead.since"].max()) == 5 * BATCH
    if case.startswith("auxk"):
        assert theirs["loss 4 auxk"] > 0
        assert theirs["loss 0 auxk"] == 0
    if "clip_norm" in CASES[case]:
        assert theirs["clipped"] > 0


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
    ("options", "reason"),
    [({"freeze": "decoder"}, "freeze='decoder'"), ({"revive": "ghost"}, "revive='ghost'")],
)
def test_what_has_no_fused_step_is_said(
    options: dict[str, Any],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SAEKIT_KERNELS", "triton")
    cfg = TopKConfig(d_sae=14, k=2, batch_size=BATCH, **options)
    trainer = TopKTrainer(cfg, D_IN)
    with caplog.at_level(logging.INFO):
        assert trainer.fused_step(torch.optim.Adam(trainer.parameters()), DEVICE) is None
    assert f"eager ({reason})" in caplog.text


def test_kinds_made_from_topk_keep_their_own_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEKIT_KERNELS", "triton")
    for trainer in (
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
@pytest.mark.parametrize("config", [TopKConfig, BatchTopKConfig])
def test_a_run_that_is_stopped_ends_in_the_same_bits(
    planted: ActivationCache,
    config: type[TopKConfig | BatchTopKConfig],
    revive: Any,
    precision: Any,
    economy: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SAEKIT_KERNELS", "triton")
    cfg = config(
        d_sae=512,
        k=4,
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
@pytest.mark.parametrize("config", [TopKConfig, BatchTopKConfig])
def test_in_bfloat16_a_run_learns_as_well_as_the_eager_path(
    planted: ActivationCache,
    config: type[TopKConfig | BatchTopKConfig],
    revive: Any,
    economy: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = config(
        d_sae=256,
        k=3,
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
