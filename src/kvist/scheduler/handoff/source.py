"""The prefill side of every handoff of one engine: accepts Grants, requests writes as pages are computed, sends Done.

This side holds a request's pages (`in_handoff`) from its Grant until decode has acknowledged, or the transport has
stopped the writes, or decode's process is certainly dead. The request itself may end earlier: its `Ended` is sent at
once, and the handoff closes later. tables.py has the transitions; batching.py decides which request computes when.

Only the decode engine that the gateway named in `Submit` may grant pages: a Grant from another engine is refused and
has no effect. A Grant may arrive before its request, by another socket: early Grants are stored for
`grant_timeout_s`, at most `max_remembered_handoffs` of them. Closed handoffs are remembered too, for
2 * `handoff_timeout_s` + `grant_timeout_s`, so that a late Grant or Revoke is answered.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvist.plan.events import Event
from kvist.plan.transfers import PeerDied, StopWrites, WritePages, WritesCompleted, WritesFailed
from kvist.request import EpochId, HandoffId, Outcome
from kvist.scheduler.active import PrefillRequest, RequestState
from kvist.scheduler.chunks import send_first_token
from kvist.scheduler.handoff.memory import ExpiringMap
from kvist.scheduler.handoff.peers import KnownPeers
from kvist.scheduler.handoff.side import SideParts
from kvist.scheduler.handoff.tables import SOURCE_TRANSITIONS, SourceState, SourceTrigger
from kvist.scheduler.timers import TimerKind
from kvist.wire import Ack, Closed, Done, Grant, PoolAddress, Revoke

_Refusal = tuple[str | None, str]  # error code, None without a failure; message


@dataclass(slots=True, eq=False, kw_only=True)
class PageWrites:
    """The writes into the pages of one Grant. Pages are numbered along the sequence: page 0 holds token 0."""

    grant: Grant
    pool: PoolAddress  # of decode, by the chosen transport
    granted_s: float
    next_page: int  # writes of pages [grant.first_page, next_page) were requested
    num_written: int = 0
    checksum: str = ""
    page_digests: bytes = b""
    complete: bool = False  # every page is computed, and all writes were requested
    complete_s: float = 0.0  # when this became so
    written_s: float = 0.0  # when the last page was written
    stop_step: int | None = None  # the step whose plan has StopWrites; reports in this step were made before the stop

    @property
    def all_written(self) -> bool:
        return self.num_written == self.next_page - self.grant.first_page


@dataclass(slots=True, eq=False, kw_only=True)
class SourceHandoff:
    """One handoff at the prefill side. Mutable; its one owner is the `SourceSide`."""

    handoff_id: HandoffId
    request: PrefillRequest
    num_pages: int  # of the handoff tokens
    state: SourceState = SourceState.AWAITING_GRANT
    writes: PageWrites | None = None  # from the Grant on
    peer_dead: bool = False
    refusal: _Refusal = (None, "")  # sent with Closed

    @property
    def target_epoch(self) -> EpochId | None:
        """The decode engine whose Grant has arrived; None before."""
        return None if self.writes is None else self.writes.grant.target_epoch


class SourceSide:
    """The prefill side of all handoffs of one engine. Mutable; its one owner is the scheduler."""

    def __init__(self, parts: SideParts) -> None:
        self._parts = parts
        self._context = parts.context
        self._endings = parts.endings
        self._epoch = parts.epoch
        self._peers = KnownPeers(parts.own)
        self._open: dict[HandoffId, SourceHandoff] = {}
        self._early_grants: OrderedDict[HandoffId, Grant] = OrderedDict()
        self._closed: ExpiringMap[HandoffId, _Refusal] = parts.closed_handoffs()

    def handlers(self) -> Mapping[type[Event], Callable[[Any], None]]:
        """Return the handler of each event of this side."""
        return {
            Grant: self.on_grant,
            Ack: self.on_ack,
            Revoke: self.on_revoke,
            WritesCompleted: self.on_writes_completed,
            WritesFailed: self.on_writes_failed,
        }

    def timer_handlers(self) -> Mapping[TimerKind, Callable[[str], None]]:
        return {
            TimerKind.GRANT: self._on_grant_timeout,
            TimerKind.EARLY_GRANT: self._on_early_grant_timeout,
            TimerKind.ACK: self._on_ack_timeout,
            TimerKind.RESEND_DONE: lambda key: self._send_done(self._open[HandoffId(key)]),
        }

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def watched_epochs(self) -> frozenset[EpochId]:
        alive = [handoff for handoff in self._open.values() if not handoff.peer_dead]
        return frozenset(handoff.target_epoch for handoff in alive if handoff.target_epoch is not None)

    # ---------------------------------------------------------------- the request of a handoff

    def on_arrived(self, request: PrefillRequest) -> None:
        """Open the handoff of an accepted request; end the request if the handoff is open or closed already."""
        handoff_id = request.handoff_id
        revoked = self._closed.get(handoff_id)
        if handoff_id in self._open or revoked is not None:
            reason = "is in use by another request" if revoked is None else f"is closed: {revoked[1]}"
            code = "invalid_request" if revoked is None else "handoff_failed"
            self._endings.end(request, Outcome.FAILED, code, f"handoff {handoff_id} {reason}")
            return
        num_pages = -(-request.num_tokens_on_arrival // self._parts.cache.page_size)
        handoff = SourceHandoff(handoff_id=handoff_id, request=request, num_pages=num_pages)
        self._open[handoff_id] = handoff
        self._parts.set_timer(TimerKind.GRANT, handoff_id, self._context.config.grant_timeout_s)
        early = self._early_grants.pop(handoff_id, None)
        if early is not None:
            self._parts.cancel_timers(handoff_id, TimerKind.EARLY_GRANT)
            self._receive_grant(handoff, early)

    def on_refused(self, handoff_id: HandoffId, code: str, message: str) -> None:
        """Close the handoff of a request that was refused."""
        if handoff_id not in self._open:
            self._refuse_early_grant(handoff_id, code, message)

    def on_computed(self, request: PrefillRequest) -> None:
        """Write the pages that have become full; more K/V of the request, perhaps all, is in its pages."""
        self._write_ready_pages(self._open[request.handoff_id])

    def on_ended(self, request: PrefillRequest, outcome: Outcome, message: str) -> None:
        """Stop the handoff of a request that ended for a reason outside the handoff."""
        handoff = self._open.get(request.handoff_id)
        if handoff is not None and handoff.request is request:
            code = None if outcome is Outcome.ABORTED else "handoff_failed"
            self._fire(handoff, SourceTrigger.REQUEST_ENDED, (code, f"the prefill worker ended the request: {message}"))

    # ---------------------------------------------------------------- messages from decode

    def on_grant(self, grant: Grant) -> None:
        closed = self._closed.get(grant.handoff_id)
        handoff = self._open.get(grant.handoff_id)
        if grant.source_epoch != self._epoch:
            self._send_closed(grant.handoff_id, grant.target_epoch, ("worker_lost", "the prefill worker has restarted"))
        elif closed is not None:
            self._send_closed(grant.handoff_id, grant.target_epoch, closed)
        elif handoff is not None:
            self._receive_grant(handoff, grant)
        elif grant.handoff_id not in self._early_grants:
            self._store_early_grant(grant)

    def on_ack(self, event: Ack) -> None:
        handoff = self._open.get(event.handoff_id)
        if handoff is not None and handoff.target_epoch == event.target_epoch:
            self._fire(handoff, SourceTrigger.ACK, (None, ""))

    def on_revoke(self, event: Revoke) -> None:
        handoff = self._open.get(event.handoff_id)
        refusal: _Refusal = (
            None if event.cancelled else "handoff_failed",
            f"the decode worker stopped the handoff: {event.reason}",
        )
        if handoff is None:
            self._early_grants.pop(event.handoff_id, None)
            self._parts.cancel_timers(event.handoff_id, TimerKind.EARLY_GRANT)
            refusal = self._closed.get(event.handoff_id) or refusal
            self._closed.put(event.handoff_id, refusal, self._context.now_s)
            self._send_closed(event.handoff_id, event.target_epoch, refusal)
        elif handoff.request.target_epoch == event.target_epoch:
            if handoff.writes is None:
                self._send_closed(event.handoff_id, event.target_epoch, refusal)
            self._fire(handoff, SourceTrigger.REVOKE, refusal)

    def on_peer_died(self, event: PeerDied) -> None:
        for handoff_id in [key for key, grant in self._early_grants.items() if grant.target_epoch == event.epoch]:
            del self._early_grants[handoff_id]
            self._parts.cancel_timers(handoff_id, TimerKind.EARLY_GRANT)
        for handoff in list(self._open.values()):
            if handoff.target_epoch == event.epoch:
                handoff.peer_dead = True
                self._fire(handoff, SourceTrigger.PEER_DIED, ("worker_lost", "the decode worker died"))

    # ---------------------------------------------------------------- reports and timers

    def on_writes_completed(self, event: WritesCompleted) -> None:
        handoff = self._open.get(event.handoff_id)
        if handoff is None or handoff.writes is None:
            return
        writes = handoff.writes
        writes.num_written = event.num_pages
        writes.checksum, writes.page_digests = event.checksum, event.page_digests
        if handoff.state is SourceState.STOPPING:
            if writes.all_written or writes.stop_step != self._context.step_count:
                self._fire(handoff, SourceTrigger.WRITES_STOPPED, handoff.refusal)
        else:
            self._finish_if_written(handoff, writes)

    def on_writes_failed(self, event: WritesFailed) -> None:
        handoff = self._open.get(event.handoff_id)
        if handoff is not None:
            self._fire(handoff, SourceTrigger.WRITES_FAILED, ("handoff_failed", event.message))

    def _on_early_grant_timeout(self, key: str) -> None:
        limit = f"{self._context.config.grant_timeout_s:g} s (--grant-timeout-s)"
        message = f"no request reached the prefill worker within {limit}"
        self._refuse_early_grant(HandoffId(key), "handoff_failed", message)

    def _on_grant_timeout(self, key: str) -> None:
        limit = f"{self._context.config.grant_timeout_s:g} s (--grant-timeout-s)"
        self._fail_request(HandoffId(key), f"the decode worker granted no pages within {limit}")

    def _on_ack_timeout(self, key: str) -> None:
        limit = f"{self._context.config.handoff_timeout_s:g} s (--handoff-timeout-s)"
        self._fail_request(HandoffId(key), f"the decode worker did not acknowledge the pages within {limit}")

    def _fail_request(self, handoff_id: HandoffId, message: str) -> None:
        request = self._open[handoff_id].request
        if request.state is not RequestState.ENDED:
            self._endings.end(request, Outcome.FAILED, "handoff_failed", message)
            self.on_ended(request, Outcome.FAILED, message)

    # ---------------------------------------------------------------- actions of the transitions

    def _fire(self, handoff: SourceHandoff, trigger: SourceTrigger, refusal: _Refusal) -> None:
        """Make the transition and carry out its actions, if the table has one; end the request if the handoff ends."""
        to = SOURCE_TRANSITIONS[handoff.state].get(trigger)
        if to is None:
            return
        handoff.state = to
        handoff.refusal = refusal
        if to is SourceState.DONE_SENT:
            self._send_done(handoff)
            return
        if to is SourceState.STOPPING:
            to = self._stop_writes(handoff)
        if to is SourceState.CLOSED:
            self._close(handoff, acknowledged=trigger is SourceTrigger.ACK)
        request = handoff.request
        if request.state is RequestState.ENDED:
            self._endings.release(request)
        elif to is SourceState.CLOSED and trigger is SourceTrigger.ACK:
            self._endings.end(request, Outcome.FINISHED)
        elif to in (SourceState.STOPPING, SourceState.CLOSED):
            outcome = Outcome.ABORTED if refusal[0] is None else Outcome.FAILED
            self._endings.end(request, outcome, refusal[0], refusal[1])

    def _stop_writes(self, handoff: SourceHandoff) -> SourceState:
        """Stop the transport; return the new state, which is CLOSED if no write is pending."""
        writes = handoff.writes
        if writes is None or writes.all_written:
            handoff.state = SOURCE_TRANSITIONS[SourceState.STOPPING][SourceTrigger.WRITES_STOPPED]
        else:
            self._context.out.transfers.append(StopWrites(handoff_id=handoff.handoff_id))
            writes.stop_step = self._context.step_count
        return handoff.state

    def _close(self, handoff: SourceHandoff, *, acknowledged: bool) -> None:
        context, handoff_id, request, writes = self._context, handoff.handoff_id, handoff.request, handoff.writes
        del self._open[handoff_id]
        self._closed.put(handoff_id, handoff.refusal, context.now_s)
        self._parts.cancel_timers(handoff_id, TimerKind.GRANT, TimerKind.ACK, TimerKind.RESEND_DONE)
        request.in_handoff = False
        if writes is not None and writes.complete and request.has_pages:
            self._parts.cache.end_transfer(request.lease)
        if writes is not None and acknowledged:
            num_pages = len(writes.grant.page_ids)
            context.count("handoffs_sent")
            context.count("handoff_pages", num_pages)
            context.count("handoff_bytes", num_pages * self._parts.own.page_bytes)
            context.count("handoff_seconds", context.now_s - writes.granted_s)
            context.count("handoff_grant_wait_seconds", max(0.0, writes.granted_s - request.first_token_s))
            context.count("handoff_last_copy_seconds", writes.written_s - writes.complete_s)
            return
        context.count("handoffs_cancelled" if handoff.refusal[0] is None else "handoffs_failed")
        if writes is not None and not handoff.peer_dead:
            self._send_closed(handoff_id, writes.grant.target_epoch, handoff.refusal)

    def _receive_grant(self, handoff: SourceHandoff, grant: Grant) -> None:
        if grant.target_epoch != handoff.request.target_epoch:
            self._context.count("foreign_grants")
            refusal = ("handoff_failed", "the gateway has named another decode worker for this request")
            self._send_closed(grant.handoff_id, grant.target_epoch, refusal)
        elif handoff.state is SourceState.AWAITING_GRANT:  # else a repeated Grant, accepted before
            self._accept_grant(handoff, grant)

    def _accept_grant(self, handoff: SourceHandoff, grant: Grant) -> None:
        choice = self._peers.to(grant.target_epoch, grant.target)
        pool = next((pool for pool in grant.pools if pool.transport == choice.name), None)
        fault = None if pool is None else _fault_of_pages(grant, pool, handoff.num_pages)
        if pool is None or fault is not None:
            refusal = ("handoff_failed", fault or choice.reason)
            self._send_closed(grant.handoff_id, grant.target_epoch, refusal)
            self._fire(handoff, SourceTrigger.BAD_GRANT, refusal)
            return
        handoff.writes = PageWrites(grant=grant, pool=pool, granted_s=self._context.now_s, next_page=grant.first_page)
        self._parts.cancel_timers(handoff.handoff_id, TimerKind.GRANT)
        self._fire(handoff, SourceTrigger.GRANT, (None, ""))
        self._on_granted(handoff.request)
        self._write_ready_pages(handoff)

    def _on_granted(self, request: PrefillRequest) -> None:
        """Give the request high priority: from the Grant on it is not preempted."""
        request.granted = request.in_handoff = True
        send_first_token(self._context, request)
        requests = self._parts.requests
        if request.state is RequestState.SUSPENDED:
            requests.move(request, RequestState.WAITING)
        elif request.state is RequestState.WAITING:
            requests.waiting.requeue(request)

    def _write_ready_pages(self, handoff: SourceHandoff) -> None:
        """Request the writes of newly computed pages: of full pages, and at the end of the prompt of the last page."""
        request, writes = handoff.request, handoff.writes
        if handoff.state is not SourceState.WRITING or writes is None or not request.has_pages:
            return
        grant, cache = writes.grant, self._parts.cache
        complete = request.state is RequestState.AWAITING_TRANSFER
        ready = handoff.num_pages if complete else request.num_computed // cache.page_size
        if ready > writes.next_page:
            self._context.out.transfers.append(
                WritePages(
                    handoff_id=handoff.handoff_id,
                    pool=writes.pool,
                    page_ids=tuple(request.page_ids[writes.next_page : ready]),
                    peer_page_ids=grant.page_ids[writes.next_page - grant.first_page : ready - grant.first_page],
                )
            )
            writes.next_page = ready
        if complete and not writes.complete:
            writes.complete, writes.complete_s = True, self._context.now_s
            cache.begin_transfer(request.lease, 0)  # the last page, if partial: full pages are in the tree
            self._parts.set_timer(TimerKind.ACK, handoff.handoff_id, self._context.config.handoff_timeout_s)
            self._finish_if_written(handoff, writes)

    def _finish_if_written(self, handoff: SourceHandoff, writes: PageWrites) -> None:
        if writes.complete and writes.all_written:
            writes.written_s = self._context.now_s
            self._fire(handoff, SourceTrigger.ALL_WRITTEN, (None, ""))

    def _send_done(self, handoff: SourceHandoff) -> None:
        """Send Done, and repeat it every `ack_timeout_s` until decode answers: an answer may be lost with its
        connection."""
        request, writes, first_token = handoff.request, handoff.writes, handoff.request.first_token
        assert writes is not None
        assert first_token is not None
        done = Done(
            handoff_id=handoff.handoff_id,
            target_epoch=writes.grant.target_epoch,
            source_epoch=self._epoch,
            num_pages=len(writes.grant.page_ids),
            checksum=writes.checksum,
            first_token=first_token,
            grant_wait_s=max(0.0, writes.granted_s - request.first_token_s),
            last_copy_s=writes.written_s - writes.complete_s,
            finish_reason=handoff.request.first_token_finish,
            transport=writes.pool.transport if writes.grant.page_ids else "",
            page_digests=writes.page_digests,
        )
        self._context.out.to_target(done.target_epoch, done)
        self._parts.set_timer(TimerKind.RESEND_DONE, handoff.handoff_id, self._context.config.ack_timeout_s)

    def _store_early_grant(self, grant: Grant) -> None:
        if len(self._early_grants) >= self._context.config.max_remembered_handoffs:
            oldest = next(iter(self._early_grants))
            self._refuse_early_grant(
                oldest, "overloaded", "too many grants wait for their requests (--max-remembered-handoffs)"
            )
        self._early_grants[grant.handoff_id] = grant
        self._parts.set_timer(TimerKind.EARLY_GRANT, grant.handoff_id, self._context.config.grant_timeout_s)

    def _refuse_early_grant(self, handoff_id: HandoffId, code: str, message: str) -> None:
        self._closed.put(handoff_id, (code, message), self._context.now_s)
        self._parts.cancel_timers(handoff_id, TimerKind.EARLY_GRANT)
        grant = self._early_grants.pop(handoff_id, None)
        if grant is not None:
            self._send_closed(handoff_id, grant.target_epoch, (code, message))

    def _send_closed(self, handoff_id: HandoffId, target_epoch: EpochId, refusal: _Refusal) -> None:
        closed = Closed(
            handoff_id=handoff_id,
            target_epoch=target_epoch,
            source_epoch=self._epoch,
            error_code=refusal[0],
            message=refusal[1],
        )
        self._context.out.to_target(target_epoch, closed)


def _fault_of_pages(grant: Grant, pool: PoolAddress, num_pages: int) -> str | None:
    """Return why the pages of a Grant cannot be those of a sequence of `num_pages` pages."""
    if grant.first_page < 0 or grant.first_page + len(grant.page_ids) != num_pages:
        return f"the grant ends at page {grant.first_page + len(grant.page_ids)}, but the prompt at page {num_pages}"
    if any(not 0 <= page_id < pool.num_pages for page_id in grant.page_ids):
        return f"the grant names a page outside the decode worker's pool of {pool.num_pages} pages"
    if len(set(grant.page_ids)) != len(grant.page_ids):
        return "the grant names a page twice"
    return None
