"""One training step of other libraries, each as its own trainer takes it, in its fastest mode.

For `bench`, which times those that are installed in its own process, by its own clock. Only what a
trainer does with a batch is here: no language model, no data, no logging service. A trainer's
AuxK is on where it is by default; it costs next to nothing while no latent is dead, and in the
steps of a benchmark none has been idle for long enough.

Batches are [batch_size, d_in], float32, on the device that everything is made on. Autocast is to
bfloat16; weights and Adam's moments are float32 everywhere.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

Following = Callable[[], Tensor]
"""Gives the next batch."""
Step = Callable[[], None]
Facts = dict[str, Any]
"""Plain values for a line of results. `loss` is there, after a step, where the library itself
reads it back at every step: that waits for the GPU, and is part of the step."""
Make = Callable[[], tuple[Step, Facts]]
Peer = tuple[str, str, Make]
"""Name; version and mode; what builds the SAE and its optimiser, and gives the step."""

RUN = 100_000
"""Steps of the run that the schedules of learning rates are for."""

_LONG_AGO = 100_000_000
"""Tokens, or batches, since what is dead has fired: more than any library waits."""

OPTIONAL = ("nnsight", "wandb")
"""Imported by peers for other ends than a step: language models, and a logging service."""


@dataclass(frozen=True)
class _Sizes:
    d_in: int
    d_sae: int
    k: int
    batch_size: int
    n_dead: int = 0
    """Latents, the first, that were dead before the first step: they never fire, and the library's
    own auxiliary loss is on."""
    autocast: bool = True


def peers(
    d_in: int,
    d_sae: int,
    k: int,
    batch_size: int,
    following: Following,
    *,
    n_dead: int = 0,
    autocast: bool = True,
) -> Iterator[Peer]:
    """Steps of TopK SAEs. What `make` imports, builds or runs may raise. The first `n_dead` latents
    are dead from the start."""
    sizes = _Sizes(d_in, d_sae, k, batch_size, n_dead, autocast)
    made_in = "bf16 autocast" if autocast else "float32"
    if version := _installed("eai-sparsify"):
        for optimiser in ("signum", "fused Adam"):
            mode = f"{version}, {made_in}, {optimiser}"
            yield "sparsify", mode, partial(_sparsify, sizes, following, optimiser)
    if version := _installed("dictionary-learning"):
        mode = f"{version}, {made_in}"
        yield "dictionary_learning", mode, partial(_dictionary_learning, sizes, following)
    if version := _installed("sae-lens"):
        for compiled in (False, True):
            mode = f"{version}, {made_in}" + ", compiled" * compiled
            yield "sae-lens", mode, partial(_sae_lens, sizes, following, compiled)


def pursuit(
    d_in: int, d_sae: int, steps: int, batch_size: int, following: Following
) -> Iterator[Peer]:
    """Steps of an SAE that picks its latents by matching pursuit, `steps` of them, each a product
    with the whole dictionary. Takes the first `batch_size` rows of a batch."""
    if version := _installed("overcomplete"):
        sizes = _Sizes(d_in, d_sae, steps, batch_size)
        mode = f"{version}, bf16 autocast"
        yield "overcomplete", mode, partial(_overcomplete, sizes, following)


def _sparsify(sizes: _Sizes, following: Following, optimiser: str) -> tuple[Step, Facts]:
    """`Trainer.fit`: what its hook does with a batch, and its loop after that."""
    coder = _load("sparsify.sparse_coder")
    config = _load("sparsify.config")
    x = following()
    sae = coder.SparseCoder(
        sizes.d_in,
        config.SparseCoderConfig(num_latents=sizes.d_sae, k=sizes.k),
        x.device,
        dtype=torch.float32,
    )
    sae.b_dec.data = x.mean(0)
    scale = (sizes.d_sae / 2**14) ** 0.5
    schedule: Any = None
    if optimiser == "signum":
        descent = _load("sparsify.sign_sgd").SignSGD(sae.parameters(), lr=5e-3 / scale)
        update = _load("schedulefree").ScheduleFreeWrapper(descent, momentum=0.95)
        update.train()
    else:
        # Its own Adam is of 8 bits where bitsandbytes is installed, and torch's default elsewhere.
        update = torch.optim.Adam(sae.parameters(), lr=2e-4 / scale, fused=True)
        linear = _load("transformers").get_linear_schedule_with_warmup
        schedule = linear(update, 1_000, RUN)
    since = torch.zeros(sizes.d_sae, dtype=torch.long, device=x.device)
    fired = torch.zeros(sizes.d_sae, dtype=torch.bool, device=x.device)
    _silence(sizes, sae.encoder.weight, sae.encoder.bias)
    since[: sizes.n_dead] = _LONG_AGO
    # Off by default in its trainer, whose help names 1/32.
    alpha = 1 / 32 if sizes.n_dead else 0.0
    facts = _facts("eai-sparsify", "schedulefree") | {
        "decoder": coder.decoder_impl.__name__,
        "auxk": alpha > 0,
        "clip_norm": None,
        "unit_rows": True,
    }

    def step() -> None:
        x = following()
        with _tf32():
            sae.set_decoder_norm_to_unit_norm()
            variance = (x - x.mean(0)).pow(2).sum()
            dead = since > _LONG_AGO // 2 if alpha else None
            with torch.autocast(x.device.type, torch.bfloat16, enabled=sizes.autocast):
                out = sae(x=x, y=x, dead_mask=dead, total_variance=variance)
            fired[out.latent_indices.flatten()] = True
            facts["loss"] = float(out.fvu.detach())
            (out.fvu + alpha * out.auxk_loss).backward()
            sae.remove_gradient_parallel_to_decoder_directions()
            update.step()
            update.zero_grad()
            if schedule is not None:
                schedule.step()
            since.add_(len(x))
            since[fired] = 0
            fired.zero_()

    return step, facts


def _dictionary_learning(sizes: _Sizes, following: Following) -> tuple[Step, Facts]:
    """`trainSAE` with `autocast_dtype=torch.bfloat16`. Its estimate of a threshold begins after a
    thousand steps."""
    trainers = _load("dictionary_learning.trainers.top_k")
    device = following().device
    with device:  # It would draw its weights on the CPU, which takes long.
        trainer = trainers.TopKTrainer(
            steps=RUN,
            activation_dim=sizes.d_in,
            dict_size=sizes.d_sae,
            k=sizes.k,
            layer=0,
            lm_name="given rows",
            device=str(device),
        )
    _silence(sizes, trainer.ae.encoder.weight, trainer.ae.encoder.bias)
    trainer.num_tokens_since_fired[: sizes.n_dead] = _LONG_AGO
    facts = _facts("dictionary-learning") | {
        "auxk": True,
        "clip_norm": 1.0,
        "unit_rows": True,
    }
    number = count()

    def step() -> None:
        x = following().to(torch.bfloat16 if sizes.autocast else torch.float32)
        with torch.autocast(device.type, torch.bfloat16, enabled=sizes.autocast):
            facts["loss"] = trainer.update(next(number), x)

    step()  # The first also looks for the median of the batch, for the bias.
    return step, facts


def _sae_lens(sizes: _Sizes, following: Following, compiled: bool) -> tuple[Step, Facts]:
    """`SAETrainer.fit`, with the flags `autocast` and `compile_sae` of its runner."""
    topk = _load("sae_lens.saes.topk_sae")
    training = _load("sae_lens.training.sae_trainer")
    config = _load("sae_lens.config")
    device = str(following().device)
    sae = topk.TopKTrainingSAE(
        topk.TopKTrainingSAEConfig(d_in=sizes.d_in, d_sae=sizes.d_sae, k=sizes.k, device=device)
    )
    cfg = config.SAETrainerConfig(
        total_training_samples=RUN * sizes.batch_size,
        train_batch_size_samples=sizes.batch_size,
        lr_end=3e-5,  # a tenth of its default, as its runner sets it
        device=device,
        autocast=sizes.autocast,
    )
    trainer = training.SAETrainer(cfg, sae, iter(()))
    _silence(sizes, sae.W_enc.T, sae.b_enc)
    trainer.n_forward_passes_since_fired[: sizes.n_dead] = _LONG_AGO
    if compiled:
        torch.compiler.reset()  # or it would compile a second shape for shapes that vary
        sae.training_forward_pass = torch.compile(sae.training_forward_pass)

    def step() -> None:
        trainer.step(following())
        trainer.n_training_steps += 1

    return step, _facts("sae-lens", "transformer-lens") | {
        "auxk": True,
        "clip_norm": 1.0,
        "unit_rows": False,
    }


@torch.no_grad()
def _silence(sizes: _Sizes, W_enc_T: Tensor, b_enc: Tensor) -> None:
    """The latents that are to be dead are below 0 on every row."""
    W_enc_T[: sizes.n_dead] *= 0.01
    b_enc[: sizes.n_dead] = -1


def _overcomplete(sizes: _Sizes, following: Following) -> tuple[Step, Facts]:
    """`train_sae` without its monitoring, under autocast; `train_sae_amp` would have float16 and
    scaled losses."""
    matplotlib = _load("matplotlib")
    # Its plots ask at import for a function that newer versions of matplotlib have elsewhere.
    maps = getattr(matplotlib.cm, "get_cmap", matplotlib.colormaps.get_cmap)
    with patch.object(matplotlib.cm, "get_cmap", maps, create=True):
        modules = _load("overcomplete.sae.mp_sae")
    trackers = _load("overcomplete.sae.trackers")
    device = following().device
    sae = modules.MpSAE(sizes.d_in, sizes.d_sae, k=sizes.k, device=str(device))
    sae.train()
    update = torch.optim.Adam(sae.parameters(), lr=5e-4)
    dead = trackers.DeadCodeTracker(sizes.d_sae, device)

    def step() -> None:
        x = following()[: sizes.batch_size]
        update.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            _, z, x_hat = sae(x)
            loss = (x - x_hat).square().mean()
        dead.update(z)
        loss.backward()
        nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        update.step()

    return step, _facts("overcomplete") | {"auxk": False, "clip_norm": 1.0, "unit_rows": True}


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        log.warning("%s is not installed, and left out", package)
        return None


def _facts(*packages: str) -> Facts:
    return {"peer_versions": {name: importlib.metadata.version(name) for name in packages}}


@contextmanager
def _tf32() -> Iterator[None]:
    """As sparsify sets it for the whole process."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _load(name: str) -> Any:
    """Import a module of a peer. In place of those in OPTIONAL that are not installed it finds
    empty ones, which nothing else gets to see."""
    finder = _Absent()
    sys.meta_path.append(finder)  # the last to be asked
    try:
        return importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)
        for stub in finder.made:
            sys.modules.pop(stub, None)


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self) -> None:
        self.made: list[str] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in OPTIONAL:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        self.made.append(spec.name)
        return MagicMock(name=spec.name, __spec__=spec, __path__=[], __name__=spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
