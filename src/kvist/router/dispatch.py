"""The asyncio shell of the dispatcher: carries messages and times to the pure decisions (streams.py, calls.py), and
what they decide to the engines and the readers.

Runs as callbacks on one asyncio loop, with one timer for all deadlines, and without a task per request or per token.
Each attempt has its own request id at the engines: a later attempt, or an equal id of another gateway's client, cannot
collide with it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from typing import Protocol

import msgspec

from kvist import wire
from kvist.clock import Clock
from kvist.errors import Conflict, KvistError, Timeout, Unavailable
from kvist.flight.timeline import Timeline
from kvist.request import EngineRequest, WorkerId
from kvist.router.calls import FIRST_VERSIONS, Call, Calls
from kvist.router.config import RouterConfig
from kvist.router.fleet import EngineEvents
from kvist.router.open_stream import OpenStream
from kvist.router.placement import ANYWHERE, Placement
from kvist.router.registry import Registry, Worker, WorkerState
from kvist.router.route import Router
from kvist.router.sent_together import sent_together, submits_of
from kvist.router.stream import Cancelled, ClusterSnapshot, StreamPart
from kvist.router.streams import Streams


class Engines(Protocol):
    """Interface to fleet.py; tests pass an implementation without sockets."""

    def start(self, events: EngineEvents) -> None: ...

    def send(self, worker: Worker, message: wire.GatewayToEngine) -> bool: ...

    async def close(self) -> None: ...


class Dispatcher:
    def __init__(self, *, config: RouterConfig, registry: Registry, engines: Engines, clock: Clock) -> None:
        self._links = config.links
        self._policy = config.routing.policy
        self._registry = registry
        self._engines = engines
        self._clock = clock
        self._router = Router(config, registry)
        self._streams = Streams(config.links, self._router, new_id=lambda: secrets.token_hex(8))
        self._calls = Calls()
        self._readers: dict[OpenStream | Call, asyncio.Future[None]] = {}  # that wait
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0  # the time for which it is set

    async def start(self) -> None:
        """Start to connect to the workers. Returns at once; see `ready`."""
        self._engines.start(self)

    async def close(self) -> None:
        self.fail_all(Unavailable("the gateway is shutting down"))
        if self._timer is not None:
            self._timer.cancel()
        await self._engines.close()

    def fail_all(self, error: KvistError) -> None:
        """Fail every open request with this error."""
        self._streams.end_all(error, self._clock.now_s())
        self._carry_out()

    @property
    def num_open(self) -> int:
        """Number of requests that some worker has not ended yet, or that wait for a worker."""
        return self._streams.num_open

    def ready(self) -> bool:
        """Return whether the ready workers can serve a request with an answer of any length."""
        return self._router.can_serve()

    def model(self) -> wire.EngineSpec | None:
        """Return the spec shared by all READY workers, with the limits of the best route; None if no worker is
        ready."""
        return self._registry.reference()

    def snapshot(self) -> ClusterSnapshot:
        counts, index = self._streams.counts, self._registry.index
        return ClusterSnapshot(
            workers=self._registry.snapshot(),
            cancelled=Cancelled(num_held=counts.num_cancelled_held, release_s=counts.release_s),
            failovers=counts.failovers,
            num_routes=counts.num_routes.copy(),
            role_switches=self._registry.role_switches.copy(),
            num_index_entries=index.num_entries,
            num_index_bytes=index.num_bytes,
            handoffs=dict(counts.num_handoffs),
            policy=self._policy,
            decisions=tuple(self._streams.decisions),
        )

    async def generate(
        self, request: EngineRequest, placement: Placement = ANYWHERE, timeline: Timeline | None = None
    ) -> AsyncGenerator[StreamPart, None]:
        """Yield the output of the request, and note its stages in `timeline`. Closing or cancelling the iterator
        aborts the request at every engine.

        Raises, before the first part: `PromptTooLong`, `Unavailable`, `Overloaded`; at any time: the error that an
        engine reported and that no other worker can avoid, `WorkerLost`, `HandoffFailed`, `PoisonousRequest`,
        `Timeout`."""
        stream = self._streams.begin(request, self._clock.now_s(), placement, timeline)
        try:
            if placement.group:
                asyncio.get_running_loop().call_soon(self._carry_out)  # the others of the group may begin first
            else:
                self._carry_out()
            while True:
                part = stream.take()
                if part is not None:
                    yield part
                elif stream.error is not None:
                    raise stream.error
                elif stream.merger.complete:
                    return
                else:
                    await self._waiter(stream)
        finally:
            self._readers.pop(stream, None)
            self._streams.on_reader_gone(stream, self._clock.now_s())
            self._carry_out()

    async def ask_workers(self, command: wire.Command, answer_type: type[wire.AnswerT]) -> dict[WorkerId, wire.AnswerT]:
        """Send the command, with a new `call_id`, to every worker that is new enough to know it. Return the answers of
        the workers that are not lost.

        Raises `Unavailable` if no worker is ready, `Timeout` naming the workers that did not answer."""
        workers = {w for w in self._registry.workers if w.state is WorkerState.READY}
        if not workers:
            raise Unavailable("no worker is ready")
        needed = FIRST_VERSIONS.get(type(command), 0)
        known = {w for w in workers if w.spec is not None and w.spec.protocol_version >= needed}
        return await self._ask(known, command, answer_type) if known else {}

    async def ask_worker(
        self, name: str | None, command: wire.Command, answer_type: type[wire.AnswerT]
    ) -> wire.AnswerT:
        """Send the command, with a new `call_id`, to the worker with this URL or id (None: the only one). Return its
        answer.

        Raises `RequestError` without a name where there are several workers, `UnknownWorker`, `Conflict` if the worker
        is too old, `Unavailable` if it is not ready, `Timeout`."""
        worker = self._registry.named(name)
        if worker.state is not WorkerState.READY:
            raise Unavailable(f"worker {worker.worker_id} is {worker.state.value} ({worker.problem}): retry later")
        assert worker.spec is not None
        known, needed = worker.spec.protocol_version, FIRST_VERSIONS.get(type(command), 0)
        if known < needed:
            raise Conflict(
                f"worker {worker.worker_id} has protocol version {known}, and this needs {needed}: upgrade the worker"
            )
        answers = await self._ask({worker}, command, answer_type)
        if worker.worker_id not in answers:
            raise Unavailable(f"worker {worker.worker_id} was lost before it answered: retry later")
        return answers[worker.worker_id]

    async def _ask(
        self, workers: set[Worker], command: wire.Command, answer_type: type[wire.AnswerT]
    ) -> dict[WorkerId, wire.AnswerT]:
        is_storage = isinstance(command, wire.StorageCommand)
        timeout_s = self._links.storage_timeout_s if is_storage else self._links.flush_timeout_s
        command = msgspec.structs.replace(command, call_id=secrets.token_hex(8))
        call = self._calls.begin(command.call_id, workers)
        try:
            for worker in workers:
                if not self._engines.send(worker, command):
                    self._calls.on_lost(worker)
            if not call.is_complete:
                await asyncio.wait_for(self._waiter(call), timeout_s)
        except TimeoutError as error:
            silent = ", ".join(sorted(w.worker_id for w in call.waiting))
            raise Timeout(f"{silent} did not answer in time ({len(call.answers)} workers did)") from error
        finally:
            self._calls.forget(command.call_id)
            self._readers.pop(call, None)
        return {worker_id: answer for worker_id, answer in call.answers.items() if isinstance(answer, answer_type)}

    # ---------------------------------------------------------------- messages of engines (fleet.EngineEvents)

    def on_outputs(self, worker: Worker, outputs: wire.StepOutputs) -> None:
        now_s = self._clock.now_s()
        self._streams.on_outputs(worker, outputs, now_s)
        self._carry_out(now_s)

    def on_answer(self, worker: Worker, answer: wire.Answer) -> None:
        for call in self._calls.on_answer(worker, answer):
            self._wake(call)

    def on_lost(self, worker: Worker, reason: str) -> None:
        for call in self._calls.on_lost(worker):
            self._wake(call)
        self._streams.on_lost(worker, reason, self._clock.now_s())
        self._carry_out()

    def on_time(self) -> None:
        """Handle the deadlines that have come. The timer calls this method, too."""
        self._carry_out()

    # ---------------------------------------------------------------- what the decisions say

    def _carry_out(self, now_s: float | None = None) -> None:
        streams, now_s = self._streams, self._clock.now_s() if now_s is None else now_s
        next_s = streams.next_deadline_s
        if next_s is not None and next_s <= now_s:
            streams.on_time(now_s)
        while streams.sends:
            sends, streams.sends = streams.sends, []
            for worker, message in sent_together(sends):
                if not self._engines.send(worker, message):
                    for submit in submits_of(message):
                        streams.on_unsent(worker, submit, now_s)
        if streams.woken:
            woken, streams.woken = streams.woken, []
            for stream in woken:
                self._wake(stream)
        next_s = streams.next_deadline_s
        if next_s is not None and (self._timer is None or next_s < self._timer_s):
            if self._timer is not None:
                self._timer.cancel()
            delay_s, self._timer_s = max(0.0, next_s - now_s), next_s
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.on_time()

    def _waiter(self, awaited: OpenStream | Call) -> asyncio.Future[None]:
        """Return a future for the one reader of `awaited`, which ends when `awaited` is woken."""
        waiter = self._readers[awaited] = asyncio.get_running_loop().create_future()
        return waiter

    def _wake(self, awaited: OpenStream | Call) -> None:
        waiter = self._readers.pop(awaited, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
