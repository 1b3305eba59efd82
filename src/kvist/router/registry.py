"""The workers that a gateway knows: identity, cached pages, load and state.

Life of a worker: JOINING (named by a source, no message yet, or refused) → READY (Welcome received) → DRAINING
(shutting down, takes no new request) → LOST (silent, or the connection broke) → READY again, in a new or the same
epoch. A worker that no source names any more is LEAVING until its last request has ended. Uses no sockets and no clock:
fleet.py reports events with their times.
"""

from __future__ import annotations

import enum
import logging
import secrets
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice

from kvist.bounded_log import BoundedLog
from kvist.errors import ConfigError, RequestError, UnknownWorker
from kvist.fairness import CallerCounts, CallerPath
from kvist.page_index.page_feed import KnownPages, PageFeed
from kvist.page_index.page_runs import HeldPages
from kvist.page_index.prefix_index import PrefixIndex
from kvist.plan.compat import difference_of_pages
from kvist.protocol import PROTOCOL_VERSION, interworks
from kvist.request import (
    MAX_SHORT_ANSWER,
    PRIORITY,
    REQUEST_FIELDS,
    EngineRequest,
    RequestId,
    Role,
    WorkerId,
    fields_in_use,
)
from kvist.router.checks import fault_of_page_events, fault_of_report, fault_of_spec
from kvist.router.coming_pages import ComingPages
from kvist.router.config import RouterConfig
from kvist.router.policy import WorkerView
from kvist.router.rates import RateMeter
from kvist.router.stream import WorkerSnapshot
from kvist.service_time import SHORTEST_WAIT_S, bounded_retry_after_s, retry_after_s
from kvist.wire import EngineSpec, ListPages, LoadReport, PageEvents, Welcome

logger = logging.getLogger(__name__)

_OVERCOMMIT_DIVISOR = 8  # requests under way may exceed a worker's places by 1/8


class WorkerState(enum.Enum):
    JOINING = "joining"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"
    LEAVING = "leaving"


_JOINED = frozenset({WorkerState.READY, WorkerState.DRAINING, WorkerState.LEAVING})  # with a Welcome and its requests


@dataclass(slots=True)
class SentRequest:
    """A request that has not ended at a worker. Mutable; owned by its `Worker`."""

    num_pending_tokens: int  # prompt tokens that are not known to be computed
    caller: CallerPath


@dataclass(slots=True, kw_only=True, eq=False)
class Worker:
    """State of one worker. Mutable; owned by the registry."""

    url: str  # of its HTTP server
    wanted_role: Role | None  # None: the role that the worker was started with
    api_key: str | None = field(default=None, repr=False)  # for its HTTP server; None: the gateway's own
    sources: tuple[str, ...] = ()  # that name the worker (membership.py)
    state: WorkerState = WorkerState.JOINING
    problem: str = ""  # why the worker is not READY, for people
    endpoint: str = ""  # where its engine is reached
    spec: EngineSpec | None = None
    load: LoadReport | None = None
    present_role: Role | None = None  # of its engine, as last reported; None: the one of `spec`
    last_message_s: float = 0.0
    pages: PageFeed | None = None  # of its current process; None before the first Welcome, and while LOST
    unknown_fields: frozenset[str] = frozenset()  # of requests: its engine is older than this gateway
    num_rejected_messages: int = 0  # each was dropped, or failed its request
    leave_by_s: float = 0.0  # while LEAVING: when the requests that are still open fail
    in_flight: dict[RequestId, SentRequest] = field(default_factory=dict)
    num_pending_tokens: int = 0  # of all in flight
    coming: ComingPages = field(default_factory=ComingPages)  # prompts in flight
    meter: RateMeter = field(default_factory=RateMeter)
    callers: CallerCounts = field(default_factory=CallerCounts)  # of all in flight

    @property
    def worker_id(self) -> WorkerId:
        return self.spec.worker_id if self.spec is not None else WorkerId(self.url)

    @property
    def role(self) -> Role | None:
        """How the router uses the worker; None while that is unknown."""
        if self.spec is not None and self.present_role not in (None, self.spec.role):
            return self.present_role  # it was switched, which overrules the flags of router and worker
        if self.wanted_role is not None:
            return self.wanted_role
        return self.spec.role if self.spec is not None else None

    def knows(self, request: EngineRequest) -> bool:
        """Return whether the engine knows every field that the request uses."""
        return not self.unknown_fields or self.unknown_fields.isdisjoint(fields_in_use(request))

    def holds(self, num_tokens: int) -> bool:
        assert self.spec is not None
        return num_tokens <= self.spec.max_model_len

    def admits_whole(self, max_tokens: int) -> bool:
        """Return whether the worker serves a whole request with an answer of this length beside workers of all
        roles."""
        assert self.spec is not None
        engine_role = self.present_role or self.spec.role
        return engine_role is not Role.PREFILL or max_tokens <= MAX_SHORT_ANSWER

    @property
    def writes_alone(self) -> bool:
        """Whether the worker's engine generates answers of any length without another worker."""
        assert self.spec is not None
        return self.spec.writes_alone

    def has_room_for(self, caller: CallerPath) -> bool:
        """Return whether the worker has a free place, or will displace a request of a caller with more requests there.
        A worker that uses priorities decides about that itself: only the worker compares them.

        For the second case (scheduler/entry.py) slightly more requests than places may be under way to the worker."""
        assert self.spec is not None
        num_places = self.spec.max_running_requests + self.spec.max_queued_requests
        if len(self.in_flight) < num_places:
            return True
        if len(self.in_flight) >= num_places + max(1, num_places // _OVERCOMMIT_DIVISOR):
            return False
        return self.spec.scheduling_policy == PRIORITY or self.callers.displaced_by(caller) is not None

    def retry_after_s(self) -> float:
        """Estimate the time until a place is free, from the last report and this gateway's requests."""
        assert self.spec is not None
        if self.load is None:
            return SHORTEST_WAIT_S
        num_ahead = max(1, len(self.in_flight) - self.spec.max_running_requests, self.load.num_waiting)
        if self.load.queue_wait_s and self.load.num_waiting:
            return bounded_retry_after_s(self.load.queue_wait_s * num_ahead / self.load.num_waiting)
        return retry_after_s(self.load.service_s, num_ahead=num_ahead, num_served=self.load.num_running)

    def take(self, request_id: RequestId, num_tokens: int, caller: CallerPath) -> None:
        self.in_flight[request_id] = SentRequest(num_tokens, caller)
        self.callers.add(caller)
        self.num_pending_tokens += num_tokens

    def prompt_done(self, request_id: RequestId) -> None:
        found = self.in_flight.get(request_id)
        if found is not None:
            self.num_pending_tokens -= found.num_pending_tokens
            found.num_pending_tokens = 0

    def is_queued(self, request_id: RequestId) -> bool:
        """Return whether the request waits for its turn there, by the last report: the newest requests wait. An
        estimate, for people: other gateways and priorities are not considered."""
        num_waiting = 0 if self.load is None else self.load.num_waiting
        return request_id in islice(reversed(self.in_flight), num_waiting)

    def release(self, request_id: RequestId) -> None:
        found = self.in_flight.pop(request_id, None)
        if found is not None:
            self.num_pending_tokens -= found.num_pending_tokens
            self.callers.remove(found.caller)
            self.coming.remove(request_id)

    def view(
        self, held: HeldPages, caller: CallerPath, *, num_coming_tokens: int = 0, served_session: bool = False
    ) -> WorkerView:
        """Return the worker as a policy sees it for a request of the caller; `held` are the prompt's pages there."""
        assert self.spec is not None
        load = self.load
        return WorkerView(
            worker_id=self.spec.worker_id,
            page_size=self.spec.page_size,
            num_requests=self._num_before(caller),
            num_pending_tokens=self.num_pending_tokens,
            num_known_pages=0 if self.pages is None else self.pages.num_pages,
            held=held,
            num_coming_tokens=num_coming_tokens,
            served_session=served_session,
            role=self.role or Role.UNIFIED,
            page_bytes=self.spec.page_bytes,
            num_available_pages=self.spec.num_pages if load is None else load.num_free_pages + load.num_cached_pages,
            max_running_requests=self.spec.max_running_requests,
            service_s=(load.service_s or 0.0) if load is not None else 0.0,
            rates=self.meter.rates,
        )

    def _num_before(self, caller: CallerPath) -> int:
        """Return the number of requests that run or wait at the worker, without those in its queue that a request of
        the caller passes."""
        assert self.spec is not None
        reported = 0 if self.load is None else self.load.num_running + self.load.num_waiting
        num_requests = max(len(self.in_flight), reported)  # the report counts other gateways' requests too
        num_queued = max(0, num_requests - self.spec.max_running_requests)
        num_passed = len(self.in_flight) - self.callers.num_ahead(caller) if num_queued else 0
        return num_requests - min(num_queued, num_passed)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayTokenizer:
    """The tokenizer that this gateway uses for prompts."""

    name: str  # of the model of the tokenizer
    fingerprint: str


class Registry:
    def __init__(self, config: RouterConfig, tokenizer: GatewayTokenizer | None = None) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._log = BoundedLog(logger)
        self._workers: dict[str, Worker] = {}
        self.role_switches: Counter[tuple[Role, Role]] = Counter()  # (from, to) of workers that reported another role
        self.index = PrefixIndex(config.routing.max_known_pages, seed=secrets.randbits(128))

    @property
    def workers(self) -> tuple[Worker, ...]:
        return tuple(self._workers.values())

    def add(self, url: str, role: Role | None, now_s: float) -> Worker:
        """Add a worker. A worker that was LEAVING stays, and is READY again after its next Welcome."""
        leaving = self._workers.get(url)
        if leaving is not None:
            assert leaving.state is WorkerState.LEAVING, f"{url} is a worker already"
            leaving.wanted_role, leaving.state, leaving.problem = role, WorkerState.JOINING, "named again"
            return leaving
        worker = Worker(url=url, wanted_role=role, last_message_s=now_s, problem="no message yet")
        self._workers[url] = worker
        return worker

    def find(self, url: str) -> Worker | None:
        return self._workers.get(url)

    def named(self, name: str | None) -> Worker:
        """Return the worker with this URL or id; None: the only worker. Raises `UnknownWorker`, `RequestError`."""
        if name is None and len(self._workers) == 1:
            return self.workers[0]
        if name is None:
            raise RequestError(f"name one of the {len(self._workers)} workers (GET /workers)", param="worker")
        for worker in self.workers:
            if name in (worker.url, worker.worker_id):
                return worker
        raise UnknownWorker(f"there is no worker {name[:200]!r}: GET /workers lists the workers")

    def leave(self, worker: Worker) -> None:
        """Send the worker no new request."""
        worker.state, worker.problem = WorkerState.LEAVING, "removed from this gateway"
        self._forget_pages(worker)

    def remove(self, worker: Worker) -> None:
        """Forget a worker without requests."""
        del self._workers[worker.url]
        self._forget_pages(worker)

    def ready(self, role: Role) -> list[Worker]:
        return [w for w in self._workers.values() if w.state is WorkerState.READY and w.role is role]

    def reference(self) -> EngineSpec | None:
        """Return a spec with the values shared by all READY workers (model, layout, dtype), and with the limits of the
        worker that can hold the longest requests: on a complete route, if there is one."""
        ready = [w for w in self.workers if w.state is WorkerState.READY]  # a copy: other threads call this method
        writers = [w for w in ready if w.role is Role.UNIFIED]
        if any(w.role is Role.PREFILL for w in ready):
            writers += [w for w in ready if w.role is Role.DECODE]
        specs = [w.spec for w in writers or ready if w.spec is not None]
        return max(specs, key=lambda spec: spec.max_model_len, default=None)

    def on_welcome(self, worker: Worker, welcome: Welcome, now_s: float) -> None:
        """Mark the worker READY. Raises `ConfigError`, and sets `worker.problem`, if the worker cannot serve here."""
        worker.last_message_s = now_s
        spec = welcome.spec
        known = worker.spec if worker.state in (WorkerState.READY, WorkerState.DRAINING) else None
        if worker.state is WorkerState.LEAVING or (known is not None and not is_another(known, spec)):
            return
        problem = self._problem(worker, welcome)
        if problem:
            worker.state, worker.problem = WorkerState.JOINING, problem
            raise ConfigError(problem)
        self._reset_reported_state(worker)
        worker.unknown_fields = frozenset(REQUEST_FIELDS).difference(spec.request_fields)
        worker.spec, worker.state, worker.problem = spec, WorkerState.READY, ""
        self.index.add(spec.worker_id, {"device": spec.num_pages, "host": spec.num_host_pages})
        worker.pages = PageFeed(self.index, spec.worker_id)
        logger.info("worker %s is ready: %s, epoch %s", spec.worker_id, spec.role, spec.epoch)

    def on_report(self, worker: Worker, report: LoadReport, now_s: float) -> bool:
        """Handle a load report. Return whether the worker has another role from now on."""
        worker.last_message_s = now_s
        fault = fault_of_report(report)
        if fault is not None:
            self._reject(worker, f"the load report has {fault}")
            return False
        worker.load = report
        role_before, worker.present_role = worker.role, report.role
        if worker.pages is not None:
            self.index.set_store(worker.worker_id, "" if report.storage is None else report.storage.location)
        worker.meter.on_totals(report.totals)
        if report.draining and worker.state is WorkerState.READY:
            logger.info("worker %s is stopping and takes no new requests", worker.worker_id)
            worker.state, worker.problem = WorkerState.DRAINING, "it is stopping"
        if worker.role is role_before:
            return False
        if role_before is not None and worker.role is not None:
            self.role_switches[role_before, worker.role] += 1
        logger.info("worker %s is used for %s from now on, before for %s", worker.worker_id, worker.role, role_before)
        return True

    def on_page_events(self, worker: Worker, events: PageEvents, now_s: float) -> ListPages | None:
        """Apply page events. Return the request to the worker that they make due, if any."""
        assert worker.pages is not None
        fault = fault_of_page_events(events)
        if fault is not None:
            self._reject(worker, f"the page events have {fault}")
            return None
        was_cut = worker.pages.num_cut
        request = worker.pages.on_events(events, now_s)
        if worker.pages.num_cut and not was_cut:
            logger.warning(
                "worker %s reports more cached pages than it can have (%d), or than its share of the %d that routing "
                "knows (--max-known-pages); further pages are ignored",
                worker.worker_id,
                0 if worker.spec is None else worker.spec.num_pages + worker.spec.num_host_pages,
                self.index.max_pages,
            )
        return request

    def _reject(self, worker: Worker, fault: str) -> None:
        worker.num_rejected_messages += 1
        self._log.warning("rejected a message of worker %s: %s", worker.worker_id, fault)

    def on_lost(self, worker: Worker, reason: str) -> None:
        """Mark the worker as unusable. The dispatcher fails its requests."""
        if worker.state in (WorkerState.READY, WorkerState.DRAINING):
            if worker.state is WorkerState.READY:
                logger.warning("worker %s is lost: %s", worker.worker_id, reason)
            worker.state = WorkerState.LOST
            self._reset_reported_state(worker)
        worker.problem = reason

    def snapshot(self) -> tuple[WorkerSnapshot, ...]:
        return tuple(self._snapshot_of(worker) for worker in self.workers)

    @staticmethod
    def _snapshot_of(worker: Worker) -> WorkerSnapshot:
        return WorkerSnapshot(
            worker_id=worker.worker_id,
            role=worker.role,
            alive=worker.state is WorkerState.READY,
            spec=worker.spec,
            load=worker.load,
            state=worker.state.value,
            problem=worker.problem,
            url=worker.url,
            sources=worker.sources,
            num_in_flight=len(worker.in_flight),
            num_pending_tokens=worker.num_pending_tokens,
            rates=worker.meter.rates,
            num_rejected_messages=worker.num_rejected_messages,
            known_pages=KnownPages() if worker.pages is None else worker.pages.known(),
        )

    def _reset_reported_state(self, worker: Worker) -> None:
        self._forget_pages(worker)
        worker.load = worker.present_role = None
        worker.meter = RateMeter()

    def _forget_pages(self, worker: Worker) -> None:
        if worker.pages is not None:
            self.index.remove(worker.worker_id)
            worker.pages = None

    def _problem(self, worker: Worker, welcome: Welcome) -> str:
        spec = welcome.spec
        if not interworks(welcome.protocol_version, PROTOCOL_VERSION):
            return (
                f"worker {spec.worker_id} uses protocol {welcome.protocol_version}, this gateway {PROTOCOL_VERSION}:"
                " run versions of Kvist that are at most one protocol version apart"
            )
        fault = fault_of_spec(spec)
        if fault is not None:
            return f"worker {spec.worker_id} reports {fault}, which is impossible"
        wanted = worker.wanted_role
        if wanted not in (None, spec.role) and (wanted, spec.role) != (Role.PREFILL, Role.UNIFIED):
            return (
                f"worker {spec.worker_id} was started as {spec.role} and cannot be used for {wanted}:"
                f" start it with --role {wanted}"
            )
        others = [o for o in self._workers.values() if o is not worker and o.state in _JOINED]
        if self._tokenizer is not None and spec.tokenizer_fingerprint not in ("", self._tokenizer.fingerprint):
            return (
                f"worker {spec.worker_id} serves {spec.model_name} with vocabulary {spec.tokenizer_fingerprint}, but"
                f" this gateway uses the vocabulary of {self._tokenizer.name}, {self._tokenizer.fingerprint}: start the"
                " router with the --model-path of its workers"
            )
        for other in others:
            if other.worker_id == spec.worker_id:
                return f"{worker.url} is the same worker as {other.url}: remove one of the two"
            if other.spec is not None and other.spec.epoch == spec.epoch:
                return (
                    f"{worker.url} uses the identity of {other.worker_id} at {other.url} (epoch {spec.epoch}): remove "
                    "one of the two"
                )
        reference = next((other.spec for other in others if other.state is WorkerState.READY), None)
        if reference is None:
            return ""
        if spec.vocab_size != reference.vocab_size:
            return (
                f"worker {spec.worker_id} has another model vocabulary than worker {reference.worker_id} "
                f"({spec.vocab_size} tokens, not {reference.vocab_size}): use the same model files"
            )
        return difference_of_pages(reference, spec) or ""


def is_another(known: EngineSpec, spec: EngineSpec) -> bool:
    """Return whether the spec is that of another worker than the one known so far: another process, role or model."""
    fields = ("epoch", "worker_id", "role", "model_fingerprint", "namespace")
    return any(getattr(known, name) != getattr(spec, name) for name in fields)
