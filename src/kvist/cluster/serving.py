"""`kvist serve` and `kvist router`: one gateway process, over its own engine or over remote ones.

A worker: HTTP answers at once (`/server_info` says `engine: null`) → the engine process loads → the gateway connects to
it as to any engine → `/ready`. When the engine dies its supervisor starts another, and the gateway finds that one. When
the first start fails, or a signal comes, HTTP stops, open requests have a bounded time, then the engine stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from types import FrameType

import httpx
import msgspec
import uvicorn

from kvist.channel import (
    ChannelConfig,
    bracketed,
    host_to_name,
    is_loopback,
    with_cluster_key,
)
from kvist.checkpoint import Checkpoint, find_checkpoint
from kvist.cluster.announce import announce, curl_example, router_example, shown_key
from kvist.cluster.lifeline import signals_to, stop_at_end_of_stdin
from kvist.errors import ConfigError
from kvist.event_loop import run_in_loop
from kvist.request import WorkerId
from kvist.router import Dispatcher, GatewayTokenizer, RouterConfig, build_dispatcher
from kvist.server.app import build_app
from kvist.server.config import ServerConfig
from kvist.server.serve import http_server
from kvist.text import SamplingDefaults, TextConfig, load_sampling_defaults, load_tokenizer
from kvist.text.fingerprint import vocabulary_fingerprint
from kvist.wire import EngineHealth, EngineSpec
from kvist.worker.child import EngineSupervisor
from kvist.worker.config import UNIFIED, EngineConfig

log = logging.getLogger(__name__)


class OwnEngine(httpx.AsyncBaseTransport):
    """Answers the dispatcher's /server_info in the process itself: a worker's gateway finds its engine as a router
    does, through its restarts, without a call to its own HTTP."""

    def __init__(
        self, spec: Callable[[], EngineSpec | None], health: Callable[[], EngineHealth] = EngineHealth
    ) -> None:
        self._spec, self._health = spec, health

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        told = {"engine": self._spec(), "engine_health": self._health()}
        return httpx.Response(200, content=msgspec.json.encode(told), request=request)


def serve_worker(
    *,
    engine: EngineConfig,
    server: ServerConfig,
    text: TextConfig,
    router: RouterConfig,
    stop_with_stdin: bool = False,
) -> int:
    """Until SIGINT or SIGTERM: 0. Raises `KvistError` when the engine cannot start, or the port is taken."""
    channel = with_cluster_key(engine.channel, serves_alone=engine.role == UNIFIED)
    with _listening(server, stop_with_stdin) as (stop, listener, name):
        checkpoint = find_checkpoint(engine.model_path)
        url = f"{server.scheme}://{name}"
        engine = replace(engine, worker_id=name, channel=channel)
        supervisor = EngineSupervisor(engine)
        own = OwnEngine(lambda: supervisor.spec, lambda: supervisor.health)
        dispatcher = build_dispatcher(replace(router, worker_urls=(url,)), channel, transport=own)
        # prefill and decode are answered through a router, which has the tokenizer
        tokenizer = load_tokenizer(checkpoint, text) if engine.role == UNIFIED else None
        defaults = _sampling_defaults(checkpoint, text) if engine.role == UNIFIED else None
        app = build_app(
            dispatcher=dispatcher,
            tokenizer=tokenizer,
            config=server,
            model_name=checkpoint.name,
            model_path=str(checkpoint.path),
            sampling_defaults=defaults,
            own_engine=lambda: supervisor.spec,
            own_health=lambda: supervisor.health,
        )
        log.info("%s worker at %s is loading %s", engine.role, url, checkpoint.path)
        stop.http = http_server(app, app.traffic, server)
        if engine.role == UNIFIED:
            example = curl_example(url, api_key=shown_key(server.api_key))
        else:
            example = router_example(url, engine.role)
        ready = _say_ready(url, None if stop_with_stdin else example)
        run_in_loop(_serve(stop.http, listener, dispatcher, supervisor, ready))
    return 0


def serve_router(
    *,
    router: RouterConfig,
    model_path: str | None,
    server: ServerConfig,
    text: TextConfig,
    channel: ChannelConfig,
    stop_with_stdin: bool = False,
) -> int:
    """Until SIGINT or SIGTERM: 0. Raises `ConfigError` for a bad URL, a missing tokenizer, a port that is taken."""
    channel = with_cluster_key(channel)
    with _listening(server, stop_with_stdin) as (stop, listener, name):
        checkpoint = find_checkpoint(model_path)
        key = server.api_key[0] if server.api_key else None  # one of its workers' keys, too
        tokenizer = load_tokenizer(checkpoint, text)
        named = GatewayTokenizer(name=checkpoint.name, fingerprint=vocabulary_fingerprint(tokenizer))
        dispatcher = build_dispatcher(router, channel, api_key=key, tokenizer=named)
        app = build_app(
            dispatcher=dispatcher,
            tokenizer=tokenizer,
            config=server,
            model_name=checkpoint.name,
            model_path=str(checkpoint.path),
            sampling_defaults=_sampling_defaults(checkpoint, text),
        )
        log.info("router at %s://%s for %s", server.scheme, name, checkpoint.name)
        stop.http = http_server(app, app.traffic, server)
        url = f"{server.scheme}://{name}"
        example = curl_example(url, api_key=shown_key(server.api_key))
        ready = _say_ready(url, None if stop_with_stdin else example)
        run_in_loop(_serve(stop.http, listener, dispatcher, None, ready))
    return 0


def _sampling_defaults(checkpoint: Checkpoint, text: TextConfig) -> SamplingDefaults:
    """Of requests that do not say; the log says what they are, and what of them cannot be done."""
    defaults = load_sampling_defaults(checkpoint, text.generation_config)
    given = {name: value for name, value in asdict(defaults).items() if value is not None}
    penalty = given.pop("repetition_penalty", None)
    if given:
        said = ", ".join(f"{name} {value:g}" for name, value in given.items())
        log.info("sampling defaults of the model: %s (--generation-config)", said)
    if penalty not in (None, 1.0):
        log.warning("the model recommends repetition_penalty %g, which Kvist does not apply yet", penalty)
    return defaults


@contextlib.contextmanager
def _listening(server: ServerConfig, stop_with_stdin: bool) -> Iterator[tuple[_StopSignals, socket.socket, WorkerId]]:
    """The way to be told to stop, the socket of the HTTP server, and HOST:PORT, by which others name it."""
    stop = _StopSignals()
    with signals_to(stop, (signal.SIGINT, signal.SIGTERM)), listen(server) as listener:
        if stop_with_stdin:
            stop_at_end_of_stdin()
        yield stop, listener, WorkerId(f"{host_to_name(server.host, socket.gethostname())}:{listener.getsockname()[1]}")


def _say_ready(url: str, example: str | None) -> Callable[[], None]:
    """`example` is a command for whoever started us at a terminal; None under `kvist up`, which has its own."""

    def say() -> None:
        log.info("ready at %s", url)
        if example is not None:
            print(f"Ready at {url}    (Ctrl-C stops it). Try:\n{example}", flush=True)

    return say


async def _serve(
    http: uvicorn.Server,
    listener: socket.socket,
    dispatcher: Dispatcher,
    supervisor: EngineSupervisor | None,
    say_ready: Callable[[], None],
) -> None:
    await dispatcher.start()
    announcer = asyncio.create_task(announce(dispatcher, say_ready), name="announcer")
    serving = asyncio.create_task(http.serve(sockets=[listener]), name="http")
    tasks: list[asyncio.Task[None]] = [serving]
    if supervisor is not None:
        tasks.append(asyncio.create_task(supervisor.run(), name="engine"))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        announcer.cancel()
        http.should_exit = True
        await serving
        await dispatcher.close()
        for task in tasks[1:]:
            task.cancel()
        results = await asyncio.gather(*tasks[1:], return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result


@contextlib.contextmanager
def listen(server: ServerConfig) -> Iterator[socket.socket]:
    """The socket of the HTTP server, bound before anything slow starts. Raises `ConfigError` when it is taken."""
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart must not wait for old connections
        try:
            listener.bind((server.host, server.port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on --host {server.host} --port {server.port}: {error.strerror}"
            ) from error
        address, port = listener.getsockname()[:2]
        if not server.api_key and not is_loopback(f"tcp://{bracketed(address)}:{port}"):
            log.warning("HTTP on %s is open to whoever can reach it: --api-key closes it", server.host)
        yield listener


class _StopSignals:
    """SIGINT and SIGTERM: before there is an HTTP server they end the start; then they stop it. uvicorn takes them over
    while it runs and raises them again afterwards, which must not end the process before the engine is stopped."""

    def __init__(self) -> None:
        self.http: uvicorn.Server | None = None

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        if self.http is None:
            raise KeyboardInterrupt
        self.http.should_exit = True
