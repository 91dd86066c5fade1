import runpy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saekit.errors import ConfigError
from saekit.kernels import reference

DEVICE = runpy.run_path(str(Path(__file__).with_name("_interpret.py")))["DEVICE"]
triton_step = pytest.importorskip("saekit.kernels.triton_step")

# Relative to the largest entry; float32 against float64, over a few steps.
LIMIT = 1e-5

NAMES = ("W_enc_T", "W_dec", "b_enc", "b_dec")


@pytest.fixture(autouse=True)
def few_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs one after another."""
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_step, "_RESIDUAL_PARTS", 3)
        monkeypatch.setattr(triton_step, "_ENCODER_PARTS", 2)
        few = triton_step.RowConfig(1, 2, 2)
        monkeypatch.setattr(triton_step, "row_config", lambda *_, **__: few)


def weights(d_in: int, d_sae: int, often: int = 0) -> dict[str, Tensor]:
    """Of an SAE some of whose latents fire on most rows."""
    W_dec = torch.randn(d_sae, d_in)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    W_enc_T = W_dec + 0.1 * torch.randn(d_sae, d_in)
    b_enc = 0.02 * torch.randn(d_sae)
    b_enc[:often] += 3
    found = dict(zip(NAMES, (W_enc_T, W_dec, b_enc, 0.1 * torch.randn(d_in)), strict=True))
    return {name: tensor.to(DEVICE) for name, tensor in found.items()}


class Eager:
    """The same step by the reference, autograd and torch's own optimiser, in float64."""

    def __init__(
        self, start: Mapping[str, Tensor], k: int, clip_norm: float | None, weight_decay: float
    ) -> None:
        self.k, self.clip_norm, self.clipped = k, clip_norm, 0
        self.parameters = {name: nn.Parameter(t.double().clone()) for name, t in start.items()}
        self.optimiser = torch.optim.AdamW(
            list(self.parameters.values()), lr=0.1, weight_decay=weight_decay
        )

    def __call__(self, x: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """The loss and the code."""
        W_enc_T, W_dec, b_enc, b_dec = self.parameters.values()
        centred = x.double() - b_dec
        values, indices = reference.topk_encode(centred, W_enc_T.T, b_enc, self.k)
        error = centred - reference.sparse_decode(values, indices, W_dec)
        loss = error.square().sum(1).mean()
        self.optimiser.zero_grad()
        loss.backward()
        assert W_dec.grad is not None
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        if self.clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), self.clip_norm)
            self.clipped += int(norm > self.clip_norm)
        self.optimiser.param_groups[0]["lr"] = lr
        self.optimiser.step()
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        return loss.detach(), indices[values > 0]


def poison(step: Any) -> None:
    """Nothing may be left over from the step before."""
    for name, tensor in vars(step).items():
        made = name.startswith("_") and name not in ("_constants", "_hyper")
        if made and isinstance(tensor, Tensor) and tensor.is_floating_point():
            tensor.fill_(torch.nan)


def near(ours: Tensor, theirs: Tensor, limit: float = LIMIT) -> None:
    assert (ours.double() - theirs).abs().max() <= limit * theirs.abs().max()


def heavy_from(n: int, d_in: int, d_sae: int, k: int) -> Any:
    return replace(triton_step.step_config(d_in, d_sae, k), heavy=n)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped on some steps": {"clip_norm": 8.0},
    "decayed": {"weight_decay": 0.1},
    "a few rows at a time": {"rows_at_once": 3},
    "heavy latents": {"often": 3, "heavy": 2},
    "heavy latents, deterministic": {"often": 3, "heavy": 2, "deterministic": True},
    "heavy latents, clipped": {"often": 3, "heavy": 2, "clip_norm": 1.0},
    "one latent a row": {"k": 1, "d_in": 33},
}


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_autograd_and_torch_adam(case: str) -> None:
    options = dict(CASES[case])
    d_in, d_sae, batch = options.pop("d_in", 10), 11, 5
    k, often = options.pop("k", 4), options.pop("often", 0)
    clip_norm, decay = options.get("clip_norm"), options.get("weight_decay", 0.0)
    start = weights(d_in, d_sae, often)
    eager = Eager(start, k, clip_norm, decay)
    if heavy := options.pop("heavy", None):
        options["config"] = heavy_from(heavy, d_in, d_sae, k)
    since, fired = (torch.zeros(d_sae, dtype=torch.int64, device=DEVICE) for _ in range(2))
    step = triton_step.FusedTopKStep(
        *start.values(),
        k=k,
        batch_size=batch,
        precision="float32",
        since=since,
        fired=fired,
        **options,
    )
    quiet, total = torch.zeros_like(since), torch.zeros_like(fired)
    for number in range(2):
        # Small, then large: some steps are clipped.
        x = torch.randn(batch, d_in, device=DEVICE) * (3 if number else 0.5)
        lr = 1e-2 / (1 + number)
        poison(step)
        step.lr.fill_(lr)
        loss = step(x).clone()
        wanted, latents = eager(x, lr)
        near(loss, wanted)
        n = torch.bincount(latents, minlength=d_sae)
        total += n
        quiet = (quiet + batch).masked_fill(n > 0, 0)
        assert step.l0 == len(latents) / batch
    for name, parameter in eager.parameters.items():
        near(start[name], parameter)
        theirs = eager.optimiser.state[parameter]
        for moment in ("exp_avg", "exp_avg_sq"):
            near(step.state[name][moment], theirs[moment])
        assert step.state[name]["step"] == theirs["step"] == 2
    assert fired.equal(total)
    assert since.equal(quiet)
    assert step.clipped == eager.clipped
    if clip_norm == 8:
        assert 0 < eager.clipped < 2


def test_a_step_goes_on_from_the_state_of_an_optimiser() -> None:
    start = weights(6, 9)
    held = [nn.Parameter(tensor.clone()) for tensor in start.values()]
    optimiser = torch.optim.Adam(held, lr=1e-2, fused=True)
    parameters = optimiser.param_groups[0]["params"]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimiser.step()
    state = {name: optimiser.state[p] for name, p in zip(NAMES, parameters, strict=True)}
    step = triton_step.FusedTopKStep(
        *(p.data for p in parameters), k=2, batch_size=5, precision="float32", state=state
    )
    before = state["b_enc"]["exp_avg"].clone()
    step(torch.randn(5, 6, device=DEVICE))
    # In the optimiser's own tensors.
    assert not optimiser.state[parameters[2]]["exp_avg"].equal(before)
    assert optimiser.state[parameters[1]]["step"] == 2


def test_the_split_weights_are_bit_for_bit_the_float32_ones() -> None:
    starts = [weights(10, 17, often=2)]
    starts.append({name: tensor.clone() for name, tensor in starts[0].items()})
    whole, split = (
        triton_step.FusedTopKStep(
            *start.values(), k=3, batch_size=6, deterministic=True, split_master=split
        )
        for start, split in zip(starts, (False, True), strict=True)
    )
    x = torch.randn(6, 10, device=DEVICE)
    for step in (whole, split):
        # The split rounds up what lies in the middle, and the interpreter rounds towards 0.
        for name, tensor in split._copies.items():
            step._copies[name].copy_(tensor)
        step.lr.fill_(1e-2)
        step(x)
    for name in ("W_enc_T", "W_dec"):
        error = (split._copies[name].float() - starts[0][name]).abs()
        assert (error <= 2**-8 * starts[0][name].abs()).all()
        starts[1][name].zero_()
    split.write_back()
    for name in NAMES:
        assert starts[0][name].view(torch.int32).equal(starts[1][name].view(torch.int32))


def test_bfloat16_trains_almost_as_float32_does() -> None:
    losses = []
    x = torch.randn(4, 10, device=DEVICE)
    start = weights(10, 13)
    for precision in ("float32", "bfloat16"):
        step = triton_step.FusedTopKStep(
            *(t.clone() for t in start.values()), k=4, batch_size=4, precision=precision
        )
        step.lr.fill_(1e-2)
        losses.append([float(step(x)) for _ in range(2)])
    for high, low in zip(*losses, strict=True):
        # Eight bits of each factor, truncated where there is no GPU.
        assert abs(low / high - 1) < 0.02
    assert losses[1][1] < 0.99 * losses[1][0]


def test_moments_in_bfloat16_keep_their_means() -> None:
    """Adam's second moment changes by a thousandth a step, and bfloat16 has 8 bits."""
    found = []
    start = weights(20, 30)
    x = torch.randn(5, 20, device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        held = {
            name: {"exp_avg_sq": torch.ones_like(start[name], dtype=dtype)}
            for name in ("W_enc_T", "W_dec")
        }
        step = triton_step.FusedTopKStep(
            *(t.clone() for t in start.values()),
            k=3,
            batch_size=5,
            precision="float32",
            moments=dtype,
            state=held,
        )
        for _ in range(3):
            step(x)
        found.append(step.state)
    for name in ("W_enc_T", "W_dec"):
        high, low = (state[name]["exp_avg_sq"].float() for state in found)
        assert found[1][name]["exp_avg_sq"].dtype == torch.bfloat16
        # Where nothing fired it has sunk to 0.997; to the nearest it would have stayed at 1.
        assert float(high.median()) == pytest.approx(0.997, abs=1e-5)
        assert float((low - high).mean()) == pytest.approx(0, abs=5e-4)
        first = [state[name]["exp_avg"].float() for state in found]
        assert (first[0] - first[1]).norm() < 1e-2 * first[0].norm()


def test_moments_of_an_optimiser_are_taken_in_another_type() -> None:
    start = weights(6, 9)
    state = {"W_dec": {"exp_avg": torch.full((9, 6), 0.5, device=DEVICE)}}
    step = triton_step.FusedTopKStep(
        *start.values(), k=2, batch_size=5, moments=torch.bfloat16, state=state
    )
    assert step.state["W_dec"]["exp_avg"].eq(0.5).all()
    assert step.state["W_dec"]["exp_avg"].dtype == torch.bfloat16
    assert step.state["b_enc"]["exp_avg"].dtype == torch.float32


def test_what_changes_outside_is_taken_over() -> None:
    start = weights(6, 9)
    step = triton_step.FusedTopKStep(*start.values(), k=2, batch_size=5, split_master=True)
    start["W_dec"].copy_(torch.randn_like(start["W_dec"]))
    wanted = start["W_dec"].clone()
    step.take_over()
    start["W_dec"].zero_()
    step.write_back()
    assert start["W_dec"].equal(wanted)


def test_what_cannot_be_served_is_refused() -> None:
    start = weights(6, 9)
    step = triton_step.FusedTopKStep

    def refused(match: str, **options: Any) -> None:
        tensors = {**start, **options.pop("tensors", {})}
        with pytest.raises(ConfigError, match=match):
            step(*tensors.values(), **{"k": 2, "batch_size": 5, **options})

    refused(r"k=10 must lie in 1\.\.d_sae=9", k=10)
    refused("batch_size=0 with k=2", batch_size=0)
    refused("W_enc_T must be float32, and contiguous", tensors={"W_enc_T": torch.randn(6, 9).T})
    refused("since and fired count the same thing", since=torch.zeros(9, dtype=torch.int64))
    refused("split_master makes the bfloat16 copy", precision="float32", split_master=True)
    moments = {"W_enc_T": {"exp_avg": torch.zeros(6, 9, device=DEVICE)}}
    refused("exp_avg of W_enc_T must lie in memory", state=moments)
    with pytest.raises(ConfigError, match=r"batches of \(5, 6\), and this one is \(4, 6\)"):
        step(*start.values(), k=2, batch_size=5)(torch.randn(4, 6, device=DEVICE))


def test_every_candidate_is_served() -> None:
    for config in triton_step.step_candidates(2_048, 65_536, 64):
        select, row = config.select, config.row
        assert 64 * select.group <= 65_536
        assert row.n_warps & (row.n_warps - 1) == 0
        assert config.decode.columns & (config.decode.columns - 1) == 0


def large(**options: Any) -> tuple[Any, dict[str, Tensor]]:
    d_in, d_sae = options.pop("d_in", 768), options.pop("d_sae", 4_096)
    start = weights(d_in, d_sae, options.pop("often", 0))
    return triton_step.FusedTopKStep(*start.values(), k=32, batch_size=1_024, **options), start


def rows(number: int, d_in: int = 768) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(1_024, d_in, generator=generator).to(DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("d_in", [768, 2_048])
@pytest.mark.parametrize("often", [0, 8])
def test_in_bfloat16_a_large_step_is_near_that_of_autograd(d_in: int, often: int) -> None:
    step, start = large(d_in=d_in, often=often, clip_norm=1e-3)
    eager = Eager(start, 32, 1e-3, 0.0)
    # At first what Adam holds is the gradient. The code is that of rounded weights, so its rows are
    # compared on the whole.
    loss, _ = eager(rows(0, d_in), 0.0)
    step.lr.fill_(0)
    assert abs(float(step(rows(0, d_in))) / float(loss) - 1) < 1e-3
    for name, parameter in eager.parameters.items():
        ours = step.state[name]["exp_avg"].double()
        theirs = eager.optimiser.state[parameter]["exp_avg"]
        assert (ours - theirs).norm() < 0.2 * theirs.norm(), name
    assert step.clipped == 1


@pytest.mark.gpu
def test_in_float32_a_large_step_is_that_of_autograd() -> None:
    step, start = large(often=8, precision="float32", deterministic=True)
    eager = Eager(start, 32, None, 0.0)
    step.lr.fill_(1e-3)
    near(step(rows(0)), eager(rows(0), 1e-3)[0])
    for name, parameter in eager.parameters.items():
        ours = step.state[name]["exp_avg"].double()
        theirs = eager.optimiser.state[parameter]["exp_avg"]
        # A near-tie may fall the other way.
        assert (ours - theirs).norm() < 1e-2 * theirs.norm(), name


@pytest.mark.gpu
@pytest.mark.parametrize("split", [False, True])
def test_deterministic_training_is_the_same_bits_with_and_without_a_graph(split: bool) -> None:
    found = []
    begun = weights(768, 4_096, 8)
    for graph in (False, False, True):
        start = {name: tensor.clone() for name, tensor in begun.items()}
        step = triton_step.FusedTopKStep(
            *start.values(),
            k=32,
            batch_size=1_024,
            deterministic=True,
            split_master=split,
            graph=graph,
        )
        losses = []
        for number in range(8):
            step.lr.fill_(1e-3)
            losses.append(step(rows(number)).clone())
        step.write_back()
        found.append((*losses, *start.values()))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert one.equal(two)
