"""Text to activations on disk: one pass over a corpus, several hook points at once."""

import logging
from pathlib import Path

from saekit.activations_cache.config import HarvestConfig
from saekit.activations_cache.job import Data, Job, begun, load_model, missing
from saekit.activations_cache.manifest import Manifest
from saekit.activations_cache.model import Model
from saekit.activations_cache.ranks import folder_name, join, shares_of
from saekit.activations_cache.storage import Storage, storage
from saekit.activations_cache.store import ActivationCache
from saekit.errors import ConfigError

log = logging.getLogger(__name__)


def harvest(
    cfg: HarvestConfig,
    out: Path | str,
    *,
    model: Model | None = None,
    data: Data | None = None,
    rank: int = 0,
    ranks: int = 1,
    progress: bool = False,
) -> ActivationCache:
    """Harvest into `out`, a folder or a URL of fsspec, or finish the harvest that was begun there.

    `model` stands in for the one that the config names, and `data` for its corpus (the config's
    `model` and `dataset` are then their names). With several ranks, each harvests its share of the
    documents into a folder of its own inside `out`, and whoever is last joins them; the others
    return their own share. Fewer ranks may go on with what more have begun: each takes the shares
    of several. Raises ConfigError where `out` holds something else, ModelError,
    CorpusError, and CacheError for activations that are not finite, or where another harvest writes
    there.
    """
    whole = storage(out)
    done = begun(cfg, whole)
    if done is not None and done.complete and not missing(whole, done):
        log.info("%s is complete: %d rows", whole.url, done.n_rows)
        return ActivationCache.open(whole.url)
    if done is not None and ranks > 1:
        raise ConfigError(f"{whole.url} was begun by one process: go on with one")
    shares = ranks if done is not None else shares_of(whole) or ranks
    if ranks > shares:
        raise ConfigError(
            f"{whole.url} was begun by {shares} processes, which share its documents out: go on "
            f"with as many or fewer, not {ranks}"
        )
    model, folder = model or load_model(cfg), whole
    for share in range(rank, shares, ranks):
        folder = whole if shares == 1 else whole.sub(folder_name(share, shares))
        Job(cfg, model, data, share, shares).run(folder, progress)
    if shares == 1 or not join(whole, shares):
        return ActivationCache.open(folder.url)
    return ActivationCache.open(whole.url)


def remake(folder: Storage, held: Manifest, numbers: list[int]) -> None:
    """Make shards of a finished cache again, from its config; its writer's lock must be held."""
    cfg = HarvestConfig.from_dict(held.config)
    job = Job(cfg, load_model(cfg))
    for number in numbers:
        job.remake(folder, held, number)
