"""saekit: find and study the features inside transformers with sparse autoencoders.

    text -> tokens -> activations -> cache on disk -> trainer -> SAE -> evals -> results -> report,
    dashboard

The names below load on first use, so that `import saekit` (and `saekit --help`) need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from saekit.activations_cache.config import HarvestConfig
    from saekit.activations_cache.harvest import harvest
    from saekit.activations_cache.store import ActivationCache
    from saekit.checkpoint import save
    from saekit.evals._base import evaluate
    from saekit.interop import load
    from saekit.sae import SAE, JumpReLU, MatchingPursuit, ReLU, SparseCode, TopK
    from saekit.trainers._loop import train

_HOME = {
    "HarvestConfig": "saekit.activations_cache.config",
    "harvest": "saekit.activations_cache.harvest",
    "ActivationCache": "saekit.activations_cache.store",
    "load": "saekit.interop",
    "save": "saekit.checkpoint",
    "evaluate": "saekit.evals._base",
    "SAE": "saekit.sae",
    "JumpReLU": "saekit.sae",
    "MatchingPursuit": "saekit.sae",
    "ReLU": "saekit.sae",
    "SparseCode": "saekit.sae",
    "TopK": "saekit.sae",
    "train": "saekit.trainers._loop",
}

__all__ = [
    "SAE",
    "ActivationCache",
    "HarvestConfig",
    "JumpReLU",
    "MatchingPursuit",
    "ReLU",
    "SparseCode",
    "TopK",
    "evaluate",
    "harvest",
    "load",
    "save",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'saekit' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
