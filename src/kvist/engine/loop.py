"""The engine's loop: events → `scheduler.step` → carry out the plan → events.

    recv ─► events ─► step ─► plan: 1. tokens and endings to gateways   2. messages to peers   3. transfers, tier jobs
      ▲                             4. launch the batch
      ├── message, transfer report, tier report, timer
      └── the oldest step has ended: read it ─► StepFinished | StepFailed

One thread, no `await`. The loop sleeps in `recv`, also while a device computes: a message or a report is handled at
once, and only the next batch waits for the end of a step. step_waiter.py wakes the loop when the step in flight has
ended. With overlap (on a GPU), the next batch is planned and launched before the current one is
read, so that the device does not wait for the loop; tokens are sent while the device computes the next batch. On a CPU
the loop's thread computes: the runner then calls `between_layers`, which handles what has arrived. The same loop serves
every role.

With a storage tier, the scheduler gets new requests before it plans a batch, so that their pages are looked up in the
store. The store answers within about a millisecond, so the pages are fetched while this batch is computed, not the
next.

The loop decides nothing about requests. Its own tasks are to detect silent gateways and dead peers, and to send load
reports.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from kvist import wire
from kvist.channel import address_for_log
from kvist.channel.engine import Inbound, Outbound
from kvist.clock import Clock
from kvist.engine.gateways import Gateways
from kvist.engine.in_flight import LaunchedStep, StepRunner, StepsInFlight
from kvist.engine.inbox import Inbox, refusal
from kvist.engine.page_events import PageEventLog
from kvist.engine.reports import LoadReports
from kvist.engine.roles import RoleSwitch, SwitchMeter
from kvist.engine.step_abort import StepAbort
from kvist.engine.step_times import StepCpuTimes
from kvist.errors import HandoffFailed, Unavailable
from kvist.lease_messages import LeaseAnswer
from kvist.plan.batch import Batch
from kvist.plan.events import Event
from kvist.plan.grammars import CompileGrammar, GrammarCompiled
from kvist.plan.plan import Plan
from kvist.plan.tiers import FindPages, PageJob, PageReport, PagesFound, StorageAttached, StoreJob, StoreReport
from kvist.plan.transfers import PeerDied, StopWrites, ToSource, ToTarget, VerifyPages, WritePages
from kvist.request import EpochId, Role
from kvist.scheduler import Scheduler
from kvist.transfer import Transport

STORE_PROBE_S = 0.002  # the longest time that a batch waits for the store's answer
# A step that takes longer may never end. The loop then only waits for it, so an engine whose device hangs is silent, as
# gateways and the watchdog expect.
STEP_PATIENCE_S = 1.0
LIVENESS_INTERVAL_S = 1.0  # between two checks of watched peers and known gateways

logger = logging.getLogger(__name__)


class Channel(Protocol):
    """`channel.EngineChannel`, or a fake."""

    num_undecodable: int
    num_unexpected: int
    num_refused: int

    def recv(self, timeout_s: float) -> list[tuple[bytes, Inbound]]: ...
    def send(self, identity: bytes, message: Outbound) -> bool: ...
    def send_to_peer(self, endpoint: str, message: wire.TargetToSource) -> bool: ...
    def wakeup(self) -> None: ...


class WriteAccess(Protocol):
    """`transfer.Transports`, or a fake: who may write our pages, and who can be reached."""

    def sending(self, message: wire.PeerMessage, endpoint: str | None = None) -> wire.PeerMessage: ...
    def received(self, message: wire.PeerMessage) -> wire.Pong | None: ...
    def pings(self, own: EpochId, epochs: Iterable[EpochId]) -> list[tuple[str, wire.Ping]]: ...


class Mover(Protocol):
    """`memory.page_copier.PageMover`, or a fake."""

    def start(self, job: PageJob) -> None: ...
    def poll(self) -> list[PageReport]: ...
    def totals(self) -> dict[str, float]: ...


class Storage(Protocol):
    """`store.control.StorageControl`, or a fake."""

    def start(self, job: StoreJob) -> None: ...
    def poll(self) -> list[StoreReport | StorageAttached]: ...
    def on_command(self, identity: bytes, call: wire.StorageCommand) -> None: ...
    def answers(self) -> list[tuple[bytes, wire.StorageAnswer]]: ...
    def status(self) -> wire.StorageStatus: ...
    def totals(self) -> dict[str, float]: ...


class Grammars(Protocol):
    """`engine.grammar_jobs.GrammarJobs`, or a fake."""

    def start(self, job: CompileGrammar) -> None: ...
    def known(self, events: Iterable[Event]) -> list[GrammarCompiled]: ...
    def poll(self) -> list[GrammarCompiled]: ...
    def totals(self) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopParts:
    """The parts that the loop uses. assembly.py makes the parts, and closes them after the loop has ended."""

    spec: wire.EngineSpec
    scheduler: Scheduler
    runner: StepRunner
    channel: Channel
    transport: Transport
    reports: LoadReports
    page_events: PageEventLog
    clock: Clock
    gateway_timeout_s: float
    watch_step: Callable[[LaunchedStep], None]  # wakes the loop when the step has ended
    roles: RoleSwitch
    access: WriteAccess | None = None  # None: the pages are reached by no network
    mover: Mover | None = None  # with a host tier
    storage: Storage | None = None  # with a host tier
    grammars: Grammars | None = None  # None: no request has a constraint
    overlap: bool = False  # launch a batch before the previous one is read; as in the scheduler


class EngineLoop:
    """Mutable; used by the engine's main thread, except `request_stop` and `request_drain`."""

    def __init__(self, parts: LoopParts) -> None:
        self._parts = parts
        self._gateways = Gateways(timeout_s=parts.gateway_timeout_s, role=parts.spec.role)
        on_storage_command = None if parts.storage is None else parts.storage.on_command
        self._inbox = Inbox(
            spec=parts.spec, gateways=self._gateways, roles=parts.roles, on_storage_command=on_storage_command
        )
        self._pending_events: list[Event] = []  # events made by the loop itself, for the next step
        self._watched_epochs: frozenset[EpochId] = frozenset()
        self._wake_at_s: float | None = None
        self._next_check_s = parts.clock.now_s()
        self.num_iterations = 0  # iterations begun; read by any thread
        self._stop = threading.Event()
        self._drain = threading.Event()
        self._may_follow = False  # a step was launched or read since the last plan: plan at once what may follow it
        self._step_times = StepCpuTimes()
        self._switches = SwitchMeter()
        self._in_flight = StepsInFlight(parts.runner, parts.watch_step, self._step_times, overlap=parts.overlap)
        self._step_abort = StepAbort(lambda request_id: self._gateways.owner(request_id) is not None, parts.clock)

    @property
    def role(self) -> Role:
        """The present role. Safe from any thread."""
        return self._parts.roles.role

    def run(self) -> None:
        """Serve until `request_stop`, or after `request_drain` until no request is open; then fail the open requests.

        Raises `EngineError` if the runner does, and after `MAX_FAILED_STEPS_IN_A_ROW`: a new process may succeed."""
        try:
            while not self._stop.is_set() and not self._is_drained():
                self.iterate(self.idle_s())
        finally:
            self._fail_open_requests()

    def _is_drained(self) -> bool:
        """Return whether a requested drain is complete: reports were sent to the gateways, and no request is open."""
        if self._drain.is_set() and not self._inbox.draining:
            self._inbox.draining = True
            self._parts.reports.make_due()
            return False
        return self._inbox.draining and not self._gateways.num_requests

    def _fail_open_requests(self) -> None:
        for request_id, identity in self._gateways.all_requests():
            error = Unavailable("the worker is shutting down")
            self._parts.channel.send(identity, refusal(identity, request_id, error).message)

    def request_stop(self) -> None:
        """Safe from any thread and from a signal handler."""
        self._stop.set()
        self._parts.channel.wakeup()

    def request_drain(self) -> None:
        """Take no new request, and end after the last open one. Safe from any thread and from a signal handler."""
        self._drain.set()
        self._parts.channel.wakeup()

    def iterate(self, timeout_s: float) -> None:
        """Wait for a message, a report or the end of a step for `timeout_s` at most, then run one scheduler step and
        carry out its plan."""
        self.num_iterations += 1
        if self._in_flight.waited_s(self._parts.clock.now_s()) > STEP_PATIENCE_S:
            self._in_flight.wait()
            timeout_s = 0.0
        now_s, events = self._receive(timeout_s)
        events += self._read_if_done()
        if (
            self._parts.storage is not None
            and self._in_flight.has_room
            and any(type(event) is wire.Submit for event in events)
        ):
            now_s, events = self._probe_store(now_s, events)
        plan = self._plan(now_s, events)
        self._carry_out(plan, now_s)
        if plan.batch is not None:
            self._launch(plan.batch)
        self._may_follow = plan.batch is not None and self._in_flight.has_room
        self._pending_events += self._read_if_done()

    def between_layers(self) -> None:
        """Handle what has arrived while a step is computed in this thread. Called by the runner. Raises `StepAborted`
        if every request of the step has ended."""
        if not self._step_abort.is_due():
            return
        now_s, events = self._receive(0.0)
        if events or self._next_due_s() <= now_s:
            plan = self._plan(now_s, events, with_batch=False)
            self._carry_out(plan, now_s)
        self._step_abort.check()

    def _probe_store(self, now_s: float, events: list[Event]) -> tuple[float, list[Event]]:
        """Start to look up the pages of new requests in the store, and wait for the answers for `STORE_PROBE_S` at
        most. Return the time, and the events received meanwhile."""
        plan = self._plan(now_s, events, with_batch=False)
        self._carry_out(plan, now_s)
        num_queries = sum(isinstance(job, FindPages) for job in plan.tier_jobs)
        deadline_s = now_s + STORE_PROBE_S
        received: list[Event] = []
        for _ in range(num_queries):
            now_s, more = self._receive(max(0.0, deadline_s - self._parts.clock.now_s()))
            received += more
            if now_s >= deadline_s or sum(isinstance(event, PagesFound) for event in received) >= num_queries:
                break
        return now_s, received

    def _plan(self, now_s: float, events: list[Event], *, with_batch: bool = True) -> Plan:
        with self._step_times.planning():
            return self._parts.scheduler.step(now_s, events, with_batch=with_batch)

    def _receive(self, timeout_s: float) -> tuple[float, list[Event]]:
        """Wait for a message or report for `timeout_s` at most. Return the time and all new events."""
        received = self._without_pings(self._parts.channel.recv(timeout_s))
        now_s = self._parts.clock.now_s()
        events, replies = self._inbox.translate(received, now_s)
        for reply in replies:
            self._send(reply.identity, reply.message)
        # Transfer reports first: a report made before a Revoke arrived must not count as the report of its StopWrites.
        tier_reports = self._tier_reports()
        events = [
            *self._parts.transport.poll(),
            *tier_reports,
            *(() if self._parts.grammars is None else self._parts.grammars.poll()),
            *self._pending_events,
            *self._role_change(now_s),
            *events,
            *(() if self._parts.grammars is None else self._parts.grammars.known(events)),
            *self._check_liveness(now_s),
        ]
        self._pending_events = []
        return now_s, events

    def _role_change(self, now_s: float) -> list[Event]:
        roles = self._parts.roles
        change = roles.update(gateway.known_role for gateway in self._gateways)
        if (seconds := self._switches.note(roles, now_s)) is not None:
            logger.info("every router uses this worker for %s, %.2f s after its switch", roles.role, seconds)
        if change is None:
            return []
        self._parts.reports.make_due()
        return [change]

    def _without_pings(self, received: list[tuple[bytes, Inbound]]) -> list[tuple[bytes, Inbound]]:
        """Show each message of a peer to the transports, and answer pings."""
        for _, message in received:
            if isinstance(message, wire.PeerMessage) and self._parts.access is not None:
                pong = self._parts.access.received(message)
                if pong is not None:
                    self._parts.channel.send(pong.target_epoch.encode(), pong)
        return [each for each in received if not isinstance(each[1], wire.Ping | wire.Pong)]

    def _tier_reports(self) -> list[Event]:
        mover, storage = self._parts.mover, self._parts.storage
        tier_reports: list[Event] = [] if mover is None else [*mover.poll()]
        if storage is not None:
            tier_reports += storage.poll()
            for identity, answer in storage.answers():
                self._send(identity, answer)
        return tier_reports

    # ------------------------------------------------------------ waiting

    @property
    def has_pending(self) -> bool:
        """Whether a batch is in flight, or events wait for the next step."""
        return bool(self._pending_events or self._in_flight)

    def idle_s(self) -> float:
        """Return how long the loop may sleep without a message, a report or the end of a step."""
        if self._pending_events or self._may_follow:
            return 0.0
        return max(0.0, self._next_due_s() - self._parts.clock.now_s())

    def _next_due_s(self) -> float:
        """Return the time of the next timer, report or check."""
        times = [
            self._parts.reports.due_at_s(self._gateways),
            self._parts.page_events.due_at_s(self._gateways),
            self._next_check_s,
        ]
        if self._wake_at_s is not None:
            times.append(self._wake_at_s)
        return min(times)

    def _check_liveness(self, now_s: float) -> list[Event]:
        if now_s < self._next_check_s:
            return []
        self._next_check_s = now_s + LIVENESS_INTERVAL_S
        silent: list[Event] = [wire.Abort(request_id=each) for each in self._gateways.forget_silent(now_s)]
        if self._parts.access is not None:
            for endpoint, ping in self._parts.access.pings(self._parts.spec.epoch, self._watched_epochs):
                self._parts.channel.send_to_peer(endpoint, ping)
        return silent + self._dead_peers(self._watched_epochs)

    def _dead_peers(self, epochs: frozenset[EpochId]) -> list[Event]:
        return [PeerDied(epoch=epoch) for epoch in sorted(epochs) if self._parts.transport.peer_is_dead(epoch)]

    # ------------------------------------------------------------ carrying out a plan

    def _carry_out(self, plan: Plan, now_s: float) -> None:
        """Carry out the plan, except its batch."""
        self._send_outputs(plan)
        self._send_to_peers(plan)
        for transfer in plan.transfers:
            self._start_transfer(transfer)
        for job in plan.tier_jobs:
            if isinstance(job, PageJob):
                assert self._parts.mover is not None
                self._parts.mover.start(job)
            else:
                assert self._parts.storage is not None
                self._parts.storage.start(job)
        for grammar_job in plan.grammar_jobs:
            assert self._parts.grammars is not None
            self._parts.grammars.start(grammar_job)
        # Check new peers at once: the death of a peer can be proved only if its lock file was opened while it was
        # alive.
        self._pending_events += self._dead_peers(plan.watched_epochs - self._watched_epochs)
        self._watched_epochs = plan.watched_epochs
        self._wake_at_s = plan.wake_at_s
        self._report(plan, now_s)

    def _launch(self, batch: Batch) -> None:
        self._step_abort.begin(batch)
        self._in_flight.launch(batch, self._parts.clock.now_s())

    def _read_if_done(self) -> list[Event]:
        """Read the oldest step if it has ended, one step for each plan. A batch that may follow is launched first."""
        events = [] if self._may_follow else self._in_flight.read_if_done(self._parts.clock.now_s())
        if events:
            self._may_follow = True
        return events

    def _send_outputs(self, plan: Plan) -> None:
        """Send one message to each gateway with new tokens or endings."""
        chunks: defaultdict[bytes | None, list[wire.TokenChunk]] = defaultdict(list)
        ended: defaultdict[bytes | None, list[wire.Ended]] = defaultdict(list)
        owner = self._gateways.owner
        for chunk in plan.chunks:
            chunks[owner(chunk.request_id)].append(chunk)
        for end in plan.ended:
            ended[owner(end.request_id)].append(end)
            self._gateways.end_request(end.request_id)
        for identity in {**chunks, **ended}:
            if identity is not None:  # None: the gateway was forgotten
                self._send(identity, wire.StepOutputs(chunks=tuple(chunks[identity]), ended=tuple(ended[identity])))
        for flush in plan.flushes:
            self._answer(wire.Flushed(call_id=flush.call_id, num_pages=flush.num_pages))
        for answer in plan.lease_answers:
            self._answer(answer)

    def _answer(self, answer: wire.Flushed | LeaseAnswer) -> None:
        caller = self._inbox.take_call(answer.call_id)
        if caller is not None:
            self._send(caller, answer)

    def _send(self, identity: bytes, message: wire.EngineToGateway) -> None:
        if not self._parts.channel.send(identity, message):
            # The message is lost, and the streams of this gateway cannot be completed.
            lost = self._gateways.forget(identity)
            if lost:
                sender = address_for_log(identity)
                logger.warning("gateway %s does not read its messages: %d requests aborted", sender, len(lost))
            self._pending_events += [wire.Abort(request_id=request_id) for request_id in lost]

    def _send_to_peers(self, plan: Plan) -> None:
        for planned in plan.messages:
            outgoing = self._completed(planned)
            if not isinstance(outgoing, ToSource):
                # A failed send means a broken connection: the peer repeats its message, or its epoch is found dead.
                self._parts.channel.send(outgoing.target_epoch.encode(), outgoing.message)
            elif not self._parts.channel.send_to_peer(outgoing.endpoint, outgoing.message):
                self._pending_events += _refusal_of_unsent_grant(outgoing)

    def _completed(self, planned: ToSource | ToTarget) -> ToSource | ToTarget:
        access = self._parts.access
        if access is None:
            return planned
        endpoint = planned.endpoint if isinstance(planned, ToSource) else None
        return dataclasses.replace(planned, message=access.sending(planned.message, endpoint))  # type: ignore[arg-type]  # same type

    def _start_transfer(self, job: WritePages | VerifyPages | StopWrites) -> None:
        match job:
            case WritePages():
                self._parts.transport.write(job)
            case VerifyPages():
                self._parts.transport.verify(job)
            case StopWrites():
                self._parts.transport.stop(job.handoff_id)

    def _report(self, plan: Plan, now_s: float) -> None:
        reports = self._parts.reports
        if plan.changed_pages:
            reports.on_pages_changed()
        self._parts.page_events.record(plan.changed_pages, plan.seen_in_store)
        for identity, events in self._parts.page_events.make(self._gateways, now_s):
            self._send(identity, events)
        if now_s < reports.due_at_s(self._gateways):
            return
        totals = {
            "undecodable_messages": float(self._parts.channel.num_undecodable),
            "refused_connections": float(self._parts.channel.num_refused),
            "unexpected_messages": float(self._parts.channel.num_unexpected + self._inbox.num_unexpected),
            "failed_steps": float(self._in_flight.num_failed),
            "abandoned_steps": float(self._step_abort.num_aborted),
            **self._step_times.totals(),
            **self._switches.totals(),
            **({} if self._parts.mover is None else self._parts.mover.totals()),
            **({} if self._parts.storage is None else self._parts.storage.totals()),
            **({} if self._parts.grammars is None else self._parts.grammars.totals()),
        }
        storage = None if self._parts.storage is None else self._parts.storage.status()
        status = self._parts.scheduler.status()
        draining = self._inbox.draining
        for identity, report in reports.make(
            self._gateways, status, totals, now_s, self._parts.roles, storage, draining=draining
        ):
            self._send(identity, report)


def _refusal_of_unsent_grant(unsent: ToSource) -> list[Event]:
    """Return the refusal of a Grant that could not be queued, as if prefill had sent it: prefill will not write."""
    grant = unsent.message
    if not isinstance(grant, wire.Grant) or unsent.repeated:
        return []
    refused = wire.Closed(
        handoff_id=grant.handoff_id,
        target_epoch=grant.target_epoch,
        source_epoch=grant.source_epoch,
        error_code=HandoffFailed.code,
        message=f"the prefill engine at {unsent.endpoint} cannot be reached",
    )
    return [refused]
