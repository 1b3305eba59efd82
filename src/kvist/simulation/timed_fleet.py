"""A gateway's decisions and unified workers in simulated time: real routing, streams and schedulers; steps take time.

    fleet = TimedFleet(num_workers=2, config=config, step_s=lambda batch: 0.02 + 20e-6 * batch.num_tokens)
    fleet.submit(make_request("r", prompt, max_tokens=20), at_s=0.5)
    fleet.run()                              # until no work is left
    fleet.served["r"].first_token_s          # and refused_s, ended_s, error, retry_after_s

Time goes from one event to the next. Messages take no time; workers report their load once a second.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass

from kvist import wire
from kvist.errors import KvistError
from kvist.kv.cache import PageCache
from kvist.plan.batch import Batch
from kvist.plan.events import Event, SampledTokens, StepFinished
from kvist.plan.plan import Plan
from kvist.request import EngineRequest, EpochId, Role, WorkerId
from kvist.router.config import LinkOptions, RouterConfig
from kvist.router.open_stream import OpenStream
from kvist.router.registry import Registry, Worker
from kvist.router.route import Router
from kvist.router.streams import Streams
from kvist.scheduler import SchedulerConfig, build_scheduler
from kvist.testing.specs import make_load, make_peer_spec, make_spec

PAGE_SIZE, NUM_PAGES, TOKEN_ID = 16, 4096, 7
REPORT_S = 1.0  # between two load reports


@dataclass(slots=True, kw_only=True)
class Served:
    """The times and the outcome of one request at its client, in simulated seconds."""

    asked_s: float
    first_token_s: float | None = None
    ended_s: float | None = None
    num_tokens: int = 0
    error: KvistError | None = None

    @property
    def refused(self) -> bool:
        return self.error is not None

    @property
    def latency_s(self) -> float:
        assert self.ended_s is not None
        return self.ended_s - self.asked_s

    @property
    def ttft_s(self) -> float:
        assert self.first_token_s is not None
        return self.first_token_s - self.asked_s


class TimedWorker:
    """A scheduler whose steps take simulated time. Mutable; the fleet's."""

    def __init__(self, fleet: TimedFleet, name: str, config: SchedulerConfig) -> None:
        self._fleet = fleet
        epoch = EpochId(f"{name}#1")
        self.cache = PageCache(num_pages=NUM_PAGES, page_size=PAGE_SIZE, namespace="t")
        self.scheduler = build_scheduler(fleet.role, config, self.cache, epoch, make_peer_spec(worker_id=name))
        self.spec = make_spec(
            worker_id=WorkerId(name),
            epoch=epoch,
            role=fleet.role,
            endpoint=name,
            vocab_size=1000,
            page_size=PAGE_SIZE,
            num_pages=NUM_PAGES,
            max_model_len=config.max_model_len,
            max_running_requests=config.max_running_requests,
            max_queued_requests=config.max_queued_requests,
            scheduling_policy=config.scheduling_policy,
        )
        self.link: Worker = fleet.registry.add(f"http://{name}", None, 0.0)
        fleet.registry.on_welcome(self.link, wire.Welcome(spec=self.spec), 0.0)
        self._batch: Batch | None = None
        self._wake_at_s: float | None = None
        self.most_live = 0  # requests at once

    def receive(self, event: Event) -> None:
        self._step([event])

    def report(self) -> None:
        status = self.scheduler.status()
        load = make_load(
            num_running=status.num_running,
            num_waiting=status.num_waiting,
            num_free_pages=status.pages.free,
            num_cached_pages=status.pages.cached,
            num_owned_pages=status.pages.owned,
            service_s=status.service_s,
            queue_wait_s=status.queue_wait_s,
        )
        self._fleet.registry.on_report(self.link, load, self._fleet.now_s)

    def _step(self, events: list[Event]) -> None:
        plan: Plan = self.scheduler.step(self._fleet.now_s, events, with_batch=self._batch is None)
        self.most_live = max(self.most_live, len(self.scheduler.requests.live))
        self._fleet.on_outputs(self, wire.StepOutputs(chunks=tuple(plan.chunks), ended=tuple(plan.ended)))
        if plan.batch is not None:
            self._batch = plan.batch
            self._fleet.at(self._fleet.now_s + self._fleet.step_s(plan.batch), self._finish_step)
        if plan.wake_at_s is not None and plan.wake_at_s != self._wake_at_s:
            self._wake_at_s = plan.wake_at_s
            self._fleet.at(plan.wake_at_s, self._wake)

    def _finish_step(self) -> None:
        batch, self._batch = self._batch, None
        assert batch is not None
        token_ids = [TOKEN_ID for item in batch.items if item.samples]
        self._step([StepFinished(step_id=batch.step_id, sampled=SampledTokens(token_ids=token_ids))])

    def _wake(self) -> None:
        if self.scheduler.has_work():
            self._step([])


class TimedFleet:
    """Mutable; owned by one test."""

    def __init__(
        self,
        *,
        num_workers: int = 1,
        config: SchedulerConfig,
        step_s: Callable[[Batch], float],
        links: LinkOptions | None = None,
    ) -> None:
        self.role = Role.UNIFIED
        self.now_s = 0.0
        self.step_s = step_s
        router_config = RouterConfig()
        self.registry = Registry(router_config)
        numbers = itertools.count()
        router = Router(router_config, self.registry)
        self.streams = Streams(links or router_config.links, router, lambda: str(next(numbers)))
        self.workers = [TimedWorker(self, f"w{number}", config) for number in range(num_workers)]
        self.served: dict[str, Served] = {}
        self._open: dict[int, tuple[OpenStream, Served]] = {}  # by id of the stream
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._num_to_come = 0  # requests

    def at(self, time_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (time_s, next(self._order), call))

    def submit(self, request: EngineRequest, *, at_s: float) -> None:
        self._num_to_come += 1
        self.at(at_s, lambda: self._begin(request))

    def run(self) -> None:
        """Run until no request is to come or open."""
        self._report()
        while self._heap and (self._num_to_come or self._open):
            self.now_s, _, call = heapq.heappop(self._heap)
            call()

    def _report(self) -> None:
        for worker in self.workers:
            worker.report()
        self.at(self.now_s + REPORT_S, self._report)

    def _begin(self, request: EngineRequest) -> None:
        self._num_to_come -= 1
        served = self.served[request.request_id] = Served(asked_s=self.now_s)
        try:
            stream = self.streams.begin(request, self.now_s)
        except KvistError as error:
            served.error, served.ended_s = error, self.now_s
            return
        self._open[id(stream)] = stream, served
        self._flush()

    def on_outputs(self, worker: TimedWorker, outputs: wire.StepOutputs) -> None:
        self.streams.on_outputs(worker.link, outputs, self.now_s)
        self._flush()

    def _flush(self) -> None:
        """Send the messages, and let the readers read."""
        self.streams.on_time(self.now_s)
        while self.streams.sends or self.streams.woken:
            sends, self.streams.sends = self.streams.sends, []
            for link, message in sends:
                worker = next(each for each in self.workers if each.link is link)
                self.at(self.now_s, lambda worker=worker, message=message: worker.receive(message))  # type: ignore[misc]
            woken, self.streams.woken = self.streams.woken, []
            for stream in woken:
                self._read(stream)

    def _read(self, stream: OpenStream) -> None:
        if id(stream) not in self._open:
            return
        _, served = self._open[id(stream)]
        while (part := stream.take()) is not None:
            if part.chunk.token_ids and served.first_token_s is None:
                served.first_token_s = self.now_s
            served.num_tokens += len(part.chunk.token_ids)
        if stream.settled:
            served.error, served.ended_s = stream.error, self.now_s
            del self._open[id(stream)]
            self.streams.on_reader_gone(stream, self.now_s)
