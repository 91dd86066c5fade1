import runpy
from pathlib import Path

import pytest
import torch

from saekit.errors import ConfigError

DEVICE = runpy.run_path(str(Path(__file__).with_name("_interpret.py")))["DEVICE"]
candidates = pytest.importorskip("saekit.kernels.triton_candidates")
triton_step = pytest.importorskip("saekit.kernels.triton_step")


@pytest.mark.parametrize(("d_in", "n", "k"), [(10, 5, 5), (33, 9, 4), (200, 40, 1)])
def test_of_the_candidates_the_largest_are_kept_in_order_and_counted(
    d_in: int, n: int, k: int
) -> None:
    batch, d_sae = 6, 50
    centred, W_enc_T = torch.randn(batch, d_in), torch.randn(d_sae, d_in)
    b_enc = torch.randn(d_sae)
    chosen = torch.stack([torch.randperm(d_sae)[:n].sort().values for _ in range(batch)])
    # Fewer above 0 than are kept.
    b_enc[chosen[0, 1:]] = -1_000
    pre = (centred.double() @ W_enc_T.double().T + b_enc.double()).gather(1, chosen)
    slices = -(-d_in // candidates.columns(d_in))
    scores = torch.full((slices, batch, n), torch.nan, device=DEVICE)
    given = [t.to(DEVICE) for t in (centred, W_enc_T, b_enc)]
    latents = chosen.to(DEVICE, torch.int32)
    candidates.rescore(given[0], given[1], latents, scores)
    values = torch.full((batch, k), torch.nan, device=DEVICE)
    indices = torch.full((batch, k), -1, dtype=torch.int32, device=DEVICE)
    count = torch.zeros(d_sae, dtype=torch.int32, device=DEVICE)
    rank = torch.zeros(batch, k, dtype=torch.int32, device=DEVICE)
    candidates.reselect(
        scores, given[2], latents, values=values, indices=indices, count=count, rank=rank
    )
    order = pre.relu().sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
    assert indices.cpu().equal(chosen.gather(1, order).int())
    wanted = pre.gather(1, order).relu()
    torch.testing.assert_close(values.cpu().double(), wanted, rtol=1e-5, atol=1e-5)
    fired = chosen.gather(1, order)[wanted > 0]
    assert count.cpu().equal(torch.bincount(fired, minlength=d_sae).int())
    assert (rank.cpu() >= 0).equal(wanted > 0)


def test_quantised_rows_are_near_and_keep_their_largest() -> None:
    rows = torch.randn(20, 40) * torch.logspace(-3, 3, 20)[:, None]
    rows[3] = 0
    rows = rows.to(DEVICE)
    low = torch.zeros(20, 40, dtype=torch.float8_e4m3fn, device=DEVICE)
    scale = torch.zeros(20, device=DEVICE)
    candidates.quantise(rows, low, scale)
    back = low.float() * scale[:, None]
    # To the nearest of 4 bits; the interpreter keeps fewer.
    limit = 0.04 if DEVICE == "cuda" else 0.13
    assert ((back - rows).norm(dim=1) <= limit * rows.norm(dim=1)).all()
    torch.testing.assert_close(back.abs().amax(1), rows.abs().amax(1))


@pytest.mark.parametrize("split_master", [False, True])
def test_after_a_step_the_encoder_in_float8_is_that_of_its_new_weights(split_master: bool) -> None:
    W_dec = torch.randn(20, 24, device=DEVICE)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    given = W_dec.clone(), W_dec, torch.zeros(20, device=DEVICE), torch.zeros(24, device=DEVICE)
    step = triton_step.FusedTopKStep(*given, k=3, batch_size=7, split_master=split_master)
    # As where candidates are looked for, whose product needs a GPU.
    step._W_low = torch.zeros(20, 24, dtype=torch.float8_e4m3fn, device=DEVICE)
    step._W_scale = torch.zeros(20, device=DEVICE)
    step.lr.fill_(0.1)
    step(torch.randn(7, 24, device=DEVICE))
    step.write_back()
    assert not step.parameters["W_enc_T"].equal(W_dec)
    low, scale = torch.zeros_like(step._W_low), torch.zeros_like(step._W_scale)
    candidates.quantise(step.parameters["W_enc_T"], low, scale)
    assert step._W_scale.equal(scale) and bool((scale > 0).all())
    assert step._W_low.view(torch.uint8).equal(low.view(torch.uint8))
    step._W_low.zero_()
    step.take_over()
    assert step._W_low.view(torch.uint8).equal(low.view(torch.uint8))


def test_what_has_no_float8_product_is_refused() -> None:
    W = torch.randn(9, 6, device=DEVICE)
    given = W.clone(), W, torch.zeros(9, device=DEVICE), torch.zeros(6, device=DEVICE)
    with pytest.raises(ConfigError, match=r"d_in \(6\) that is a multiple of 16"):
        triton_step.FusedTopKStep(*given, k=2, batch_size=5, candidates=4)


@pytest.mark.gpu
@pytest.mark.parametrize("rows_at_once", [None, 700])
def test_almost_all_of_the_k_largest_are_among_the_candidates(rows_at_once: int | None) -> None:
    d_in, d_sae, k, batch = 768, 16_384, 32, 2_048
    W_dec = torch.randn(d_sae, d_in, device="cuda")
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    b_enc = 0.02 * torch.randn(d_sae, device="cuda")
    step = triton_step.FusedTopKStep(
        W_dec.clone(),
        W_dec,
        b_enc,
        torch.zeros(d_in, device="cuda"),
        k=k,
        batch_size=batch,
        candidates=candidates.candidates_of(k),
        rows_at_once=rows_at_once,
        deterministic=True,
    )
    step.lr.fill_(1e-3)
    for _ in range(3):
        step(torch.randn(batch, d_in, device="cuda"))
    x = torch.randn(batch, d_in, device="cuda")
    W_enc_T = step._copies["W_enc_T"].double()
    centred = (x - step.parameters["b_dec"]).bfloat16().double()
    pre = centred @ W_enc_T.T + step._copies["b_enc"].double()
    step(x)
    values, indices = pre.topk(k)
    wanted = torch.zeros_like(pre).scatter_(1, indices, 1.0)
    chosen = torch.zeros_like(pre).scatter_(1, step._indices.long(), 1.0)
    assert float((wanted * chosen).sum()) > 0.9995 * batch * k
    ours = step._values.double().sort(1, descending=True).values
    assert (ours - values).norm() < 4e-3 * values.norm()
