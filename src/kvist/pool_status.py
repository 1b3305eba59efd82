"""The state of a Mooncake pool, read from its master's /metrics. Pure; mooncake/pool_watch.py fetches the text.

The master's names differ from release to release. A metric that is missing counts as 0, and a text without the master's
number of keys is refused: it comes from another server.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import msgspec

from kvist.errors import WireError

_SAMPLE = re.compile(r'(?P<name>[A-Za-z_:][\w:]*)(?:\{segment="(?P<segment>[^"]{1,300})"\})? (?P<value>\S+)')
_PROOF = "master_key_count"  # every master has this metric


class StoreShare(msgspec.Struct, frozen=True, kw_only=True):
    """The memory of one store of the pool."""

    capacity_bytes: int
    used_bytes: int


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The pool as its master counts it. The counters begin at 0 when the master starts."""

    capacity_bytes: int  # memory of all stores
    used_bytes: int
    ssd_capacity_bytes: int
    ssd_used_bytes: int
    num_keys: int
    num_keys_in_memory: int  # keys with at least one copy in memory
    num_keys_on_ssd: int
    num_stores: int  # processes that the master considers alive, and that have memory or an SSD
    stores: dict[str, StoreShare] = {}  # by the name of the store's segment, HOST:PORT
    # counters
    num_hot_copies: int = 0  # copies made of pages that many readers want
    num_moved_copies: int = 0  # copies moved away from stores that are drained
    num_evicted_keys: int = 0
    evicted_bytes: int = 0
    num_failed_allocations: int = 0  # puts refused because no store had room
    num_memory_hits: int = 0  # lookups answered with a copy in memory
    num_ssd_hits: int = 0
    num_lookups: int = 0


class WatchedPool(msgspec.Struct, frozen=True, kw_only=True):
    """The last answer of a pool's master, as a process that uses the pool has it."""

    master: str  # URL
    status: PoolStatus | None = None  # None: no answer yet
    age_s: float | None = None  # of `status`
    problem: str = ""  # why the last question had no answer; a text to be read


def read_pool_status(text: str) -> PoolStatus:
    """Read the master's metrics in Prometheus' text format. Raises `WireError` if they are not a master's."""
    plain: dict[str, int] = {}
    by_store: dict[str, dict[str, int]] = {}
    for name, segment, value in _samples(text):
        if segment is None:
            plain[name] = value
        else:
            by_store.setdefault(segment, {})[name] = value
    if _PROOF not in plain:
        raise WireError(f"the answer has no metric {_PROOF}: is this the metrics port of a Mooncake master?")
    return PoolStatus(
        capacity_bytes=plain.get("master_total_capacity_bytes", 0),
        used_bytes=plain.get("master_allocated_bytes", 0),
        ssd_capacity_bytes=plain.get("master_total_file_capacity_bytes", 0),
        ssd_used_bytes=plain.get("master_allocated_file_size_bytes", 0),
        num_keys=plain[_PROOF],
        num_keys_in_memory=plain.get("mem_cache_nums_", 0),
        num_keys_on_ssd=plain.get("file_cache_nums_", 0),
        num_stores=plain.get("master_active_clients", 0),
        stores={name: _share(values) for name, values in sorted(by_store.items()) if _CAPACITY in values},
        num_hot_copies=_succeeded(plain, "master_copy_end"),
        num_moved_copies=_succeeded(plain, "master_move_end"),
        num_evicted_keys=plain.get("master_evicted_key_count", 0),
        evicted_bytes=plain.get("master_evicted_size_bytes", 0),
        num_failed_allocations=plain.get("master_put_start_alloc_failures_total", 0),
        num_memory_hits=plain.get("mem_cache_hit_nums_", 0),
        num_ssd_hits=plain.get("file_cache_hit_nums_", 0),
        num_lookups=plain.get("total_get_nums_", 0),
    )


_CAPACITY, _USED = "segment_total_capacity_bytes", "segment_allocated_bytes"


def _share(values: Mapping[str, int]) -> StoreShare:
    return StoreShare(capacity_bytes=values[_CAPACITY], used_bytes=values.get(_USED, 0))


def _succeeded(plain: Mapping[str, int], call: str) -> int:
    return max(0, plain.get(f"{call}_requests_total", 0) - plain.get(f"{call}_failures_total", 0))


def _samples(text: str) -> Iterator[tuple[str, str | None, int]]:
    """Yield (name, segment or None, value) of each sample that is one number of the master or of one segment."""
    for line in text.splitlines():
        match = _SAMPLE.fullmatch(line.strip())
        if match is None:
            continue
        try:
            value = float(match["value"])
        except ValueError:
            continue
        if math.isfinite(value):
            yield match["name"], match["segment"], max(0, int(value))
