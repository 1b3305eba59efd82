"""The decode side of every handoff of one engine: grants pages, verifies the received pages, takes the request over.

A Grant is repeated, at growing intervals, until prefill answers: if a Grant is lost with its connection, the request is
delayed by a second or two. Granted pages are IN_FLIGHT until prefill has confirmed that it writes no more (Done,
Closed) or its process is certainly dead. The request itself may end earlier: its `Ended` is sent at once, and Revoke is
repeated until the pages are free.

tables.py has the transitions. Closed handoffs are remembered for a while, so that a repeated Done is answered again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvist.flight.handoff_report import HandoffReport
from kvist.plan.events import Event
from kvist.plan.transfers import PagesVerified, PeerDied, VerifyPages
from kvist.request import EpochId, HandoffId, Outcome
from kvist.scheduler.active import DecodeRequest, PrefillRequest, RequestState
from kvist.scheduler.handoff.memory import ExpiringMap
from kvist.scheduler.handoff.peers import KnownPeers
from kvist.scheduler.handoff.side import SideParts
from kvist.scheduler.handoff.tables import TARGET_TRANSITIONS, TargetState, TargetTrigger
from kvist.scheduler.stage_times import note_done
from kvist.scheduler.timers import TimerKind
from kvist.wire import Ack, Closed, Done, Grant, Revoke

MAX_KNOWN_SOURCES = 4096  # epochs of prefill engines


@dataclass(slots=True, eq=False, kw_only=True)
class TargetHandoff:
    """One handoff at the decode side. Mutable; its one owner is the `TargetSide`."""

    request: DecodeRequest
    grant: Grant
    granted_s: float
    num_grants_sent: int = 1
    state: TargetState = TargetState.GRANTED
    done: Done | None = None  # from its arrival on
    done_s: float = 0.0
    num_intact: int = 0  # pages that arrived as they were sent, up to the first that did not
    reason: str = ""  # sent with Revoke
    cancelled: bool = False  # its request was aborted, here or at prefill

    @property
    def handoff_id(self) -> HandoffId:
        return self.grant.handoff_id

    @property
    def source_epoch(self) -> EpochId:
        return self.grant.source_epoch

    @property
    def endpoint(self) -> str:
        """The address of the prefill engine."""
        return self.request.prefill.endpoint

    @property
    def received(self) -> Done:
        """The Done of a handoff that has received it."""
        assert self.done is not None, f"{self.handoff_id} has not received Done"
        return self.done


@dataclass(frozen=True, slots=True)
class _Answer:
    """The answer to a Done that is repeated after its handoff was closed here: Ack, or Revoke with the reason."""

    taken_over: bool
    reason: str = ""


class TargetSide:
    """The decode side of all handoffs of one engine. Mutable; its one owner is the scheduler."""

    def __init__(self, parts: SideParts) -> None:
        self._parts = parts
        self._context = parts.context
        self._endings = parts.endings
        self._epoch = parts.epoch
        self._peers = KnownPeers(parts.own)
        self._open: dict[HandoffId, TargetHandoff] = {}
        self._closed: ExpiringMap[HandoffId, _Answer] = parts.closed_handoffs()
        # Entries do not expire: a prefill engine keeps pages until its Done is answered, however late it arrives.
        self._endpoints: ExpiringMap[EpochId, str] = ExpiringMap(capacity=MAX_KNOWN_SOURCES, max_age_s=math.inf)

    def handlers(self) -> Mapping[type[Event], Callable[[Any], None]]:
        """Return the handler of each event of this side."""
        return {
            Done: self.on_done,
            Closed: self.on_closed,
            PagesVerified: self.on_verified,
        }

    def timer_handlers(self) -> Mapping[TimerKind, Callable[[str], None]]:
        return {
            TimerKind.DONE: self._on_done_timeout,
            TimerKind.RESEND: lambda key: self._resend(self._open[HandoffId(key)]),
        }

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def watched_epochs(self) -> frozenset[EpochId]:
        return frozenset(handoff.source_epoch for handoff in self._open.values())

    # ---------------------------------------------------------------- the request of a handoff

    def on_arrived(self, request: DecodeRequest) -> None:
        """End an accepted request whose handoff id was used before, or whose prefill engine cannot hand pages over."""
        handoff_id, prefill = request.handoff_id, request.prefill
        self._endpoints.put(prefill.epoch, prefill.endpoint, self._context.now_s)
        others = [each for each in self._parts.requests.live.values() if each is not request]
        if (
            handoff_id in self._open
            or self._closed.get(handoff_id) is not None
            or any(isinstance(o, PrefillRequest | DecodeRequest) and o.handoff_id == handoff_id for o in others)
        ):
            message = f"handoff {handoff_id} was used before"
            self._endings.end(request, Outcome.FAILED, "invalid_request", message)
        elif prefill.spec is not None:
            choice = self._peers.from_(prefill.epoch, prefill.spec)
            if choice.name is None:
                self._endings.end(request, Outcome.FAILED, "handoff_failed", choice.reason)

    def grant_pages(self, request: DecodeRequest) -> None:
        """Open the handoff: grant the pages of the request that are not cached."""
        context, source = self._context, request.prefill
        first_page = request.num_computed // self._parts.cache.page_size
        grant = Grant(
            handoff_id=request.handoff_id,
            request_id=request.request_id,
            target_epoch=self._epoch,
            source_epoch=source.epoch,
            target=self._parts.own,
            first_page=first_page,
            page_ids=tuple(request.page_ids[first_page:]),
        )
        self._open[grant.handoff_id] = TargetHandoff(request=request, grant=grant, granted_s=context.now_s)
        request.granted = request.in_handoff = True
        self._parts.cache.begin_transfer(request.lease, first_page)
        context.out.to_source(source.endpoint, grant)
        self._parts.set_timer(TimerKind.RESEND, grant.handoff_id, context.config.ack_timeout_s)
        self._parts.set_timer(TimerKind.DONE, grant.handoff_id, context.config.handoff_timeout_s)

    def on_ended(self, request: DecodeRequest, outcome: Outcome, message: str) -> None:
        """Stop the handoff of a request that ended for a reason outside the handoff."""
        handoff = self._open.get(request.handoff_id)
        if handoff is not None and handoff.request is request:
            handoff.cancelled |= outcome is Outcome.ABORTED
            self._fire(handoff, TargetTrigger.REQUEST_ENDED, message)

    # ---------------------------------------------------------------- messages from prefill

    def on_done(self, done: Done) -> None:
        handoff = self._open.get(done.handoff_id)
        if done.target_epoch != self._epoch:
            return
        if handoff is None:
            self._repeat_answer(done)
        elif handoff.source_epoch == done.source_epoch:
            if handoff.state is TargetState.GRANTED:
                handoff.done, handoff.done_s = done, self._context.now_s
                if handoff.request.state is RequestState.GRANTED:
                    note_done(handoff.request, self._context.now_s)
            self._fire(handoff, TargetTrigger.DONE, handoff.reason)

    def on_closed(self, closed: Closed) -> None:
        handoff = self._open.get(closed.handoff_id)
        if handoff is None or closed.target_epoch != self._epoch:
            return
        if closed.source_epoch == handoff.source_epoch:
            handoff.cancelled |= closed.error_code is None
            self._fire(handoff, TargetTrigger.SOURCE_CLOSED, closed.message, closed.error_code)
        elif handoff.state is TargetState.GRANTED:
            # Another process answers at that address. The process that received our Grant may still be writing: its
            # pages are free only after its death, but the request cannot succeed any more.
            self._fail_request(handoff, "worker_lost", "the prefill worker has restarted")

    def on_peer_died(self, event: PeerDied) -> None:
        for handoff in list(self._open.values()):
            if handoff.source_epoch == event.epoch:
                self._fire(handoff, TargetTrigger.PEER_DIED, "the prefill worker died", "worker_lost")

    # ---------------------------------------------------------------- reports and timers

    def on_verified(self, event: PagesVerified) -> None:
        handoff = self._open.get(event.handoff_id)
        if handoff is None or handoff.done is None:
            return
        if event.checksum == handoff.done.checksum:
            handoff.num_intact = len(handoff.grant.page_ids)
            self._fire(handoff, TargetTrigger.VERIFIED, handoff.reason)
        else:
            handoff.num_intact = min(event.num_intact, len(handoff.grant.page_ids))
            self._fire(handoff, TargetTrigger.MISMATCH, handoff.reason)

    def _on_done_timeout(self, key: str) -> None:
        limit = f"{self._context.config.handoff_timeout_s:g} s (--handoff-timeout-s)"
        message = f"the prefill worker did not hand over the pages within {limit}"
        self._fail_request(self._open[HandoffId(key)], "handoff_failed", message)

    def _fail_request(self, handoff: TargetHandoff, code: str, message: str) -> None:
        self._endings.end(handoff.request, Outcome.FAILED, code, message)
        self.on_ended(handoff.request, Outcome.FAILED, message)

    # ---------------------------------------------------------------- actions of the transitions

    def _fire(self, handoff: TargetHandoff, trigger: TargetTrigger, reason: str, code: str | None = None) -> None:
        """Make the transition, if the table has one, and do what its new state requires."""
        to = TARGET_TRANSITIONS[handoff.state].get(trigger)
        if to is None:
            return
        before, handoff.state, handoff.reason = handoff.state, to, reason
        if to is TargetState.VERIFYING:
            self._parts.cancel_timers(handoff.handoff_id, TimerKind.RESEND)
            self._verify(handoff)
        elif to is TargetState.REVOKED:
            self._parts.cancel_timers(handoff.handoff_id, TimerKind.DONE)
            self._send_revoke(handoff.endpoint, handoff.handoff_id, reason, cancelled=handoff.cancelled)
            self._parts.set_timer(TimerKind.RESEND, handoff.handoff_id, self._context.config.ack_timeout_s)
        elif to is TargetState.DISCARDING:
            self._parts.cancel_timers(handoff.handoff_id, TimerKind.DONE)
            self._send_revoke(handoff.endpoint, handoff.handoff_id, reason, cancelled=handoff.cancelled)
        elif before is TargetState.VERIFYING:
            self._take_over(handoff, verified=trigger is TargetTrigger.VERIFIED)
        else:
            self._close(handoff, _Answer(taken_over=False, reason=reason))
            self._context.count("handoffs_cancelled" if handoff.cancelled else "handoffs_failed")
            if handoff.request.state is RequestState.ENDED:
                self._endings.release(handoff.request)
            elif handoff.cancelled:
                self._endings.end(handoff.request, Outcome.ABORTED, None, reason)
            else:
                self._endings.end(handoff.request, Outcome.FAILED, code or "handoff_failed", reason)

    def _verify(self, handoff: TargetHandoff) -> None:
        done, page_ids = handoff.received, handoff.grant.page_ids
        if done.num_pages != len(page_ids):
            self._fire(handoff, TargetTrigger.MISMATCH, "")
        elif not page_ids:
            self._fire(handoff, TargetTrigger.VERIFIED, "")
        else:
            verify = VerifyPages(
                handoff_id=handoff.handoff_id,
                page_ids=page_ids,
                transport=done.transport,
                checksum=done.checksum,
                page_digests=done.page_digests,
            )
            self._context.out.transfers.append(verify)

    def _take_over(self, handoff: TargetHandoff, *, verified: bool) -> None:
        """Continue the request here. Pages that did not arrive as they were sent are computed again."""
        context, num_pages = self._context, len(handoff.grant.page_ids)
        self._close(handoff, _Answer(taken_over=True))
        self._send_ack(handoff.endpoint, handoff.handoff_id)
        num_bytes = num_pages * self._parts.own.page_bytes
        handoff.request.taken_over_s = context.now_s
        handoff.request.handoff_report = HandoffReport(
            num_pages=num_pages,
            num_pages_reused=handoff.grant.first_page,
            num_bytes=num_bytes,
            duration_s=context.now_s - handoff.granted_s,
            wait_s=context.now_s - handoff.done_s,
            transport=handoff.received.transport,
            transport_reason=self._reason_for(handoff),
            num_pages_recomputed=num_pages - handoff.num_intact,
            grant_wait_s=handoff.received.grant_wait_s,
            last_copy_s=handoff.received.last_copy_s,
        )
        context.count("handoff_verify_seconds", context.now_s - handoff.done_s)
        context.count("handoffs_received" if verified else "handoff_checksum_mismatches")
        context.count("handoff_pages", num_pages)
        context.count("handoff_bytes", num_bytes)
        context.count("handoff_seconds", context.now_s - handoff.granted_s)
        self._start_decoding(handoff)

    def _reason_for(self, handoff: TargetHandoff) -> str:
        """Return why the transport that wrote the pages was chosen; empty if only the prefill engine knows."""
        peer = handoff.request.prefill
        choice = None if peer.spec is None else self._peers.from_(peer.epoch, peer.spec)
        return "" if choice is None or choice.name != handoff.received.transport else choice.reason

    def _start_decoding(self, handoff: TargetHandoff) -> None:
        """Start the request. The K/V of its tokens on arrival is in its intact pages; prefill has already sent the
        first token to the gateway, with the finish reason, if any."""
        request, done = handoff.request, handoff.received
        num_pages = handoff.grant.first_page + handoff.num_intact
        num_tokens = min(request.num_tokens_on_arrival, num_pages * self._parts.cache.page_size)
        request.num_computed = request.num_planned = num_tokens
        self._parts.cache.insert(request.lease, request.token_ids, num_tokens)
        request.token_ids.append(done.first_token.token_id)
        if done.finish_reason is not None:
            self._endings.end(request, Outcome.FINISHED)
        else:
            self._parts.requests.move(request, RequestState.RUNNING)

    def _close(self, handoff: TargetHandoff, answer: _Answer) -> None:
        """Close the handoff: no write can arrive any more."""
        del self._open[handoff.handoff_id]
        self._closed.put(handoff.handoff_id, answer, self._context.now_s)
        self._parts.cancel_timers(handoff.handoff_id, TimerKind.DONE, TimerKind.RESEND)
        handoff.request.in_handoff = False
        self._parts.cache.end_transfer(handoff.request.lease)

    def _repeat_answer(self, done: Done) -> None:
        endpoint = self._endpoints.get(done.source_epoch)
        if endpoint is None:
            return  # no request here has named that prefill worker: its endpoint is unknown
        answer = self._closed.get(done.handoff_id)
        if answer is None:
            self._send_revoke(endpoint, done.handoff_id, "the handoff is unknown")
        elif answer.taken_over:
            self._send_ack(endpoint, done.handoff_id)
        else:
            self._send_revoke(endpoint, done.handoff_id, answer.reason)

    def _send_ack(self, endpoint: str, handoff_id: HandoffId) -> None:
        self._context.out.to_source(endpoint, Ack(handoff_id=handoff_id, target_epoch=self._epoch))

    def _send_revoke(self, endpoint: str, handoff_id: HandoffId, reason: str, *, cancelled: bool = False) -> None:
        revoke = Revoke(handoff_id=handoff_id, target_epoch=self._epoch, reason=reason, cancelled=cancelled)
        self._context.out.to_source(endpoint, revoke)

    def _resend(self, handoff: TargetHandoff) -> None:
        """Send Revoke or Grant again. Revoke is repeated every `ack_timeout_s`. Grant is repeated after waits of 1, 2,
        4 ... times `ack_timeout_s`, since prefill may compute for long and sends no answer before Done."""
        wait_s, endpoint = self._context.config.ack_timeout_s, handoff.endpoint
        if handoff.state is TargetState.GRANTED:
            self._context.out.to_source(endpoint, handoff.grant, repeated=True)
            wait_s *= 2.0**handoff.num_grants_sent
            handoff.num_grants_sent += 1
        else:
            self._send_revoke(endpoint, handoff.handoff_id, handoff.reason, cancelled=handoff.cancelled)
        self._parts.set_timer(TimerKind.RESEND, handoff.handoff_id, wait_s)
