"""From a cache of shuffled rows back to the one that it was made from, in the order of the text."""

import logging

from saekit.activations_cache.store import ActivationCache
from saekit.errors import CacheError

log = logging.getLogger(__name__)


def unshuffled(cache: ActivationCache) -> ActivationCache:
    """A cache, or the one that was shuffled to make it: evaluations look at whole windows of
    text."""
    trained_on = cache
    while (record := cache.manifest.shuffle) is not None:
        try:
            source = ActivationCache.open(record.source)
        except CacheError as error:
            raise CacheError(
                f"{cache.url} is shuffled, and the cache that it was made from, {record.source}, "
                "cannot be opened: give it where it is now, with --cache CACHE"
            ) from error
        if source.fingerprint != record.source_fingerprint:
            raise CacheError(
                f"{record.source} is not the cache any more that {cache.url} was made from "
                f"(fingerprint {source.fingerprint[:12]}, was {record.source_fingerprint[:12]}): "
                "give the one to evaluate on, with --cache CACHE"
            )
        cache = source
    if cache is not trained_on:
        log.info(
            "%s is shuffled: evaluating on %s, which it was made from", trained_on.url, cache.url
        )
    return cache
