import runpy
from functools import partial
from pathlib import Path

import pytest
import torch

from saekit import kernels
from saekit.kernels import reference

DEVICE = runpy.run_path(str(Path(__file__).with_name("_interpret.py")))["DEVICE"]
pytest.importorskip("saekit.kernels.triton_backend")

# float32 sums against float64.
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEKIT_KERNELS", "triton")


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("d_in", [3, 65])
def test_encode_matches_the_reference_with_all_gradients(d_in: int, ragged: bool) -> None:
    x, W_enc, b_enc = torch.randn(6, d_in), torch.randn(d_in, 9), torch.zeros(9)
    x[2] = 0
    rule = (
        (lambda pre: kernels.batch_topk(pre, 20))
        if ragged
        else (lambda pre: (pre.topk(3).indices, None))
    )
    results = []
    for op, dtype in ((kernels.encode, torch.float32), (reference.encode, torch.float64)):
        held = [t.to(DEVICE, dtype).requires_grad_() for t in (x, W_enc, b_enc)]
        values, indices, _ = op(held[0], held[1], held[2], lambda pre: rule(pre.float()))
        upstream = torch.linspace(-1, 1, values.numel()).to(values).view_as(values)
        results.append((values, indices, *torch.autograd.grad(values, held, upstream)))
    for ours, theirs in zip(*results, strict=True):
        close(ours.to(theirs.dtype), theirs)


def test_topk_encode_keeps_what_the_reference_keeps_latents_in_order() -> None:
    x, W_enc, b_enc = torch.randn(5, 8), torch.randn(8, 30), torch.randn(30)
    x, W_enc, b_enc = (t.to(DEVICE) for t in (x, W_enc, b_enc))
    values, indices = kernels.topk_encode(x, W_enc, b_enc, 4)
    assert (indices.diff() > 0).all()
    assert indices.dtype == torch.int64
    theirs, places = reference.topk_encode(x, W_enc, b_enc, 4)
    order = places.argsort(1)
    close(values, theirs.gather(1, order))
    assert indices.equal(places.gather(1, order))


def test_batch_topk_matches_the_reference() -> None:
    pre = torch.randn(7, 40).to(DEVICE)
    for ours, theirs in zip(
        kernels.batch_topk(pre, 50), reference.batch_topk(pre, 50), strict=True
    ):
        assert ours.equal(theirs)
