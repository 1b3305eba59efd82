"""The HTTP server of a node, and the node's life from its start to a stop.

    signal ─► /ready answers 503 ─► the node ends in its own order ─► the port closes

A second signal, or the parent's request to hurry, sets `Stop.hurried`: the node then leaves out what takes long. HTTP
answers during the whole life, also while the node starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from kvist import __version__
from kvist.clock import MonotonicClock
from kvist.cluster.listener import bound_socket
from kvist.cluster.stop_requests import STOP_SIGNALS, handle_signals, stop_with_parent
from kvist.cluster.stopping import StopSignals
from kvist.errors import Unavailable
from kvist.event_loop import run_in_loop
from kvist.http.asgi import send_bytes, send_json
from kvist.http.traffic import Traffic
from kvist.metrics import CONTENT_TYPE, Histogram
from kvist.server.config import ServerConfig
from kvist.server.lifecycle import Lifecycle
from kvist.server.middleware import Endpoint, GuardMiddleware, RawEndpoint, TrafficMiddleware
from kvist.server.serve import http_server

logger = logging.getLogger(__name__)

TEXT = [(b"content-type", CONTENT_TYPE.encode())]


@dataclass(slots=True, kw_only=True, eq=False)
class NodeMetrics(Collector):
    """Metrics of a node: those of its HTTP traffic, which are few, are not shown."""

    of_node: Callable[[], Iterable[Metric]]
    num_http_requests: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    num_refused_connections: int = 0
    loop_lag_s: Histogram = field(default_factory=Histogram)

    def exposition(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        ProcessCollector(registry=registry)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        yield from self.of_node()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """The requests to stop a node. Set inside the event loop."""

    requested: asyncio.Event
    hurried: asyncio.Event


class Node(Protocol):
    async def run(self, stop: Stop) -> None:
        """Work until `stop.requested` is set, then end in order. Raises `KvistError` if the node cannot work."""

    def problem(self) -> str:
        """Return why the node is not ready; empty if it is."""

    def metrics(self) -> Iterable[Metric]: ...

    async def more_metrics(self) -> bytes:
        """Do what `metrics` would wait for. Return metrics of another program in Prometheus' text format."""

    def endpoints(self) -> Sequence[tuple[str, Endpoint, list[str]]]:
        """Return (path, endpoint, methods) of the node's own endpoints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeProcess:
    """How a node runs as a process."""

    server: ServerConfig
    instance_id: str | None
    stop_with_stdin: bool
    stop_s: float  # time that an orderly end may take


class _Endpoints:
    def __init__(self, node: Node, instance_id: str | None, lifecycle: Lifecycle) -> None:
        self._node, self._lifecycle = node, lifecycle
        self._instance = {} if instance_id is None else {"instance_id": instance_id}
        self.metrics_of_node = NodeMetrics(of_node=node.metrics)

    async def health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Report that this process answers."""
        del scope, receive
        await send_json(send, {"status": "ok", **self._instance})

    async def ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        self._lifecycle.check()
        if problem := self._node.problem():
            raise Unavailable(f"not ready: {problem}")
        await send_json(send, {"status": "ready", **self._instance})

    async def server_info(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Return Kvist's version, and why the node is not ready ("" if it is)."""
        del scope, receive
        await send_json(send, {"version": __version__, "problem": self._node.problem(), **self._instance})

    async def metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        more = await self._node.more_metrics()
        await send_bytes(send, self.metrics_of_node.exposition() + more, headers=TEXT)


def run_node(process: NodeProcess, node_at: Callable[[int], Node]) -> int:
    """Run the node until SIGINT or SIGTERM, then return 0. `node_at` makes the node for the port of its HTTP server.
    Raises `ConfigError` for a port in use, and the error of the node."""
    server, stop = process.server, StopSignals()
    with (
        handle_signals(stop, STOP_SIGNALS),
        contextlib.suppress(KeyboardInterrupt),  # a stop signal during the start
        bound_socket(server.host, server.port) as listener,
    ):
        if process.stop_with_stdin:
            stop_with_parent(stop=stop.stop, hurry=stop.hurry, drain_s=process.stop_s)
        lifecycle = Lifecycle()
        node = node_at(listener.getsockname()[1])
        app = _app(node, process, lifecycle)
        http = http_server(app, app.traffic, server)

        async def main() -> None:
            stop.watch()
            serving = asyncio.create_task(http.serve(sockets=[listener]), name="http")
            working = asyncio.create_task(node.run(Stop(requested=stop.requested, hurried=stop.hurried)), name="node")
            marking = asyncio.create_task(_mark_stopping(stop.requested, lifecycle), name="stop requested")
            try:
                await asyncio.wait((serving, working), return_when=asyncio.FIRST_COMPLETED)
                stop.requested.set()  # also if HTTP has ended by itself
                await working
            finally:
                marking.cancel()
                http.should_exit = True
                await serving
                stop.unwatch()

        run_in_loop(main())
    return 0


async def _mark_stopping(requested: asyncio.Event, lifecycle: Lifecycle) -> None:
    await requested.wait()
    logger.info("stopping")
    lifecycle.stop()


def _app(node: Node, process: NodeProcess, lifecycle: Lifecycle) -> TrafficMiddleware:
    own = _Endpoints(node, process.instance_id, lifecycle)
    table: list[tuple[str, Endpoint, list[str]]] = [
        ("/health", own.health, ["GET"]),
        ("/ready", own.ready, ["GET"]),
        ("/server_info", own.server_info, ["GET"]),
        ("/metrics", own.metrics, ["GET"]),
        *node.endpoints(),
    ]
    routes = [Route(path, RawEndpoint(endpoint), methods=methods) for path, endpoint, methods in table]
    guarded = GuardMiddleware(Router(routes), process.server, lifecycle)
    paths = [route.path for route in routes]
    traffic = Traffic(
        own.metrics_of_node,
        MonotonicClock(),
        paths=paths,
        polled=[path for path, _, methods in node.endpoints() if methods == ["GET"]],
        access_log=process.server.access_log,
    )
    return TrafficMiddleware(guarded, traffic)
