"""Steps with gradients in closed form beside those of autograd, whose losses define them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from saekit.kernels import eager_step
from saekit.trainers._base import Batch
from saekit.trainers._closed import ClosedTopKStep
from saekit.trainers._run import _optimiser
from saekit.trainers._step import EagerStep
from saekit.trainers.topk import TopKConfig, TopKTrainer

BATCH, D_IN, D_SAE = 20, 6, 40


def made(closed: bool, **options: Any) -> tuple[TopKTrainer, torch.optim.Optimizer, EagerStep]:
    """A trainer with latents that are dead, about to die, and never above 0."""
    values = {"precision": "float32", "k": 3, "dead_after": 35, **options}
    cfg = TopKConfig(d_sae=D_SAE, batch_size=BATCH, **values)
    torch.manual_seed(3)
    trainer = TopKTrainer(cfg, D_IN)
    trainer.to_device("cpu")
    trainer.initialise(torch.randn(100, D_IN))
    with torch.no_grad():
        trainer.b_enc[:30] = torch.linspace(-1.5, 0.2, 30)
        trainer.dead.since[:30] = torch.tensor([50, 18, 0]).repeat(10)
    trainer = trainer.double()
    optimiser = _optimiser(cfg, list(trainer.parameters()))
    assert optimiser is not None
    step = trainer.fused_step(optimiser, "cpu") if closed else None
    step = step or EagerStep(cfg, trainer, optimiser, "cpu")
    assert isinstance(step, ClosedTopKStep if closed else EagerStep)
    return trainer, optimiser, step


CASES: dict[str, dict[str, Any]] = {
    "auxk": {},
    "auxk with more dead than it uses": {"k_aux": 4},
    "auxk, clipped": {"clip_norm": 2.0},
    "auxk without weight": {"auxk_coef": 0.0},
    "none": {"revive": "none"},
    "resample": {"revive": "resample"},
    "softly frozen": {"freeze": "soft_decoder:0.9"},
    "adamw": {"optimiser": "adamw", "weight_decay": 0.1, "adam_betas": (0.5, 0.9)},
}


def after_steps(closed: bool, **options: Any) -> dict[str, Tensor]:
    """All that a run has after a few steps."""
    trainer, optimiser, step = made(closed, **options)
    torch.manual_seed(4)
    found: dict[str, Tensor] = {}
    for number in range(4):
        losses = step(Batch(torch.randn(BATCH, D_IN, dtype=torch.float64)), 0.01)
        found |= {f"loss {number} {name}": loss for name, loss in losses.items()}
        found[f"dead {number}"] = trainer.dead.mask.clone()
    for name, p in trainer.named_parameters():
        assert p.grad is not None
        found |= {f"{name} {key}": t for key, t in optimiser.state[p].items()}
        found[f"{name} grad"] = p.grad
    return found | trainer.state_dict() | {"clipped": step.clipped, "l0": trainer.l0}


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_closed_steps_are_those_of_autograd(
    case: str, parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if parts:
        for name, entries in (("ENTRIES", 7 * D_SAE), ("DEAD", 100), ("LATENTS", 16)):
            monkeypatch.setattr(eager_step, f"_{name}_AT_ONCE", entries)
    theirs, ours = (after_steps(closed, **CASES[case]) for closed in (False, True))
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        # float64 on both sides: what is left is the order of summation, and Adam's share of it.
        torch.testing.assert_close(ours[name], wanted, rtol=1e-6, atol=1e-8, msg=name)
        assert ours[name].stride() == wanted.stride(), name
    # Some die only once their batch is counted, and some come back in it.
    dead = torch.stack([theirs[f"dead {number}"] for number in range(4)]).int().diff(dim=0)
    assert dead.max() == 1 and dead.min() == -1
    if "clip_norm" in CASES[case]:
        assert theirs["clipped"] > 0


def test_few_are_dead_or_none() -> None:
    losses = []
    for closed in (False, True):
        trainer, _, step = made(closed, dead_after=10_000)
        x = torch.randn(
            BATCH, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        assert step(Batch(x), 0.01)["auxk"] == 0
        trainer.dead.since[0] = 20_000
        losses.append(step(Batch(x), 0.01)["auxk"])
    assert losses[0] > 0
    torch.testing.assert_close(losses[1], losses[0])


def test_a_latent_that_is_no_number_is_seen_in_the_loss() -> None:
    for sign in (1.0, -1.0):
        trainer, _, step = made(closed=True)
        with torch.no_grad():
            trainer.b_enc[30] = torch.copysign(torch.tensor(torch.nan), torch.tensor(sign))
        losses = step(Batch(torch.randn(BATCH, D_IN, dtype=torch.float64)), 0.01)
        assert losses["mse"].isnan()


def test_in_bfloat16_the_steps_are_those_of_autograd_but_for_its_rounding() -> None:
    grads = []
    for closed in (False, True):
        trainer, _, step = made(closed)
        trainer = trainer.float()
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16):
            step._differentiate(Batch(torch.randn(BATCH, D_IN)))
        grads.append({name: p.grad for name, p in trainer.named_parameters()})
    for name, wanted in grads[0].items():
        ours = grads[1][name]
        assert ours is not None and wanted is not None and ours.dtype == torch.float32
        assert (ours - wanted).norm() < 0.02 * wanted.norm(), name
        assert not ours.equal(wanted)


@pytest.mark.parametrize(
    "options", [{"freeze": "decoder"}, {"freeze": "encoder"}, {"revive": "ghost"}]
)
def test_what_has_no_closed_form_takes_autograd(options: dict[str, str]) -> None:
    cfg = TopKConfig(d_sae=8, k=2, **options)  # type: ignore[arg-type]
    trainer = TopKTrainer(cfg, 4)
    assert trainer.fused_step(torch.optim.Adam(trainer.parameters()), "cpu") is None


def test_the_definitions_take_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = TopKTrainer(TopKConfig(d_sae=8, k=2), 4)
    monkeypatch.setenv("SAEKIT_KERNELS", "reference")
    assert trainer.fused_step(torch.optim.Adam(trainer.parameters()), "cpu") is None
