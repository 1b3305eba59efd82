"""The page cache's counters: hits, misses and copies of each tier, and the ceiling, the hits of an infinite cache."""

from __future__ import annotations

from collections.abc import Iterable

from kvist.kv.ceiling import EvictionHistory
from kvist.kv.tiers.storage import STORAGE_COUNTERS

# In pages, never decreasing.
TIER_COUNTERS = (
    "device_hit_pages",
    "device_miss_pages",
    "device_evicted_pages",
    "host_hit_pages",
    "host_miss_pages",
    "host_evicted_pages",
    "host_loaded_pages",
    "host_backed_up_pages",
    "host_skipped_pages",  # due for a backup and skipped: too many under way, or no free slot
    "host_failed_pages",  # in loads and backups that failed
    *STORAGE_COUNTERS,
    "ceiling_remembered_pages",  # evicted from the device pool and remembered; each once, unless forgotten since
    "ceiling_forgotten_pages",  # remembered pages that were forgotten; above 0 the ceiling is a lower bound
)


class HitCounters:
    """The hits of the device pool, and their ceiling. Mutable; its one owner is `PageCache`."""

    def __init__(self) -> None:
        self._history = EvictionHistory()
        self._num_hits = self._num_misses = self._num_evicted = 0

    def count(self, num_hits: int, num_misses: int) -> None:
        self._num_hits += num_hits
        self._num_misses += num_misses

    def on_evicted(self, digests: Iterable[bytes]) -> None:
        for digest in digests:
            self._num_evicted += 1
            self._history.remember(digest)

    def num_evicted_before(self, digests: Iterable[bytes]) -> int:
        """Return how many leading pages, all missing in the tiers, were evicted from the device pool earlier."""
        return self._history.num_leading(digests)

    def forget_evictions(self) -> None:
        """Count no page evicted so far in the ceiling."""
        self._history.clear()

    def totals(self) -> dict[str, float]:
        return {
            "device_hit_pages": self._num_hits,
            "device_miss_pages": self._num_misses,
            "device_evicted_pages": self._num_evicted,
            "ceiling_remembered_pages": self._history.num_remembered,
            "ceiling_forgotten_pages": self._history.num_forgotten,
        }
