"""Engines in memory for a real dispatcher: a test sees every message to an engine, and sends what an engine would.

    bench = RouterBench()
    worker = bench.engines.join("u")             # a worker, whose engine has sent its spec
    tokens = await bench.begin(make_request())     # a task that reads the answer
    bench.engines.emit(worker, 0, 7, 8)            # the output tokens from position 0 on
    bench.engines.end(worker)

Nothing answers by itself unless the test sets `on_submit`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import TypedDict, Unpack

from kvist import wire
from kvist.flight.stages import StageTime
from kvist.flight.timeline import Timeline
from kvist.request import EngineRequest, FinishReason, Outcome, RequestId, TokenLogprobs
from kvist.router.config import RouterConfig
from kvist.router.dispatch import Dispatcher
from kvist.router.fleet import EngineEvents
from kvist.router.registry import Registry, Worker
from kvist.router.sent_together import submits_of
from kvist.router.stream import StreamPart
from kvist.router.streams import RETRY_S
from kvist.testing.clocks import FakeClock
from kvist.testing.specs import SpecFields, make_roomy_spec


class EndFields(TypedDict, total=False):
    """The fields of `wire.Ended` that describe a failure."""

    error_code: str
    message: str
    retry_after_s: float
    stages: tuple[StageTime, ...]


class MemoryEngines:
    """The dispatcher's `Engines` without sockets. Mutable; used in the event loop of one test."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.sent: list[tuple[Worker, wire.GatewayToEngine]] = []
        self.unreachable: set[Worker] = set()  # messages to these workers cannot be sent
        self.on_submit: Callable[[Worker, wire.Submit], None] = lambda _worker, _submit: None
        self._events: EngineEvents | None = None

    @property
    def events(self) -> EngineEvents:
        """The dispatcher, once it has started."""
        assert self._events is not None, "the dispatcher has not started"
        return self._events

    def start(self, events: EngineEvents) -> None:
        self._events = events

    def send(self, worker: Worker, message: wire.GatewayToEngine) -> bool:
        if worker in self.unreachable:
            return False
        self.sent.append((worker, message))
        for submit in submits_of(message):
            self.on_submit(worker, submit)
        return True

    async def close(self) -> None: ...

    # ------------------------------------------------------------ workers

    def join(self, name: str, **spec: Unpack[SpecFields]) -> Worker:
        """Add a worker whose engine has sent its spec: that of a roomy unified engine with these changes."""
        worker = self.registry.add(name, None, 0.0)
        worker.endpoint = f"tcp://{name}"
        fields: SpecFields = {"worker_id": name, "epoch": f"epoch-{name}", "writes_alone": True}
        fields.update(spec)
        self.registry.on_welcome(worker, wire.Welcome(spec=make_roomy_spec(**fields)), 0.0)
        return worker

    def lose(self, worker: Worker) -> None:
        """Let the worker's engine die."""
        self.registry.on_lost(worker, "it died")
        self.events.on_lost(worker, "it died")

    # ------------------------------------------------------------ messages to engines

    def submits(self, worker: Worker) -> list[wire.Submit]:
        return [submit for to, message in self.sent if to is worker for submit in submits_of(message)]

    def aborts(self, worker: Worker) -> list[RequestId]:
        return [message.request_id for to, message in self.sent if to is worker and isinstance(message, wire.Abort)]

    # ------------------------------------------------------------ messages of engines

    def emit(
        self,
        worker: Worker,
        position: int,
        *token_ids: int,
        finish: FinishReason | None = None,
        stages: tuple[StageTime, ...] = (),
    ) -> None:
        """Send output tokens of the request that the worker got last."""
        request_id = self.submits(worker)[-1].request.request_id
        chunk = wire.TokenChunk(
            request_id=request_id, position=position, token_ids=token_ids, finish_reason=finish, stages=stages
        )
        self.events.on_outputs(worker, wire.StepOutputs(chunks=(chunk,)))

    def emit_scores(self, worker: Worker, position: int, *logprobs: TokenLogprobs) -> None:
        """Send logprobs of the prompt, from this position on, of the request that the worker got last."""
        request_id = self.submits(worker)[-1].request.request_id
        chunk = wire.TokenChunk(
            request_id=request_id, position=0, token_ids=(), prompt_position=position, prompt_logprobs=logprobs
        )
        self.events.on_outputs(worker, wire.StepOutputs(chunks=(chunk,)))

    def end(self, worker: Worker, outcome: Outcome = Outcome.FINISHED, **fields: Unpack[EndFields]) -> None:
        """End the request that the worker got last."""
        request_id = self.submits(worker)[-1].request.request_id
        ended = wire.Ended(request_id=request_id, outcome=outcome, **fields)
        self.events.on_outputs(worker, wire.StepOutputs(ended=(ended,)))


class RouterBench:
    """A dispatcher over engines in memory, at a time that the test moves."""

    def __init__(self, config: RouterConfig | None = None) -> None:
        self.config = config or RouterConfig()
        self.clock = FakeClock()
        self.registry = Registry(self.config)
        self.engines = MemoryEngines(self.registry)
        self.dispatcher = Dispatcher(config=self.config, registry=self.registry, engines=self.engines, clock=self.clock)
        self.engines.start(self.dispatcher)

    async def begin(self, request: EngineRequest, timeline: Timeline | None = None) -> asyncio.Task[list[int]]:
        """Start a reader of the answer; return once the request is sent, or waits."""
        task = asyncio.create_task(read_all(self.dispatcher.generate(request, timeline=timeline)))
        await settle()
        return task

    async def pass_time(self, seconds: float) -> None:
        """Move the time, in steps that no deadline of the dispatcher is shorter than."""
        end_s = self.clock.now_s() + seconds
        while self.clock.now_s() < end_s:
            self.clock.advance(min(RETRY_S, end_s - self.clock.now_s()))
            self.dispatcher.on_time()
            await settle()

    def idle(self) -> bool:
        """Return whether every request has ended at every worker."""
        in_flight = sum(worker.num_in_flight for worker in self.dispatcher.snapshot().workers)
        return not self.dispatcher.num_open and not in_flight


async def read_all(stream: AsyncGenerator[StreamPart, None]) -> list[int]:
    """Return the output tokens of one request."""
    return [token async for part in stream for token in part.chunk.token_ids]


async def settle() -> None:
    """Let all tasks run until they wait for something that only the test can do."""
    for _ in range(5):
        await asyncio.sleep(0)
