"""One training step of a TopK SAE in a few Triton kernels and one matrix product.

    pre = (x - b_dec) @ W_enc + b_enc,   z = topk(relu(pre)),   x_hat = z @ W_dec + b_dec
    loss = mean over the batch of |x - x_hat|^2, summed over d_in

What `torch.optim.Adam` does with all gradients of this loss, those of W_dec projected off its unit
rows before and the rows normalised after, as trainers.topk has it (without AuxK). Adam is dense: a
latent that did not fire moves, too, by the moments that it has.

The backward goes latent by latent. A latent's two rows of weights and their gradients are held in
registers, and its moments and weights are read and written once a step. Neither [d_sae, d_in]
gradients nor anything of shape [batch * k, d_in] exist.

Axes: batch, d_in, d_sae, k, chunk, program (of a kernel's launch), part (some rows' sum).
"""

# Triton has no types, and is not on every machine.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.distributed import ALONE
from saekit.errors import ConfigError
from saekit.kernels import triton_candidates
from saekit.kernels._choose import require_triton
from saekit.kernels.auxk import AuxKConfig, AuxKGradients, DeadCount, room_for
from saekit.kernels.triton_decode import (
    DecodeConfig,
    RowConfig,
    decode_candidates,
    decode_config,
    decode_residual,
    row_candidates,
    row_config,
)
from saekit.kernels.triton_index import HEAVY, LatentIndex, multiprocessors, power
from saekit.kernels.triton_select import (
    SelectConfig,
    select_candidates,
    select_config,
    topk_select,
)
from saekit.kernels.triton_step_kernels import (
    b_dec_kernel,
    centre_kernel,
    chunk_kernel,
    clip_kernel,
    column_sum_kernel,
    latent_kernel,
    schedule_kernel,
)

_CENTRE_BLOCK = 4_096
_RESIDUAL_PARTS = 64
_ENCODER_PARTS = 32
_BIAS_COLUMNS = 64
_SPLIT_ROWS = 8_192
_MOST_PARAMETERS = 5


@dataclass(frozen=True)
class StepConfig:
    """How each kernel goes about one shape."""

    select: SelectConfig
    decode: DecodeConfig
    row: RowConfig
    heavy: int = HEAVY
    """See `LatentIndex`."""


def step_config(d_in: int, d_sae: int, k: int, moments: torch.dtype = torch.float32) -> StepConfig:
    """What was quickest on an H200 for the three shapes of benchmarks/bench_step.py."""
    row = row_config(d_in, narrow=moments != torch.float32)
    return StepConfig(select_config(d_sae, k), decode_config(d_in, k), row)


def step_candidates(
    d_in: int, d_sae: int, k: int, moments: torch.dtype = torch.float32
) -> list[StepConfig]:
    """What an autotuner may try: the kernels do not depend on each other's choice."""
    base = step_config(d_in, d_sae, k, moments)
    return [
        *(replace(base, select=one) for one in select_candidates(d_sae, k)),
        *(replace(base, decode=one) for one in decode_candidates(d_in, k)),
        *(replace(base, row=one) for one in row_candidates(d_in)),
    ]


class FusedTopKStep:
    """Takes training steps: `step.lr.fill_(lr)`, then `step(x)`, which updates the parameters in
    place and returns the loss. Nothing waits for the device.

    W_enc_T is the trainer's W_enc transposed. `state` holds what `torch.optim.Adam` does of each
    parameter, under the parameter's name, and is taken as it is where it is given, so that an
    optimiser may share it; moments of W_enc_T are its shape. `since` and `fired` are those of
    `DeadLatents`. `clipped` counts the steps whose gradient was longer than `clip_norm`.

    precision: what is multiplied; "bfloat16" rounds x and the weights, and rounds pre-activations,
    values and the error.
    rows_at_once: pre-activations are made for so many rows at a time, rather than for the batch.
    auxk: adds the loss that revives dead latents; needs `since`.
    deterministic: the same bits from the same start.
    split_master: float32 weights are held as their bfloat16 copy and the 16 bits that it lacks,
    which saves reading and writing 2 of 26 bytes. The tensors that were given then have the
    weights' last values only after `write_back`.
    moments: bfloat16 halves what Adam's moments take and what reading and writing them costs. They
    are rounded up or down at random, with the chances that keep their means, because the steps of
    the second are smaller than bfloat16's. The same bits from the same start all the same.
    candidates: so many latents a row are chosen by a product in float8, and the k among them by
    one in bfloat16 (see `triton_candidates`); not given, all are looked at in `precision`.
    graph: from the second call on, the kernels are launched as one CUDA graph.

    Whoever changes a parameter between steps calls `take_over` after it.
    """

    _mesh = ALONE
    _RAGGED = False
    """Whether rows keep different numbers of latents."""
    _DISTINCT = True
    """Whether the index may hold a map of a row's places for each latent that has many entries."""
    _offsets: Tensor | None = None
    _ends: Tensor | None = None
    """Where rows begin, and where what fires of them ends; of a ragged code."""
    _firing: Tensor | None = None
    """How many of a latent's entries fire, where not all do."""
    jump: Tensor | None = None
    """Of JumpReLU: see `triton_step_forms`."""

    def __init__(
        self,
        W_enc_T: Float[Tensor, "d_sae d_in"],
        W_dec: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, " d_sae"],
        b_dec: Float[Tensor, " d_in"],
        *,
        k: int,
        batch_size: int,
        level: Float[Tensor, " d_sae"] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        precision: Literal["float32", "bfloat16"] = "bfloat16",
        state: Mapping[str, Mapping[str, Tensor]] | None = None,
        since: Int[Tensor, " d_sae"] | None = None,
        fired: Int[Tensor, " d_sae"] | None = None,
        auxk: AuxKConfig | None = None,
        rows_at_once: int | None = None,
        deterministic: bool = False,
        split_master: bool = False,
        moments: torch.dtype = torch.float32,
        candidates: int | None = None,
        graph: bool = False,
        config: StepConfig | None = None,
    ) -> None:
        self.parameters = {
            "W_enc_T": W_enc_T.detach(),
            "W_dec": W_dec.detach(),
            "b_enc": b_enc.detach(),
            "b_dec": b_dec.detach(),
        }
        if level is not None:
            self.parameters["level"] = level.detach()
        self.d_sae, self.d_in = W_dec.shape
        self.k, self.batch_size, self.device = k, batch_size, W_dec.device
        self.betas, self.eps, self.clip_norm = betas, eps, clip_norm
        self.split_master = split_master
        self.rows_at_once = min(rows_at_once or batch_size, batch_size)
        if self._RAGGED and self.rows_at_once < batch_size:
            raise ConfigError("rows_at_once cuts a batch that is selected from as a whole")
        self._moments, self._n_candidates = moments, candidates
        self._check(precision)
        self.config = config or step_config(self.d_in, self.d_sae, k, moments)
        self.state = self._state(state)
        if (since is None) != (fired is None):
            raise ConfigError("since and fired count the same thing: give both, or neither")
        if auxk is not None and since is None:
            raise ConfigError("auxk needs since, which says what is dead: give since and fired")
        self._dead = (since, fired, batch_size) if since is not None and fired is not None else None
        self._auxk, self._room, self._dead_count = auxk, 0, None
        if auxk is not None and since is not None:
            self._dead_count = DeadCount(since, auxk.after, batch_size, self._mesh)

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.lr = new(dtype=torch.float64)
        """Of the next step."""
        self.loss = new()
        """Of the last step, without AuxK."""
        self.auxk_loss = new()
        self.clipped = new(dtype=torch.int64)
        low = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self._copies = dict(self.parameters)
        if precision == "bfloat16":
            for name in ("W_enc_T", "W_dec", "b_enc"):
                self._copies[name] = self._new_copy(name)
        self._lower = {
            name: torch.empty_like(self.parameters[name], dtype=torch.int16)
            for name in ("W_enc_T", "W_dec")
            if split_master
        }
        d_in, d_sae = self.d_in, self.d_sae
        self._W_low: Tensor | None = None
        self._W_scale: Tensor | None = None
        if candidates is not None:
            self._W_low = new(d_sae, d_in, dtype=torch.float8_e4m3fn)
            self._W_scale = new(d_sae)
            self._x_low = new(batch_size, d_in, dtype=torch.float8_e4m3fn)
            self._x_scale = new(batch_size)
            self._candidates = (
                new(self.rows_at_once, candidates, dtype=low),
                new(self.rows_at_once, candidates, dtype=torch.int32),
            )
            slices = -(-d_in // triton_candidates.columns(d_in))
            self._scores = new(slices, self.rows_at_once, candidates)
        self.take_over()
        row = self.config.row
        sms = multiprocessors(self.device)
        self._programs = sms * row.programs
        self._heavy_programs = sms * max(1, row.programs // 2)
        self._low, self._deterministic = low, deterministic
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
        self._compiled: set[tuple[str, int]] = set()
        self._make_places(self._places())
        self._pre = new(self.rows_at_once, d_sae, dtype=low)
        self._centred = new(batch_size, d_in, dtype=low)
        self._residual = new(batch_size, d_in, dtype=low)
        self._losses = new(-(-d_in // self.config.decode.columns), batch_size)
        self._pre_bias = new(self._programs, d_in)
        self._parts = new(_RESIDUAL_PARTS + _ENCODER_PARTS, d_in)
        self._squares = new(self._programs + -(-d_in // _BIAS_COLUMNS))
        # log beta_1, log beta_2, weight_decay; then what they make of the step and the rate.
        logs = [math.log(beta) if beta > 0 else -math.inf for beta in betas]
        self._constants = torch.tensor([*logs, weight_decay], dtype=torch.float64).to(self.device)
        self._hyper = torch.ones(5, device=self.device)
        self._revival: dict[int, AuxKGradients] = {}
        self._wants_graph = graph and self.device.type == "cuda"
        self._x: Tensor | None = None
        self._begin()

    def _new_copy(self, name: str) -> Tensor:
        """Memory for a parameter's copy in bfloat16."""
        return torch.empty_like(self.parameters[name], dtype=torch.bfloat16)

    def _begin(self) -> None:
        """What a form of its own needs beside."""

    def _places(self) -> int:
        """Entries of a code that there is room for."""
        return self.batch_size * self.k

    def _make_places(self, n_entries: int) -> None:
        """Room for so many entries, and for what is summed up of them."""
        self._index = LatentIndex(
            self.d_sae,
            n_entries,
            self.device,
            deterministic=self._deterministic,
            distinct=self._DISTINCT * self.batch_size,
            ragged=self._RAGGED,
            heavy=self.config.heavy,
        )
        shape = (n_entries,) if self._RAGGED else (self.batch_size, self.k)
        self._values = torch.zeros(shape, dtype=self._low, device=self.device)
        self._indices = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self._rank = self._index.rank.view(shape)
        self._rows = torch.zeros_like(self._indices) if self._RAGGED else None
        n_chunks = self._index.n_chunks
        self._chunk_rows = torch.zeros(n_chunks, 2, self.d_in, device=self.device)
        self._chunk_sums = torch.zeros(n_chunks, 4, device=self.device)
        self._graphs.clear()

    def _check(self, precision: str) -> None:
        W_dec = self.parameters["W_dec"]
        require_triton(W_dec.device, W_dec.dtype, self.d_in)
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32 or not parameter.is_contiguous():
                raise ConfigError(
                    f"{name} must be float32, and contiguous as the fused step is given it: it is "
                    f"{parameter.dtype}, with strides {parameter.stride()}"
                )
        if self._n_candidates is not None:
            if precision == "float32" or not triton_candidates.served(W_dec.device, self.d_in):
                raise ConfigError(
                    "candidates by float8 need precision 'bfloat16', a GPU of compute capability "
                    f"{triton_candidates.CAPABILITY[0]}.{triton_candidates.CAPABILITY[1]} and a "
                    f"d_in ({self.d_in}) that is a multiple of 16: leave them out"
                )
            if not self.k <= self._n_candidates <= self.d_sae:
                raise ConfigError(
                    f"candidates={self._n_candidates} must lie in k={self.k}..d_sae={self.d_sae}"
                )
        if precision == "float32" and self.split_master:
            raise ConfigError(
                "split_master makes the bfloat16 copy a part of the weights, and precision is "
                "'float32': leave it out"
            )
        if not 0 < self.k <= self.d_sae:
            raise ConfigError(f"k={self.k} must lie in 1..d_sae={self.d_sae}")
        if not 0 < self._places() < 2**31:
            raise ConfigError(
                f"batch_size={self.batch_size} with k={self.k} makes {self._places()} entries, and "
                "the fused step can count 1 to 2^31 - 1: take smaller batches"
            )

    def _state(
        self, given: Mapping[str, Mapping[str, Tensor]] | None
    ) -> dict[str, dict[str, Tensor]]:
        state: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.parameters.items():
            slot = dict((given or {}).get(name, {}))
            # torch's plain Adam counts on the CPU.
            slot["step"] = slot.get("step", torch.zeros(())).to(self.device)
            for moment in ("exp_avg", "exp_avg_sq"):
                dtype = self._moments if parameter.ndim == 2 else parameter.dtype
                slot.setdefault(moment, torch.zeros_like(parameter, dtype=dtype))
                # As the count above: what comes from elsewhere, or in another type, is held here
                # and no longer shared.
                slot[moment] = held = slot[moment].to(dtype)
                if held.shape != parameter.shape or not held.is_contiguous():
                    raise ConfigError(
                        f"{moment} of {name} must lie in memory as {name} does: its shape is "
                        f"{tuple(held.shape)}, with strides {held.stride()}"
                    )
            state[name] = slot
        return state

    def parts(self, x: Float[Tensor, "batch d_in"]) -> dict[str, Callable[[], object]]:
        """The kernels that a part of the config is for, to be timed after a step on `x`."""
        return {
            "select": self._encode_again,
            "decode": lambda: self._decode(x),
            "row": self._update_latents,
        }

    def _encode_again(self) -> None:
        self._index.clear()
        topk_select(
            self._pre,
            self.k,
            out=(self._values[: len(self._pre)], self._indices[: len(self._pre)]),
            count=self._index.count,
            rank=self._rank[: len(self._pre)],
            config=self.config.select,
        )

    def code(self) -> tuple[Int[Tensor, "..."], Int[Tensor, " offsets"] | None]:
        """Which latents the last batch kept: indices and offsets, see `reference`."""
        if self._offsets is None:
            return self._indices.long(), None
        return self._indices[: int(self._offsets[-1])].long(), self._offsets.clone()

    def smallest(self) -> tuple[Float[Tensor, ""], Bool[Tensor, ""]]:
        """The smallest entry above 0 that the last batch kept, and whether it kept any."""
        kept = self._rank >= 0
        return self._values.float().masked_fill(~kept, torch.inf).min(), kept.any()

    @property
    def l0(self) -> Float[Tensor, ""]:
        """Latents that fired a row, on the mean over the last batch."""
        return self._index.totals[0] / self.batch_size

    @torch.no_grad()
    def take_over(self) -> None:
        """After the parameters, or `since`, were changed from outside."""
        if self._dead_count is not None:
            self._dead_count.forget()
        for name, copy in self._copies.items():
            if name in self._lower:
                for first in range(0, self.d_sae, _SPLIT_ROWS):
                    rows = slice(first, first + _SPLIT_ROWS)
                    bits = self.parameters[name][rows].view(torch.int32)
                    high = (bits + 0x8000) >> 16
                    copy[rows].view(torch.int16).copy_(high)
                    self._lower[name][rows] = bits - (high << 16)
            elif copy is not self.parameters[name]:
                copy.copy_(self.parameters[name])
        if self._W_low is not None and self._W_scale is not None:
            triton_candidates.quantise(self.parameters["W_enc_T"], self._W_low, self._W_scale)

    @torch.no_grad()
    def write_back(self) -> None:
        """Give the tensors of the parameters their last values, where `split_master` holds them
        elsewhere."""
        for name, low in self._lower.items():
            for first in range(0, self.d_sae, _SPLIT_ROWS):
                rows = slice(first, first + _SPLIT_ROWS)
                high = self._copies[name][rows].view(torch.int16).to(torch.int32)
                self.parameters[name][rows].view(torch.int32).copy_((high << 16) + low[rows])

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
        """Takes a step; the loss is of before it, and is written over by the next."""
        x = self._held(x)
        if self._dead_count is not None:
            self._room = room_for(self._dead_count.bound(), self.d_sae)
        self._take(x)
        return self.loss

    def _held(self, x: Tensor) -> Tensor:
        """The batch where a graph finds it."""
        if x.shape != (self.batch_size, self.d_in):
            raise ConfigError(
                f"the fused step was made for batches of ({self.batch_size}, {self.d_in}), and "
                f"this one is {tuple(x.shape)}"
            )
        if not self._wants_graph:
            return x.contiguous()
        if self._x is None or self._x.dtype != x.dtype:
            self._x = torch.empty_like(x, memory_format=torch.contiguous_format)
            self._graphs.clear()
        return self._x.copy_(x)

    def _take(self, x: Tensor) -> None:
        self._launch(self._step, x)

    def _launch(self, part: Callable[[Tensor], None], x: Tensor) -> None:
        """A part of a step, as a graph from the second time on."""
        key = part.__name__, self._room
        if key in self._graphs:
            self._graphs[key].replay()
        elif key not in self._compiled or not self._wants_graph:
            # Kernels are compiled, and tensors made, before any of it is captured.
            self._compiled.add(key)
            part(x)
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                part(x)
            self._graphs[key] = graph
            graph.replay()

    def _step(self, x: Tensor) -> None:
        self._look(x)
        self._decode(x)
        self._learn(x)

    def _look(self, x: Tensor) -> None:
        self._prepare(x)
        self._encode()
        self._index_latents()

    def _learn(self, x: Tensor) -> None:
        self._revive()
        self._schedule()
        self._share_heavy()
        if self.clip_norm is not None:
            self._update_latents(norm=True)
            self._update_b_dec(norm=True)
            self._clip()
        self._update_latents()
        self._update_b_dec()

    def _schedule(self) -> None:
        """The step is taken from here on."""
        steps: list[Tensor | None] = [slot["step"] for slot in self.state.values()]
        steps += [None] * (_MOST_PARAMETERS - len(steps))
        schedule_kernel[(1,)](*steps, self.lr, self._constants, self._hyper, num_warps=1)

    def _prepare(self, x: Tensor) -> None:
        self._index.clear()
        if self._n_candidates is not None:
            triton_candidates.centre(
                x, self.parameters["b_dec"], self._centred, self._x_low, self._x_scale
            )
            return
        centre_kernel[(-(-x.numel() // _CENTRE_BLOCK),)](
            x,
            self.parameters["b_dec"],
            self._centred,
            x.numel(),
            D=self.d_in,
            BLOCK=_CENTRE_BLOCK,
            num_warps=8,
        )

    def _encode(self) -> None:
        if self._n_candidates is not None:
            self._encode_by_candidates()
            return
        W_enc = self._copies["W_enc_T"].t()
        for first in range(0, self.batch_size, self.rows_at_once):
            rows = slice(first, first + self.rows_at_once)
            centred = self._centred[rows]
            pre = torch.addmm(self._copies["b_enc"], centred, W_enc, out=self._pre[: len(centred)])
            topk_select(
                pre,
                self.k,
                out=(self._values[rows], self._indices[rows]),
                count=self._index.count,
                rank=self._rank[rows],
                config=self.config.select,
            )

    def _encode_by_candidates(self) -> None:
        W_low, W_scale = self._W_low, self._W_scale
        assert W_low is not None and W_scale is not None
        for first in range(0, self.batch_size, self.rows_at_once):
            rows = slice(first, first + self.rows_at_once)
            low, n = self._x_low[rows], len(self._x_low[rows])
            pre, bias = self._pre[:n], self._copies["b_enc"]
            triton_candidates.product(low, self._x_scale[rows], W_low, W_scale, bias, pre)
            values, indices = (held[:n] for held in self._candidates)
            choice = triton_candidates.choice_of(self.d_sae, values.shape[1])
            topk_select(pre, values.shape[1], out=(values, indices), config=choice)
            scores = self._scores if n == self.rows_at_once else self._scores[:, :n].contiguous()
            triton_candidates.rescore(self._centred[rows], self._copies["W_enc_T"], indices, scores)
            triton_candidates.reselect(
                scores,
                bias,
                indices,
                values=self._values[rows],
                indices=self._indices[rows],
                count=self._index.count,
                rank=self._rank[rows],
            )

    def _index_latents(self) -> None:
        k = 0 if self._RAGGED else self.k
        self._index.build(
            self._values,
            self._indices,
            k=k,
            rows=self._rows,
            dead=self._dead,
            firing=self._firing,
        )

    def _decode(self, x: Tensor) -> None:
        decode_residual(
            self._values,
            self._indices,
            self._offsets,
            self._copies["W_dec"],
            self.parameters["b_dec"],
            x,
            self._residual,
            self._losses,
            scale=1 / self.batch_size,
            config=self.config.decode,
            ends=self._ends,
        )
        torch.sum(self._losses, (0, 1), out=self.loss)

    def _revive(self) -> None:
        if self._auxk is None:
            return
        if self._room == 0:
            self.auxk_loss.zero_()
            return
        assert self._dead is not None
        if self._room not in self._revival:
            self._revival[self._room] = AuxKGradients(
                self._auxk, self._dead[0], self.d_in, self._room, self._mesh
            )
        copies = self._copies
        self._revival[self._room].compute(
            self._centred,
            self._residual,
            self.loss,
            copies["W_enc_T"],
            copies["W_dec"],
            copies["b_enc"],
            self.auxk_loss,
        )

    def _share_heavy(self) -> None:
        chunk_kernel[(self._heavy_programs,)](
            *self._masters("W_dec"),
            *self._index.entries(),
            *self._index.chunks(),
            self._residual,
            self._centred,
            self._chunk_rows,
            self._chunk_sums,
            self._level(),
            self.jump,
            **self._row_options(),
        )

    def _update_latents(self, norm: bool = False) -> None:
        enc, dec, bias = (self.state[name] for name in ("W_enc_T", "W_dec", "b_enc"))
        # The gradient of b_dec needs W_enc of before the step.
        sums = norm or self.clip_norm is None
        aux = self._revival.get(self._room)
        latent_kernel[(self._programs,)](
            *self._masters("W_dec"),
            dec["exp_avg"],
            dec["exp_avg_sq"],
            *self._masters("W_enc_T"),
            enc["exp_avg"],
            enc["exp_avg_sq"],
            self.parameters["b_enc"],
            self._copies["b_enc"],
            bias["exp_avg"],
            bias["exp_avg_sq"],
            *self._index.entries(),
            self._index.start,
            self._index.count,
            self._index.first_chunk,
            self._residual,
            self._centred,
            self._chunk_rows,
            self._chunk_sums,
            self._pre_bias,
            self._squares,
            self._hyper,
            None if aux is None else aux.slot,
            None if aux is None else aux.rows,
            None if aux is None else aux.bias,
            self._W_low,
            self._W_scale,
            self._level(),
            *self._level_moments(),
            self.jump,
            self.d_sae,
            2 / self.batch_size,
            *self._adam(),
            HEAVY=self.config.heavy,
            COPY=self._copies["b_enc"] is not self.parameters["b_enc"],
            NORM=norm,
            SUMS=sums,
            AUX=aux is not None,
            **self._row_options(),
        )

    def _update_b_dec(self, norm: bool = False) -> None:
        columns = min(128, power(self.d_in))
        if norm or self.clip_norm is None:
            for sums, first, n_parts in (
                (self._residual, 0, _RESIDUAL_PARTS),
                (self._pre_bias, _RESIDUAL_PARTS, _ENCODER_PARTS),
            ):
                column_sum_kernel[(-(-self.d_in // columns), n_parts)](
                    sums,
                    self._parts[first:],
                    len(sums),
                    -(-len(sums) // n_parts),
                    D=self.d_in,
                    ROWS=16,
                    COLUMNS=columns,
                )
            self._mesh.reduce(self._parts[_RESIDUAL_PARTS:], "all")
        slot = self.state["b_dec"]
        b_dec_kernel[(-(-self.d_in // _BIAS_COLUMNS),)](
            self._parts,
            self.parameters["b_dec"],
            slot["exp_avg"],
            slot["exp_avg_sq"],
            self._squares[self._programs :],
            self._hyper,
            2 / self.batch_size,
            *self._adam(),
            D=self.d_in,
            ADDED=_RESIDUAL_PARTS,
            PARTS=_RESIDUAL_PARTS + _ENCODER_PARTS,
            ROWS=32,
            COLUMNS=_BIAS_COLUMNS,
            NORM=norm,
        )

    def _clip(self) -> None:
        self._mesh.reduce(self._squares[: self._programs], "all")
        clip_kernel[(1,)](
            self._squares, self._hyper, self.clipped, len(self._squares), self.clip_norm, BLOCK=1024
        )

    def _masters(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Of a matrix: float32 weights, their copy in what is multiplied, the copy's lower bits."""
        copy = self._copies[name]
        if self.split_master:
            return copy, copy.view(torch.int16), self._lower[name]
        return self.parameters[name], copy, copy

    def _level(self) -> Tensor | None:
        """Of the thresholds that are learnt, where a form has any."""
        return self.parameters.get("level")

    def _level_moments(self) -> tuple[Tensor | None, Tensor | None]:
        slot = self.state.get("level", {})
        return slot.get("exp_avg"), slot.get("exp_avg_sq")

    def _adam(self) -> tuple[float, float, float, float, float]:
        # 1 - beta from the full beta: a kernel's arguments are float32.
        one, two = self.betas
        return one, 1 - one, two, 1 - two, self.eps

    def _row_options(self) -> dict[str, int | None]:
        row = self.config.row
        return {
            "D": self.d_in,
            "BLOCK": power(self.d_in),
            "STAGES": row.n_stages,
            "SPLIT": self.split_master,
            "JUMP": self.jump is not None,
            "num_warps": row.n_warps,
            "maxnreg": row.max_registers,
        }
