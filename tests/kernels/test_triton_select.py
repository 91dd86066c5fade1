import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saekit.errors import ConfigError
from saekit.kernels import reference

DEVICE = runpy.run_path(str(Path(__file__).with_name("_interpret.py")))["DEVICE"]
triton_select = pytest.importorskip("saekit.kernels.triton_select")
triton_batch_select = pytest.importorskip("saekit.kernels.triton_batch_select")
triton_jump_select = pytest.importorskip("saekit.kernels.triton_jump_select")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def largest(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By a stable sort: of equal entries the first, and latents in ascending order."""
    z = pre.relu()
    order = z.double().sort(dim=1, descending=True, stable=True).indices
    indices = order[:, :k].sort(1).values
    return z.gather(1, indices), indices.to(torch.int32)


def preactivations(kind: str, *shape: int) -> Tensor:
    pre = torch.randn(shape)
    match kind:
        case "few above 0":
            pre -= 3
        case "none above 0":
            pre = -pre.abs() - 1
        case "many alike":
            pre = (2 * pre).round()
    return pre.to(DEVICE)


def select(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Into memory that held something else."""
    values = torch.full((len(pre), k), torch.nan, dtype=pre.dtype, device=DEVICE)
    indices = torch.full((len(pre), k), -1, dtype=torch.int32, device=DEVICE)
    triton_select.topk_select(pre, k, out=(values, indices))
    return values, indices


def same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["alike", "few above 0", "none above 0", "many alike"])
# One latent, all of a row, a row that is held whole; then groups, the last of them cut off.
@pytest.mark.parametrize(("d_sae", "k"), [(1, 1), (7, 7), (1_000, 9), (4_100, 33), (9_001, 1)])
def test_topk_keeps_the_largest_and_of_equal_ones_the_first(
    d_sae: int, k: int, kind: str, dtype: torch.dtype
) -> None:
    pre = preactivations(kind, 2, d_sae).to(dtype)
    same(select(pre, k), largest(pre, k))


@pytest.mark.parametrize(("group", "at_once"), [(8, 256), (64, 64), (256, 4)])
def test_topk_is_exact_whatever_the_groups(group: int, at_once: int) -> None:
    config = triton_select.SelectConfig(group, at_once, 4)
    pre = preactivations("many alike", 2, 5_000).half()
    same(triton_select.topk_select(pre, 16, config=config), largest(pre, 16))


@pytest.mark.parametrize("d_sae", [1 << 20, (1 << 20) + 1, 3 << 20])
@pytest.mark.parametrize("kind", ["alike", "few above 0"])
def test_topk_of_a_million_latents_is_exact(d_sae: int, kind: str) -> None:
    """As many groups as there are at most have an entry above 0."""
    pre = preactivations(kind, 1, d_sae).to(torch.bfloat16)
    same(select(pre, 64), largest(pre, 64))


def test_a_row_whose_groups_cannot_be_held_is_read_for_every_bit() -> None:
    assert triton_select.select_config(1 << 24, 64).group == -1
    assert triton_select.select_config(1 << 20, 1_024).group == -1
    assert triton_select.select_config(1 << 20, 64).group == 32


def test_topk_has_what_the_reference_has() -> None:
    x, W_enc = torch.randn(4, 6, device=DEVICE), torch.randn(6, 40, device=DEVICE)
    values, indices = triton_select.topk_select(x @ W_enc, 5)
    theirs, chosen = reference.topk_encode(x, W_enc, torch.zeros(40, device=DEVICE), 5)
    dense = torch.zeros(4, 40, device=DEVICE)
    assert dense.scatter(1, indices.long(), values).equal(dense.scatter(1, chosen, theirs))


@pytest.mark.parametrize("kind", ["alike", "few above 0", "many alike"])
def test_a_k_beyond_the_fast_way_is_exact_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FAST_K", 4), ("_MOST_CANDIDATES", 64), ("_SCAN_BLOCK", 128)):
        monkeypatch.setattr(triton_select, name, value)
    for k, dtype in ((20, torch.bfloat16), (200, torch.float32)):
        pre = preactivations(kind, 2, 200).to(dtype)
        same(select(pre, k), largest(pre, k))


@pytest.mark.parametrize("fast", [True, False])
def test_the_same_kernel_counts_what_fires(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        for name, value in (("FAST_K", 4), ("_MOST_CANDIDATES", 64), ("_SCAN_BLOCK", 128)):
            monkeypatch.setattr(triton_select, name, value)
    pre = preactivations("few above 0", 6, 70)
    count = torch.ones(70, dtype=torch.int32, device=DEVICE)
    rank = torch.full((6, 9), -7, dtype=torch.int32, device=DEVICE)
    values, indices = triton_select.topk_select(pre, 9, count=count, rank=rank)
    fires = values > 0
    assert (count - 1).equal(torch.bincount(indices[fires], minlength=70).int())
    assert (rank[~fires] == -1).all()
    # Each of a latent's entries has a place of its own, from what was counted before.
    for latent in range(70):
        places = rank[fires & (indices == latent)].sort().values.tolist()
        assert places == list(range(1, 1 + len(places)))


def test_nan_is_kept_so_that_it_is_seen() -> None:
    for dtype in DTYPES:
        pre = torch.randn(1, 50, device=DEVICE).to(dtype)
        pre[0, 3] = torch.nan
        assert triton_select.topk_select(pre, 2)[0].isnan().any()


def test_an_empty_batch_has_an_empty_code() -> None:
    values, indices = triton_select.topk_select(torch.empty(0, 5, device=DEVICE), 2)
    assert values.shape == indices.shape == (0, 2)


def test_what_cannot_be_selected_is_refused() -> None:
    pre = torch.randn(2, 5, device=DEVICE)
    with pytest.raises(ConfigError, match=r"k=6 must lie in 1\.\.d_sae=5"):
        triton_select.topk_select(pre, 6)
    with pytest.raises(ConfigError, match="entries of torch.float64 cannot be selected from"):
        triton_select.topk_select(pre.double(), 2)
    with pytest.raises(ConfigError, match="must be contiguous"):
        triton_select.topk_select(pre.T, 2)
    with pytest.raises(ConfigError, match=r"a threshold of shape \(3,\) fits no latents"):
        triton_select.threshold_select(pre, torch.zeros(3, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("each", [False, True])
def test_threshold_keeps_what_is_above_it(each: bool, dtype: torch.dtype) -> None:
    pre = preactivations("many alike", 4, 131).to(dtype)
    pre[1] = -9
    threshold = torch.rand(131, device=DEVICE) if each else 1.0
    values, indices, offsets = triton_select.threshold_select(pre, threshold)
    rows, latents = (pre.float() > threshold).nonzero(as_tuple=True)
    same((indices.long(), offsets), (latents, reference.row_offsets(rows, 4)))
    assert values.equal(pre[rows, latents])


@pytest.mark.parametrize("shape", [(1, 1), (40, 1), (13, 131), (0, 5)])
@pytest.mark.parametrize("n_kept", [0, 17, 5_000])
def test_batch_topk_matches_the_reference(shape: tuple[int, int], n_kept: int) -> None:
    pre = preactivations("alike", *shape)
    values, indices, offsets = triton_batch_select.batch_topk_select(pre, n_kept)
    latents, ends = reference.batch_topk(pre, n_kept)
    same((indices.long(), offsets), (latents, ends))
    assert values.equal(pre[reference.rows_of(ends), latents])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["many alike", "few above 0", "the sample is large"])
def test_batch_topk_keeps_exactly_so_many_and_of_equal_ones_the_first(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pre = preactivations(kind, 5, 70)
    if kind == "the sample is large":
        monkeypatch.setattr(triton_batch_select, "_SAMPLE", 100)
        pre.flatten()[:: 5 * 70 // 100 | 1] += 10
    pre = pre.to(dtype)
    flat = pre.double().flatten()
    for n_kept in (3, 80, 300):
        values, indices, offsets = triton_batch_select.batch_topk_select(pre, n_kept)
        kept = flat.sort(descending=True, stable=True).indices[:n_kept]
        kept = kept[flat[kept] > 0].sort().values
        same(
            (indices.long(), offsets, values),
            (kept % 70, reference.row_offsets(kept // 70, 5), pre.flatten()[kept]),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_the_last_batch_was_cut_says_where_to_look_and_not_what_is_kept(
    dtype: torch.dtype,
) -> None:
    n_kept, shape = 20, (5, 70)

    def integers(n: int) -> Tensor:
        return torch.full((n,), 7, dtype=torch.int32, device=DEVICE)

    cut = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    # Much larger and much smaller than before, as before, and fewer above 0 than are wanted.
    for factor in (1, 1, 100, 0.01, -1, 1):
        pre = preactivations("many alike", *shape)
        pre = (pre.abs() - 4 if factor < 0 else factor * pre).to(dtype)
        values, offsets = torch.zeros(n_kept, dtype=dtype, device=DEVICE), integers(6).long()
        indices, rows, rank = integers(n_kept), integers(n_kept), integers(n_kept)
        count = torch.zeros(70, dtype=torch.int32, device=DEVICE)
        triton_batch_select.batch_topk_into(
            pre,
            values=values,
            indices=indices,
            rows=rows,
            offsets=offsets,
            count=count,
            rank=rank,
            cut=cut,
        )
        flat = pre.double().flatten()
        kept = flat.sort(descending=True, stable=True).indices[:n_kept]
        kept = kept[flat[kept] > 0].sort().values
        latents, ends = kept % 70, reference.row_offsets(kept // 70, 5)
        total = int(ends[-1])
        assert total == (n_kept if factor > 0 else int((pre > 0).sum()))
        same((offsets, indices[:total].long()), (ends, latents))
        same((rows[:total].long(),), (reference.rows_of(ends),))
        assert values[:total].equal(pre[rows[:total].long(), latents])
        assert count.long().equal(torch.bincount(latents, minlength=70))
        assert bool((rank[:total] >= 0).all()) and bool((rank[total:] == -1).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("batch", "d_sae", "shift"), [(5, 131, 0.0), (1, 1, 9.0), (3, 5_000, -2.5)]
)
def test_jump_keeps_what_fires_and_what_is_near_its_threshold(
    batch: int, d_sae: int, shift: float, dtype: torch.dtype
) -> None:
    pre = (preactivations("alike", batch, d_sae) + shift).to(dtype)
    pre[0] = -9  # a row without any
    level, jump = torch.rand(d_sae, device=DEVICE), torch.tensor([0.5, 0.3, 0.0], device=DEVICE)
    found = triton_jump_select.JumpSearch.of(batch, d_sae, torch.device(DEVICE))
    threshold = level * 0.5
    for _ in range(2):
        triton_jump_select.jump_search(pre, level, jump, found)
    fires, keeps = pre.float() > threshold, pre.float() > threshold - jump[1]
    assert found.totals.tolist() == [int(keeps.sum()), int(fires.sum())]
    assert found.offsets.diff().equal(keeps.sum(1))
    assert (found.ends - found.offsets[:-1]).equal(fires.sum(1))
    places = int(keeps.sum()) + 3
    indices, rows, rank = (
        torch.full((places,), 7, dtype=torch.int32, device=DEVICE) for _ in range(3)
    )
    values = torch.full((places,), torch.nan, dtype=dtype, device=DEVICE)
    count, firing = (torch.zeros(d_sae, dtype=torch.int32, device=DEVICE) for _ in range(2))
    triton_jump_select.jump_fill(
        pre,
        level,
        jump,
        found,
        values=values,
        indices=indices,
        rows=rows,
        count=count,
        rank=rank,
        firing=firing,
    )
    for row in range(batch):
        begin, end = found.offsets[row], found.offsets[row + 1]
        fire, near = (m.nonzero().flatten() for m in (fires[row], keeps[row] & ~fires[row]))
        assert indices[begin:end].long().equal(torch.cat([fire, near]))
        assert rows[begin:end].eq(row).all()
        wanted = torch.cat([pre[row, fire], torch.zeros_like(pre[row, near])])
        assert values[begin:end].equal(wanted)
    assert count.long().equal(keeps.sum(0)) and firing.long().equal(fires.sum(0))
    kept = indices[:-3].long()
    for latent in kept.unique():
        assert rank[:-3][kept == latent].sort().values.tolist() == list(range(int(count[latent])))
    assert rank[-3:].eq(-1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("d_sae", "k"), [(24_576, 32), (65_536, 64), (131_072, 64), (65_537, 1_024), (30_000, 2_000)]
)
def test_topk_of_wide_rows_is_exact(d_sae: int, k: int, dtype: torch.dtype) -> None:
    for kind in ("alike", "few above 0", "many alike"):
        pre = preactivations(kind, 300, d_sae).to(dtype)
        same(select(pre, k), largest(pre, k))


@pytest.mark.gpu
def test_batch_topk_of_a_large_matrix_is_exact() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        pre = torch.randn(2_048, 24_576, device=DEVICE).to(dtype)
        values, _, offsets = triton_batch_select.batch_topk_select(pre, 65_536)
        assert len(values) == offsets[-1] == 65_536
        theirs = pre.float().flatten().topk(65_536).values
        assert values.float().sort(descending=True).values.equal(theirs)
