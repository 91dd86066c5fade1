"""Text to activations on disk: one pass over a corpus, several hook points at once.

A shard holds the rows of a fixed number of forward batches. That makes a harvest resumable to the
byte: the shards in the manifest are kept, the windows that went into them are passed over, and
what follows is computed in the very batches of an uninterrupted run.
"""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from rich.filesize import decimal
from torch import Tensor

from saekit.activations_cache import corpus, manifest, shards
from saekit.activations_cache.manifest import Manifest
from saekit.activations_cache.masks import KINDS
from saekit.activations_cache.model import LanguageModel
from saekit.activations_cache.shards import ActivationBatch
from saekit.activations_cache.store import ActivationCache
from saekit.activations_cache.tokens import TokenWindow, pad, windows
from saekit.config import Config, differences
from saekit.errors import CacheError, ConfigError, CorpusError, SaekitError
from saekit.files import remove_partial
from saekit.progress import bar

log = logging.getLogger(__name__)

DEFAULT_CONTEXT = 256

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class HarvestConfig(Config):
    """What to read, through which model, and what to keep of it."""

    model: str = "demo"
    """Language model: "demo" (embedded), a folder in transformers format, or a hub id."""

    dataset: str = "demo"
    """Corpus: "demo" (the standard library of this Python), a folder of text files, a .txt, .json,
    .jsonl, .parquet or .csv file, or a hub id (streamed)."""

    dataset_config: str | None = None
    """Configuration of a dataset of the hub."""

    dataset_split: str = "train"
    """Split of a dataset of the hub."""

    text_field: str = "text"
    """Field of a dataset's rows that holds the text."""

    hooks: tuple[str, ...] = ("resid_post.1",)
    """Hook points, all harvested in one pass; `saekit inspect MODEL` lists them."""

    n_tokens: int = 1_000_000
    """Tokens, and so rows, at most; the corpus may end before."""

    context: int | None = None
    """Tokens of a window, the beginning-of-sequence token included; 256 where not given, or as many
    as the model can look at if that is less."""

    batch_size: int = 32
    """Windows in a forward pass."""

    gradients: bool = False
    """Also keep the gradient of the summed next-token loss with respect to each activation."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision on disk. Gradients of a float16 cache are kept in bfloat16: float16 loses small
    ones."""

    model_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision in which the model runs."""

    holdout: float = 0.1
    """Share of the documents, chosen by name, that training never sees and evaluation uses."""

    shard_rows: int = 131_072
    """Rows of a shard, about: a whole number of forward batches."""

    device: str = "auto"
    """Where the model runs: "auto" is a GPU where there is one."""

    def __post_init__(self) -> None:
        for name in ("n_tokens", "batch_size", "shard_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.context is not None and self.context < 2:
            raise ConfigError(
                f"context={self.context} must be at least 2: a special token and a word"
            )
        if not 0 <= self.holdout < 1:
            raise ConfigError(
                f"holdout={self.holdout} must lie in [0, 1): it is a share of documents"
            )
        if not self.hooks or len(set(self.hooks)) < len(self.hooks):
            raise ConfigError(
                f"hooks={list(self.hooks)} must name at least one hook point, each once"
            )


def harvest(cfg: HarvestConfig, out: Path | str, *, progress: bool = False) -> ActivationCache:
    """Harvest into the folder `out`, or finish the harvest that was begun there.

    Raises ConfigError where `out` holds something else, ModelError, CorpusError, and CacheError
    for an activation that is not finite.
    """
    out = Path(out)
    begun = _begun(cfg, out)
    if begun is not None and begun.complete:
        log.info("%s is complete: %d rows", out, begun.n_rows)
        return ActivationCache.open(out)
    model = load_model(cfg)
    current = begun or Manifest(
        config=cfg.to_dict(),
        model=cfg.model,
        model_fingerprint=model.fingerprint,
        hooks=model.widths(cfg.hooks),
    )
    if current.model_fingerprint != model.fingerprint:
        raise CacheError(
            f"{out} was begun with other weights of '{cfg.model}' (fingerprint "
            f"{current.model_fingerprint[:12]}, now {model.fingerprint[:12]}): give another --out"
        )
    _check_space(cfg, out, current)
    _harvest_shards(cfg, out, model, current, progress)
    return ActivationCache.open(out)


def load_model(cfg: HarvestConfig) -> LanguageModel:
    """The model that the config names, where and in the precision it shall run.

    Raises ConfigError for a context longer than the model's.
    """
    model = LanguageModel.load(cfg.model, resolve_device(cfg.device), DTYPES[cfg.model_dtype])
    if cfg.context is not None and cfg.context > model.context:
        raise ConfigError(
            f"context={cfg.context} exceeds what '{cfg.model}' can look at ({model.context} tokens)"
        )
    return model


def batches(cfg: HarvestConfig, model: LanguageModel) -> Iterator[list[TokenWindow]]:
    """The corpus as batches of windows, as they go through the model."""
    texts = corpus.documents(
        cfg.dataset, config=cfg.dataset_config, split=cfg.dataset_split, text_field=cfg.text_field
    )
    stream = windows(texts, model, context_of(cfg, model), cfg.n_tokens)
    while batch := list(islice(stream, cfg.batch_size)):
        yield batch


def context_of(cfg: HarvestConfig, model: LanguageModel) -> int:
    """Tokens of a window."""
    return cfg.context or min(DEFAULT_CONTEXT, model.context)


def row_bytes(cfg: HarvestConfig, hooks: dict[str, int]) -> dict[str, int]:
    """Bytes of a row on disk by column; the four columns of the token's own go by "token"."""
    size, wide = DTYPES[cfg.dtype].itemsize, _gradient_dtype(cfg).itemsize
    sizes = {name: width * size for name, width in hooks.items()}
    if cfg.gradients:
        sizes |= {name + shards.GRADIENT: width * wide for name, width in hooks.items()}
    return sizes | {"token": 3 * torch.int32.itemsize + torch.uint8.itemsize}


def free_bytes(out: Path) -> int:
    """Room on the disk that `out` will lie on."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def _check_space(cfg: HarvestConfig, out: Path, current: Manifest) -> None:
    need = (cfg.n_tokens - current.n_rows) * sum(row_bytes(cfg, current.hooks).values())
    free = free_bytes(out)
    if need > free:
        raise SaekitError(
            f"{cfg.n_tokens:,} tokens need up to {decimal(need)} more in {out}, and "
            f"{decimal(free)} are free there: lower --n-tokens, name fewer --hooks, or give "
            "another --out"
        )


def resolve_device(device: str) -> str:
    """The device that a config names; "auto" is the first GPU where there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _begun(cfg: HarvestConfig, out: Path) -> Manifest | None:
    """What an earlier call of the same command left behind, less any shard that is no longer
    whole."""
    if not (out / manifest.NAME).exists():
        if out.is_dir():
            remove_partial(out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out} exists and is no activation cache: give another --out")
        return None
    begun = Manifest.load(out)
    if begun.config != cfg.to_dict():
        raise ConfigError(
            f"{out} holds a cache of another config ({differences(cfg.to_dict(), begun.config)}): "
            "give another --out, or the config that it was begun with"
        )
    remove_partial(out)
    whole = 0
    while whole < len(begun.shards) and (out / begun.shards[whole].file).is_file():
        whole += 1
    if whole == len(begun.shards):
        return begun
    return replace(begun, shards=begun.shards[:whole], complete=False)


def _harvest_shards(
    cfg: HarvestConfig, out: Path, model: LanguageModel, current: Manifest, progress: bool
) -> None:
    stream = batches(cfg, model)
    batches_per_shard = max(1, cfg.shard_rows // (cfg.batch_size * context_of(cfg, model)))
    names = DocumentNumbers()
    for batch in islice(stream, len(current.shards) * batches_per_shard):
        names.number(batch)
    with bar("harvest", cfg.n_tokens, done=current.n_rows, shown=progress) as shown:
        while some := list(islice(stream, batches_per_shard)):
            first_new = len(names)
            parts = []
            for batch in some:
                parts.append(activations(cfg, model, batch, names))
                shown.advance(sum(len(window.ids) for window in batch))
            shard = shards.write(out, len(current.shards), _join(parts), names.since(first_new))
            current = replace(current, shards=(*current.shards, shard))
            current.save(out)
    if current.n_rows == 0:
        raise CorpusError(
            f"dataset '{cfg.dataset}' gave no token: it is empty, or holds only empty documents"
        )
    replace(current, complete=True).save(out)


def activations(
    cfg: HarvestConfig, model: LanguageModel, batch: list[TokenWindow], names: "DocumentNumbers"
) -> ActivationBatch:
    """The rows of a batch of windows. Raises CacheError for a value that is not finite."""
    ids = pad(batch, model.bos)
    lengths = torch.tensor([len(window.ids) for window in batch])
    position = torch.arange(ids.shape[1]).expand_as(ids)
    kept = position < lengths[:, None]
    columns = _columns(cfg, model, ids, lengths)
    acts = {}
    for name, (x, dtype) in columns.items():
        rows = x[kept.to(x.device)].to("cpu", dtype)
        if not rows.isfinite().all():
            raise CacheError(
                f"values of '{name}' are not finite in documents {batch[0].document} to "
                f"{batch[-1].document}, stored as {dtype}: use --dtype bfloat16 or float32, or "
                "leave those documents out"
            )
        acts[name] = rows
    special = torch.isin(ids, torch.tensor(sorted(model.special)))
    last = position == lengths[:, None] - 1
    return ActivationBatch(
        acts=acts,
        token=ids[kept].int(),
        document=names.number(batch).repeat_interleave(lengths).int(),
        position=position[kept].int(),
        mask=(special * KINDS["special"] | last * KINDS["last"])[kept].to(torch.uint8),
    )


def _columns(
    cfg: HarvestConfig, model: LanguageModel, ids: Tensor, lengths: Tensor
) -> dict[str, tuple[Tensor, torch.dtype]]:
    """What to keep of a batch by the name of its column, and in which precision."""
    dtype = DTYPES[cfg.dtype]
    if not cfg.gradients:
        acts = model.capture(ids, cfg.hooks)
        return {name: (acts[name], dtype) for name in cfg.hooks}
    acts, grads = model.capture_with_gradients(ids, lengths, cfg.hooks)
    wide = _gradient_dtype(cfg)
    columns = {name: (acts[name], dtype) for name in cfg.hooks}
    return columns | {name + shards.GRADIENT: (grads[name], wide) for name in cfg.hooks}


def _gradient_dtype(cfg: HarvestConfig) -> torch.dtype:
    return DTYPES["bfloat16" if cfg.dtype == "float16" else cfg.dtype]


def _join(parts: list[ActivationBatch]) -> ActivationBatch:
    columns = {c: torch.cat([getattr(part, c) for part in parts]) for c in shards.COLUMNS}
    acts = {name: torch.cat([part.acts[name] for part in parts]) for name in parts[0].acts}
    return ActivationBatch(acts=acts, **columns)


class DocumentNumbers:
    """Numbers documents in the order in which they appear; a document's windows stand together."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def __len__(self) -> int:
        return len(self._names)

    def number(self, batch: list[TokenWindow]) -> Tensor:
        numbers = []
        for window in batch:
            if not self._names or self._names[-1] != window.document:
                self._names.append(window.document)
            numbers.append(len(self._names) - 1)
        return torch.tensor(numbers)

    def since(self, number: int) -> list[str]:
        return self._names[number:]
