"""Keeps one connection to each worker's engine, and the registry true.

For each worker one task: find the engine (discovery.py) → open a link → Hello → keep-alives until the connection
breaks, the worker falls silent, or it is refused → close the link, tell the dispatcher → again, with growing pauses.
A new link has a new identity, so an engine sees a reconnecting gateway as a new one and lets the old one's requests go.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Protocol

import httpx
import zmq

from kvist import wire
from kvist.channel import ChannelConfig, GatewayLink
from kvist.clock import Clock
from kvist.errors import ConfigError, KvistError
from kvist.router import discovery
from kvist.router.config import RouterConfig
from kvist.router.registry import Registry, Worker, WorkerState

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 1.5


class EngineEvents(Protocol):
    """Who hears what engines say; called inside the loop, must not block."""

    def on_outputs(self, worker: Worker, outputs: wire.StepOutputs) -> None: ...

    def on_answer(self, worker: Worker, answer: wire.Flushed | wire.StorageAnswer) -> None: ...

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
        """`transport`: how /server_info is fetched; None is the network. `api_key`: the workers' HTTP asks for it."""
        self._registry = registry
        self._config = config
        self._channel = channel
        self._clock = clock
        self._transport = transport
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._gateway_id = secrets.token_hex(6)
        self._num_links = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._links: dict[Worker, GatewayLink] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._events: EngineEvents | None = None
        self._http: httpx.AsyncClient | None = None

    def start(self, events: EngineEvents) -> None:
        """Inside the running loop."""
        self._events = events
        self._http = httpx.AsyncClient(transport=self._transport, headers=self._headers, trust_env=False)
        for worker in self._registry.workers:
            self._tasks.append(asyncio.create_task(self._keep(worker), name=f"worker {worker.url}"))

    def send(self, worker: Worker, message: wire.GatewayToEngine) -> bool:
        """False: the worker is not connected, or its queue is full."""
        link = self._links.get(worker)
        return link is not None and link.send(message)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if self._http is not None:
            await self._http.aclose()
        self._context.destroy(linger=0)

    async def _keep(self, worker: Worker) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                assert self._http is not None
                timeout_s = self._config.discovery_timeout_s
                worker.endpoint = await discovery.find_engine(self._http, worker.url, timeout_s=timeout_s)
                reason = await self._hold(worker)
                if worker.state is WorkerState.READY:
                    pause_s = _FIRST_PAUSE_S
            except KvistError as error:
                reason = error.message
            except Exception as error:  # our bug: the worker is out until it is mended, the gateway serves on
                logger.exception("cannot keep worker %s", worker.url)
                reason = f"internal error: {error}"
            self._lose(worker, reason)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    async def _hold(self, worker: Worker) -> str:
        """Talk to the engine until it cannot be talked to; returns why."""
        lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def on_lost(reason: str) -> None:
            if not lost.done():
                lost.set_result(reason)

        def on_message(message: wire.EngineToGateway) -> None:
            try:
                self._receive(worker, message)
            except ConfigError as error:
                on_lost(error.message)

        self._num_links += 1
        identity = f"{self._gateway_id}/{self._num_links}".encode()
        link = GatewayLink(
            self._context,
            worker.endpoint,
            identity=identity,
            on_message=on_message,
            on_lost=on_lost,
            config=self._channel,
        )
        worker.last_heard_s = self._clock.now_s()
        self._links[worker] = link
        try:
            link.open()
            while not lost.done():
                link.send(wire.Hello(gateway_id=self._gateway_id, resync=worker.needs_snapshot))
                await asyncio.wait((lost,), timeout=self._config.keepalive_s)
                silent_s = self._clock.now_s() - worker.last_heard_s
                if silent_s > self._config.worker_timeout_s:
                    on_lost(_silence(worker, silent_s))
            return lost.result()
        finally:
            del self._links[worker]
            link.close()

    def _receive(self, worker: Worker, message: wire.EngineToGateway) -> None:
        assert self._events is not None
        now_s = self._clock.now_s()
        worker.last_heard_s = now_s
        if isinstance(message, wire.StepOutputs):
            self._events.on_outputs(worker, message)
        elif isinstance(message, wire.LoadReport):
            if self._registry.reported(worker, message, now_s):
                logger.info("missed a load report of worker %s: asking for a snapshot", worker.worker_id)
                self.send(worker, wire.Hello(gateway_id=self._gateway_id, resync=True))
        elif isinstance(message, wire.Welcome):
            if worker.spec is not None and worker.spec.epoch != message.spec.epoch:
                self._lose(worker, "it was restarted")  # whatever its former life was asked for is gone
            self._registry.welcomed(worker, message, now_s)
        else:
            self._events.on_answer(worker, message)

    def _lose(self, worker: Worker, reason: str) -> None:
        assert self._events is not None
        self._registry.lost(worker, reason)
        self._events.on_lost(worker, reason)


def _silence(worker: Worker, silent_s: float) -> str:
    if worker.state is WorkerState.READY:
        return f"the engine at {worker.endpoint} has been silent for {silent_s:.1f} s"
    return f"the engine at {worker.endpoint} has not answered for {silent_s:.1f} s: it is still loading, or not there"
