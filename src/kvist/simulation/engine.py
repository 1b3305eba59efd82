"""A simulated engine: a real scheduler and page cache over a device, a transport and tiers that exist only in memory.

    events ─► step ─► plan: chunks and messages to the cluster, transfers, tier jobs ─► under_way ─► finish_step ─┐
      ▲                                                                                                           │
      └────────────── StepFinished | StepFailed, reports of the transport, the mover and the store ◄──────────────┘

Each part checks what it is asked (device.py: every position that is read; transport.py: every copy), and each
step checks the counts of the scheduler and of the cache. cluster.py connects engines.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypedDict, Unpack

from kvist.errors import InvalidConstraint
from kvist.kv.cache import PageCache
from kvist.kv.tiers.host import HostTier
from kvist.kv.tiers.prefetch import PrefetchConfig
from kvist.kv.tiers.storage import FETCH_PAGES, StorageTier
from kvist.plan.batch import Batch
from kvist.plan.events import Event, StepFailed, StepFinished
from kvist.plan.grammars import CompileGrammar, GrammarCompiled
from kvist.plan.plan import Plan
from kvist.plan.tiers import BackUpPages, ForgetPages, LoadPages, StorageAttached
from kvist.plan.transfers import PeerDied, ToSource
from kvist.request import EpochId, HandoffId, Mode, RequestId, Role
from kvist.scheduler import SchedulerConfig, build_scheduler
from kvist.scheduler.active import RequestState
from kvist.simulation.device import EOS, SimDevice
from kvist.simulation.mover import SimMover
from kvist.simulation.order import OrderCheck
from kvist.simulation.slots import SlotCheck
from kvist.simulation.store import SimStore
from kvist.simulation.transport import SimTransport
from kvist.testing.page_events import ReplayedPages, listed_pages
from kvist.testing.specs import make_peer_spec, make_pool
from kvist.wire import Grant, PeerSpec

if TYPE_CHECKING:
    from kvist.simulation.cluster import SimCluster

PAGE_BYTES = 64
LAYOUT = "sim"
WITH_PAGES = frozenset(
    {
        RequestState.GRANTED,
        RequestState.LOADING,
        RequestState.RUNNING,
        RequestState.AWAITING_TRANSFER,
        RequestState.ENDED,  # only while a step, a load or a peer still uses the pages
    }
)


class SchedulerFields(TypedDict, total=False):
    """The fields of `SchedulerConfig`."""

    max_running_requests: int
    max_queued_requests: int
    scheduling_policy: str
    max_queue_wait_s: float | None
    chunked_prefill_size: int
    max_prefill_tokens: int
    overlap: bool
    queue_timeout_s: float
    grant_timeout_s: float
    handoff_timeout_s: float
    ack_timeout_s: float
    store_handoff_timeout_s: float
    max_lease_fraction: float
    max_lease_fraction_per_key: float
    max_remembered_handoffs: int
    grammar_compile_timeout_s: float
    max_model_len: int
    eos_token_ids: tuple[int, ...]


_SMALL = SchedulerConfig(
    max_running_requests=4,
    max_queued_requests=6,
    chunked_prefill_size=6,
    max_prefill_tokens=10,
    max_model_len=40,
    eos_token_ids=(EOS,),
    queue_timeout_s=30.0,
    grant_timeout_s=30.0,
    handoff_timeout_s=60.0,
    ack_timeout_s=1.0,
    max_remembered_handoffs=64,
)


def small_config(**changes: Unpack[SchedulerFields]) -> SchedulerConfig:
    """Return limits that a few short requests reach, with these changes."""
    return replace(_SMALL, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimShape:
    """The sizes and settings of an engine."""

    role: Role = Role.UNIFIED
    config: SchedulerConfig = field(default_factory=small_config)
    num_pages: int = 12
    page_size: int = 4
    num_host_pages: int = 0  # a host tier, if more than 0
    write_policy: str = "write_through"
    prefetch: PrefetchConfig | None = None  # a storage tier over the host tier
    fetch_pages: int = FETCH_PAGES  # most pages in one fetch from the store
    row_tokens: int = 1  # most tokens in a row that the device samples


class ShapeFields(TypedDict, total=False):
    """The fields of `SimShape`."""

    role: Role
    config: SchedulerConfig
    num_pages: int
    page_size: int
    num_host_pages: int
    write_policy: str
    prefetch: PrefetchConfig | None
    fetch_pages: int
    row_tokens: int


class SimEngine:
    """One life of an engine process: `step` runs the scheduler and starts what its plan says, `finish_step` computes.

    Mutable; stepped by the test or by `SimCluster.settle`."""

    def __init__(self, world: SimCluster, name: str, life: int, shape: SimShape) -> None:
        self.world = world
        self.name = name
        self.shape = shape
        self.epoch = EpochId(f"{name}#{life}")
        self.host = HostTier(shape.num_host_pages) if shape.num_host_pages else None
        storage = None
        if self.host is not None and shape.prefetch is not None:
            storage = StorageTier(self.host, shape.prefetch, page_size=shape.page_size, fetch_pages=shape.fetch_pages)
        self.cache = PageCache(
            num_pages=shape.num_pages,
            page_size=shape.page_size,
            namespace="sim",
            host=self.host,
            write_policy=shape.write_policy,
            storage=storage,
        )
        self.device = SimDevice(self.cache, shape.row_tokens)
        self.transport = SimTransport(self, world.by_epoch.get)
        self.mover = SimMover(self.cache, self.device, shape.num_host_pages)
        self.store = None if storage is None else SimStore(self.mover.host, world.stored)
        self.as_peer = self._describe()
        self.scheduler = build_scheduler(shape.role, shape.config, self.cache, self.epoch, self.as_peer)
        self.events: list[Event] = [] if storage is None else [StorageAttached(attached=True)]  # for the next step
        self.slot_check = SlotCheck(shape.config.max_running_requests)
        self.order_check = OrderCheck(self.scheduler.requests)
        self.under_way: deque[Batch] = deque()  # launched, not finished
        self.plan = Plan()  # the newest
        self.pages = ReplayedPages()
        self.in_flight_pages: dict[int, HandoffId] = {}  # page id → handoff, from the grants that it sent
        self.fail_next_step = False
        self.holds_grammars = False  # as if its compiler hung
        self._compiling: list[CompileGrammar] = []

    def _describe(self) -> PeerSpec:
        pool = make_pool(
            transport="sim",
            location=self.epoch,
            num_pages=self.shape.num_pages,
            page_bytes=PAGE_BYTES,
            layout=LAYOUT,
        )
        return make_peer_spec(pool, worker_id=self.name, page_size=self.shape.page_size)

    @property
    def role(self) -> Role:
        return self.shape.role

    @property
    def config(self) -> SchedulerConfig:
        return self.shape.config

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
        events = [*self.events, *self.transport.poll(), *self.mover.poll(), *stored, *dead, *self._compiled()]
        self.events = []
        self.order_check.before()
        plan = self.plan = self.scheduler.step(self.world.now_s, events)
        self.order_check.after()
        self._check(plan)
        self.world.receive(self, plan)
        self._compiling += plan.grammar_jobs
        for transfer in plan.transfers:
            self.transport.take(transfer)
        for job in plan.tier_jobs:
            if isinstance(job, LoadPages | BackUpPages | ForgetPages):
                self.mover.take(job)
            else:
                assert self.store is not None
                self.store.take(job)
        self._check_slots()
        if plan.batch is not None:
            self.under_way.append(plan.batch)
            assert len(self.under_way) <= (2 if self.config.overlap else 1)
        return plan

    def _compiled(self) -> Iterator[GrammarCompiled]:
        """Report the compilations; a constraint with the text "faulty" fails."""
        while self._compiling and not self.holds_grammars:
            job = self._compiling.pop()
            code = InvalidConstraint.code if job.constraint.text == "faulty" else None
            yield GrammarCompiled(request_id=job.request_id, error_code=code)

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
        load = self.scheduler.status()
        assert load.num_waiting == sum(not request.has_pages for request in live)
        assert load.num_running == sum(request.has_pages for request in live)
        running = list(requests.running)
        assert running == sorted(running, key=lambda request: request.urgency)
        assert requests.running.num_prefills == sum(request.mode is Mode.PREFILL for request in running)
        assert requests.slots.num_taken == len(running) == len({request.slot for request in running})
        assert requests.num_counted_as_running <= self.config.max_running_requests
        waiting = requests.waiting
        to_compute = sum(len(each.token_ids) for each in waiting if not each.awaits_handoff)
        assert waiting.num_tokens == to_compute, "num_tokens counts the waiting tokens that this engine computes"
        for request in requests.fetching:
            assert self.world.now_s < request.arrived_s + self.config.queue_timeout_s / 2, (
                "a request waits for the store too long"
            )
        if not self.under_way:  # else the end of a leader may not have been seen yet
            loads = requests.fetching.num_early_jobs + sum(
                request.loading for request in (*requests.loading, *requests.ended)
            )  # a load outlives its request
            assert not len(requests.awaiting_pages) or len(requests.running) or loads, (
                "requests wait for pages that no request computes or loads"
            )
        for request in live:
            assert request.prefetch is None or not request.has_pages, "a prefetch is open after admission"

    def _check(self, plan: Plan) -> None:
        self._check_requests()
        counts = self.scheduler.status().pages
        assert counts.free + counts.cached + counts.owned + counts.in_flight == counts.total
        self.pages.apply(plan.changed_pages)
        host = self.cache.host_counts()
        if host is None:
            assert len(self.pages.pages) == counts.cached
        else:
            assert host.free + host.cached + host.in_flight == host.total
            assert 0 <= host.in_flight <= host.total
        assert self.pages.pages == listed_pages(self.cache.list_pages)
        totals = self.scheduler.status().totals
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
