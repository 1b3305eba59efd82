"""The decode side of every handoff of one engine: grants pages, verifies the received pages, takes the request over.

A Grant is repeated, at growing intervals, until prefill answers: a Grant that was lost with its connection costs a
second or two. Granted pages are IN_FLIGHT until prefill has confirmed that it writes no more (Done, Closed) or its
process is certainly dead. The request itself may end earlier: its `Ended` is sent at once, and Revoke is repeated until
the pages are free.

handoff.py has the transitions. Closed handoffs are remembered for a while, so that a repeated Done is answered again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvist.plan.events import Event
from kvist.plan.transfers import PagesVerified, PeerDied, VerifyPages
from kvist.request import EpochId, HandoffId, Outcome
from kvist.scheduler.active import ActiveRequest, RequestState
from kvist.scheduler.handoff import TARGET_TRANSITIONS, TargetState, TargetTrigger
from kvist.scheduler.memory import ExpiringMap
from kvist.scheduler.requests import RequestTable
from kvist.scheduler.timers import TimerKind
from kvist.wire import Ack, Closed, Done, Grant, HandoffReport, PoolAddress, PrefillPeer, Revoke

MAX_KNOWN_SOURCES = 4096  # epochs of prefill engines


@dataclass(slots=True, eq=False, kw_only=True)
class TargetHandoff:
    """One handoff at the decode side. Mutable; its one owner is the `TargetSide`."""

    handoff_id: HandoffId
    request: ActiveRequest
    source: PrefillPeer
    num_pages_reused: int
    page_ids: tuple[int, ...]  # granted
    granted_s: float
    grant: Grant
    num_grants_sent: int = 1
    state: TargetState = TargetState.GRANTED
    done: Done | None = None
    done_s: float = 0.0
    reason: str = ""  # sent with Revoke
    cancelled: bool = False  # its request was aborted, here or at prefill


class TargetSide:
    """The decode side of all handoffs of one engine. Mutable; its one owner is the scheduler."""

    def __init__(self, table: RequestTable, *, epoch: EpochId, pool: PoolAddress) -> None:
        config = table.config
        self._table = table
        self._epoch = epoch
        self._pool = pool
        self._open: dict[HandoffId, TargetHandoff] = {}
        memory_s = 2 * config.handoff_timeout_s + config.grant_timeout_s
        # None: the request was taken over, send Ack again; else the reason, to send Revoke again
        self._closed: ExpiringMap[HandoffId, tuple[str | None]] = ExpiringMap(
            capacity=config.max_remembered_handoffs, max_age_s=memory_s
        )
        # Never expires: a prefill engine keeps pages until its Done is answered, however late the Done arrives.
        self._endpoints: ExpiringMap[EpochId, str] = ExpiringMap(capacity=MAX_KNOWN_SOURCES, max_age_s=math.inf)

    def handlers(self) -> Mapping[type[Event], Callable[[Any], None]]:
        """Return the handler of each event of this side, for `Steps`."""
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
        return frozenset(handoff.source.epoch for handoff in self._open.values())

    # ---------------------------------------------------------------- calls from the requests (HandoffHooks)

    def on_arrived(self, request: ActiveRequest) -> None:
        handoff_id, prefill = request.handoff_id, request.prefill
        assert handoff_id is not None
        assert prefill is not None
        self._endpoints.put(prefill.epoch, prefill.endpoint, self._table.now_s)
        waiting = (other for other in self._table.live.values() if other is not request)
        if (
            handoff_id in self._open
            or self._closed.get(handoff_id) is not None
            or any(other.handoff_id == handoff_id for other in waiting)
        ):
            self._table.end(request, Outcome.FAILED, "invalid_request", f"handoff {handoff_id} was used before")

    def on_refused(self, handoff_id: HandoffId, code: str, message: str) -> None:
        """Do nothing: no page was granted. Prefill ends by its grant timeout or by the gateway's Abort."""

    def on_allocated(self, request: ActiveRequest) -> None:
        if request.granted:
            return  # preempted after the takeover: this engine computes its pages itself
        assert request.handoff_id is not None
        assert request.prefill is not None
        assert request.lease is not None
        table, source = self._table, request.prefill
        first_page = request.num_computed // table.cache.page_size
        grant = Grant(
            handoff_id=request.handoff_id,
            request_id=request.request_id,
            target_epoch=self._epoch,
            source_epoch=source.epoch,
            pool=self._pool,
            first_page=first_page,
            page_ids=tuple(request.lease.page_ids[first_page:]),
        )
        handoff = TargetHandoff(
            handoff_id=request.handoff_id,
            request=request,
            source=source,
            num_pages_reused=first_page,
            page_ids=grant.page_ids,
            granted_s=table.now_s,
            grant=grant,
        )
        self._open[handoff.handoff_id] = handoff
        request.granted = request.in_handoff = True
        table.cache.begin_transfer(request.lease, first_page)
        table.out.to_source(source.endpoint, grant)
        self._schedule_resend(handoff.handoff_id, table.config.ack_timeout_s)
        table.timers.set(TimerKind.DONE, handoff.handoff_id, table.now_s + table.config.handoff_timeout_s)

    def on_computed(self, request: ActiveRequest) -> None:
        raise AssertionError(f"{request.request_id}: a decode engine has no PREFILL requests")

    def on_ended(self, request: ActiveRequest, outcome: Outcome, message: str) -> None:
        assert request.handoff_id is not None
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
        elif handoff.source.epoch == done.source_epoch:
            if handoff.state is TargetState.GRANTED:
                handoff.done, handoff.done_s = done, self._table.now_s
            self._fire(handoff, TargetTrigger.DONE, handoff.reason)

    def on_closed(self, closed: Closed) -> None:
        handoff = self._open.get(closed.handoff_id)
        if handoff is None or closed.target_epoch != self._epoch:
            return
        if closed.source_epoch == handoff.source.epoch:
            handoff.cancelled |= closed.error_code is None
            self._fire(handoff, TargetTrigger.SOURCE_CLOSED, closed.message, closed.error_code)
        elif handoff.state is TargetState.GRANTED:
            # A new process answers at that address. The process that got our Grant may still be writing: only its
            # death frees the pages, but the request is lost already.
            self._table.end(handoff.request, Outcome.FAILED, "worker_lost", "the prefill worker has restarted")

    def on_peer_died(self, event: PeerDied) -> None:
        for handoff in list(self._open.values()):
            if handoff.source.epoch == event.epoch:
                self._fire(handoff, TargetTrigger.PEER_DIED, "the prefill worker died", "worker_lost")

    # ---------------------------------------------------------------- reports and timers

    def on_verified(self, event: PagesVerified) -> None:
        handoff = self._open.get(event.handoff_id)
        if handoff is not None and handoff.done is not None:
            equal = event.checksum == handoff.done.checksum
            trigger = TargetTrigger.VERIFIED if equal else TargetTrigger.MISMATCH
            self._fire(
                handoff,
                trigger,
                "" if equal else "the pages that arrived differ from those that the prefill worker sent",
            )

    def _on_done_timeout(self, key: str) -> None:
        handoff = self._open[HandoffId(key)]
        limit = f"{self._table.config.handoff_timeout_s:g} s (--handoff-timeout-s)"
        message = f"the prefill worker did not hand over the pages within {limit}"
        self._table.end(handoff.request, Outcome.FAILED, "handoff_failed", message)

    # ---------------------------------------------------------------- actions of the transitions

    def _fire(self, handoff: TargetHandoff, trigger: TargetTrigger, reason: str, code: str | None = None) -> None:
        """Make the transition, if the table has one, and do what its new state requires."""
        to = TARGET_TRANSITIONS[handoff.state].get(trigger)
        if to is None:
            return
        endpoint = handoff.source.endpoint
        handoff.state, handoff.reason = to, reason
        if to is TargetState.VERIFYING:
            self._table.timers.cancel(TimerKind.RESEND, handoff.handoff_id)
            self._verify(handoff)
        elif to is TargetState.REVOKED:
            self._table.timers.cancel(TimerKind.DONE, handoff.handoff_id)
            self._send_revoke(endpoint, handoff.handoff_id, reason, cancelled=handoff.cancelled)
            self._schedule_resend(handoff.handoff_id, self._table.config.ack_timeout_s)
        elif trigger is TargetTrigger.VERIFIED:
            self._take_over(handoff)
        else:
            if trigger in (TargetTrigger.MISMATCH, TargetTrigger.REQUEST_ENDED):
                self._send_revoke(endpoint, handoff.handoff_id, reason, cancelled=handoff.cancelled)
            self._close(handoff, (reason,))
            self._table.totals["handoffs_cancelled" if handoff.cancelled else "handoffs_failed"] += 1
            if handoff.request.state is RequestState.ENDED:
                self._table.release(handoff.request)
            elif handoff.cancelled:
                self._table.end(handoff.request, Outcome.ABORTED, None, reason)
            else:
                self._table.end(handoff.request, Outcome.FAILED, code or "handoff_failed", reason)

    def _verify(self, handoff: TargetHandoff) -> None:
        assert handoff.done is not None
        if handoff.done.num_pages != len(handoff.page_ids):
            message = f"the prefill worker wrote {handoff.done.num_pages} of {len(handoff.page_ids)} granted pages"
            self._fire(handoff, TargetTrigger.MISMATCH, message)
        elif not handoff.page_ids:
            self._fire(handoff, TargetTrigger.VERIFIED, "")
        else:
            verify = VerifyPages(handoff_id=handoff.handoff_id, page_ids=handoff.page_ids)
            self._table.out.transfers.append(verify)

    def _take_over(self, handoff: TargetHandoff) -> None:
        table, done, request = self._table, handoff.done, handoff.request
        assert done is not None
        self._close(handoff, (None,))
        self._send_ack(handoff.source.endpoint, handoff.handoff_id)
        num_bytes = len(handoff.page_ids) * self._pool.page_bytes
        request.report = HandoffReport(
            num_pages=len(handoff.page_ids),
            num_pages_reused=handoff.num_pages_reused,
            num_bytes=num_bytes,
            duration_s=table.now_s - handoff.granted_s,
            wait_s=table.now_s - handoff.done_s,
        )
        table.totals["handoffs_received"] += 1
        table.totals["handoff_pages"] += len(handoff.page_ids)
        table.totals["handoff_bytes"] += num_bytes
        table.totals["handoff_seconds"] += table.now_s - handoff.granted_s
        table.start_decoding(request, done.first_token, done.finish_reason)

    def _close(self, handoff: TargetHandoff, answer: tuple[str | None]) -> None:
        """Close the handoff. No write can arrive any more: the pages belong to the request alone."""
        table, request = self._table, handoff.request
        del self._open[handoff.handoff_id]
        self._closed.put(handoff.handoff_id, answer, table.now_s)
        for kind in (TimerKind.DONE, TimerKind.RESEND):
            table.timers.cancel(kind, handoff.handoff_id)
        request.in_handoff = False
        assert request.lease is not None
        table.cache.end_transfer(request.lease)

    def _repeat_answer(self, done: Done) -> None:
        endpoint = self._endpoints.get(done.source_epoch)
        if endpoint is None:
            return  # no request here ever named that prefill worker: its endpoint is unknown
        answer = self._closed.get(done.handoff_id)
        reason = "the handoff is unknown" if answer is None else answer[0]
        if reason is None:
            self._send_ack(endpoint, done.handoff_id)
        else:
            self._send_revoke(endpoint, done.handoff_id, reason)

    def _send_ack(self, endpoint: str, handoff_id: HandoffId) -> None:
        self._table.out.to_source(endpoint, Ack(handoff_id=handoff_id, target_epoch=self._epoch))

    def _send_revoke(self, endpoint: str, handoff_id: HandoffId, reason: str, *, cancelled: bool = False) -> None:
        revoke = Revoke(handoff_id=handoff_id, target_epoch=self._epoch, reason=reason, cancelled=cancelled)
        self._table.out.to_source(endpoint, revoke)

    def _resend(self, handoff: TargetHandoff) -> None:
        """Send Revoke or Grant again. Revoke is repeated every `ack_timeout_s`. Grant is repeated after waits of 1, 2,
        4 ... times `ack_timeout_s`, since prefill may compute for long and sends no answer before Done."""
        wait_s, endpoint = self._table.config.ack_timeout_s, handoff.source.endpoint
        if handoff.state is TargetState.GRANTED:
            self._table.out.to_source(endpoint, handoff.grant, repeated=True)
            wait_s *= 2.0**handoff.num_grants_sent
            handoff.num_grants_sent += 1
        else:
            self._send_revoke(endpoint, handoff.handoff_id, handoff.reason, cancelled=handoff.cancelled)
        self._schedule_resend(handoff.handoff_id, wait_s)

    def _schedule_resend(self, handoff_id: HandoffId, wait_s: float) -> None:
        self._table.timers.set(TimerKind.RESEND, handoff_id, self._table.now_s + wait_s)
