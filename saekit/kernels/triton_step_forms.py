"""Fused steps of the kinds whose rows keep different numbers of latents: BatchTopK, mutual choice,
JumpReLU. What they have in common with TopK's is in `triton_step`.

Axes: batch, d_in, d_sae.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.kernels.auxk import room_for
from saekit.kernels.triton_batch_select import batch_topk_into
from saekit.kernels.triton_index import power
from saekit.kernels.triton_jump_select import JumpSearch, jump_fill, jump_search
from saekit.kernels.triton_step import FusedTopKStep

_LEAST_PLACES = 1 << 12


class _Answer:
    """Whole numbers that the device finds and the host needs to go on."""

    def __init__(self, n: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._held = torch.zeros(n, dtype=torch.int64, pin_memory=on_gpu)
        self._there = torch.cuda.Event() if on_gpu else None

    def ask(self, found: Int[Tensor, " n"]) -> None:
        self._held.copy_(found, non_blocking=True)
        if self._there is not None:
            self._there.record()

    def wait(self) -> list[int]:
        if self._there is not None:
            self._there.synchronize()
        return [int(number) for number in self._held]


class FusedBatchTopKStep(FusedTopKStep):
    """The same for BatchTopK: the k * batch_size largest entries of a batch are kept, or
    `n_kept`."""

    _RAGGED = True

    def __init__(self, *parameters: Tensor, n_kept: int | None = None, **options: Any) -> None:
        self._n_kept = n_kept or options["k"] * options["batch_size"]
        super().__init__(*parameters, **options)

    def _places(self) -> int:
        return self._n_kept

    @property
    def count(self) -> Int[Tensor, " d_sae"]:
        """Rows of the last batch on which each latent fired."""
        return self._index.count

    def _begin(self) -> None:
        self._offsets = torch.zeros(self.batch_size + 1, dtype=torch.int64, device=self.device)
        self._cut = torch.zeros(2, dtype=torch.int32, device=self.device)

    def _encode(self) -> None:
        assert self._rows is not None and self._offsets is not None
        W_enc = self._copies["W_enc_T"].t()
        pre = torch.addmm(self._copies["b_enc"], self._centred, W_enc, out=self._pre)
        batch_topk_into(
            pre,
            values=self._values,
            indices=self._indices,
            rows=self._rows,
            offsets=self._offsets,
            count=self._index.count,
            rank=self._rank,
            cut=self._cut,
        )


class FusedMutualChoiceStep(FusedBatchTopKStep):
    """BatchTopK with AuxK for latents that `auxk.weight` says, and with that weight. `weigh`, given
    on how many rows each latent fired, writes it, and returns how many have one. The host waits for
    that number, while the device decodes."""

    weigh: Callable[[Int[Tensor, " d_sae"]], Int[Tensor, ""]]

    def _begin(self) -> None:
        super()._begin()
        self._weighed = _Answer(1, self.device)
        # Which latents there are to revive is not known before the step.
        self._dead_count = None

    def _take(self, x: Tensor) -> None:
        self._room = 0
        self._launch(self._look, x)
        self._weighed.ask(self.weigh(self.count)[None])
        self._launch(self._decode, x)
        self._room = room_for(self._weighed.wait()[0], self.d_sae)
        self._launch(self._learn, x)


class FusedJumpReLUStep(FusedTopKStep):
    """The same for JumpReLU (`trainers.jumprelu`, penalty "l0"), whose thresholds learn, too.

    What threshold and window are is `jump`: thresholds are `level * jump[0]`, the window's half is
    `jump[1]`, and jump[2] weighs the penalty on what fires, by the batch. How many entries a batch
    keeps depends on the batch, so a step has two halves: `look(x)`, after which `l0` says how many
    fire a row, on the device, and `take()`, for which the host waits until it knows how many there
    are. `k` says about how many fire.
    """

    _RAGGED = True
    _DISTINCT = False  # a map would be large

    def __init__(self, *parameters: Tensor, factor: Tensor, half: Tensor, **options: Any) -> None:
        self.jump = torch.stack([factor, half, torch.zeros_like(half)]).float()
        super().__init__(*parameters, **options)

    def _places(self) -> int:
        return _LEAST_PLACES

    def _begin(self) -> None:
        self._found = JumpSearch.of(self.batch_size, self.d_sae, self.device)
        self._offsets, self._ends = self._found.offsets, self._found.ends
        self._firing = torch.zeros(self.d_sae, dtype=torch.int32, device=self.device)
        self._answer = _Answer(2, self.device)

    @property
    def l0(self) -> Float[Tensor, ""]:
        return self._found.totals[1] / self.batch_size

    def __call__(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
        self.look(x)
        return self.take()

    @torch.no_grad()
    def look(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Look for the entries of a batch that fire or move a threshold. Nothing changes yet."""
        self._batch = self._held(x)
        self._room = 0
        self._launch(self._search, self._batch)
        self._answer.ask(self._found.totals)

    def found(self) -> int:
        """How many entries there are; waits for the device."""
        return self._answer.wait()[0]

    @torch.no_grad()
    def take(self) -> Float[Tensor, ""]:
        """The step on the batch that was looked at; the loss, without penalty and AuxK."""
        n = self.found()
        held = self._values.numel()
        if not n <= held <= max(_LEAST_PLACES, 8 * n):
            self._make_places(max(_LEAST_PLACES, power(n)))
        if self._dead_count is not None:
            self._room = room_for(self._dead_count.bound(), self.d_sae)
        self._launch(self._rest, self._batch)
        return self.loss

    def _search(self, x: Tensor) -> None:
        self._prepare(x)
        W_enc = self._copies["W_enc_T"].t()
        torch.addmm(self._copies["b_enc"], self._centred, W_enc, out=self._pre)
        assert self.jump is not None
        jump_search(self._pre, self.parameters["level"], self.jump, self._found)

    def _rest(self, x: Tensor) -> None:
        assert self.jump is not None and self._rows is not None and self._firing is not None
        self._firing.zero_()
        jump_fill(
            self._pre,
            self.parameters["level"],
            self.jump,
            self._found,
            values=self._values,
            indices=self._indices,
            rows=self._rows,
            count=self._index.count,
            rank=self._rank,
            firing=self._firing,
        )
        self._index_latents()
        self._decode(x)
        self._learn(x)
