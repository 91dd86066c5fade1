"""Text to activations on disk, and back in shuffled batches."""

from saekit.activations_cache.config import HarvestConfig
from saekit.activations_cache.store import ActivationCache, Window

__all__ = ["ActivationCache", "HarvestConfig", "Window"]
