"""A prefetch: one request's wait for its pages from the store, as a state machine. Pure.

    FINDING ──found──► QUEUED ──fetches started──► FETCHING ──last fetch ended──► DONE ──closed──► CLOSED
       └─────────found too few─────────────────────────▲
    FINDING, QUEUED, FETCHING ──given up──► DONE

`TRANSITIONS` has all transitions. A trigger that is missing in the table of a state is ignored in that state, so a late
answer of the store is harmless. Until it is DONE, a prefetch may also wait for fetches of other requests; until it is
CLOSED, its leading pages stay pinned in the host tier. storage.py decides when each trigger fires.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvist.kv.tiers.host import HostPage, HostTier

PREFETCH_POLICIES = ("best_effort", "wait_complete", "timeout")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchConfig:
    """How long a request may wait for its pages from the store, and the smallest prefix worth fetching."""

    policy: str = "timeout"  # one of PREFETCH_POLICIES
    base_s: float = 1.0  # `timeout`: the longest wait is base_s + per_1k_s for each 1000 tokens
    per_1k_s: float = 0.25
    threshold_tokens: int = 256  # fewer tokens are computed instead of fetched

    def __post_init__(self) -> None:
        assert self.policy in PREFETCH_POLICIES

    def wait_s(self, num_tokens: int, *, for_handoff: bool = False) -> float:
        """Return the longest wait for `num_tokens` tokens. A handoff through the store always waits for its pages."""
        if self.policy == "timeout" or (for_handoff and self.policy == "best_effort"):
            return self.base_s + self.per_1k_s * num_tokens / 1000
        return 0.0 if self.policy == "best_effort" else math.inf


class PrefetchState(enum.Enum):
    FINDING = "finding"  # the store looks up the pages
    QUEUED = "queued"  # pages were found; waits for room in the host tier's share for prefetches
    FETCHING = "fetching"  # waits for fetches, its own or those of other requests
    DONE = "done"  # nothing is left to wait for; fetched pages stay pinned
    CLOSED = "closed"  # the request was admitted, or ended


class PrefetchTrigger(enum.Enum):
    FOUND = "found"
    FOUND_TOO_FEW = "found too few"  # or too few pages were missing for a look-up
    STARTED = "fetches started"
    FETCHED = "last fetch ended"
    GIVEN_UP = "given up"  # the time limit has expired, or the store was detached
    CLOSED = "closed"


TRANSITIONS: dict[PrefetchState, dict[PrefetchTrigger, PrefetchState]] = {
    PrefetchState.FINDING: {
        PrefetchTrigger.FOUND: PrefetchState.QUEUED,
        PrefetchTrigger.FOUND_TOO_FEW: PrefetchState.FETCHING,
        PrefetchTrigger.GIVEN_UP: PrefetchState.DONE,
    },
    PrefetchState.QUEUED: {
        PrefetchTrigger.STARTED: PrefetchState.FETCHING,
        PrefetchTrigger.GIVEN_UP: PrefetchState.DONE,
    },
    PrefetchState.FETCHING: {
        PrefetchTrigger.FETCHED: PrefetchState.DONE,
        PrefetchTrigger.GIVEN_UP: PrefetchState.DONE,
    },
    PrefetchState.DONE: {
        PrefetchTrigger.CLOSED: PrefetchState.CLOSED,
    },
    PrefetchState.CLOSED: {},
}


@dataclass(slots=True, eq=False)
class Fetch:
    """One `FetchPages` job under way. Mutable; its one owner is the `StorageTier`."""

    job_id: int
    pages: list[HostPage]
    owner: Prefetch  # the prefetch that started the job
    waiters: list[Prefetch]  # all prefetches that wait for the pages
    generation: int  # of the store
    is_cancelled: bool = False


@dataclass(slots=True, eq=False, kw_only=True)
class Prefetch:
    """Mutable; its one owner is the `StorageTier`: others only read it."""

    digests: Sequence[bytes] = field(repr=False)  # of the prompt's pages, from the first
    num_cached: int  # leading pages in the device pool, which need no fetch
    wait_s: float  # the longest wait
    for_handoff: bool = False  # a prefill engine has stored the pages for this request
    find_start: int = 0  # pages [find_start, len(digests)) are looked up in the store
    find_end: int = 0  # pages [find_start, find_end) were found in the store
    state: PrefetchState = PrefetchState.FINDING
    fetches: list[Fetch] = field(default_factory=list)  # under way and waited for, including other requests' fetches
    num_fetched: int = 0  # pages fetched for this request; they count in the share until the prefetch is closed
    pinned: HostPage | None = None  # the last of the leading resident pages; the pin keeps the whole prefix
    _num_resident: int = 0  # leading pages resident when `pinned` was set

    def fire(self, trigger: PrefetchTrigger) -> bool:
        """Enter the next state; return False if the trigger is ignored in this state."""
        next_state = TRANSITIONS[self.state].get(trigger)
        if next_state is None:
            return False
        self.state = next_state
        return True

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to wait for."""
        return self.state in (PrefetchState.DONE, PrefetchState.CLOSED)

    @property
    def num_asked(self) -> int:
        return len(self.digests) - self.find_start

    @property
    def num_found_beyond_device(self) -> int:
        """The number of pages that the store has and the device pool did not have."""
        return self.find_end - max(self.find_start, self.num_cached)

    def wait_for(self, fetch: Fetch) -> None:
        if self not in fetch.waiters:
            fetch.waiters.append(self)
            self.fetches.append(fetch)

    def on_fetch_ended(self, fetch: Fetch) -> bool:
        """Stop waiting for this fetch; return whether the prefetch is DONE now."""
        self.fetches.remove(fetch)
        return self.fire_if_fetched()

    def fire_if_fetched(self) -> bool:
        return not self.fetches and self.fire(PrefetchTrigger.FETCHED)

    def keep_prefix(self, host: HostTier) -> None:
        """Pin the last of the leading resident pages: this keeps the whole prefix, since children are evicted first."""
        last = self.pinned
        while self._num_resident < len(self.digests):
            page = host.get(self.digests[self._num_resident])
            if page is None or not page.resident:
                break
            last = page
            self._num_resident += 1
        if last is not None and last is not self.pinned:
            host.pin(last)
            self.release_prefix(host)
            self.pinned = last

    def release_prefix(self, host: HostTier) -> None:
        if self.pinned is not None:
            host.unpin(self.pinned)
            self.pinned = None
