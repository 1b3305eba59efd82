"""What a scheduler says of itself: queue lengths, pages and counters. The counters' names are listed here only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvist.kv.host_tier import HostCounts
from kvist.kv.pages import PageCounts

# Each only grows. Tokens and pages are counted when the step or the handoff that made them is finished.
COUNTERS = (
    "requests_finished",
    "requests_failed",
    "requests_aborted",
    "requests_refused",  # failed before they were queued: overloaded, too long, not for this role
    "requests_displaced",  # failed when the queue was full and a caller with fewer requests came
    "prompt_tokens",  # of requests whose prompt this engine read
    "cached_prompt_tokens",  # of those: found in the cache
    "ceiling_prompt_tokens",  # of those: what a cache that forgets nothing would have had
    "computed_prompt_tokens",  # computed in prompt chunks, those evicted and computed again included
    "generation_tokens",  # produced by this engine's steps
    "steps",
    "preemptions",
    "prefetches",  # requests that asked the store for pages, or waited for those that others had asked for
    "prefetch_timeouts",  # of those: went on before all had come
    "prefetch_wait_seconds",  # from arrival to the queue
    "handoffs_sent",  # prefill: acknowledged by decode
    "handoffs_received",  # decode: verified and taken over
    "handoffs_cancelled",  # either side: given up with its request, which was aborted
    "handoffs_failed",  # either side: closed in any other way
    "foreign_grants",  # prefill: refused, as the gateway named another decode engine
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
    service_s: float | None = None  # of a request lately, from its first turn to its end; None: none has ended
    host_pages: HostCounts | None = None  # None: there is no host tier
