"""The loop: several SAEs at once, what stops a run, what is written, and the options that every
kind has. The contract of the kinds themselves is in `test_common.py`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from saekit import ActivationCache, train
from saekit.errors import ConfigError
from saekit.sae import SAE
from saekit.trainers import Callback, RunSpec, coefficient, train_many
from saekit.trainers._base import Batch, Trainer, keep_near
from saekit.trainers._log import FILE as LOG
from saekit.trainers._precision import multiplying_in
from saekit.trainers._run import Columns, Diverged, Run
from saekit.trainers.topk import TopKConfig, TopKTrainer


def config(**options: object) -> TopKConfig:
    sizes = {"d_sae": 64, "k": 3, "n_tokens": 8_000, "batch_size": 200, "checkpoint_every": 15}
    return TopKConfig(**{**sizes, **options})  # type: ignore[arg-type]


def same(a: SAE, b: SAE) -> bool:
    return all(tensor.equal(b.tensors()[name]) for name, tensor in a.tensors().items())


def log_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / LOG).read_text().splitlines()]


SEVERAL = (
    config(),
    config(k=5, seed=1),
    config(d_sae=96, n_tokens=4_000),
    config(batch_size=100),
    config(shuffle_seed=3),
)


def test_several_saes_come_out_as_each_does_alone(planted: ActivationCache) -> None:
    together = train_many([RunSpec(config=cfg) for cfg in SEVERAL], planted)
    for cfg, sae in zip(SEVERAL, together, strict=True):
        assert same(sae, train(cfg, planted))


def test_saes_that_want_the_same_rows_share_one_reader(
    planted: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0
    take = ActivationCache.take

    def counted(self: ActivationCache, column: str, rows: Tensor, **options: object) -> Tensor:
        nonlocal taken
        taken += len(rows)
        return take(self, column, rows, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ActivationCache, "take", counted)
    train(config(), planted)
    alone, taken = taken, 0
    train_many([RunSpec(config=config(k=k)) for k in (1, 2, 3)], planted)
    # As many rows, but for batches prepared ahead that nobody asked for.
    assert taken <= alone + 3 * 200


def test_an_exported_sae_is_a_copy_that_does_not_learn(planted: ActivationCache) -> None:
    seen: list[SAE] = []

    def keep(sae: SAE) -> dict[str, float]:
        seen.append(sae)
        return {}

    last = train(config(), planted, callbacks=[Callback(every=10, call=keep)])
    assert not any(tensor.requires_grad for tensor in last.tensors().values())
    assert not seen[0].W_enc.equal(last.W_enc) and seen[-1].W_enc.equal(last.W_enc)


class Killed(Exception):
    pass


def test_a_sweep_killed_anywhere_goes_on(
    planted: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the runs was done by then, and the others' checkpoints are of different steps."""
    sizes = ({"n_tokens": 4_000}, {"checkpoint_every": 7}, {"seed": 1})
    configs = [config(**options) for options in sizes]
    specs = [
        RunSpec(config=cfg, out=tmp_path / f"run{number}") for number, cfg in enumerate(configs)
    ]
    advance = Run.advance

    def until_killed(self: Run, columns: Columns) -> dict[str, float]:
        if self.step == 33:
            raise Killed
        return advance(self, columns)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", until_killed)
        with pytest.raises(Killed):
            train_many(specs, planted)
    assert (tmp_path / "run0" / "sae.safetensors").exists()
    resumed = train_many(specs, planted)
    assert all(same(sae, train(cfg, planted)) for sae, cfg in zip(resumed, configs, strict=True))


def test_a_run_that_diverges_leaves_the_others_alone_and_its_batch_behind(
    planted: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEKIT_KERNELS", "reference")  # whose steps are those of `losses`
    step = TopKTrainer.losses
    bad = 22
    seen: dict[int, Tensor] = {}

    def explode(self: TopKTrainer, batch: Batch) -> dict[str, Tensor]:
        losses = step(self, batch)
        if self.cfg.k == 4:
            seen[self.step] = batch.x
            if self.step >= bad:
                losses["mse"] = losses["mse"] * torch.nan
        return losses

    monkeypatch.setattr(TopKTrainer, "losses", explode)
    options = {"input_scaling": "none", "checkpoint_every": 5}
    specs = [RunSpec(config=config(k=k, **options), out=tmp_path / f"k{k}") for k in (3, 4)]
    with pytest.raises(Diverged, match="k4: the loss is no number from step 23 on.*lower --lr"):
        train_many(specs, planted)
    assert (tmp_path / "k3" / "sae.safetensors").exists()
    kept = load_file(tmp_path / "k4" / "diverged.safetensors")
    assert kept["resid_post.0"].equal(seen[bad])
    state = load_file(tmp_path / "k4" / "train_state" / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point())
    assert state["optimiser/0/step"] == 20


def test_two_runs_in_one_folder_are_refused(planted: ActivationCache, tmp_path: Path) -> None:
    specs = [RunSpec(config=config(seed=seed), out=tmp_path / "run") for seed in (0, 1)]
    with pytest.raises(ConfigError, match="same folder"):
        train_many(specs, planted)


def test_figures_of_a_callback_go_to_the_log_once(
    planted: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after a call whose checkpoint was not written yet, so that it is made again."""
    seen: list[float] = []

    def norm(sae: SAE) -> dict[str, float]:
        seen.append(float(sae.W_enc.norm()))
        if len(seen) == 2:
            raise Killed
        return {"norm": seen[-1]}

    callbacks = [Callback(every=16, call=norm)]
    out = tmp_path / "run"
    with pytest.raises(Killed):
        train(config(), planted, out=out, callbacks=callbacks)
    sae = train(config(), planted, out=out, callbacks=callbacks)
    lines = {line["step"]: line["norm"] for line in log_of(out) if "norm" in line}
    assert [line["step"] for line in log_of(out) if "norm" in line] == [16, 32, 40]
    assert lines[40] == float(sae.W_enc.norm())
    assert lines[32] == seen[1]


def test_gradients_are_clipped_and_the_share_is_logged(
    planted: ActivationCache, tmp_path: Path
) -> None:
    free = train(config(), planted)
    for bound, share in ((1e-6, 1.0), (1e9, 0.0)):
        out = tmp_path / str(bound)
        clipped = train(config(clip_norm=bound), planted, out=out)
        assert {line["clipped"] for line in log_of(out)} == {share}
        assert same(clipped, free) == (share == 0)


def test_the_clipped_share_survives_a_kill(planted: ActivationCache, tmp_path: Path) -> None:
    """A checkpoint between two lines of the log, and a bound that is passed on some steps."""
    cfg = config(clip_norm=1.5, checkpoint_every=13)

    def stop(_: SAE) -> dict[str, float]:
        raise Killed

    train(cfg, planted, out=tmp_path / "whole")
    with pytest.raises(Killed):
        train(cfg, planted, out=tmp_path / "run", callbacks=[Callback(every=17, call=stop)])
    train(cfg, planted, out=tmp_path / "run")
    shares = [[line["clipped"] for line in log_of(tmp_path / name)] for name in ("whole", "run")]
    assert shares[0] == shares[1]
    assert 0 < sum(shares[0]) < len(shares[0])


def test_adamw_takes_a_share_off_each_weight(planted: ActivationCache) -> None:
    """With a rate of 0 but for the decay there would be nothing else: so compare the two."""
    plain = train(config(optimiser="adamw"), planted)
    decayed = train(config(optimiser="adamw", weight_decay=10.0), planted)
    assert decayed.W_enc.norm() < 0.95 * plain.W_enc.norm()
    assert same(plain, train(config(), planted))


@pytest.mark.parametrize("part", ["encoder", "decoder", "all"])
def test_what_is_frozen_stays_as_it_was_drawn(part: str, planted: ActivationCache) -> None:
    torch.manual_seed(0)
    drawn = TopKTrainer(config(encoder_norm=1.0), 32)
    sae = train(config(freeze=part), planted)
    assert sae.W_enc.equal(drawn.W_enc) == (part in ("encoder", "all"))
    assert sae.W_dec.equal(drawn.W_dec) == (part in ("decoder", "all"))
    assert sae.b_enc.abs().max() > 0


def test_a_softly_frozen_decoder_keeps_its_cosine(planted: ActivationCache) -> None:
    torch.manual_seed(0)
    drawn = TopKTrainer(config(), 32).W_dec
    free, held = (train(config(freeze=f, lr=0.02), planted) for f in ("none", "soft_decoder:0.8"))
    cosine = {sae: (sae.W_dec * drawn).sum(1) for sae in (free, held)}
    assert cosine[free].min() < 0.7
    assert cosine[held].min() > 0.8 - 1e-5
    assert cosine[held].min() < 0.81


def test_the_nearest_direction_with_the_cosine_is_taken() -> None:
    anchor = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    W = torch.tensor([[0.0, 2.0, 0.0], [1.0, 8.0, 0.0]])
    keep_near(W, anchor, 0.6)
    torch.testing.assert_close(W, torch.tensor([[1.2, 1.6, 0.0], [1.0, 8.0, 0.0]]))


@pytest.mark.parametrize("freeze", ["decoders", "soft_decoder", "soft_decoder:2", "soft_decoder:x"])
def test_an_unknown_freeze_is_refused(freeze: str) -> None:
    with pytest.raises(ConfigError, match="is none of: none, encoder, decoder, all"):
        config(freeze=freeze)


def test_what_a_kind_does_not_have_cannot_be_frozen() -> None:
    class Tied(Trainer):
        FREEZES = {"decoder": ("W_dec",)}

    with pytest.raises(ConfigError, match="has no encoder of its own"):
        Tied(config(freeze="all"), 8).frozen()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_norm": 0.0}, "clip_norm=0.0 must be positive"),
        ({"weight_decay": 0.1}, "only adamw has any"),
        ({"weight_decay": -0.1, "optimiser": "adamw"}, "may not be negative"),
        ({"life_windows": -1}, "life_windows=-1 may not be negative"),
        ({"dead_after": 0}, "dead_after=0 must be at least 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**options)


def test_bfloat16_products_come_near_float32_ones(planted: ActivationCache) -> None:
    before = torch.get_float32_matmul_precision()
    exact, rough = (train(config(precision=p), planted) for p in ("float32", "bfloat16"))
    assert torch.get_float32_matmul_precision() == before
    assert rough.W_dec.dtype == torch.float32
    assert (exact.W_dec * rough.W_dec).sum(1).median() > 0.99


def test_float32_means_float32_whatever_the_caller_set() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with multiplying_in("float32", "cpu"):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("scaling", ["sqrt_d", "unit", "none"])
def test_what_training_sees_has_the_norm_asked_for(
    scaling: str, planted: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    initialise = TopKTrainer.initialise

    def look(self: TopKTrainer, sample: Tensor) -> None:
        seen.append(sample)
        initialise(self, sample)

    monkeypatch.setattr(TopKTrainer, "initialise", look)
    train(config(input_scaling=scaling, n_tokens=200), planted)
    norm = float(seen[0].norm(dim=1).mean())
    stored = float(planted.rows("resid_post.0", torch.arange(planted.n_rows)).norm(dim=1).mean())
    assert norm == pytest.approx(
        {"sqrt_d": 32**0.5, "unit": 1.0, "none": stored}[scaling], rel=0.02
    )


class _L1(torch.nn.Module):
    """A one-layer SAE with a given scale of its input, in any loss convention."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.W = torch.nn.Parameter(torch.randn(5, 9))
        # The same map in other units: bias and output scale with the input.
        self.b = torch.nn.Parameter(torch.randn(9) * scale)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = (x @ self.W + self.b).relu()
        error = (x - z @ self.W.T / 3).square().sum(1).mean()
        return error, z.sum(1).mean(), (z > 0).sum(1).float().mean()


@pytest.mark.parametrize("convention", ["sum", "mean", "fvu"])
def test_a_converted_coefficient_gives_the_same_direction_of_descent(convention: Any) -> None:
    """Theirs on x, ours on 4 x: losses are equal but for a factor, so gradients are parallel."""
    torch.manual_seed(0)
    x, scale, theirs = torch.randn(50, 5), 4.0, 0.37
    one, other = _L1(1.0), _L1(scale)
    error, l1, l0 = one.parts(x)
    variance = (x - x.mean(0)).square().sum(1).mean()
    divisor = {"sum": 1.0, "mean": 5.0, "fvu": float(variance)}[convention]
    published = error / divisor + theirs * l1
    error, l1, _ = other.parts(scale * x)
    converted = coefficient(
        theirs,
        convention,
        d_in=5,
        variance=float(variance) * scale**2,
        scale=scale,
    )
    ours = error + converted * l1
    (first,), (second,) = (
        torch.autograd.grad(loss, [module.W]) for loss, module in ((published, one), (ours, other))
    )
    torch.testing.assert_close(second / second.norm(), first / first.norm())
    # An L0 penalty has no units, the error has those of x squared.
    l0_factor = float(((ours - converted * l1) / (published - theirs * one.parts(x)[1])).detach())
    assert coefficient(
        theirs,
        convention,
        d_in=5,
        variance=float(variance) * scale**2,
        scale=scale,
        penalty="l0",
    ) == pytest.approx(theirs * l0_factor)


def test_a_coefficient_of_fvu_needs_the_variance() -> None:
    with pytest.raises(ConfigError, match="give variance"):
        coefficient(0.1, "fvu", d_in=8)


def test_a_kind_that_needs_gradients_is_refused_on_a_cache_without(
    planted: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TopKTrainer, "NEEDS", frozenset({"grad"}))
    monkeypatch.setitem(planted.manifest.config, "gradients", False)
    with pytest.raises(ConfigError, match="harvest with --gradients"):
        train(config(), planted)


def test_gradients_are_scaled_against_their_activations(
    planted: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x' = s x has the gradient g / s: their products stay."""
    monkeypatch.setenv("SAEKIT_KERNELS", "reference")  # whose steps are those of `losses`
    products: list[Tensor] = []
    losses = TopKTrainer.losses

    def look(self: TopKTrainer, batch: Batch) -> dict[str, Tensor]:
        assert batch.grad is not None
        products.append((batch.x * batch.grad).sum(1))
        return losses(self, batch)

    monkeypatch.setattr(TopKTrainer, "NEEDS", frozenset({"grad"}))
    monkeypatch.setattr(TopKTrainer, "losses", look)
    for scaling in ("none", "unit"):
        train(config(n_tokens=200, input_scaling=scaling), planted)
    torch.testing.assert_close(*products)
