"""Data that the dispatcher returns to the server: merged output with its workers, and the state of every worker.

Pure data types. router/dispatch.py creates them; server/ and metrics.py read them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvist.flight.handoff_report import StoredPages
from kvist.metrics import Histogram
from kvist.page_index.page_feed import KnownPages
from kvist.pool_status import WatchedPool
from kvist.request import RequestId, Role, WorkerId
from kvist.router.handoff_ways import HandoffWay, Way, WayCause
from kvist.router.policy import Reason, WorkerView
from kvist.router.rates import Rates
from kvist.wire import EngineSpec, LoadReport, TokenChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPart:
    """The next output tokens of a request: all tokens that were waiting for the reader, as one chunk.

    Parts are in order of `chunk.position`, without gaps or repeats; the part whose chunk has a `finish_reason` is the
    last. `chunk.num_cached_tokens` and `chunk.handoff` are in the part that covers the chunk which carried them.
    """

    chunk: TokenChunk
    prefill_worker: WorkerId  # runs prefill; with a unified worker both ids are equal
    decode_worker: WorkerId  # runs decode
    reason: Reason  # of the choice of one worker or two
    cost_ms: float | None = None  # of the route, if the policy measures it
    handoff: HandoffWay | None = None  # of a pair
    stored: StoredPages | None = None  # of a handoff through the store, once prefill has ended
    num_failovers: int = 0  # times that the stream went on at other workers, because one had failed


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSnapshot:
    worker_id: WorkerId
    role: Role | None  # how the router uses the worker; None before the first Welcome, if no URL list says it
    alive: bool  # requests can be sent to the worker now
    spec: EngineSpec | None  # None before the first Welcome
    load: LoadReport | None  # the last report, possibly without its digests
    state: str = "ready"  # registry.WorkerState
    problem: str = ""  # why the worker is not ready, for people
    url: str = ""  # of its HTTP server
    sources: tuple[str, ...] = ()  # that name the worker: "flags", "http", "announcement", or a --discovery
    num_in_flight: int = 0  # requests of this gateway that have not ended at the worker
    num_pending_tokens: int = 0  # prompt tokens of these that are not known to be computed
    rates: Rates = field(default_factory=Rates)
    num_rejected_messages: int = 0  # undecodable or impossible messages
    known_pages: KnownPages = field(default_factory=lambda: KnownPages())

    @property
    def role_name(self) -> str:
        return "unknown" if self.role is None else str(self.role)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """Counts of the requests whose client disconnected before the end."""

    num_held: int = 0  # requests that some worker has not ended yet
    release_s: Histogram = field(
        default_factory=Histogram
    )  # of the others: from the disconnect to the end at every worker


@dataclass(slots=True, kw_only=True)
class FailoverCounts:
    """Counts of the streams whose worker failed. Mutable; owned by `Streams`."""

    by_cause: Counter[str] = field(default_factory=Counter)  # failovers, by the code of the error before each
    num_resumed: int = 0  # pauses after which a token arrived
    num_failed: int = 0  # streams that ended because no worker went on with them
    pause_s: Histogram = field(default_factory=Histogram)  # from the failure to the next token


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A route that was chosen, and what was known about the workers then."""

    request_id: RequestId
    decided_s: float  # on the gateway's monotonic clock
    reason: Reason
    cost_ms: float | None  # of the route, if the policy measures it
    way: Way | None  # of the handoff of a pair
    prefill: WorkerId
    decode: WorkerId  # the same worker if one has both parts
    num_prompt_tokens: int  # and of the answer so far, after a failover
    num_failovers: int  # before this choice
    considered: Sequence[WorkerView]  # see `route.Route`


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSnapshot:
    workers: tuple[WorkerSnapshot, ...]
    handoffs: Mapping[tuple[Way, WayCause], int] = field(default_factory=dict)  # number of requests
    cancelled: Cancelled = field(default_factory=Cancelled)
    failovers: FailoverCounts = field(default_factory=FailoverCounts)
    num_routes: Mapping[Reason, int] = field(default_factory=dict)  # routes chosen so far, retries included
    role_switches: Mapping[tuple[Role, Role], int] = field(default_factory=dict)  # (from, to), as workers reported them
    num_index_entries: int = 0  # different pages that the index knows
    num_index_bytes: int = 0
    policy: str = ""  # of routing
    decisions: Sequence[Decision] = ()  # the last ones, the newest last

    def pools(self) -> dict[str, WatchedPool]:
        """Return each page pool by its location, as the worker that has asked its master last knows it."""
        found: dict[str, WatchedPool] = {}
        for worker in self.workers:
            tier = None if worker.load is None else worker.load.storage
            if tier is not None and tier.pool is not None:
                before = found.setdefault(tier.location, tier.pool)
                if _age_s(tier.pool) < _age_s(before):
                    found[tier.location] = tier.pool
        return found


def _age_s(pool: WatchedPool) -> float:
    return math.inf if pool.age_s is None else pool.age_s
