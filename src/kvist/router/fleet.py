"""Keeps one connection to the engine of each worker, and updates the registry. Workers join and leave at any time.

One task per worker: find the engine (discovery.py) → open a link → Hello → keep-alives until the connection breaks, the
engine hangs, or the worker is refused → close the link, notify the dispatcher → again, after growing pauses. A silent
engine may be computing a long step: the worker's /server_info says so.
A worker that leaves keeps its link until its last request has ended, for `--request-timeout-s` at most.
A new link has a new address: to an engine, a gateway that reconnects is a new one, and the engine releases the requests
of the old one.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from typing import Protocol

import httpx
import zmq

from kvist import wire
from kvist.channel import ChannelConfig, GatewayLink, Member
from kvist.clock import Clock, PauseMeter
from kvist.errors import ConfigError, Forbidden, KvistError, Unavailable
from kvist.router import discovery
from kvist.router.addresses import HostRule
from kvist.router.config import RouterConfig
from kvist.router.membership import HTTP, NamedWorker
from kvist.router.page_queue import PageQueue
from kvist.router.registry import Registry, Worker, WorkerState, is_another

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 1.5
ASK_S = 1.0  # time limit for /server_info of a worker with a silent engine
_ASK_AGAIN_S = 0.5


class EngineEvents(Protocol):
    """Receiver of engine messages. Called inside the loop; must not block."""

    def on_outputs(self, worker: Worker, outputs: wire.StepOutputs) -> None: ...

    def on_answer(self, worker: Worker, answer: wire.Answer) -> None: ...

    def on_lost(self, worker: Worker, reason: str) -> None: ...


class Fleet:
    def __init__(
        self,
        *,
        registry: Registry,
        config: RouterConfig,
        channel: ChannelConfig,
        clock: Clock,
        transport: httpx.AsyncBaseTransport | None = None,
        api_key: str | None = None,
    ) -> None:
        """`transport` fetches /server_info (None: the network). `api_key` is sent to the HTTP servers of workers that
        have no other one. Raises `ConfigError` if the channel's config has no cluster key."""
        self._registry = registry
        self._config = config
        self._channel = channel
        self._member = Member(channel.cluster_key)
        self._hosts = HostRule(config.members.allowed_worker_hosts)
        self._clock = clock
        self._transport = transport
        self._api_key = api_key
        self._gateway_id = secrets.token_hex(6)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._page_queue = PageQueue(registry.index, self._apply)
        self._links: dict[Worker, GatewayLink] = {}
        self._tasks: dict[Worker, asyncio.Task[None]] = {}
        self._cancelled: set[asyncio.Task[None]] = set()  # that have not ended yet
        self._events: EngineEvents | None = None
        self._http: httpx.AsyncClient | None = None

    def start(self, events: EngineEvents) -> None:
        """Start one task per worker. Call inside the running loop."""
        self._events = events
        self._http = httpx.AsyncClient(transport=self._transport, trust_env=False)
        for worker in self._registry.workers:
            self._supervise_in_task(worker)

    def join(self, named: NamedWorker) -> None:
        """Add a worker, or take back a worker that is leaving. Before `start`, only the registry changes."""
        worker = self._registry.add(named.url, named.role, self._clock.now_s())
        worker.api_key = named.api_key
        if worker in self._links:
            self._say_hello(worker)
        elif self._events is not None and worker not in self._tasks:
            self._supervise_in_task(worker)

    def leave(self, url: str) -> None:
        """Stop the use of a worker. Its link closes after its last request has ended."""
        worker = self._registry.find(url)
        assert worker is not None, f"no worker has the URL {url}"
        self._registry.leave(worker)
        self._page_queue.wake()  # its pages are forgotten
        worker.leave_by_s = self._clock.now_s() + self._config.links.request_timeout_s
        if not worker.in_flight:
            self._forget(worker, worker.problem)

    def send(self, worker: Worker, message: wire.GatewayToEngine) -> bool:
        """Send a message. Return False if the worker is not connected or its queue is full."""
        link = self._links.get(worker)
        return link is not None and link.send(message)

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), *self._cancelled, return_exceptions=True)
        self._tasks.clear()
        self._page_queue.close()
        if self._http is not None:
            await self._http.aclose()
        self._context.destroy(linger=0)

    def _supervise_in_task(self, worker: Worker) -> None:
        self._tasks[worker] = asyncio.create_task(self._supervise(worker), name=f"worker {worker.url}")

    def _forget(self, worker: Worker, reason: str) -> None:
        """End the task and the link of a worker, and fail the requests that it still has."""
        task = self._tasks.pop(worker, None)
        if task is not None and task is not asyncio.current_task():
            self._cancelled.add(task)
            task.add_done_callback(self._cancelled.discard)
            task.cancel()
        if self._events is not None:
            self._mark_lost(worker, reason)
        self._registry.remove(worker)

    async def _supervise(self, worker: Worker) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                timeout_s = self._config.links.discovery_timeout_s
                worker.endpoint = (await self._find(worker, timeout_s, self._stalled_s)).endpoint
                if worker.sources == (HTTP,) and not self._hosts.admits_engine(worker.endpoint, worker.url):
                    raise Forbidden(
                        f"{worker.url} names the engine {worker.endpoint}: allow it in --allowed-worker-hosts"
                    )
                reason = await self._run_link(worker)
                if worker.state is WorkerState.READY:
                    pause_s = _FIRST_PAUSE_S
            except KvistError as error:
                reason = error.message
            except Exception as error:  # our bug: this worker is not used, the gateway continues with the others
                logger.exception("cannot keep the connection to worker %s", worker.url)
                reason = f"internal error: {error}"
            if worker.state is WorkerState.LEAVING:
                self._forget(worker, reason)
                return
            self._mark_lost(worker, reason)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    async def _run_link(self, worker: Worker) -> str:
        """Exchange messages with the engine until the link is lost. Return the reason."""
        lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def on_lost(reason: str) -> None:
            if not lost.done():
                lost.set_result(reason)

        def on_rejected() -> None:
            worker.num_rejected_messages += 1

        def on_message(message: wire.EngineToGateway) -> None:
            try:
                self._receive(worker, message)
            except ConfigError as error:
                on_lost(error.message)

        link = GatewayLink(
            self._context,
            worker.endpoint,
            member=self._member,
            on_message=on_message,
            on_lost=on_lost,
            on_rejected=on_rejected,
            config=self._channel,
        )
        now_s = worker.last_message_s = next_hello_s = next_ask_s = self._clock.now_s()
        limit_s = min(self._config.links.worker_silence_s, self._config.links.worker_timeout_s)
        check_s = min(self._config.links.keepalive_s, limit_s / 10)
        pauses = PauseMeter(now_s, max_interval_s=2 * check_s)
        self._links[worker] = link
        try:
            link.open()
            while not lost.done():
                if now_s >= next_hello_s:
                    next_hello_s = now_s + self._config.links.keepalive_s
                    self._say_hello(worker)
                self._request_pages(worker, now_s)
                await asyncio.wait((lost,), timeout=check_s)
                now_s = self._clock.now_s()
                if worker.state is WorkerState.LEAVING and (not worker.in_flight or now_s >= worker.leave_by_s):
                    on_lost(worker.problem)
                worker.last_message_s += pauses.measure_s(now_s)
                silent_s = now_s - worker.last_message_s
                if silent_s > limit_s and now_s >= next_ask_s and not lost.done():
                    last_message_s = worker.last_message_s
                    reason = await self._silence_reason(worker, silent_s)
                    if reason and worker.last_message_s == last_message_s:  # otherwise a message came meanwhile
                        on_lost(reason)
                    now_s = self._clock.now_s()
                    next_ask_s = now_s + _ASK_AGAIN_S
                    pauses.measure_s(now_s)
            return lost.result()
        finally:
            del self._links[worker]
            link.close()

    def _say_hello(self, worker: Worker) -> None:
        self.send(worker, wire.Hello(gateway_id=self._gateway_id, known_role=worker.present_role))

    @property
    def _stalled_s(self) -> float:
        return self._config.links.worker_timeout_s / 2  # the reported state is about a second old

    async def _find(self, worker: Worker, timeout_s: float, stalled_s: float) -> discovery.FoundEngine:
        assert self._http is not None
        api_key = self._api_key if worker.api_key is None else worker.api_key
        return await discovery.find_engine(
            self._http, worker.url, api_key=api_key, timeout_s=timeout_s, stalled_s=stalled_s
        )

    async def _silence_reason(self, worker: Worker, silent_s: float) -> str:
        """Return why the engine is lost; "" if the engine is computing a long step, or may be."""
        reason = f"the engine at {worker.endpoint} has been silent for {silent_s:.1f} s"
        is_long = silent_s > self._config.links.worker_timeout_s
        if worker.state is WorkerState.JOINING:
            return f"{reason}: it is still loading, or not running" if is_long else ""
        stalled_s = self._stalled_s if is_long else math.inf
        try:
            found = await self._find(worker, min(ASK_S, self._config.links.discovery_timeout_s), stalled_s)
        except Unavailable as error:
            return f"{reason}: {error.message}"
        if found.endpoint != worker.endpoint:
            return f"{reason}: it is another engine now"
        if not is_long:
            return ""
        if found.health is None:
            return reason
        if found.health.turn_s < silent_s / 2:
            return f"{reason}, but is healthy: its messages do not reach this gateway"
        return ""

    def _receive(self, worker: Worker, message: wire.EngineToGateway) -> None:
        assert self._events is not None
        now_s = self._clock.now_s()
        worker.last_message_s = now_s
        if isinstance(message, wire.StepOutputs):
            if worker.spec is not None:  # otherwise no Welcome has come, and no request was sent
                self._events.on_outputs(worker, message)
        elif isinstance(message, wire.LoadReport):
            if self._registry.on_report(worker, message, now_s):
                self._say_hello(worker)  # the engine learns that later requests follow the new role
        elif isinstance(message, wire.PageEvents):
            if not self._page_queue.put(worker, message):
                worker.num_rejected_messages += 1
        elif isinstance(message, wire.Welcome):
            if worker.spec is not None and is_another(worker.spec, message.spec):
                self._mark_lost(worker, "it was restarted")  # the requests of the old process are gone
            self._registry.on_welcome(worker, message, now_s)
            self._request_pages(worker, now_s)
        else:
            self._events.on_answer(worker, message)

    def _request_pages(self, worker: Worker, now_s: float) -> None:
        """Send the worker the request for its pages that is due, if any."""
        request = None if worker.pages is None else worker.pages.request(now_s)
        if request is not None:
            self.send(worker, request)

    def _apply(self, worker: Worker, events: wire.PageEvents) -> None:
        request = self._registry.on_page_events(worker, events, self._clock.now_s())
        if request is not None:
            self.send(worker, request)

    def _mark_lost(self, worker: Worker, reason: str) -> None:
        assert self._events is not None
        self._registry.on_lost(worker, reason)
        self._page_queue.wake()  # its pages are forgotten
        self._events.on_lost(worker, reason)
