"""Configs: frozen dataclasses that come from flags, from a TOML file or from Python, and check
themselves.

The string under a field is its help on the command line. `__post_init__` only checks.
"""

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from saekit.errors import ConfigError, nearest

# typing.Self is not understood by the type checker that tests run under.
_C = TypeVar("_C", bound="Config")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every config can do: come from and go to plain data."""

    @classmethod
    def from_dict(cls: type[_C], values: Mapping[str, Any]) -> _C:
        """Build from plain data, as TOML and JSON hold it.

        Raises ConfigError for an unknown key, naming the nearest, and for a value of a wrong type.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"{cls.__name__} has no key '{key}'; {nearest(key, known)}")
        try:
            return TypeAdapter(cls).validate_python(dict(values))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or cls.__name__
            raise ConfigError(f"{where}={first['input']!r}: {first['msg']}") from error

    @classmethod
    def from_toml(cls: type[_C], path: Path) -> _C:
        return cls.from_dict(read_toml(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` takes back; fields that are None are left out (TOML has no
        null)."""
        values = dataclasses.asdict(self)
        return {key: _plain(value) for key, value in values.items() if value is not None}


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as plain data. Raises ConfigError where it is missing or no TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; give a TOML file of config keys") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The keys in which two configs differ, with both values, for a message."""
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    return ", ".join(f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in keys)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """What every kind of SAE is trained with. Losses are sums over d_in, means over rows."""

    d_sae: int = 4096
    """Latents: the width of the dictionary."""

    n_tokens: int = 4_000_000
    """Activations to train on; a smaller cache is read again, in a new order each time."""

    batch_size: int = 4096
    """Activations a step."""

    lr: float = 1e-3
    """Peak learning rate."""

    lr_warmup: float = 0.05
    """Share of the steps over which the learning rate rises from 0."""

    lr_decay: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls to 0."""

    lr_shape: Literal["linear", "cosine"] = "linear"
    """Along a line or half a cosine wave: how the learning rate falls at the end."""

    optimiser: Literal["adam", "adamw"] = "adam"
    """Adam, or AdamW with `weight_decay`."""

    weight_decay: float = 0.0
    """Of AdamW: the share of each weight that is taken off a step, times the learning rate."""

    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's two moments."""

    clip_norm: float | None = None
    """Largest norm of the whole gradient; a longer one is scaled down to it. Losses are sums over
    d_in, so a norm of 1 is short. Not clipped where not given."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What matrices are multiplied in; weights, their moments and sums stay float32. "auto" is
    bfloat16 on a GPU that has it, and float32 elsewhere."""

    economy: bool = False
    """On a GPU, for TopK and BatchTopK: hold Adam's moments in bfloat16 and, for TopK where d_in is
    large, look for the largest latents in float8 first. Quicker and smaller. What it costs in
    quality is yet to be measured: compare before you rely on it."""

    input_scaling: Literal["sqrt_d", "unit", "none"] = "sqrt_d"
    """Scale activations so that their mean norm is sqrt(d_in), or 1, so that one learning rate
    serves many layers and models. Folded into the weights at export."""

    exclude: tuple[str, ...] = ("special",)
    """Kinds of token whose activations are left out (see the cache's masks)."""

    seed: int = 0
    """Of the initial weights, and of whatever is drawn while training."""

    shuffle_seed: int = 0
    """Of the order of the activations. Runs that have it in common can be fed by one reader."""

    freeze: str = "none"
    """What is kept as it was drawn at random, for a control: "encoder", "decoder", both with
    "all", or "soft_decoder:0.8", whose rows keep a cosine of 0.8 at least with what they began
    as."""

    dead_after: int = 1_000_000
    """Tokens without firing after which a latent counts as dead."""

    life_windows: int = 32
    """How many times in the run it is written down how each latent does; 0 for never. See `saekit
    inspect RUN --dead`."""

    checkpoint_every: int = 200
    """Steps between checkpoints: what a kill can cost at most."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        counts = ("d_sae", "n_tokens", "batch_size", "dead_after", "checkpoint_every", "log_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.lr > 0:
            raise ConfigError(f"lr={self.lr} must be positive: it is the size of a step")
        if min(self.lr_warmup, self.lr_decay) < 0 or self.lr_warmup + self.lr_decay > 1:
            raise ConfigError(
                f"lr_warmup={self.lr_warmup} and lr_decay={self.lr_decay} are shares of the same "
                "steps: neither may be negative, and together they may not exceed 1"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(
                f"clip_norm={self.clip_norm} must be positive; leave it out to clip nothing"
            )
        if self.weight_decay < 0 or (self.weight_decay > 0 and self.optimiser != "adamw"):
            raise ConfigError(
                f"weight_decay={self.weight_decay} may not be negative, and only adamw has any: "
                "set optimiser to adamw"
            )
        if self.life_windows < 0:
            raise ConfigError(f"life_windows={self.life_windows} may not be negative; 0 is never")
        self.soft_cosine  # noqa: B018  checks `freeze`

    @property
    def soft_cosine(self) -> float | None:
        """The least cosine of a softly frozen decoder; None where it is free or quite frozen."""
        kind, _, cosine = self.freeze.partition(":")
        if self.freeze in ("none", "encoder", "decoder", "all"):
            return None
        try:
            least = float(cosine)
        except ValueError:
            least = math.nan
        if kind != "soft_decoder" or not -1 <= least <= 1:
            raise ConfigError(
                f"freeze='{self.freeze}' is none of: none, encoder, decoder, all, "
                "soft_decoder:COSINE with a cosine from -1 to 1, such as soft_decoder:0.8"
            )
        return least

    @property
    def n_steps(self) -> int:
        """Steps in the run: n_tokens in whole batches, at least one."""
        return max(1, self.n_tokens // self.batch_size)
