"""A TOML file that names many runs.

    cache = "runs/cache"            # keys above the first [[run]] hold for every run
    hook = "resid_post.2"
    n_tokens = 4_000_000

    [[run]]
    kind = ["topk", "batch_topk"]   # a list stands for one run with each of its values
    k = [16, 32]
    seed = [0, 1, 2]

    [[run]]
    kind = "relu"
    target_l0 = [16, 32]

That is 14 runs, in folders named by what tells them apart: `topk-k16-seed0`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, get_origin, get_type_hints

from saekit.config import TrainConfig
from saekit.errors import ConfigError
from saekit.trainers._kinds import kind


@dataclass(frozen=True, kw_only=True)
class Named:
    """One run of a sweep."""

    name: str
    hook: str | None
    config: TrainConfig


def expand(table: Mapping[str, Any]) -> list[Named]:
    """The runs that a sweep's table stands for, in order.

    Raises ConfigError for a table without runs, a run without a kind, an unknown key, and two runs
    that nothing tells apart.
    """
    common = {key: value for key, value in table.items() if key != "run"}
    tables = table.get("run")
    if not isinstance(tables, list) or not tables:
        raise ConfigError(
            "a sweep's TOML file needs one [[run]] table at least, with the kind of SAE: "
            '[[run]] and below it kind = "topk"'
        )
    runs = [run for one in tables for run in _grid({**common, **one})]
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"two runs of the sweep would both be called '{name}': give the values that tell "
                'them apart as lists, or a name of its own to a [[run]] (name = "...")'
            )
    return runs


def _grid(table: dict[str, Any]) -> list[Named]:
    prefix = table.pop("name", None)
    kinds = table.pop("kind", None)
    if kinds is None:
        raise ConfigError('each [[run]] of a sweep needs its kind, such as kind = "topk"')
    named = []
    for one in kinds if isinstance(kinds, list) else [kinds]:
        config = kind(one).Config
        hints = get_type_hints(config)
        many = [
            key
            for key, value in table.items()
            if isinstance(value, list) and get_origin(hints.get(key)) is not tuple
        ]
        for values in product(*(table[key] for key in many)):
            chosen = dict(zip(many, values, strict=True))
            rest = {**table, **chosen}
            hook = rest.pop("hook", None)
            parts = [prefix or one, *(f"{key}{value}" for key, value in chosen.items())]
            if prefix is not None and isinstance(kinds, list):
                parts.insert(1, one)
            named.append(
                Named(
                    name="-".join(parts).replace("/", "_").replace(":", "_"),
                    hook=hook,
                    config=config.from_dict(rest),
                )
            )
    return named
