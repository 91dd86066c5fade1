"""What every evaluation shares: its config, the check that SAE and cache belong together, and
`evaluate`.

Axes: row (activations that the token mask keeps), d (their width).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit import checkpoint
from saekit.activations_cache.config import DTYPES
from saekit.activations_cache.job import resolve_device
from saekit.activations_cache.model import LanguageModel
from saekit.activations_cache.store import ActivationCache
from saekit.config import Config
from saekit.distributed import ALONE, Mesh
from saekit.errors import CacheError, ConfigError, SaekitError
from saekit.evals import _kinds
from saekit.progress import bar
from saekit.results import EvalResult, Metric, versions
from saekit.sae import SAE


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Config):
    """Which rows an evaluation looks at. One mask serves all of its numbers."""

    split: Literal["train", "test", "all"] = "test"
    """Documents to look at: "test" are those held out from training."""

    exclude: tuple[str, ...] = ("special",)
    """Kinds of token left out of every number (see the cache's masks)."""

    max_rows: int = 400_000
    """Activations to look at, at most: the first of the split."""

    batch_size: int = 4096
    """Activations at once; results do not depend on it, up to fp32 rounding."""

    device: str = "auto"
    """Where SAE and model run: "auto" is a GPU where there is one."""

    def __post_init__(self) -> None:
        for name in ("max_rows", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ResampledConfig(EvalConfig):
    """Of an evaluation whose numbers have intervals (see `_resample`)."""

    n_bootstrap: int = 1000
    """Resamples of the documents (of a task's prompts) that intervals are taken from; 0 for
    none."""

    seed: int = 0
    """Of what is drawn at random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_bootstrap < 0:
            raise ConfigError(
                f"n_bootstrap={self.n_bootstrap} must not be negative; 0 leaves intervals out"
            )


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What an evaluation hands to `evaluate`, which adds where it comes from."""

    metrics: dict[str, Metric]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


class Eval(ABC):
    """One evaluation of one SAE. A module of this folder offers a subclass as `EVAL`."""

    Config: ClassVar[type[EvalConfig]]
    NORMALISED: ClassVar[bool] = False
    """Whether it is right for SAEs that normalise each row, whose latents are in units of their
    own row, so that W_enc and W_dec alone do not say what they read and add."""
    SHARES_ROWS: ClassVar[bool] = False
    """Whether several processes can look at a part of the rows each. Each class says so for itself:
    what one that is built on it adds may need all rows."""

    def __init__(
        self,
        cfg: EvalConfig,
        sae: SAE,
        cache: ActivationCache,
        hook: str,
        *,
        out: Path | None = None,
        progress: bool = False,
        mesh: Mesh = ALONE,
    ) -> None:
        self.cfg = cfg
        self.mesh = mesh
        self.device = resolve_device(cfg.device)
        self.given = sae
        """The SAE as it was given: what results are of."""
        self.sae = sae.to(self.device, torch.float32)
        self.cache = cache
        self.hook = hook
        self.out = out
        """Folder of the results, for an evaluation that has a format of its own and writes it as it
        goes; None where nothing is to be kept."""
        self.progress = progress

    @abstractmethod
    def run(self) -> Findings:
        """Look, and report. Called under `torch.no_grad`, with an SAE that fits cache and hook."""

    @classmethod
    def misfit(cls, cache: ActivationCache, hook: str) -> str | None:
        """Why this evaluation says nothing about SAEs of this cache and hook; None where it does.

        For one that is of some hooks or caches alone: `saekit eval all` then leaves it out.
        """
        return None

    def batches(self) -> Iterator[Float[Tensor, "row d"]]:
        """The activations that the mask keeps, at most `max_rows`, in stored order; of several
        processes, this one's.

        Raises CacheError where there are none.
        """
        ours = self.ours(self.rows())
        with bar("activations", sum(map(len, ours)), shown=self.progress) as shown:
            for some in ours:
                yield self.cache.rows(self.hook, some).to(self.device)
                shown.advance(len(some))

    def ours(self, rows: Int[Tensor, " row"]) -> list[Int[Tensor, " part"]]:
        """Of something of every row, this process's batches: an empty one at least."""
        batches = torch.split(rows, self.cfg.batch_size)
        first, stop = self._share(len(rows))
        return list(batches[first:stop]) or [rows[:0]]

    def before(self, n: int) -> int:
        """How many of n rows lie before the batches that `ours` gives of them."""
        return min(n, self._share(n)[0] * self.cfg.batch_size)

    def _share(self, n: int) -> tuple[int, int]:
        """Numbers of this process's batches of n rows: the first, and that behind the last."""
        count, rank = -(-n // self.cfg.batch_size), self.mesh.data_rank
        return count * rank // self.mesh.data, count * (rank + 1) // self.mesh.data

    def rows(self) -> Int[Tensor, " row"]:
        """Which rows of the cache `batches` gives, those of all processes.

        Raises CacheError where there are none.
        """
        return self._index

    @cached_property
    def _index(self) -> Int[Tensor, " row"]:
        cfg = self.cfg
        index = self.cache.indices(cfg.split, cfg.exclude)[: cfg.max_rows]
        if len(index) == 0:
            raise CacheError(
                f"split '{cfg.split}' of {self.cache.url} has no rows outside "
                f"{list(cfg.exclude)}; choose another split, or harvest more documents"
            )
        return index

    def documents(self) -> Int[Tensor, " row"]:
        """Of each of those rows."""
        return self.cache.take("document", self.rows()).long().to(self.device)

    def load_model(self) -> LanguageModel:
        """The language model that the cache was harvested from, in the precision it ran in then.

        Raises CacheError where another model now goes by that name, and where none made the rows.
        """
        if "model_dtype" not in self.cache.manifest.config:
            raise CacheError(
                f"no language model made the rows of {self.cache.url}, so there is none to run: "
                "evaluate what needs none, such as core with ce_tokens=0, or ground_truth"
            )
        dtype = DTYPES[self.cache.manifest.config["model_dtype"]]
        model = LanguageModel.load(self.cache.model, self.device, dtype)
        if model.fingerprint != self.cache.model_fingerprint:
            raise CacheError(
                f"{self.cache.url} was harvested from weights of '{self.cache.model}' with "
                f"fingerprint {self.cache.model_fingerprint[:12]}, but that name now leads to "
                f"{model.fingerprint[:12]}: put the old weights back, or harvest again"
            )
        return model


def evaluate(
    name: str,
    sae: SAE,
    cache: ActivationCache,
    *,
    hook: str | None = None,
    config: EvalConfig | None = None,
    out: Path | str | None = None,
    progress: bool = False,
    mesh: Mesh = ALONE,
) -> EvalResult:
    """Run the evaluation `name`, and save what it finds into the folder `out` where one is given.

    All processes of a `mesh` (of data alone; `saekit.distributed`) make the call together, look at
    a part of the rows each, and get the same result, which rank 0 saves. The hook is the one that
    the SAE was trained on; it must be given for an SAE of unknown origin. Raises ConfigError for an
    unknown name, another evaluation's config or one that several processes cannot share, CacheError
    for an SAE that does not belong to the cache's model, to the hook, or to its width, and
    SaekitError for one with NaN among its weights.
    """
    kind = _kinds.find(name)
    cfg = kind.Config() if config is None else config
    if not isinstance(cfg, kind.Config):
        raise ConfigError(
            f"evaluation '{name}' takes a {kind.Config.__name__}, not a {type(cfg).__name__}"
        )
    if mesh.size > 1 and (mesh.latent > 1 or not _shared(kind)):
        able = ", ".join(one for one in _kinds.names() if _shared(_kinds.find(one)))
        raise ConfigError(
            f"evaluation '{name}' runs in one process, and there are {mesh.size} (mesh {mesh}): "
            f"start it without torchrun. Several can share the rows of: {able}"
        )
    hook = matching_hook(sae, cache, hook)
    _refuse_spoilt(sae)
    folder = None if out is None else Path(out)
    if sae.row_norm is not None and not kind.NORMALISED:
        right = [name for name in _kinds.names() if _kinds.find(name).NORMALISED]
        raise ConfigError(
            f"evaluation '{name}' takes latents to be in units of the activations, and this SAE "
            f"normalises each row first; {', '.join(right)} are right for it"
        )
    with torch.no_grad(), mesh.taking_steps(f"ran evaluation '{name}'"):
        found: Findings = kind(
            cfg, sae, cache, hook, out=folder, progress=progress, mesh=mesh
        ).run()
    result = EvalResult(
        eval=name,
        metrics=found.metrics,
        hook=hook,
        split=cfg.split,
        exclude=cfg.exclude,
        sae_fingerprint=checkpoint.fingerprint(sae),
        cache_fingerprint=cache.fingerprint,
        config=cfg.to_dict(),
        versions=versions(),
        arrays=found.arrays,
    )
    if folder is not None and mesh.rank == 0:
        result.save(folder)
    return result


def _shared(kind: type[Eval]) -> bool:
    return bool(vars(kind).get("SHARES_ROWS", False))


def _refuse_spoilt(sae: SAE) -> None:
    """Not every evaluation looks at every weight, and none may make a number of a spoilt one."""
    for name, tensor in sae.tensors().items():
        # An infinite threshold or bias is how a latent is switched off.
        off = name in ("b_enc", "threshold")
        spoilt = tensor.isnan() if off else ~tensor.isfinite()
        if n := int(spoilt.sum()):
            raise SaekitError(
                f"{n} of the {tensor.numel()} weights of the SAE's {name} are NaN or infinite, so "
                "no number over it would mean anything: its training diverged (lower the learning "
                "rate), or its file is damaged (load it again from where it came)"
            )


def matching_hook(sae: SAE, cache: ActivationCache, hook: str | None) -> str:
    """The hook to evaluate at, once SAE, model, hook and width are known to belong together."""
    origin = sae.provenance
    if origin is None and hook is None:
        raise ConfigError(
            "this SAE does not say which hook point it was trained on: name it, hook='...'; "
            f"the cache holds {', '.join(cache.hooks)}"
        )
    if origin is not None:
        if origin.model_fingerprint != cache.model_fingerprint:
            raise CacheError(
                f"the SAE was trained on model '{origin.model}' (fingerprint "
                f"{origin.model_fingerprint[:12]}), but {cache.url} holds activations of "
                f"'{cache.model}' ({cache.model_fingerprint[:12]}): give a cache of the SAE's model"
            )
        if hook is not None and hook != origin.hook:
            raise CacheError(
                f"the SAE was trained on hook '{origin.hook}', but hook '{hook}' was asked for: "
                "leave the hook out, or give an SAE of that hook"
            )
        hook = origin.hook
    assert hook is not None
    width = cache.width(hook)
    if sae.d_in != width:
        raise CacheError(
            f"the SAE reads activations of width {sae.d_in}, but '{hook}' of {cache.url} has "
            f"width {width}: give the hook that the SAE was trained on"
        )
    if sae.d_out != sae.d_in:
        raise CacheError(
            f"the SAE turns width {sae.d_in} into width {sae.d_out}: it predicts another hook's "
            "activations, and there is no evaluation of transcoders yet"
        )
    return hook
