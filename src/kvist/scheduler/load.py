"""The load report of a scheduler: queue lengths, pages and counters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvist.kv.pages import PageCounts
from kvist.kv.tiers.host import HostCounts

# Counters never decrease. Tokens and pages are counted when their step or handoff is finished.
COUNTERS = (
    "requests_finished",
    "requests_failed",
    "requests_aborted",
    "requests_refused",  # failed before they were queued: overloaded, too long, wrong mode for this role
    "requests_displaced",  # failed in a full queue, for a request of a caller with fewer requests
    "prompt_tokens",  # of admitted requests whose prompt this engine computes
    "cached_prompt_tokens",  # part of prompt_tokens: found in the cache
    "ceiling_prompt_tokens",  # part of prompt_tokens: hits of an unbounded cache
    "computed_prompt_tokens",  # computed in prompt chunks, including repeats after a preemption
    "generation_tokens",  # sampled by this engine's steps
    "steps",
    "preemptions",
    "prefetches",  # requests that queried the store, or waited for the fetch of another request
    "prefetch_timeouts",  # part of prefetches: continued before all pages had arrived
    "prefetch_wait_seconds",  # from arrival to the waiting queue
    "handoffs_sent",  # prefill: acknowledged by decode
    "handoffs_received",  # decode: verified, request taken over
    "handoffs_cancelled",  # either side: closed since its request was aborted
    "handoffs_failed",  # either side: closed for any other reason
    "foreign_grants",  # prefill: refused, since the gateway named another decode engine
    "handoff_pages",  # in handoffs sent or received
    "handoff_bytes",
    "handoff_seconds",  # Grant to verified (decode), Grant to Ack (prefill)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLoad:
    num_running: int  # with pages, computing or waiting for a handoff
    num_waiting: int  # without pages
    pages: PageCounts
    totals: Mapping[str, float]  # COUNTERS, and the cache's TIER_COUNTERS
    service_s: float | None = None  # recent mean time from admission to end; None: no request has ended yet
    host_pages: HostCounts | None = None  # None: there is no host tier
