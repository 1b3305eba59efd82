"""The state of a gateway and its workers at one moment, as the dashboard and `kvist top` read it. PURE data.

Units are in the names: `_s` seconds, `_per_s` per second. Rates are means of the last seconds (recorder.py). None means
unknown: no value in that time, or a worker that has not reported yet.
"""

from __future__ import annotations

import msgspec


class Tiered(msgspec.Struct, frozen=True, kw_only=True):
    """Prompt tokens per second, by the place where they were found."""

    device: float
    host: float
    storage: float
    computed: float  # found nowhere


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds below which half, 90% and 99% of the last minute's values lie."""

    p50: float | None
    p90: float | None
    p99: float | None


class Server(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    model: str
    instance_id: str | None
    role: str  # "router", or the role of the engine behind this HTTP port
    ready: bool
    draining: bool
    num_open_requests: int  # that a drain waits for
    policy: str  # of routing


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """The requests of this gateway."""

    num_in_flight: int
    num_long_waiting: int  # for a thread that tokenises them
    finished_per_s: float
    failed_per_s: float
    disconnected_per_s: float
    prompt_tokens_per_s: Tiered
    output_tokens_per_s: float
    ttft_s: Quantiles
    itl_s: Quantiles
    e2e_s: Quantiles


class Pages(msgspec.Struct, frozen=True, kw_only=True):
    """The pages of one tier of a worker."""

    total: int
    used: int  # by requests, or being copied
    cached: int
    free: int


class Storage(msgspec.Struct, frozen=True, kw_only=True):
    """The storage tier of a worker."""

    backend: str
    state: str  # "attaching", "attached" or "detaching"
    breaker: str  # "closed": the store is used; "open", "half_open"
    stored_bytes: int  # of all workers that share the store
    location: str


class Handoffs(msgspec.Struct, frozen=True, kw_only=True):
    """Handoffs that a worker has sent or received, directly or through the store."""

    sent_per_s: float
    received_per_s: float
    failed_per_s: float
    pages_per_s: float  # of direct handoffs, in both directions
    bytes_per_s: float
    mean_s: float | None  # time of a direct handoff
    num_sent: int  # since the start
    num_received: int


class HitRate(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of the prompt tokens, 0 to 1, of the last minute; None without prompts in that time."""

    cached: float | None
    ceiling: float | None  # if no page had ever been evicted
    cached_total: float | None  # since the workers started
    ceiling_total: float | None


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    worker_id: str
    url: str
    role: str  # "prefill", "decode", "unified" or "unknown"
    state: str  # "joining", "ready", "draining", "lost" or "leaving"
    problem: str  # why the worker is not ready; a text to be read
    device: str  # "cpu" or "cuda"; "" if unknown
    tp_size: int | None
    num_running: int | None
    num_waiting: int | None
    num_in_flight: int  # requests of this gateway
    num_pending_tokens: int  # prompt tokens of these that are not known to be computed
    max_running_requests: int | None
    queue_wait_s: float | None  # how long the queue lasts, by the worker's own estimate
    page_bytes: int | None
    pages: Pages | None
    host_pages: Pages | None  # None: no host tier
    num_leased_pages: int
    storage: Storage | None  # None: no store is attached
    hit_rate: HitRate
    computed_tokens_per_s: float  # prompt tokens
    output_tokens_per_s: float
    busy_share: float  # of the last seconds that was spent in steps, 0 to 1
    decode_step_s: float | None
    handoffs: Handoffs
    preemptions_per_s: float


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """The memory and SSDs of a Mooncake pool, as its master counts them."""

    location: str
    master: str
    age_s: float | None  # of the figures
    problem: str  # why the last question had no answer; a text to be read
    num_stores: int
    num_pages: int
    capacity_bytes: int
    used_bytes: int
    ssd_capacity_bytes: int
    ssd_used_bytes: int
    stores: dict[str, tuple[int, int]]  # used bytes and capacity of each store, HOST:PORT; the first 64


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A worker as the router saw it when it chose a route."""

    worker_id: str
    role: str
    chosen: bool
    num_device_tokens: int  # of the prompt, in its device pool
    num_host_tokens: int  # further ones in its host tier
    num_stored_tokens: int  # further ones in its store
    num_coming_tokens: int  # that it was computing for other requests
    num_requests: int  # running or waiting
    num_pending_tokens: int  # prompt tokens to be computed before
    served_session: bool  # it served the last request of the same session


class RouteDecision(msgspec.Struct, frozen=True, kw_only=True):
    request_id: str
    time_unix_s: float
    reason: str  # docs/routing.md, "One worker or two"
    cost_ms: float | None
    way: str | None  # of the handoff: "direct" or "store"
    prefill: str
    decode: str  # the same worker if one has both parts
    num_prompt_tokens: int
    num_failovers: int
    candidates: list[Candidate]


class Routing(msgspec.Struct, frozen=True, kw_only=True):
    reasons: dict[str, int]  # number of routes since the start
    num_failovers: int
    num_index_pages: int
    num_index_bytes: int
    decisions: list[RouteDecision]  # the newest first


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """Points of the charts, one a second, the oldest first. `lines` has a value for each time, or None for a gap."""

    times_unix_s: list[float]
    lines: dict[str, list[float | None]]


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    time_unix_s: float
    server: Server
    traffic: Traffic
    hit_rate: HitRate  # of all workers
    handoffs: Handoffs  # of all workers; pages and bytes as received
    workers: list[Worker]
    pools: list[Pool]
    routing: Routing
    series: Series
