"""`kvist serve` and `kvist router`: one gateway process, over its own engine or over remote ones.

Start of a worker: HTTP answers at once (`/server_info` shows `engine: null`) → the engine process loads → the gateway
connects to the engine, as to any other → `/ready`. If the engine dies, its supervisor starts another, and the gateway
connects to the new one. At a stop, open requests have limited time (stopping.py). After that, or if the first start
fails, HTTP and the engine end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, replace

import httpx
import msgspec

from kvist.agents_api import agent_apis
from kvist.api_docs import docs_api
from kvist.channel import (
    ChannelConfig,
    ClusterProof,
    bracketed,
    host_to_name,
    is_loopback,
    with_cluster_key,
)
from kvist.checkpoint import Checkpoint, find_checkpoint
from kvist.cluster.announce import announce, curl_example, router_example, shown_key
from kvist.cluster.config import GatewayOptions, JoinOptions
from kvist.cluster.joining import Joining, OwnAddress
from kvist.cluster.listener import bound_socket
from kvist.cluster.stop_requests import ACCEPT, RETIRE, STOP_SIGNALS, handle_signals, stop_with_parent
from kvist.cluster.stopping import Drain, StopSignals
from kvist.dashboard import dashboard_api
from kvist.engine.config import EngineConfig
from kvist.event_loop import run_in_loop
from kvist.http.front import Front
from kvist.progress import StartProgress
from kvist.prompt_work import prompt_api
from kvist.request import Role, WorkerId
from kvist.router import (
    GatewayTokenizer,
    LinkOptions,
    Members,
    RouterConfig,
    RouterParts,
    WorkerUrls,
    build_router,
)
from kvist.router.balancer import Balancer
from kvist.router.dispatch import Dispatcher
from kvist.router.stream import ClusterSnapshot
from kvist.server.app import build_app, no_engine
from kvist.server.config import ServerConfig
from kvist.server.lifecycle import Lifecycle
from kvist.server.serve import HttpServer, http_server
from kvist.service_manager import notify_ready
from kvist.supervisor.engine_process import EngineSupervisor
from kvist.text import SamplingDefaults, TextConfig, Tokenizer, load_sampling_defaults, load_tokenizer
from kvist.text.fingerprint import vocabulary_fingerprint
from kvist.tracing import tracing_api
from kvist.tracing.spans import flight_log
from kvist.wire import EngineHealth, EngineSpec

logger = logging.getLogger(__name__)


class LocalEngineTransport(httpx.AsyncBaseTransport):
    """Answers the dispatcher's /server_info requests inside the process: a worker's gateway finds its engine, also
    after restarts, in the same way as a router, without a call to its own HTTP server."""

    def __init__(
        self, spec: Callable[[], EngineSpec | None], health: Callable[[], EngineHealth] = EngineHealth
    ) -> None:
        self._spec, self._health = spec, health

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = {"engine": self._spec(), "engine_health": self._health()}
        return httpx.Response(200, content=msgspec.json.encode(body), request=request)


def serve_worker(
    *,
    engine: EngineConfig,
    gateway: GatewayOptions,
    links: LinkOptions,
    join: JoinOptions,
    stop_with_stdin: bool = False,
) -> int:
    """Serve until SIGINT or SIGTERM, then return 0. Raises `KvistError` if the engine cannot start or the port is in
    use."""
    role = engine.endpoint.role
    routers = join.router_urls()
    channel = with_cluster_key(engine.options.channel, serves_alone=role.serves_alone and not routers)
    with _listening(gateway, stop_with_stdin) as listening:
        checkpoint = find_checkpoint(engine.options.model.model_path)
        engine = replace(engine, worker_id=listening.name, options=replace(engine.options, channel=channel))
        supervisor = EngineSupervisor(engine, on_progress=StartProgress())
        transport = LocalEngineTransport(lambda: supervisor.spec, lambda: supervisor.health)
        router = RouterConfig(urls=WorkerUrls(worker_urls=(listening.url,)), links=links)
        logger.info("%s worker at %s is loading %s", role, listening.url, checkpoint.path)
        _serve(
            gateway,
            listening,
            checkpoint,
            router=build_router(router, channel, transport=transport),
            # prefill and decode workers are used through a router, which has the tokenizer
            tokenizer=load_tokenizer(checkpoint, gateway.text) if role.serves_alone else None,
            supervisor=supervisor,
            role=role,
            joining=Joining(
                routers=routers,
                own=OwnAddress(
                    scheme=gateway.tls.scheme,
                    host=gateway.server.host,
                    port=listening.listener.getsockname()[1],
                    advertised_host=engine.endpoint.engine_advertise_host,
                ),
                proof=ClusterProof(channel.cluster_key or ""),
                interval_s=join.announce_interval_s,
                api_key=_first_key(gateway.server),
            ),
        )
    return 0


def _first_key(server: ServerConfig) -> str | None:
    """Return the key that this process sends to the others of its cluster, which must accept it."""
    return server.api_key[0] if server.api_key else None


def serve_router(
    *,
    router: RouterConfig,
    model_path: str | None,
    gateway: GatewayOptions,
    channel: ChannelConfig,
    stop_with_stdin: bool = False,
    listen_fd: int | None = None,
) -> int:
    """Serve until SIGINT or SIGTERM, then return 0; or until another router has the socket of `listen_fd`. Raises
    `ConfigError` for an invalid URL, a missing tokenizer or a port in use."""
    channel = with_cluster_key(channel)
    front = None if listen_fd is None else Front(listen_fd)
    with _listening(gateway, stop_with_stdin, front) as listening:
        checkpoint = find_checkpoint(model_path)
        tokenizer = load_tokenizer(checkpoint, gateway.text)
        named = GatewayTokenizer(name=checkpoint.name, fingerprint=vocabulary_fingerprint(tokenizer))
        parts = build_router(router, channel, api_key=_first_key(gateway.server), tokenizer=named)
        logger.info("router at %s for %s", listening.url, checkpoint.name)
        if not (router.urls.worker_urls or router.urls.prefill or router.urls.decode):
            logger.info(
                "no worker is named: add workers with POST %s/workers, or start them with --router", listening.url
            )
        _serve(gateway, listening, checkpoint, router=parts, tokenizer=tokenizer)
    return 0


def _serve(
    gateway: GatewayOptions,
    listening: Listening,
    checkpoint: Checkpoint,
    *,
    router: RouterParts,
    tokenizer: Tokenizer | None,
    supervisor: EngineSupervisor | None = None,
    role: Role | None = None,
    joining: Joining | None = None,
) -> None:
    """Serve HTTP until the end of the process: over the engine of `supervisor`, which has `role`, or as a router."""
    lifecycle = Lifecycle(on_drain=listening.stop.drain)
    app = build_app(
        dispatcher=router.dispatcher,
        members=router.members if role is None else None,  # a worker's only engine is its own
        tokenizer=tokenizer,
        config=gateway.server,
        model_name=gateway.name.served_model_name or checkpoint.name,
        model_path=str(checkpoint.path),
        grammar=gateway.grammar,
        apis=(*agent_apis(gateway.agents), prompt_api, docs_api, dashboard_api, tracing_api),
        flights=flight_log(gateway.flight),
        sampling_defaults=None if tokenizer is None else _sampling_defaults(checkpoint, gateway.text),
        own_role=role,
        own_engine=no_engine if supervisor is None else lambda: supervisor.spec,
        own_health=no_engine if supervisor is None else lambda: supervisor.health,
        lifecycle=lifecycle,
        instance_id=gateway.instance.instance_id,
    )
    answers_alone = role is None or role.serves_alone
    if role is None or role.serves_alone:
        example = curl_example(listening.url, api_key=shown_key(gateway.server.api_key))
    else:
        example = router_example(listening.url, role)
    serving = Serving(
        http=http_server(app, app.traffic, gateway.server, gateway.tls, background=app.background),
        listener=listening.listener,
        front=listening.front,
        dispatcher=router.dispatcher,
        members=router.members if role is None else None,
        balancer=router.balancer,
        joining=joining,
        supervisor=supervisor,
        answers_alone=answers_alone,
        lifecycle=lifecycle,
        config=gateway.server,
        stop=listening.stop,
        on_ready=_ready_announcer(listening.url, example if listening.for_people else None),
    )
    run_in_loop(serving.run())


def _sampling_defaults(checkpoint: Checkpoint, text: TextConfig) -> SamplingDefaults:
    """Return the model's sampling defaults, and log them."""
    defaults = load_sampling_defaults(checkpoint, text.generation_config)
    given = {name: value for name, value in asdict(defaults).items() if value is not None}
    if given:
        listed = ", ".join(f"{name} {value:g}" for name, value in given.items())
        logger.info("sampling defaults of the model: %s (--generation-config)", listed)
    return defaults


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """The HTTP sockets of this process, and its stop signals."""

    stop: StopSignals
    listener: socket.socket
    front: Front | None  # a socket of the parent's
    name: WorkerId  # public name, HOST:PORT
    url: str
    for_people: bool  # started by hand: shows an example request when ready


@contextlib.contextmanager
def _listening(gateway: GatewayOptions, stop_with_stdin: bool, front: Front | None = None) -> Iterator[Listening]:
    server, stop = gateway.server, StopSignals()
    with (
        handle_signals(stop, STOP_SIGNALS),
        contextlib.suppress(KeyboardInterrupt),  # a stop signal during the start
        listen(server) as listener,
    ):
        if stop_with_stdin:
            drain_s = max(server.shutdown_timeout_s, server.drain_grace_s)
            words = None if front is None else {ACCEPT: front.accept, RETIRE: front.retire}
            stop_with_parent(stop=stop.stop, hurry=stop.hurry, drain_s=drain_s, other=words)
        host, port = (listener if front is None else front.socket).getsockname()[:2]
        name = WorkerId(f"{host_to_name(server.host if front is None else host, socket.gethostname())}:{port}")
        url = f"{gateway.tls.scheme}://{name}"
        yield Listening(stop=stop, listener=listener, front=front, name=name, url=url, for_people=not stop_with_stdin)


def _ready_announcer(url: str, example: str | None) -> Callable[[], None]:
    """Return a function that announces readiness. `example` is a command to show, or None."""

    def announce_ready() -> None:
        logger.info("ready at %s", url)
        if example is not None:
            notify_ready(url)
            print(f"Ready at {url}    (Ctrl-C stops it). Try:\n{example}", flush=True)

    return announce_ready


class LocalEngineView:
    """The readiness of a prefill or decode worker, which depends on its own engine only."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def ready(self) -> bool:
        return all(worker.alive for worker in self.snapshot().workers)

    def snapshot(self) -> ClusterSnapshot:
        return self._dispatcher.snapshot()


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """One process that answers HTTP, over its own engine or over remote ones. `run` is its whole life."""

    http: HttpServer
    listener: socket.socket
    front: Front | None = None  # of a router of `kvist up`
    dispatcher: Dispatcher
    members: Members | None = None  # of a router
    balancer: Balancer | None = None  # of a router with --auto-balance
    joining: Joining | None = None  # of a worker
    supervisor: EngineSupervisor | None = None
    lifecycle: Lifecycle
    config: ServerConfig
    stop: StopSignals
    on_ready: Callable[[], None]
    answers_alone: bool = True  # False: a prefill or decode worker

    async def run(self) -> None:
        """Serve until a stop is requested and open requests are drained. Raises the error of a failed first start."""
        self.stop.watch()
        await self.dispatcher.start()
        if self.members is not None:
            self.members.start()
        if self.balancer is not None:
            self.balancer.start()
        if self.joining is not None:
            self.joining.start()
        watched = self.dispatcher if self.answers_alone else LocalEngineView(self.dispatcher)
        announcer = asyncio.create_task(
            announce(watched, self.on_ready, reports_waiting=self.supervisor is None), name="announcer"
        )
        serving = asyncio.create_task(self.http.serve(sockets=[self.listener]), name="http")
        stop_requested = asyncio.create_task(self.stop.requested.wait(), name="stop requested")
        engine = None if self.supervisor is None else asyncio.create_task(self.supervisor.run(), name="engine")
        front = None if self.front is None else asyncio.create_task(self.front.run(self.http), name="front")
        ends = {serving, stop_requested, *([] if engine is None else [engine]), *([] if front is None else [front])}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            announcer.cancel()
            drain = Drain(
                lifecycle=self.lifecycle,
                config=self.config,
                hurried=self.stop.hurried,
                fail_all=self.dispatcher.fail_all,
                engine=self._drained(engine),
            )
            await asyncio.gather(
                self._leave_routers(), drain.run() if stop_requested.done() else drain.end_open_requests()
            )
        finally:
            self.lifecycle.stop()
            announcer.cancel()
            stop_requested.cancel()
            if front is not None:
                front.cancel()
                await asyncio.gather(front, return_exceptions=True)
            self.http.should_exit = True
            await self._leave_routers()  # if that has not happened above
            await serving
            if self.balancer is not None:
                await self.balancer.close()
            if self.members is not None:
                await self.members.close()
            await self.dispatcher.close()
            if engine is not None:
                engine.cancel()
                await asyncio.gather(engine, return_exceptions=True)
            self.stop.unwatch()
        if engine is not None and not engine.cancelled() and (error := engine.exception()) is not None:
            raise error

    async def _leave_routers(self) -> None:
        if self.joining is not None:
            await self.joining.stop()

    def _drained(self, engine: asyncio.Task[None] | None) -> Awaitable[object] | None:
        """Ask the engine to drain; return None if no engine is running, for example while it loads."""
        if self.supervisor is None or engine is None or not self.supervisor.drain():
            return None
        return asyncio.wait((engine,))


@contextlib.contextmanager
def listen(server: ServerConfig) -> Iterator[socket.socket]:
    """Yield the socket of the HTTP server, bound before the slow parts of a start. Raises `ConfigError`."""
    with bound_socket(server.host, server.port) as listener:
        address, port = listener.getsockname()[:2]
        if not server.api_key and not is_loopback(f"tcp://{bracketed(address)}:{port}"):
            logger.warning("HTTP on %s is open to every client that can reach it: set --api-key", server.host)
        yield listener
