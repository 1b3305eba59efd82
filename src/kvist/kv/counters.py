"""The counters of the page cache: hits, misses and copies of each tier, and the ceiling (the hits of an infinite
cache)."""

from __future__ import annotations

from collections.abc import Iterable

from kvist.counter import Counter, CounterGroup
from kvist.kv.ceiling import EvictionHistory

CACHE_COUNTERS = CounterGroup(
    owner="kv",
    section="Cache tiers",
    counters=(
        Counter(name="device_hit_pages", unit="pages", text="pages of admitted requests found in the device pool (L1)"),
        Counter(
            name="device_miss_pages", unit="pages", text="pages of admitted requests not found in the device pool (L1)"
        ),
        Counter(name="device_evicted_pages", unit="pages", text="cached pages dropped from the device pool"),
        Counter(
            name="ceiling_remembered_pages",
            unit="pages",
            text="evicted pages whose digests were remembered, to count ceiling_prompt_tokens",
        ),
        Counter(
            name="ceiling_forgotten_pages",
            unit="pages",
            text="remembered digests that were forgotten; above 0 ceiling_prompt_tokens is too low",
        ),
        Counter(
            name="host_hit_pages",
            unit="pages",
            text="pages not found in the device pool but found in the host tier (L2)",
        ),
        Counter(
            name="host_miss_pages",
            unit="pages",
            text="pages found neither in the device pool nor in the host tier (L2)",
        ),
        Counter(name="host_evicted_pages", unit="pages", text="pages dropped from the host tier"),
        Counter(name="host_loaded_pages", unit="pages", text="pages copied from the host tier back to the device pool"),
        Counter(name="host_backed_up_pages", unit="pages", text="pages copied to the host tier"),
        Counter(
            name="host_skipped_pages",
            unit="pages",
            text="pages not copied to the host tier: too many copies in progress, or the tier was full; with "
            "write_back an evicted page is then lost",
        ),
        Counter(name="host_failed_pages", unit="pages", text="pages of failed copies to or from the host tier"),
        Counter(
            name="storage_hit_pages",
            unit="pages",
            text="pages missing in the host tier when a request arrived, looked up in the storage tier (L3), and found",
        ),
        Counter(
            name="storage_miss_pages",
            unit="pages",
            text="pages missing in the host tier when a request arrived, looked up in the storage tier (L3), "
            "and not found",
        ),
        Counter(name="storage_fetched_pages", unit="pages", text="pages copied from the storage tier to the host tier"),
        Counter(
            name="storage_stored_pages", unit="pages", text="pages written to the storage tier, or found there already"
        ),
        Counter(
            name="storage_skipped_pages",
            unit="pages",
            text="pages not stored because the host tier evicted them before the store had room",
        ),
        Counter(name="storage_failed_pages", unit="pages", text="pages of failed copies to or from the storage tier"),
    ),
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
        """Return how many leading pages, all of them missing in the tiers, were evicted from the device pool before."""
        return self._history.num_leading(digests)

    def forget_evictions(self) -> None:
        """Exclude all pages evicted so far from the ceiling."""
        self._history.clear()

    def totals(self) -> dict[str, float]:
        return {
            "device_hit_pages": self._num_hits,
            "device_miss_pages": self._num_misses,
            "device_evicted_pages": self._num_evicted,
            "ceiling_remembered_pages": self._history.num_remembered,
            "ceiling_forgotten_pages": self._history.num_forgotten,
        }
