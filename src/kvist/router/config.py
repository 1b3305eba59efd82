"""The router's settings: which workers it has, how it chooses among them, and how long it waits."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.config import option

POLICIES = ("cache_aware", "least_loaded", "round_robin")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    prefill: tuple[str, ...] = option(
        (), "URLs of prefill workers, http://HOST:PORT (a unified worker may prefill too)"
    )
    decode: tuple[str, ...] = option((), "URLs of decode workers, http://HOST:PORT")
    worker_urls: tuple[str, ...] = option((), "URLs of workers, each used in the role that it was started with")
    policy: str = option(
        "cache_aware", "how a worker is chosen: by cached prefix and load, by load alone, or in turn", choices=POLICIES
    )
    cache_threshold: float = option(
        0.1,
        "a cached prefix shorter than this share of the prompt does not count when a worker is chosen",
        minimum=0.0,
        maximum=1.0,
    )
    balance_abs_threshold: int = option(
        32,
        "cache_aware chooses the least loaded worker when the highest and the lowest load differ by more requests "
        "than this ...",
        unit="requests",
        minimum=0,
    )
    balance_rel_threshold: float = option(
        1.5, "... and the highest load is more than this many times the lowest", minimum=1.0
    )
    max_known_pages: int = option(
        262_144,
        "most cached pages remembered for each worker; further pages do not count when a worker is chosen",
        unit="pages",
        minimum=0,
    )
    keepalive_s: float = option(2.0, "time between keep-alives to each engine", unit="seconds", minimum=0.05)
    worker_timeout_s: float = option(
        5.0,
        "an engine that is silent for this long, and makes no progress, is lost (a closed connection is noticed at "
        "once; a long step on a CPU is progress)",
        unit="seconds",
        minimum=0.1,
    )
    discovery_timeout_s: float = option(
        5.0, "longest time for one GET /server_info to a worker", unit="seconds", minimum=0.1
    )
    request_timeout_s: float = option(600.0, "longest time one request may take", unit="seconds", minimum=0.1)
    storage_timeout_s: float = option(
        90.0,
        "longest time for /hicache/storage-backend over all workers; a store may have to be scanned",
        unit="seconds",
        minimum=0.1,
    )
    flush_timeout_s: float = option(10.0, "longest time for /flush_cache over all workers", unit="seconds", minimum=0.1)
    retry_after_s: float = option(
        1.0, "Retry-After sent with a refusal when there is no better estimate", unit="seconds", minimum=0.0
    )
