"""The fused step of a TopK SAE by several processes (see `triton_step`, `saekit.distributed`).

A process looks for the best of the latents that its row of the mesh shares out, on the rows of the
batch that its column shares out. For each row the k best of every slice are gathered, and each
process keeps those of its own that are among the k best of all; what they reconstruct is added up.
From there on, each process has latents of its own, which no other updates: those of a column share
theirs out once more. They hand each other the codes, the errors and the rows of the batch, which
are small, rather than gradients, and afterwards the new weights, as they are multiplied.

Axes: batch (of all), row (held here), d_in, d_sae (latents of this process's row of the mesh), own
(of those, the ones that are updated here), k (candidates a row: k, or all latents that are held).
"""

# Triton has no types, and is not on every machine.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false

from collections.abc import Mapping
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saekit.distributed import Mesh
from saekit.errors import ConfigError
from saekit.kernels.triton_decode import _decode, decode_residual
from saekit.kernels.triton_index import power
from saekit.kernels.triton_select import key_of, keys_of, search, select_config, topk_select
from saekit.kernels.triton_step import _CENTRE_BLOCK, FusedTopKStep
from saekit.kernels.triton_step_kernels import centre_kernel

_COUNT_BLOCK = 1_024


class FusedMeshStep(FusedTopKStep):
    """See the module, and `FusedTopKStep` for the options. `batch_size` is of all processes, and a
    step takes the rows that are held here. W_enc_T, W_dec, b_enc, `state`, `since` and `fired` are
    of all latents of this process's row of the mesh, and are whole after `write_back`.
    """

    def __init__(
        self,
        W_enc_T: Float[Tensor, "d_sae d_in"],
        W_dec: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, " d_sae"],
        b_dec: Float[Tensor, " d_in"],
        *,
        mesh: Mesh,
        k: int,
        batch_size: int,
        state: Mapping[str, Mapping[str, Tensor]] | None = None,
        since: Int[Tensor, " d_sae"] | None = None,
        fired: Int[Tensor, " d_sae"] | None = None,
        moments: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        if len(W_dec) % mesh.data or batch_size % mesh.data or options.get("candidates"):
            raise ConfigError(
                f"latents ({len(W_dec)}) and rows ({batch_size}) must be multiples of the mesh's "
                f"data={mesh.data}, and candidates by float8 are for one process"
            )
        self._mesh, self._k_all, self._n_latents = mesh, k, len(W_dec)
        self._n_rows = batch_size // mesh.data
        each = len(W_dec) // mesh.data
        self._own = slice(mesh.data_rank * each, (mesh.data_rank + 1) * each)
        self._ours = slice(mesh.data_rank * self._n_rows, (mesh.data_rank + 1) * self._n_rows)
        self._whole = {"W_enc_T": W_enc_T, "W_dec": W_dec, "b_enc": b_enc}
        self._whole = {name: t.detach() for name, t in self._whole.items()}
        self._full = dict(self._whole)
        self._counters = [t for t in (since, fired) if t is not None]
        self.whole_state = self._state_of_all(state or {}, b_dec, moments)
        super().__init__(
            W_enc_T.detach()[self._own],
            W_dec.detach()[self._own],
            b_enc.detach()[self._own],
            b_dec,
            k=min(k, len(W_dec)),
            batch_size=batch_size,
            state={
                name: {key: self._mine(name, t) for key, t in slot.items()}
                for name, slot in self.whole_state.items()
            },
            since=None if since is None else since[self._own],
            fired=None if fired is None else fired[self._own],
            moments=moments,
            **{**options, "graph": False},
        )

    def _state_of_all(
        self, given: Mapping[str, Mapping[str, Tensor]], b_dec: Tensor, moments: torch.dtype
    ) -> dict[str, dict[str, Tensor]]:
        """What Adam holds of all latents of this row of the mesh; a process keeps its own up to
        date."""
        state: dict[str, dict[str, Tensor]] = {}
        for name, parameter in {**self._whole, "b_dec": b_dec.detach()}.items():
            slot = dict(given.get(name, {}))
            slot.setdefault("step", torch.zeros((), device=parameter.device))
            dtype = moments if parameter.ndim == 2 else parameter.dtype
            for moment in ("exp_avg", "exp_avg_sq"):
                slot.setdefault(moment, torch.zeros_like(parameter, dtype=dtype))
                slot[moment] = slot[moment].to(dtype)
            state[name] = slot
        return state

    def _mine(self, name: str, t: Tensor) -> Tensor:
        return t[self._own] if name in self._whole and t.ndim else t

    def _new_copy(self, name: str) -> Tensor:
        self._full[name] = torch.empty_like(self._whole[name], dtype=torch.bfloat16)
        return self._full[name][self._own]

    def _begin(self) -> None:
        def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        n = self._n_rows
        self._select = select_config(self._n_latents, self.k)
        self._candidates = new(n, self.k, dtype=self._low), new(n, self.k)
        self._local = new(self.batch_size, self.k)
        self._row_losses = new(-(-self.d_in // self.config.decode.columns), n, dtype=torch.float32)
        self._firings = new(n)
        self._starts = torch.arange(n + 1, device=self.device) * self.k
        self._row_ends = new(n, dtype=torch.int64)
        self._partial = new(n, self.d_in, dtype=torch.float32)
        self._l0 = new(dtype=torch.float32)

    @property
    def l0(self) -> Float[Tensor, ""]:
        return self._l0

    def _held(self, x: Tensor) -> Tensor:
        if x.shape != (self._n_rows, self.d_in):
            raise ConfigError(
                f"the fused step was made for ({self._n_rows}, {self.d_in}) rows a process, and "
                f"these are {tuple(x.shape)}"
            )
        return x.contiguous()

    @torch.no_grad()
    def take_over(self) -> None:
        super().take_over()
        self._share_out(self._full)

    @torch.no_grad()
    def write_back(self) -> None:
        super().write_back()
        self._share_out(self._whole)
        for name, slot in self.whole_state.items():
            if name in self._whole:
                self._share_out({key: t for key, t in slot.items() if t.ndim})
        self._share_out({str(i): t for i, t in enumerate(self._counters)})

    def _share_out(self, tensors: Mapping[str, Tensor]) -> None:
        """Give each process of a column what the others have of some tensors of all latents."""
        for t in tensors.values():
            self._gather(t, self._own)

    def _gather(self, t: Tensor, own: slice) -> None:
        """Fill a tensor of which each process of a column has a part; in place."""
        self._mesh.fill(t, own, "data")

    def _step(self, x: Tensor) -> None:
        super()._step(x)
        if self._mesh.data > 1:
            copies = {n: t for n, t in self._full.items() if t is not self._whole[n]}
            self._share_out(copies or self._whole)
            self._share_out({str(i): t for i, t in enumerate(self._counters[:1])})

    def _prepare(self, x: Tensor) -> None:
        self._index.clear()
        centre_kernel[(-(-x.numel() // _CENTRE_BLOCK),)](
            x,
            self.parameters["b_dec"],
            self._centred[self._ours],
            x.numel(),
            D=self.d_in,
            BLOCK=_CENTRE_BLOCK,
            num_warps=8,
        )

    def _encode(self) -> None:
        mesh, W_enc = self._mesh, self._full["W_enc_T"].t()
        values, indices = (t[self._ours] for t in (self._values, self._indices))
        each = max(1, self.rows_at_once // mesh.data)
        for first in range(0, self._n_rows, each):
            rows = slice(first, min(first + each, self._n_rows))
            n = rows.stop - first
            room = self._pre.view(-1)[: n * self._n_latents].view(n, -1)
            centred = self._centred[self._ours][rows]
            pre = torch.addmm(self._full["b_enc"], centred, W_enc, out=room)
            found = self._candidates[0][rows], self._candidates[1][rows]
            topk_select(pre, self.k, out=found, config=self._select)
            every = mesh.gather(found[0], "latent")
            _keep_kernel[(n,)](
                keys_of(every),
                keys_of(found[0]),
                found[1],
                keys_of(values[rows]),
                indices[rows],
                self._starts[first:],
                self._row_ends[first:],
                self._firings[first:],
                n,
                self._k_all,
                mesh.latent_rank,
                K=self.k,
                BLOCK=power(self.k),
                RANKS=mesh.latent,
                ALL=power(mesh.latent * self.k),
            )
        self._gather(self._values, self._ours)
        self._gather(self._indices, self._ours)
        n_entries = self._values.numel()
        _count_kernel[(-(-n_entries // _COUNT_BLOCK),)](
            self._values,
            self._indices,
            self._local,
            self._index.count,
            self._rank,
            self._own.start,
            self.d_sae,
            n_entries,
            BLOCK=_COUNT_BLOCK,
        )

    def _index_latents(self) -> None:
        self._index.build(self._values, self._local, k=self.k, dead=self._dead)

    def _decode(self, x: Tensor) -> None:
        mesh, ours = self._mesh, self._ours
        code = self._values[ours], self._indices[ours], self._starts, self._full["W_dec"]
        b_dec, residual = self.parameters["b_dec"], self._residual[ours]
        decode = self.config.decode
        if mesh.latent == 1:
            decode_residual(
                *code,
                b_dec,
                x,
                residual,
                self._row_losses,
                scale=1 / self.batch_size,
                config=decode,
                ends=self._row_ends,
            )
        else:
            _decode(*code, None, None, self._partial, None, 1.0, decode, self._row_ends)
            mesh.reduce(self._partial, "latent")
            _residual_kernel[(self._n_rows,)](
                self._partial,
                b_dec,
                x,
                residual,
                self._row_losses,
                1 / self.batch_size,
                D=self.d_in,
                BLOCK=min(1_024, power(self.d_in)),
            )
        sums = torch.stack([self._row_losses.sum(), self._firings.sum() / self.batch_size])
        loss, l0 = mesh.reduce(sums, "data")
        self.loss.copy_(loss)
        self._l0 = l0
        self._gather(self._centred, self._ours)
        self._gather(self._residual, self._ours)


@triton.jit
@no_type_check
def _keep_kernel(
    every,
    found,
    found_latent,
    values,
    indices,
    starts,
    ends,
    firings,
    n_rows,
    k_all,
    rank,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
    ALL: tl.constexpr,
):
    # Of a row's candidates, K from each rank, those of this rank that are among the k_all largest
    # of all, the first of equal ones: to the front, and zeros behind them.
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, ALL)
    there = slot < RANKS * K
    at = (slot // K).to(tl.int64) * n_rows * K + row * K + slot % K
    keys = tl.where(there, key_of(tl.load(every + at, mask=there, other=0)), -1)
    high = tl.max(keys) + 1
    low = tl.minimum(high, 0)
    cut = search(keys, low, high, tl.minimum(k_all, RANKS * K))
    larger = tl.sum((keys > cut).to(tl.int32))
    before = tl.sum(((keys == cut) & (slot < rank * K)).to(tl.int32))
    tl.store(firings + row, tl.minimum(k_all, tl.sum((keys > 0).to(tl.int32))))
    own = tl.arange(0, BLOCK)
    mine = tl.load(found + row * K + own, mask=own < K, other=0)
    latent = tl.load(found_latent + row * K + own, mask=own < K, other=0)
    key = tl.where(own < K, key_of(mine), -1)
    equal = (key == cut).to(tl.int32)
    earlier = tl.cumsum(equal, axis=0) - equal
    kept = (key > cut) | ((equal > 0) & (earlier < k_all - larger - before))
    kept = kept & (key > 0)
    place = row * K + tl.cumsum(kept.to(tl.int32), axis=0) - 1
    n = tl.sum(kept.to(tl.int32))
    tl.store(values + place, mine, mask=kept)
    tl.store(indices + place, latent, mask=kept)
    empty = (own >= n) & (own < K)
    tl.store(values + row * K + own, tl.zeros([BLOCK], mine.dtype), mask=empty)
    tl.store(indices + row * K + own, tl.zeros([BLOCK], latent.dtype), mask=empty)
    tl.store(ends + row, tl.load(starts + row) + n)


@triton.jit
@no_type_check
def _count_kernel(
    values, indices, local, count, rank, first, n_own, n_entries, BLOCK: tl.constexpr
):
    # Each entry's place among those of its latent, where that is updated here.
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < n_entries
    latent = tl.load(indices + at, mask=there, other=0) - first
    # Asked so that NaN goes on, and is seen in what comes out.
    fires = tl.load(values + at, mask=there, other=0.0) != 0
    mine = there & fires & (latent >= 0) & (latent < n_own)
    place = tl.atomic_add(count + tl.where(mine, latent, 0), 1, mask=mine, sem="relaxed")
    tl.store(local + at, tl.where(mine, latent, 0), mask=there)
    tl.store(rank + at, tl.where(mine, place, -1), mask=there)


@triton.jit
@no_type_check
def _residual_kernel(partial, b_dec, x, out, loss, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    # What all have decoded, plus b_dec, less x; and its squares, `scale` times.
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, D, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < D
        error = tl.load(partial + row * D + column, mask=inside, other=0.0)
        error += tl.load(b_dec + column, mask=inside, other=0.0)
        error -= tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * D + column, error.to(out.dtype.element_ty), mask=inside)
        total += error * error
    tl.store(loss + row, tl.sum(total) * scale)
