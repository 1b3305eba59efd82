"""The prefill side of every handoff of one engine: accepts Grants, requests writes as pages are computed, sends Done.

This side holds a request's pages (`in_handoff`) from its Grant until decode has acknowledged, or the transport has
stopped the writes, or decode's process is certainly dead. The request itself may end earlier: its `Ended` is sent at
once, and the handoff closes later. handoff.py has the transitions; batching.py decides which request computes when.

Only the decode engine that the gateway named in `Submit` may grant pages: a Grant from another engine is refused and
changes nothing. A Grant may arrive before its request (they travel on different sockets): early Grants are stored for
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
from kvist.scheduler.active import ActiveRequest, RequestState
from kvist.scheduler.handoff import SOURCE_TRANSITIONS, SourceState, SourceTrigger
from kvist.scheduler.memory import ExpiringMap
from kvist.scheduler.requests import RequestTable
from kvist.scheduler.timers import TimerKind
from kvist.wire import Ack, Closed, Done, Grant, PoolAddress, Revoke

_Refusal = tuple[str | None, str]  # error code, None without a failure; message


@dataclass(slots=True, eq=False, kw_only=True)
class SourceHandoff:
    """One handoff at the prefill side. Mutable; its one owner is the `SourceSide`.

    Pages are numbered along the sequence: page 0 holds token 0."""

    handoff_id: HandoffId
    request: ActiveRequest
    num_pages: int  # of the handoff tokens
    state: SourceState = SourceState.AWAITING_GRANT
    grant: Grant | None = None
    granted_s: float = 0.0
    next_page: int = 0  # writes of pages [grant.first_page, next_page) were requested
    num_written: int = 0
    checksum: str = ""
    complete: bool = False  # every page is computed, and its write requested
    peer_dead: bool = False
    stop_step: int | None = None  # step whose plan has StopWrites; a report in the same step was made before
    refusal: _Refusal = (None, "")  # sent with Closed


class SourceSide:
    """The prefill side of all handoffs of one engine. Mutable; its one owner is the scheduler."""

    def __init__(self, table: RequestTable, *, epoch: EpochId, pool: PoolAddress) -> None:
        config = table.config
        self._table = table
        self._epoch = epoch
        self._pool = pool
        self._open: dict[HandoffId, SourceHandoff] = {}
        self._early_grants: OrderedDict[HandoffId, Grant] = OrderedDict()
        self._closed: ExpiringMap[HandoffId, _Refusal] = ExpiringMap(
            capacity=config.max_remembered_handoffs, max_age_s=2 * config.handoff_timeout_s + config.grant_timeout_s
        )

    def handlers(self) -> Mapping[type[Event], Callable[[Any], None]]:
        """Return the handler of each event of this side, for `Steps`."""
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
        return frozenset(
            handoff.grant.target_epoch
            for handoff in self._open.values()
            if handoff.grant is not None and not handoff.peer_dead
        )

    # ---------------------------------------------------------------- calls from the requests (HandoffHooks)

    def on_arrived(self, request: ActiveRequest) -> None:
        handoff_id = request.handoff_id
        assert handoff_id is not None
        revoked = self._closed.get(handoff_id)
        if handoff_id in self._open or revoked is not None:
            reason = "is in use by another request" if revoked is None else f"is closed: {revoked[1]}"
            code = "invalid_request" if revoked is None else "handoff_failed"
            self._table.end(request, Outcome.FAILED, code, f"handoff {handoff_id} {reason}")
            return
        num_pages = -(-request.num_handoff_tokens // self._table.cache.page_size)
        self._open[handoff_id] = SourceHandoff(handoff_id=handoff_id, request=request, num_pages=num_pages)
        self._set_timer(TimerKind.GRANT, handoff_id, self._table.config.grant_timeout_s)
        early = self._early_grants.pop(handoff_id, None)
        if early is not None:
            self._table.timers.cancel(TimerKind.EARLY_GRANT, handoff_id)
            self._receive_grant(self._open[handoff_id], early)

    def on_refused(self, handoff_id: HandoffId, code: str, message: str) -> None:
        if handoff_id not in self._open:
            self._refuse_early_grant(handoff_id, code, message)

    def on_allocated(self, request: ActiveRequest) -> None:
        self.on_computed(request)

    def on_computed(self, request: ActiveRequest) -> None:
        assert request.handoff_id is not None
        self._write_ready_pages(self._open[request.handoff_id])

    def on_ended(self, request: ActiveRequest, outcome: Outcome, message: str) -> None:
        assert request.handoff_id is not None
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
        if handoff is not None and handoff.grant is not None and handoff.grant.target_epoch == event.target_epoch:
            self._fire(handoff, SourceTrigger.ACK, (None, ""))

    def on_revoke(self, event: Revoke) -> None:
        handoff = self._open.get(event.handoff_id)
        refusal: _Refusal = (
            None if event.cancelled else "handoff_failed",
            f"the decode worker stopped the handoff: {event.reason}",
        )
        if handoff is None:
            self._early_grants.pop(event.handoff_id, None)
            self._table.timers.cancel(TimerKind.EARLY_GRANT, event.handoff_id)
            refusal = self._closed.get(event.handoff_id) or refusal
            self._closed.put(event.handoff_id, refusal, self._table.now_s)
            self._send_closed(event.handoff_id, event.target_epoch, refusal)
        elif handoff.request.target_epoch == event.target_epoch:
            if handoff.grant is None:
                self._send_closed(event.handoff_id, event.target_epoch, refusal)
            self._fire(handoff, SourceTrigger.REVOKE, refusal)

    def on_peer_died(self, event: PeerDied) -> None:
        for handoff_id in [key for key, grant in self._early_grants.items() if grant.target_epoch == event.epoch]:
            del self._early_grants[handoff_id]
            self._table.timers.cancel(TimerKind.EARLY_GRANT, handoff_id)
        for handoff in list(self._open.values()):
            if handoff.grant is not None and handoff.grant.target_epoch == event.epoch:
                handoff.peer_dead = True
                self._fire(handoff, SourceTrigger.PEER_DIED, ("worker_lost", "the decode worker died"))

    # ---------------------------------------------------------------- reports and timers

    def on_writes_completed(self, event: WritesCompleted) -> None:
        handoff = self._open.get(event.handoff_id)
        if handoff is None:
            return
        handoff.num_written = event.num_pages
        handoff.checksum = event.checksum
        if handoff.state is SourceState.STOPPING:
            if self._all_written(handoff) or handoff.stop_step != self._table.step_count:
                self._fire(handoff, SourceTrigger.WRITES_STOPPED, handoff.refusal)
        else:
            self._send_done_if_written(handoff)

    def on_writes_failed(self, event: WritesFailed) -> None:
        handoff = self._open.get(event.handoff_id)
        if handoff is not None:
            self._fire(handoff, SourceTrigger.WRITES_FAILED, ("handoff_failed", event.message))

    def _on_early_grant_timeout(self, key: str) -> None:
        limit = f"{self._table.config.grant_timeout_s:g} s (--grant-timeout-s)"
        message = f"no request reached the prefill worker within {limit}"
        self._refuse_early_grant(HandoffId(key), "handoff_failed", message)

    def _on_grant_timeout(self, key: str) -> None:
        limit = f"{self._table.config.grant_timeout_s:g} s (--grant-timeout-s)"
        self._fail_request(HandoffId(key), f"the decode worker granted no pages within {limit}")

    def _on_ack_timeout(self, key: str) -> None:
        limit = f"{self._table.config.handoff_timeout_s:g} s (--handoff-timeout-s)"
        self._fail_request(HandoffId(key), f"the decode worker did not acknowledge the pages within {limit}")

    def _fail_request(self, handoff_id: HandoffId, message: str) -> None:
        request = self._open[handoff_id].request
        if request.state is not RequestState.ENDED:
            self._table.end(request, Outcome.FAILED, "handoff_failed", message)

    # ---------------------------------------------------------------- actions of the transitions

    def _fire(self, handoff: SourceHandoff, trigger: SourceTrigger, refusal: _Refusal) -> None:
        """Make the transition, if the table has one; end the request if the handoff stops or closes."""
        to = SOURCE_TRANSITIONS[handoff.state].get(trigger)
        if to is None:
            return
        handoff.state = to
        handoff.refusal = refusal
        if to is SourceState.DONE_SENT:
            self._send_done(handoff)
            return
        if to is SourceState.STOPPING and self._all_written(handoff):
            to = handoff.state = SOURCE_TRANSITIONS[to][SourceTrigger.WRITES_STOPPED]
        if to is SourceState.STOPPING:
            self._table.out.transfers.append(StopWrites(handoff_id=handoff.handoff_id))
            handoff.stop_step = self._table.step_count
        elif to is SourceState.CLOSED:
            self._close(handoff, acknowledged=trigger is SourceTrigger.ACK)
        request = handoff.request
        if request.state is RequestState.ENDED:
            self._table.release(request)
        elif to is SourceState.CLOSED and trigger is SourceTrigger.ACK:
            self._table.end(request, Outcome.FINISHED)
        elif to in (SourceState.STOPPING, SourceState.CLOSED):
            outcome = Outcome.ABORTED if refusal[0] is None else Outcome.FAILED
            self._table.end(request, outcome, refusal[0], refusal[1])

    def _close(self, handoff: SourceHandoff, *, acknowledged: bool) -> None:
        table, handoff_id, grant = self._table, handoff.handoff_id, handoff.grant
        del self._open[handoff_id]
        self._closed.put(handoff_id, handoff.refusal, table.now_s)
        for kind in (TimerKind.GRANT, TimerKind.ACK, TimerKind.RESEND_DONE):
            table.timers.cancel(kind, handoff_id)
        handoff.request.in_handoff = False
        if handoff.complete and handoff.request.lease is not None:
            table.cache.end_transfer(handoff.request.lease)
        if acknowledged:
            assert grant is not None
            table.totals["handoffs_sent"] += 1
            table.totals["handoff_pages"] += len(grant.page_ids)
            table.totals["handoff_bytes"] += len(grant.page_ids) * self._pool.page_bytes
            table.totals["handoff_seconds"] += table.now_s - handoff.granted_s
            return
        table.totals["handoffs_cancelled" if handoff.refusal[0] is None else "handoffs_failed"] += 1
        if grant is not None and not handoff.peer_dead:
            self._send_closed(handoff_id, grant.target_epoch, handoff.refusal)

    def _receive_grant(self, handoff: SourceHandoff, grant: Grant) -> None:
        if grant.target_epoch != handoff.request.target_epoch:
            self._table.totals["foreign_grants"] += 1
            refusal = ("handoff_failed", "the gateway has named another decode worker for this request")
            self._send_closed(grant.handoff_id, grant.target_epoch, refusal)
        elif handoff.state is SourceState.AWAITING_GRANT:  # else a repeated Grant, accepted before
            self._accept_grant(handoff, grant)

    def _accept_grant(self, handoff: SourceHandoff, grant: Grant) -> None:
        handoff.grant = grant
        handoff.granted_s = self._table.now_s
        self._table.timers.cancel(TimerKind.GRANT, handoff.handoff_id)
        fault = self._grant_error(grant, handoff.num_pages)
        if fault is not None:
            self._fire(handoff, SourceTrigger.BAD_GRANT, ("handoff_failed", fault))
            return
        self._fire(handoff, SourceTrigger.GRANT, (None, ""))
        handoff.next_page = grant.first_page
        self._table.on_grant(handoff.request)
        self._write_ready_pages(handoff)

    def _grant_error(self, grant: Grant, num_pages: int) -> str | None:
        if grant.pool.transport != self._pool.transport:
            return (
                f"the decode worker uses the transport {grant.pool.transport!r}, the prefill worker "
                f"{self._pool.transport!r}: start both with the same --device"
            )
        if grant.pool.layout != self._pool.layout or grant.pool.page_bytes != self._pool.page_bytes:
            return (
                f"the decode worker has the page layout {grant.pool.layout} ({grant.pool.page_bytes} bytes), the "
                f"prefill worker {self._pool.layout} ({self._pool.page_bytes} bytes): start both with the same model, "
                "dtype and page size"
            )
        if grant.first_page < 0 or grant.first_page + len(grant.page_ids) != num_pages:
            return (
                f"the grant ends at page {grant.first_page + len(grant.page_ids)}, but the prompt at page {num_pages}"
            )
        if any(not 0 <= page_id < grant.pool.num_pages for page_id in grant.page_ids):
            return f"the grant names a page outside the decode worker's pool of {grant.pool.num_pages} pages"
        if len(set(grant.page_ids)) != len(grant.page_ids):
            return "the grant names a page twice"
        return None

    def _write_ready_pages(self, handoff: SourceHandoff) -> None:
        """Request writes of computed, granted pages not yet requested: full pages, and at the end the last page."""
        request, grant = handoff.request, handoff.grant
        if handoff.state is not SourceState.WRITING or request.lease is None:
            return
        assert grant is not None
        complete = request.state is RequestState.AWAITING_TRANSFER
        ready = handoff.num_pages if complete else request.num_computed // self._table.cache.page_size
        if ready > handoff.next_page:
            self._table.out.transfers.append(
                WritePages(
                    handoff_id=handoff.handoff_id,
                    pool=grant.pool,
                    page_ids=tuple(request.lease.page_ids[handoff.next_page : ready]),
                    peer_page_ids=grant.page_ids[handoff.next_page - grant.first_page : ready - grant.first_page],
                )
            )
            handoff.next_page = ready
        if complete and not handoff.complete:
            handoff.complete = True
            self._table.cache.begin_transfer(request.lease, 0)  # the last page, if partial: full pages are in the tree
            self._set_timer(TimerKind.ACK, handoff.handoff_id, self._table.config.handoff_timeout_s)
            self._send_done_if_written(handoff)

    def _all_written(self, handoff: SourceHandoff) -> bool:
        assert handoff.grant is not None
        return handoff.num_written == handoff.next_page - handoff.grant.first_page

    def _send_done_if_written(self, handoff: SourceHandoff) -> None:
        if handoff.complete and self._all_written(handoff):
            self._fire(handoff, SourceTrigger.ALL_WRITTEN, (None, ""))

    def _send_done(self, handoff: SourceHandoff) -> None:
        """Send Done, again every `ack_timeout_s` until decode answers: an answer may be lost with its connection."""
        grant, request = handoff.grant, handoff.request
        assert grant is not None
        assert request.first_token is not None
        done = Done(
            handoff_id=handoff.handoff_id,
            target_epoch=grant.target_epoch,
            source_epoch=self._epoch,
            num_pages=len(grant.page_ids),
            checksum=handoff.checksum,
            first_token=request.first_token,
            finish_reason=request.first_token_finish,
        )
        self._table.out.to_target(grant.target_epoch, done)
        self._set_timer(TimerKind.RESEND_DONE, handoff.handoff_id, self._table.config.ack_timeout_s)

    def _store_early_grant(self, grant: Grant) -> None:
        if len(self._early_grants) >= self._table.config.max_remembered_handoffs:
            oldest = next(iter(self._early_grants))
            self._refuse_early_grant(
                oldest, "overloaded", "too many grants wait for their requests (--max-remembered-handoffs)"
            )
        self._early_grants[grant.handoff_id] = grant
        self._set_timer(TimerKind.EARLY_GRANT, grant.handoff_id, self._table.config.grant_timeout_s)

    def _refuse_early_grant(self, handoff_id: HandoffId, code: str, message: str) -> None:
        self._closed.put(handoff_id, (code, message), self._table.now_s)
        self._table.timers.cancel(TimerKind.EARLY_GRANT, handoff_id)
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
        self._table.out.to_target(target_epoch, closed)

    def _set_timer(self, kind: TimerKind, handoff_id: HandoffId, after_s: float) -> None:
        self._table.timers.set(kind, handoff_id, self._table.now_s + after_s)
