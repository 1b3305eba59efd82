"""Engines, a wire and a transport in memory, which run real schedulers under faults (fake_device.py holds the pages and
the model).

    World ── wire: FIFO between two processes, any order between different pairs, duplicates, nothing after a death
      └── SimEngine ── scheduler, cache, FakeDevice, SimTransport, SimMover, SimStore (fake_store.py)
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from functools import partial

from fake_device import EOS, FakeDevice, Slot, checksum, reference_scores, reference_stream
from fake_store import SimStore
from slot_check import SlotCheck

from kvist.kv.cache import PageCache
from kvist.kv.pages import PageState
from kvist.kv.tiers.host import HostTier
from kvist.kv.tiers.prefetch import PrefetchConfig
from kvist.kv.tiers.storage import StorageTier
from kvist.plan.batch import Batch
from kvist.plan.events import Event, StepFailed, StepFinished
from kvist.plan.plan import Plan
from kvist.plan.tiers import (
    BackUpPages,
    ForgetPages,
    LoadPages,
    PagesBackedUp,
    PagesForgotten,
    PagesLoaded,
    StorageAttached,
)
from kvist.plan.transfers import (
    PagesVerified,
    PeerDied,
    StopWrites,
    ToSource,
    VerifyPages,
    WritePages,
    WritesCompleted,
    WritesFailed,
)
from kvist.request import (
    EngineRequest,
    EpochId,
    FinishReason,
    HandoffId,
    Mode,
    Outcome,
    RequestId,
    Role,
    SamplingParams,
    TokenLogprobs,
)
from kvist.scheduler import SchedulerConfig, build_scheduler
from kvist.scheduler.active import RequestState
from kvist.testing.page_events import ReplayedPages, pages_in
from kvist.wire import Abort, Ack, Closed, Done, Ended, Grant, PoolAddress, PrefillPeer, Revoke, Submit, TokenChunk

PAGE_BYTES = 64
WITH_PAGES = frozenset(
    {
        RequestState.GRANTED,
        RequestState.LOADING,
        RequestState.RUNNING,
        RequestState.AWAITING_TRANSFER,
        RequestState.ENDED,  # only while a step, a load or a peer still uses the pages
    }
)
LAYOUT = "sim"


@dataclass
class _Writes:
    jobs: deque[tuple[int, int, list[Slot | None]]] = field(
        default_factory=deque
    )  # our page, peer page, content when requested
    job_ends: deque[int] = field(default_factory=deque)  # number of written pages at which a report is due
    written: list[list[Slot | None]] = field(default_factory=list)
    pool: str = ""
    num_asked: int = 0
    stopped: bool = False
    failed: bool = False


class SimTransport:
    """Copies one page at a time, in the requested order, as promised by `transfer/__init__.py`."""

    def __init__(self, world: World, engine: SimEngine) -> None:
        self._world = world
        self._engine = engine
        self._writes: dict[HandoffId, _Writes] = {}
        self._verifies: deque[VerifyPages] = deque()
        self._reports: list[Event] = []
        self.corrupt_next = False
        self.fail_next = False

    def take(self, job: WritePages | VerifyPages | StopWrites) -> None:
        if isinstance(job, VerifyPages):
            self._verifies.append(job)
            return
        writes = self._writes.setdefault(job.handoff_id, _Writes())
        if isinstance(job, StopWrites):
            writes.stopped = True
            writes.jobs.clear()
            self._reports = [
                report
                for report in self._reports
                if not (isinstance(report, WritesCompleted) and report.handoff_id == job.handoff_id)
            ]
            self._reports.append(self._completed(job.handoff_id))
            return
        assert not writes.stopped, "a write is requested after the stop"
        if writes.failed:
            return  # WritesFailed is reported already
        assert len(job.page_ids) == len(job.peer_page_ids)
        assert len(set(job.page_ids)) == len(job.page_ids)
        writes.pool = job.pool.location
        for page_id, peer_page_id in zip(job.page_ids, job.peer_page_ids, strict=True):
            writes.jobs.append((page_id, peer_page_id, list(self._engine.device.pages[page_id])))
        writes.num_asked += len(job.page_ids)
        writes.job_ends.append(writes.num_asked)

    @property
    def busy(self) -> bool:
        return bool(self._verifies) or any(writes.jobs for writes in self._writes.values())

    def advance(self) -> None:
        """Copy one page, and verify one grant."""
        if self._verifies:
            job = self._verifies.popleft()
            self._reports.append(
                PagesVerified(handoff_id=job.handoff_id, checksum=self._engine.device.checksum(job.page_ids))
            )
        for handoff_id, writes in self._writes.items():
            if writes.jobs:
                if self.fail_next:
                    self.fail_next = False
                    writes.failed = True
                    writes.jobs.clear()
                    self._reports.append(WritesFailed(handoff_id=handoff_id, message="the link is down"))
                    return
                self._copy_one(handoff_id, writes)
                return

    def _copy_one(self, handoff_id: HandoffId, writes: _Writes) -> None:
        page_id, peer_page_id, expected = writes.jobs.popleft()
        content = list(self._engine.device.pages[page_id])
        assert content == expected, f"source page {page_id} changed while handoff {handoff_id} had a pending copy of it"
        assert self._engine.cache._ledger.state(page_id) is not PageState.FREE, f"source page {page_id} was freed"
        peer = self._world.by_epoch.get(writes.pool)
        if peer is not None:  # else the peer is dead, and its pool is gone
            owner = peer.in_flight_pages.get(peer_page_id)
            state = peer.cache._ledger.state(peer_page_id)
            assert state is PageState.IN_FLIGHT, f"{handoff_id} writes page {peer_page_id}, which is {state.name}"
            assert owner == handoff_id, f"{handoff_id} writes page {peer_page_id}, granted to {owner}"
            damaged = self.corrupt_next
            self.corrupt_next = False
            peer.device.pages[peer_page_id] = [(0, 0)] * len(content) if damaged else content
        writes.written.append(content)
        if len(writes.written) == writes.job_ends[0]:
            writes.job_ends.popleft()
            self._reports.append(self._completed(handoff_id))

    def _completed(self, handoff_id: HandoffId) -> WritesCompleted:
        writes = self._writes[handoff_id]
        return WritesCompleted(handoff_id=handoff_id, num_pages=len(writes.written), checksum=checksum(writes.written))

    def poll(self) -> list[Event]:
        reports, self._reports = self._reports, []
        return reports


class SimMover:
    """Copies between device and host pages, one job for each `advance`, as promised by `memory/page_copier.py`."""

    def __init__(self, engine: SimEngine, num_host_pages: int) -> None:
        self._engine = engine
        self.host: list[list[Slot | None]] = [[] for _ in range(num_host_pages)]
        self._jobs: list[tuple[LoadPages | BackUpPages, list[list[Slot | None]]]] = []  # job, pages to copy
        self._reports: list[Event] = []
        self.fail_next = False

    def take(self, job: LoadPages | BackUpPages | ForgetPages) -> None:
        if isinstance(job, ForgetPages):
            assert not any(set(other.host_slots) & set(job.host_slots) for other, _ in self._jobs)
            self._reports.append(PagesForgotten(job_id=job.job_id))
            return
        loads = isinstance(job, LoadPages)
        source = [self.host[slot] for slot in job.host_slots] if loads else self._device_pages(job)
        assert all(None not in page for page in source), "a page is copied before it was filled"
        self._jobs.append((job, [list(page) for page in source]))

    @property
    def slots(self) -> list[tuple[bool, int]]:
        """(is written, slot) for every slot of every pending job."""
        return [(isinstance(job, BackUpPages), slot) for job, _ in self._jobs for slot in job.host_slots]

    @property
    def busy(self) -> bool:
        return bool(self._jobs or self._reports)

    def advance(self, newest: bool = False) -> None:
        """Carry out one job. Jobs of different queues may finish in any order."""
        if not self._jobs:
            return
        job, expected = self._jobs.pop(-1 if newest else 0)
        ok, self.fail_next = not self.fail_next, False
        ledger = self._engine.cache._ledger
        if isinstance(job, LoadPages):
            assert [self.host[slot] for slot in job.host_slots] == expected, "a host page changed while it was loaded"
            assert {ledger.state(page_id) for page_id in job.page_ids} == {PageState.IN_FLIGHT}
            for page_id, page in zip(job.page_ids, expected, strict=True):
                self._engine.device.pages[page_id] = list(page) if ok else [(0, 0)] * len(page)
            self._reports.append(PagesLoaded(job_id=job.job_id, ok=ok))
        else:
            assert self._device_pages(job) == expected, "a page changed while it was backed up"
            assert {ledger.state(page_id) for page_id in job.page_ids} == {PageState.CACHED}
            for slot, page in zip(job.host_slots, expected, strict=True):
                self.host[slot] = page if ok else [(0, 0)] * len(page)
            self._reports.append(PagesBackedUp(job_id=job.job_id, ok=ok))

    def poll(self) -> list[Event]:
        reports, self._reports = self._reports, []
        return reports

    def _device_pages(self, job: LoadPages | BackUpPages) -> list[list[Slot | None]]:
        return [self._engine.device.pages[page_id] for page_id in job.page_ids]


@dataclass(frozen=True)
class Rows:
    """The rows that a device returns, and which of them do not overlap."""

    max_tokens: int = 1  # of one row
    known_every: int = 0  # a request whose seed is a multiple of this needs its last token known; 0: none does

    def need_known_token(self, sampling: SamplingParams) -> bool:
        return bool(self.known_every) and sampling.seed % self.known_every == 0

    def num_tokens(self, sampling: SamplingParams, *, overlap: bool) -> int:
        """Return the most tokens in a row: no pending batch may continue a row of several tokens."""
        return 1 if overlap and not self.need_known_token(sampling) else self.max_tokens


class SimEngine:
    def __init__(
        self,
        world: World,
        name: str,
        role: Role,
        *,
        life: int,
        config: SchedulerConfig,
        num_pages: int,
        page_size: int,
        num_host_pages: int = 0,
        write_policy: str = "write_through",
        prefetch: PrefetchConfig | None = None,
        rows: Rows | None = None,
    ) -> None:
        self.world = world
        self.rows = rows or Rows()
        self.name = name
        self.role = role
        self.epoch = EpochId(f"{name}#{life}")
        self.config = config
        self.num_host_pages = num_host_pages
        self.write_policy = write_policy
        self.prefetch = prefetch
        self.host = host = HostTier(num_host_pages) if num_host_pages else None
        storage = (
            StorageTier(host, prefetch, page_size=page_size) if host is not None and prefetch is not None else None
        )
        self.cache = PageCache(
            num_pages=num_pages,
            page_size=page_size,
            namespace="sim",
            host=host,
            write_policy=write_policy,
            storage=storage,
        )
        self.store = None if storage is None else SimStore(self, world.stored)
        self.mover = SimMover(self, num_host_pages)
        self.device = FakeDevice(self.cache, partial(self.rows.num_tokens, overlap=bool(config.overlap)))
        self.transport = SimTransport(world, self)
        pool = PoolAddress(
            transport="sim", location=self.epoch, num_pages=num_pages, page_bytes=PAGE_BYTES, layout=LAYOUT
        )
        self.scheduler = build_scheduler(
            role, config, self.cache, self.epoch, pool, needs_known_token=self.rows.need_known_token
        )
        self.events: list[Event] = [] if storage is None else [StorageAttached(attached=True)]
        self.slot_check = SlotCheck(config.max_running_requests, self.rows.need_known_token)
        self.under_way: deque[Batch] = deque()
        self.plan = Plan()
        self.pages = ReplayedPages()
        self.in_flight_pages: dict[int, HandoffId] = {}  # page id → handoff, from the grants it sent
        self.max_batch_tokens = 0
        self.fail_next_step = False

    @property
    def running(self) -> list[RequestId]:
        """The requests of the newest batch."""
        return self.slot_check.running

    @property
    def context_len(self) -> int:
        return min(self.config.max_model_len, self.cache.num_pages * self.cache.page_size)

    def finish_step(self) -> None:
        """Finish the oldest pending batch; the next `step` gets its report."""
        if not self.under_way:
            return
        batch = self.under_way.popleft()
        if self.fail_next_step:
            self.fail_next_step = False
            self.device.fail(batch)
            self.events.append(StepFailed(step_id=batch.step_id, message="the device is on fire"))
        else:
            self.events.append(StepFinished(step_id=batch.step_id, sampled=self.device.execute(batch)))

    def step(self) -> Plan:
        watched = self.plan.watched_epochs
        dead = [PeerDied(epoch=epoch) for epoch in sorted(watched) if epoch not in self.world.by_epoch]
        stored = [] if self.store is None else self.store.poll()
        events = [*self.events, *self.transport.poll(), *self.mover.poll(), *stored, *dead]
        self.events = []
        plan = self.plan = self.scheduler.step(self.world.now_s, events)
        self._check(plan)
        self.world.receive(self, plan)
        for transfer in plan.transfers:
            self.transport.take(transfer)
        for move in plan.moves:
            if isinstance(move, LoadPages | BackUpPages | ForgetPages):
                self.mover.take(move)
            else:
                assert self.store is not None
                self.store.take(move)
        self._check_slots()
        if plan.batch is not None:
            self.under_way.append(plan.batch)
            assert len(self.under_way) <= (2 if self.config.overlap else 1)
        return plan

    def _check_slots(self) -> None:
        used = [*self.mover.slots, *([] if self.store is None else self.store.slots)]
        written = [slot for is_written, slot in used if is_written]
        assert len(written) == len(set(written)), "two jobs write one slot"
        assert not set(written) & {slot for is_written, slot in used if not is_written}, (
            "a slot is read and written at the same time"
        )

    def _check_requests(self) -> None:
        """Check that each request is in the one container of its state, and that every count equals what is there."""
        requests = self.scheduler.requests
        for state, container in requests.by_state.items():
            assert len(container) == len(list(container))
            for request in container:
                assert request.state is state
                assert request.has_pages is (state in WITH_PAGES), "pages are held in exactly the states that need them"
        found = Counter(request for container in requests.by_state.values() for request in container)
        assert not found or max(found.values()) == 1, "a request is in two containers"
        live = set(requests.live.values())
        assert live == set(found) - set(requests.ended), "each live request is in one container"
        assert len(requests.unadmitted) == sum(not request.was_admitted for request in live)
        load = self.scheduler.load()
        assert load.num_waiting == sum(not request.has_pages for request in live)
        assert load.num_running == sum(request.has_pages for request in live)
        running = list(requests.running)
        assert running == sorted(running, key=lambda request: request.number)
        assert requests.running.num_prefills == sum(request.mode is Mode.PREFILL for request in running)
        assert requests.slots.num_taken == len(running) == len({request.slot for request in running})
        assert requests.num_in_run_slots <= self.config.max_running_requests
        waiting = requests.waiting
        to_compute = sum(len(each.token_ids) for each in waiting if not each.awaits_grant_of_pages)
        assert waiting.num_tokens == to_compute, "num_tokens counts the waiting tokens that this engine computes"
        for request in requests.fetching:
            assert self.world.now_s < request.arrived_s + self.config.queue_timeout_s / 2, (
                "a request waits for the store too long"
            )
        for request in live:
            assert request.prefetch is None or not request.has_pages, "a prefetch is open after admission"

    def _check(self, plan: Plan) -> None:
        self._check_requests()
        counts = self.scheduler.load().pages
        assert counts.free + counts.cached + counts.owned + counts.in_flight == counts.total
        self.pages.apply(plan.page_events)
        host = self.cache.host_counts()
        if host is None:
            assert len(self.pages.pages) == counts.cached
        else:
            assert host.free + host.cached + host.in_flight == host.total
            assert 0 <= host.in_flight <= host.total
        assert self.pages.pages == pages_in(self.cache.snapshot())
        totals = self.scheduler.load().totals
        hits, ceiling = totals["cached_prompt_tokens"], totals["ceiling_prompt_tokens"]
        assert hits <= ceiling <= totals["prompt_tokens"]
        # a page known only from the store was never evicted here, but its load from the host may fail
        missed = totals["device_evicted_pages"] or totals["host_failed_pages"]
        assert hits == ceiling or missed, "a page is missed that was neither evicted nor failed"
        for message in plan.messages:
            if isinstance(message, ToSource) and isinstance(message.message, Grant):
                grant = message.message
                self.in_flight_pages.update(dict.fromkeys(grant.page_ids, grant.handoff_id))
        if plan.batch is not None:
            self.slot_check.read(plan.batch)
            assert set(self.slot_check.open.values()) <= set(self.scheduler.requests.live)
            assert 0 < plan.batch.num_tokens <= self.config.max_prefill_tokens, "the batch exceeds the token budget"
            assert len(plan.batch.items) <= self.config.max_running_requests
            for item in plan.batch.items:
                assert item.end <= len(item.page_ids) * self.cache.page_size


@dataclass
class Submitted:
    request: EngineRequest
    engines: list[tuple[SimEngine, Mode]]
    aborted: bool = False


class World:
    """Engines, one gateway that records messages, and the wires between them."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.engines: dict[str, SimEngine] = {}  # by name, also the endpoint
        self.by_epoch: dict[str, SimEngine] = {}  # alive
        self.stored: dict[bytes, list[Slot | None]] = {}  # by digest, in the shared store
        self.wires: dict[tuple[str, str], deque[tuple[str, Event]]] = defaultdict(deque)
        self.chunks: dict[str, list[tuple[str, TokenChunk]]] = defaultdict(list)  # request → (epoch, chunk)
        self.ended: dict[tuple[str, str], list[Ended]] = defaultdict(list)  # (request, epoch)
        self.submitted: dict[str, Submitted] = {}
        self.totals: Counter[str] = Counter()
        self._lives: Counter[str] = Counter()

    # ---------------------------------------------------------------- processes

    def start(
        self,
        name: str,
        role: Role,
        config: SchedulerConfig,
        *,
        num_pages: int = 12,
        page_size: int = 4,
        num_host_pages: int = 0,
        write_policy: str = "write_through",
        prefetch: PrefetchConfig | None = None,
        rows: Rows | None = None,
    ) -> SimEngine:
        self._lives[name] += 1
        engine = SimEngine(
            self,
            name,
            role,
            life=self._lives[name],
            config=config,
            num_pages=num_pages,
            page_size=page_size,
            num_host_pages=num_host_pages,
            write_policy=write_policy,
            prefetch=prefetch,
            rows=rows,
        )
        self.engines[name] = engine
        self.by_epoch[engine.epoch] = engine
        return engine

    def forget(self, engine: SimEngine, *, host: bool) -> None:
        """Evict all cached pages from the device pool, and with `host` from the host tier too."""
        engine.cache.evict(engine.cache.counts().evictable)
        if host and engine.host is not None:
            engine.host.flush()

    def kill(self, engine: SimEngine) -> SimEngine:
        """Kill the engine and its unsent messages; start a new process at the same address."""
        del self.by_epoch[engine.epoch]
        for source, target in list(self.wires):
            if source == engine.epoch:
                del self.wires[source, target]
        return self.start(
            engine.name,
            engine.role,
            engine.config,
            num_pages=engine.cache.num_pages,
            page_size=engine.cache.page_size,
            num_host_pages=engine.num_host_pages,
            write_policy=engine.write_policy,
            prefetch=engine.prefetch,
            rows=engine.rows,
        )

    def break_connection(self, engine: SimEngine) -> None:
        """Lose the engine's messages on the way to other engines; both sides survive and reconnect."""
        for (source, target), queue in self.wires.items():
            if source == engine.epoch and target != "gateway":
                queue.clear()

    # ---------------------------------------------------------------- messages

    def submit(self, request: EngineRequest, engine: SimEngine) -> None:
        """Submit a whole request (FULL)."""
        self.submitted[request.request_id] = Submitted(request, [(engine, Mode.FULL)])
        self._send("gateway", engine.name, Submit(request=request, mode=Mode.FULL))

    def submit_pair(self, request: EngineRequest, prefill: SimEngine, decode: SimEngine) -> HandoffId:
        handoff_id = HandoffId(f"h-{request.request_id}")
        self.submitted[request.request_id] = Submitted(request, [(prefill, Mode.PREFILL), (decode, Mode.DECODE)])
        peer = PrefillPeer(worker_id="w", endpoint=prefill.name, epoch=prefill.epoch)
        self._send(
            "gateway",
            prefill.name,
            Submit(request=request, mode=Mode.PREFILL, handoff_id=handoff_id, target_epoch=decode.epoch),
        )
        self._send(
            "gateway",
            decode.name,
            Submit(request=request, mode=Mode.DECODE, handoff_id=handoff_id, prefill=peer),
        )
        return handoff_id

    def abort(self, request_id: str, only: SimEngine | None = None) -> None:
        submitted = self.submitted[request_id]
        submitted.aborted = True
        for engine, _ in submitted.engines:
            if only is None or engine is only:
                self._send("gateway", engine.name, Abort(request_id=request_id))

    def receive(self, engine: SimEngine, plan: Plan) -> None:
        for chunk in plan.chunks:
            from_below = chunk.num_cached_host_tokens + chunk.num_cached_storage_tokens
            assert 0 <= from_below <= (chunk.num_cached_tokens or 0)
            self.chunks[chunk.request_id].append((engine.epoch, chunk))
        for ended in plan.ended:
            self.ended[ended.request_id, engine.epoch].append(ended)
            assert len(self.ended[ended.request_id, engine.epoch]) == 1, "a request ends once at one engine"
            if ended.error_code in ("timeout", "overloaded"):
                began = any(chunk.token_ids for _, chunk in self.chunks[ended.request_id])
                assert not began, "a queue ended a stream that had begun"
        for sent in plan.messages:
            message = sent.message
            if isinstance(sent, ToSource):
                assert isinstance(message, Grant | Ack | Revoke)
                self._send(engine.epoch, sent.endpoint, message)
            else:
                assert message.target_epoch == sent.target_epoch
                assert isinstance(message, Done | Closed)
                self._send(engine.epoch, sent.target_epoch, message)

    def _send(self, source: str, target: str, event: Event) -> None:
        """Send to an address (the process that lives there receives it) or to an epoch (only that process does)."""
        self.wires[source, target].append((source, event))

    def deliver(self, wire: tuple[str, str], *, twice: bool = False) -> None:
        queue = self.wires[wire]
        if not queue:
            return
        source, event = queue.popleft()
        if twice and source != "gateway":
            # Deliver the message again, after those that follow it. A second Grant follows at once instead: no wire
            # that keeps the order could deliver it after a Revoke.
            if isinstance(event, Grant):
                queue.appendleft((source, event))
            else:
                queue.append((source, event))
        target = self.engines.get(wire[1]) or self.by_epoch.get(wire[1])
        if target is None:
            return
        if isinstance(event, Submit):
            submitted = self.submitted[event.request.request_id]
            # A new process at the address received the message of the old one: the new process must answer.
            submitted.engines = [
                (target if engine.name == target.name else engine, mode) for engine, mode in submitted.engines
            ]
        target.events.append(event)

    # ---------------------------------------------------------------- time

    def settle(self, max_rounds: int = 4000, dt_s: float = 0.05) -> None:
        """Run all engines and wires until no work is left."""
        for _ in range(max_rounds):
            for wire in list(self.wires):
                while self.wires[wire]:
                    self.deliver(wire)
            for engine in list(self.by_epoch.values()):
                engine.transport.advance()
                engine.mover.advance()
                if engine.store is not None:
                    engine.store.advance()
                if len(engine.under_way) == 1 and engine.config.overlap:
                    engine.step()  # like the engine's loop: start the next batch before the result of this one is read
                engine.finish_step()
                engine.step()
            self.now_s += dt_s
            if self.quiet():
                return
        raise AssertionError(
            f"not quiet after {max_rounds} rounds: {[e.scheduler.load() for e in self.by_epoch.values()]}"
        )

    def quiet(self) -> bool:
        return not any(self.wires.values()) and not any(
            engine.scheduler.has_work()
            or engine.events
            or engine.under_way
            or engine.transport.busy
            or engine.mover.busy
            or (engine.store is not None and engine.store.busy)
            for engine in self.by_epoch.values()
        )

    # ---------------------------------------------------------------- promises

    def check_settled(self) -> None:
        for engine in self.by_epoch.values():
            counts = engine.scheduler.load().pages
            assert counts.owned == 0, f"{engine.epoch} leaks owned pages"
            assert counts.in_flight == 0, f"{engine.epoch} leaks pages in flight"
            assert counts.evictable == counts.cached, f"{engine.epoch} leaks pins"
            host = engine.cache.host_counts()
            hung = [] if engine.store is None else engine.store.slots
            assert host is None or host.in_flight == len({slot for _, slot in hung}), f"{engine.epoch} leaks host pages"
            if (storage := engine.cache.storage) is not None:
                assert storage.num_reserved == sum(is_written for is_written, _ in hung), (
                    f"{engine.epoch} leaks its share"
                )
                assert not storage.open_prefetches, f"{engine.epoch} leaks prefetches"
            assert engine.scheduler.requests.slots.num_taken == 0, f"{engine.epoch} leaks slots"
            assert engine.scheduler.load().num_running == engine.scheduler.load().num_waiting == 0
        for request_id, submitted in self.submitted.items():
            for engine, _ in submitted.engines:
                if engine.epoch in self.by_epoch:
                    assert len(self.ended[request_id, engine.epoch]) == 1, f"{request_id} never ended at {engine.epoch}"
            self._check_stream(request_id, submitted)

    def outcome(self, request_id: str, engine: SimEngine) -> Outcome:
        (ended,) = self.ended[request_id, engine.epoch]
        return ended.outcome

    def stream(self, request_id: str) -> tuple[list[int], FinishReason | None]:
        """Merge the chunks by position, as the gateway does."""
        request = self.submitted[request_id].request
        tokens: dict[int, int] = {}
        finish = None
        for _, chunk in self.chunks[request_id]:
            for offset, token_id in enumerate(chunk.token_ids):
                position = chunk.position + offset
                assert tokens.setdefault(position, token_id) == token_id, f"{request_id}: two tokens at {position}"
            finish = finish or chunk.finish_reason
        first = len(request.output_token_ids)
        assert set(tokens) == set(range(first, first + len(tokens))), f"{request_id}: a gap in {sorted(tokens)}"
        return [*request.output_token_ids, *(tokens[position] for position in sorted(tokens))], finish

    def _check_stream(self, request_id: str, submitted: Submitted) -> None:
        engine = submitted.engines[-1][0]
        expected, reason = reference_stream(submitted.request, engine.config, engine.context_len)
        tokens, finish = self.stream(request_id)
        assert tokens == expected[: len(tokens)], f"{request_id}: {tokens} is not a prefix of {expected}"
        # each engine sends each position once
        sent = Counter((epoch, chunk.position) for epoch, chunk in self.chunks[request_id] if chunk.token_ids)
        assert all(times == 1 for times in sent.values()), f"{request_id}: sent twice: {sent}"
        finished = all(
            self.ended[request_id, other.epoch] and self.outcome(request_id, other) is Outcome.FINISHED
            for other, mode in submitted.engines
            if mode is not Mode.PREFILL
        )
        if finished:
            assert tokens == expected
            assert finish is reason
        self._check_scores(request_id, submitted.request, finished=finished)

    def _check_scores(self, request_id: str, request: EngineRequest, *, finished: bool) -> None:
        """Each engine reports each scored position once, in order, before its first token."""
        expected, first = reference_scores(request), max(1, request.sampling.prompt_logprobs_start)
        for epoch in {epoch for epoch, _ in self.chunks[request_id]}:
            chunks = [chunk for other, chunk in self.chunks[request_id] if other == epoch]
            found: list[TokenLogprobs] = []
            for chunk in chunks:
                if chunk.prompt_logprobs:
                    assert chunk.prompt_position == first + len(found), f"{request_id}: scores twice or out of order"
                    assert (chunk.token_ids, chunk.finish_reason) == ((), None)
                found += chunk.prompt_logprobs
                if chunk.position == 0 and (chunk.token_ids or chunk.finish_reason is not None):
                    assert len(found) == len(expected), f"{request_id}: a token before the scores"
            assert found == expected[: len(found)]
        num_sent = sum(len(chunk.prompt_logprobs) for _, chunk in self.chunks[request_id])
        assert num_sent >= len(expected) or not finished


def make_request(
    request_id: str,
    prompt: list[int],
    *,
    max_tokens: int = 6,
    seed: int = 1,
    min_tokens: int = 0,
    ignore_eos: bool = False,
    stop_token_ids: tuple[int, ...] = (),
    outputs: tuple[int, ...] = (),
    cache_salt: str = "",
    client: str = "",
    prompt_logprobs: int | None = None,
    prompt_logprobs_start: int = 0,
) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        output_token_ids=outputs,
        cache_salt=cache_salt,
        client=client,
        sampling=SamplingParams(
            max_tokens=max_tokens,
            seed=seed,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
            stop_token_ids=stop_token_ids,
            prompt_logprobs=prompt_logprobs,
            prompt_logprobs_start=prompt_logprobs_start,
        ),
    )


def small_config(**changes: object) -> SchedulerConfig:
    settings: dict[str, object] = {
        "max_running_requests": 4,
        "max_queued_requests": 6,
        "chunked_prefill_size": 6,
        "max_prefill_tokens": 10,
        "max_model_len": 40,
        "eos_token_ids": (EOS,),
        "queue_timeout_s": 30.0,
        "grant_timeout_s": 30.0,
        "handoff_timeout_s": 60.0,
        "ack_timeout_s": 1.0,
        "max_remembered_handoffs": 64,
    }
    return SchedulerConfig(**{**settings, **changes})
