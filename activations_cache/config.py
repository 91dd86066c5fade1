"""What to harvest: the model, the text, and what to keep of both."""

from dataclasses import dataclass
from typing import Literal

import torch

from saekit.activations_cache import tokens
from saekit.activations_cache.tokens import Layout
from saekit.config import Config
from saekit.errors import ConfigError

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}


@dataclass(frozen=True, kw_only=True)
class HarvestConfig(Config):
    """What to read, through which model, and what to keep of it."""

    model: str = "demo"
    """Model: "demo" (embedded), a folder in transformers format, or a hub id. A decoder, an
    encoder, or a vision model. With #random=SEED at its end, as it was before any training."""

    backend: Literal["transformers", "transformer_lens"] = "transformers"
    """What runs a text model; the activations are the same."""

    dataset: str = "demo"
    """Corpus: "demo" (the standard library of this Python), a folder of text files (for a vision
    model, of images), a .txt, .json, .jsonl, .parquet or .csv file, or a hub id (streamed)."""

    dataset_config: str | None = None
    """Configuration of a dataset of the hub."""

    dataset_split: str = "train"
    """Split of a dataset of the hub."""

    text_field: str = "text"
    """Field of a dataset's rows that holds the text."""

    messages_field: str | None = None
    """Field that holds a chat, a list of {role, content}; it goes through the chat template."""

    image_field: str = "image"
    """Field that holds an image, for a vision model."""

    hooks: tuple[str, ...] = ("resid_post.1",)
    """Hook points, all harvested in one pass; `saekit inspect MODEL` lists them. A path of a module
    means its output, with :input at its end what goes in."""

    n_tokens: int = 1_000_000
    """Tokens, and so rows, at most; the corpus may end before."""

    context: int | None = None
    """Tokens of a window, the beginning-of-sequence token included; 256 where not given, or as many
    as the model can look at if that is less."""

    layout: Layout = "windows"
    """"windows" cuts each document into windows; "truncate" takes the first window of each;
    "pack" lets short windows share a pass, without seeing each other: the same rows, faster."""

    batch_size: int = 32
    """Windows in a forward pass; rows of packed windows."""

    gradients: bool = False
    """Also keep the gradient of the summed next-token loss with respect to each activation."""

    dtype: Literal["bfloat16", "float16", "float32", "int8"] = "bfloat16"
    """Precision on disk; int8 has a scale for each row, and its error is measured. Gradients of a
    float16 or int8 cache are kept in bfloat16: float16 loses small ones."""

    model_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision in which the model runs."""

    holdout: float = 0.1
    """Share of the documents, chosen by name, that training never sees and evaluation uses."""

    first_k: int = tokens.FIRST_K
    """Positions of a window that are marked `first`."""

    sink_factor: float = 10.0
    """A row is marked `sink` where its norm is above so many times the median of its window."""

    max_nonfinite: int = 0
    """Rows with a value that is not finite to put up with; they are marked and never read."""

    shard_mib: float = 128.0
    """Size of a shard, about: a whole number of forward batches. What a stop can cost."""

    memory_mib: float = 1024.0
    """Most memory for rows on their way to the disk; at least two shards."""

    device: str = "auto"
    """Where the model runs: "auto" is a GPU where there is one."""

    def __post_init__(self) -> None:
        for name in ("n_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("first_k", "max_nonfinite"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        if self.sink_factor <= 1:
            raise ConfigError(f"sink_factor={self.sink_factor} must be above 1: it is a ratio")
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
        if self.shard_mib <= 0 or self.memory_mib < 2 * self.shard_mib:
            raise ConfigError(
                f"memory_mib={self.memory_mib:g} must be at least twice shard_mib="
                f"{self.shard_mib:g}: one shard is filled while another is written"
            )
