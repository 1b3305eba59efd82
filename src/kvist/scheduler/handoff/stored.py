"""Handoffs through the store: prefill stores the pages of a prompt, decode loads them. The two never meet.

    prefill   computed pages ──► host tier ──► store; the first token is sent at once
              all stored, or the store failed, or `store_handoff_timeout_s` ──► Ended(FINISHED, stored)
    decode    a request of mode FULL with `from_store`: prefetched, loaded, the rest is computed here

No page is granted, so nothing needs to be revoked. A page that is not stored, or not found, is computed by decode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvist.flight.handoff_report import HandoffReport, StoredPages
from kvist.kv.tiers.storage import PrefixStoring
from kvist.request import Outcome, RequestId
from kvist.scheduler.active import ActiveRequest, RequestState, StoringRequest
from kvist.scheduler.handoff.side import SideParts
from kvist.scheduler.timers import TimerKind


class StoredHandoffs:
    """The handoffs of one engine through the store, as prefill and as decode. Mutable; its one owner is the
    scheduler."""

    def __init__(self, parts: SideParts) -> None:
        self._parts = parts
        self._context = parts.context
        self._cache = parts.cache
        self._waiting: dict[RequestId, StoringRequest] = {}  # in state AWAITING_TRANSFER

    def timer_handlers(self) -> Mapping[TimerKind, Callable[[str], None]]:
        return {TimerKind.STORED: lambda key: self._finish(self._waiting[RequestId(key)])}

    # ---------------------------------------------------------------- prefill

    def on_computed(self, request: StoringRequest) -> None:
        """Store the pages that have become full."""
        storage = self._cache.storage
        if storage is None or not storage.is_attached:
            return
        if request.storing is None:
            request.storing = PrefixStoring()
        self._cache.store_at_once(request.lease, request.storing)

    def on_first_token(self, request: StoringRequest) -> None:
        """Wait until the pages are stored. The prompt is computed, and its first token is sent."""
        context = self._context
        request.computed_s = context.now_s
        self._parts.requests.move(request, RequestState.AWAITING_TRANSFER)
        self._waiting[request.request_id] = request
        context.timers.set(TimerKind.STORED, request.request_id, context.now_s + context.config.store_handoff_timeout_s)

    def end_settled(self) -> None:
        """End the requests whose pages are stored, or of which no further page will be."""
        for request in list(self._waiting.values()):
            if self._is_settled(request):
                self._finish(request)

    def on_ended(self, request: StoringRequest) -> None:
        """Stop waiting for the pages of a request that has ended."""
        self._waiting.pop(request.request_id, None)
        self._context.timers.cancel(TimerKind.STORED, request.request_id)
        storage = self._cache.storage
        if request.storing is not None and storage is not None:
            storage.end_storing(request.storing)

    def _is_settled(self, request: StoringRequest) -> bool:
        storage = self._cache.storage
        return request.storing is None or storage is None or storage.is_settled(request.storing)

    def _finish(self, request: StoringRequest) -> None:
        context = self._context
        num_pages = request.num_tokens_on_arrival // self._cache.page_size
        stored = StoredPages(
            num_pages=num_pages,
            num_stored=0 if request.storing is None else request.storing.num_stored,
            duration_s=context.now_s - request.computed_s,
        )
        context.count("store_handoffs_sent" if stored.num_stored == num_pages else "store_handoffs_incomplete")
        context.count("store_handoff_seconds", stored.duration_s)
        self._parts.endings.end(request, Outcome.FINISHED, stored=stored)
        self.on_ended(request)

    # ---------------------------------------------------------------- decode

    def on_loaded(self, request: ActiveRequest) -> None:
        """Report the pages that the tiers had for a request that starts, once."""
        context, lease, page_size = self._context, request.lease, self._cache.page_size
        if request.handoff_report is not None or len(request.token_ids) > request.num_tokens_on_arrival:
            return  # preempted before, and counted then
        num_had = request.num_computed // page_size
        num_fetched = min(lease.num_fetched_tokens // page_size, num_had)
        num_missing = (request.num_tokens_on_arrival - 1) // page_size - num_had
        request.taken_over_s = context.now_s
        request.handoff_report = HandoffReport(
            num_pages=num_fetched,
            num_pages_reused=num_had - num_fetched,
            num_bytes=num_fetched * self._parts.own.page_bytes,
            duration_s=context.now_s - request.arrived_s,
            wait_s=context.now_s - request.arrived_s,
            num_pages_missing=num_missing,
            transport="store" if num_fetched else "",
        )
        context.count("store_handoffs_received")
        context.count("store_handoff_missing_pages", num_missing)
