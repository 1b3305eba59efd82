"""The counters of the store threads, summed over all stores; the stores themselves count the last three."""

from __future__ import annotations

from kvist.counter import Counter, CounterGroup

STORE_COUNTERS = CounterGroup(
    owner="store",
    section="Cache tiers",
    counters=(
        Counter(name="storage_finds", unit="calls", text="calls that looked up pages in the store"),
        Counter(
            name="storage_find_seconds", unit="seconds", text="total time of calls that looked up pages in the store"
        ),
        Counter(name="storage_reads", unit="copies", text="copies from the storage tier to the host tier"),
        Counter(name="storage_read_bytes", unit="bytes", text="bytes copied from the storage tier to the host tier"),
        Counter(
            name="storage_read_seconds",
            unit="seconds",
            text="total time of copies from the storage tier to the host tier",
        ),
        Counter(name="storage_writes", unit="copies", text="copies from the host tier to the storage tier"),
        Counter(
            name="storage_write_bytes",
            unit="bytes",
            text="bytes copied from the host tier to the storage tier, pages found there already included",
        ),
        Counter(
            name="storage_write_seconds",
            unit="seconds",
            text="total time of copies from the host tier to the storage tier",
        ),
        Counter(name="storage_slow_calls", unit="calls", text="store calls that exceeded their time limit"),
        Counter(
            name="storage_raised_calls",
            unit="calls",
            text="store calls that raised an unexpected exception: a bug in the store",
        ),
        Counter(
            name="storage_unreachable_calls",
            unit="calls",
            text="store calls and probes that found that the store, or its master, does not answer",
        ),
        Counter(
            name="storage_unasked_jobs",
            unit="jobs",
            text="lookups, reads and writes skipped because the store hangs or cannot be reached (its circuit breaker "
            "is open)",
        ),
        Counter(
            name="storage_broken_pages",
            unit="pages",
            text="stored pages with a wrong header, size, owner or seal; each counts as a miss",
        ),
        Counter(name="storage_refused_pages", unit="pages", text="pages for which the store had no room"),
        Counter(
            name="storage_evicted_pages",
            unit="pages",
            text="pages that this worker evicted from the store to keep the size limit",
        ),
    ),
)
