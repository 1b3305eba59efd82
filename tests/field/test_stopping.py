"""A stopping server is unready at once, finishes or cuts its open requests, and then closes the port."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from kvist.channel import ChannelConfig
from kvist.checkpoint import find_checkpoint
from kvist.cli import main
from kvist.cluster.listener import bound_socket
from kvist.cluster.serving import LocalEngineTransport, Serving
from kvist.cluster.stop_requests import handle_signals
from kvist.cluster.stopping import StopSignals
from kvist.request import EpochId, WorkerId
from kvist.router import LinkOptions, RouterConfig, WorkerUrls, build_router
from kvist.server.app import build_app
from kvist.server.config import ServerConfig
from kvist.server.lifecycle import Lifecycle
from kvist.server.serve import http_server
from kvist.testing.fake_engine import CLUSTER_KEY, FakeEngine
from kvist.testing.specs import make_roomy_spec
from kvist.testing.waits import until
from kvist.text import TextConfig, Tokenizer, load_tokenizer

ASK = {"prompt": [5, 6], "max_tokens": 1000, "stream": True}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(find_checkpoint(None), TextConfig())


class Server:
    """`kvist serve` with a fake engine instead of an engine process."""

    def __init__(self, engine: FakeEngine, url: str, stop: StopSignals, running: asyncio.Task[None]) -> None:
        self.engine = engine
        self.client = httpx.AsyncClient(base_url=url, timeout=60)
        self._stop = stop
        self._running = running

    def signal(self) -> None:
        self._stop(signal.SIGTERM, None)

    async def ended(self) -> None:
        await asyncio.wait_for(asyncio.shield(self._running), 60)


@pytest.fixture
def serve(tokenizer: Tokenizer) -> Callable[..., object]:
    @asynccontextmanager
    async def made(**settings: float) -> AsyncIterator[Server]:
        engine = FakeEngine(spec=make_roomy_spec(worker_id=WorkerId("u"), epoch=EpochId("e"), vocab_size=49152)).start()
        config = ServerConfig(port=0, **settings)  # type: ignore[arg-type]
        router = RouterConfig(urls=WorkerUrls(worker_urls=("http://own:1",)), links=LinkOptions(keepalive_s=0.05))
        dispatcher = build_router(
            router, ChannelConfig(cluster_key=CLUSTER_KEY), transport=LocalEngineTransport(lambda: engine.spec)
        ).dispatcher
        stop = StopSignals()
        lifecycle = Lifecycle(on_drain=stop.stop)
        app = build_app(
            dispatcher=dispatcher, tokenizer=tokenizer, config=config, model_name="fake", lifecycle=lifecycle
        )
        ready = asyncio.Event()
        with bound_socket("127.0.0.1", 0) as listener:
            serving = Serving(
                http=http_server(app, app.traffic, config),
                listener=listener,
                dispatcher=dispatcher,
                lifecycle=lifecycle,
                config=config,
                stop=stop,
                on_ready=ready.set,
            )
            running = asyncio.create_task(serving.run())
            await asyncio.wait_for(ready.wait(), 60)
            server = Server(engine, f"http://127.0.0.1:{listener.getsockname()[1]}", stop, running)
            try:
                async with server.client:
                    yield server
            finally:
                for _ in range(2):
                    if not running.done():
                        server.signal()
                await server.ended()
                engine.stop()

    return made


async def read(server: Server, ask: dict[str, object]) -> str:
    async with server.client.stream("POST", "/v1/completions", json=ask) as response:
        return (await response.aread()).decode()


@pytest.mark.case("drain-timeout")
async def test_a_stream_over_the_shutdown_timeout_ends_with_an_error_event_and_one_log_line(
    serve: Callable[..., object], caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(shutdown_timeout_s=0.5) as server:  # type: ignore[attr-defined]
        server.engine.stop_after = 3
        streaming = asyncio.create_task(read(server, ASK))
        whole = asyncio.create_task(server.client.post("/v1/completions", json={**ASK, "stream": False}))
        await until(lambda: server.engine.num_hanging == 2)
        server.signal()
        last_event = (await streaming).strip().split("\n\n")[-1]
        assert last_event.startswith("event: error\n")
        assert '"code":"unavailable"' in last_event
        answer = await whole
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert "retry-after" in answer.headers
        await server.ended()
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage() for record in warnings] == [
        "open requests that are now cut with an error: 2 (--shutdown-timeout-s)"
    ]


@pytest.mark.case("drain-timeout")
async def test_vllm_24885_llm_d_927_kserve_5496_a_drain_waits_for_open_streams_by_count_and_then_ends(
    serve: Callable[..., object],
) -> None:
    async with serve(shutdown_timeout_s=3600) as server:  # type: ignore[attr-defined]
        server.engine.stop_after = 3
        streaming = asyncio.create_task(read(server, ASK))
        await until(lambda: server.engine.num_hanging)
        drained = await server.client.post("/drain")
        assert (drained.status_code, drained.json()["requests_in_flight"]) == (202, 1)
        assert (await server.client.post("/v1/completions", json=ASK)).status_code == 503
        assert "this server is draining" in (await server.client.get("/ready")).text
        server.engine.finish_streams()
        assert (await streaming).endswith("data: [DONE]\n\n")
        await server.ended()


@pytest.mark.case("drain-timeout")
async def test_open_streams_finish_within_the_shutdown_timeout_and_new_requests_are_refused(
    serve: Callable[..., object],
) -> None:
    async with serve(shutdown_timeout_s=60) as server:  # type: ignore[attr-defined]
        server.engine.stop_after = 3
        streaming = asyncio.create_task(read(server, ASK))
        await until(lambda: server.engine.num_hanging)
        server.signal()
        await until(lambda: server._stop.requested.is_set())
        refused = await server.client.post("/v1/completions", json=ASK)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert "retry-after" in refused.headers
        server.engine.finish_streams()
        assert (await streaming).endswith("data: [DONE]\n\n")
        await server.ended()


async def test_a_second_signal_cuts_open_requests_at_once(serve: Callable[..., object]) -> None:
    async with serve(shutdown_timeout_s=3600, drain_grace_s=3600) as server:  # type: ignore[attr-defined]
        server.engine.stop_after = 3
        streaming = asyncio.create_task(read(server, ASK))
        await until(lambda: server.engine.num_hanging)
        server.signal()
        server.signal()
        assert "event: error" in await streaming
        await server.ended()


@pytest.mark.case("ready-before-close")
async def test_the_port_answers_unready_for_the_drain_grace_and_then_closes(serve: Callable[..., object]) -> None:
    async with serve(drain_grace_s=1.0, shutdown_timeout_s=0) as server:  # type: ignore[attr-defined]
        assert (await server.client.get("/ready")).status_code == 200
        server.signal()
        await until(lambda: server._stop.requested.is_set())
        ready = await server.client.get("/ready")
        assert (ready.status_code, "stopping" in ready.text) == (503, True)
        assert (await server.client.get("/health")).status_code == 200
        await server.ended()
        with pytest.raises(httpx.ConnectError):
            await server.client.get("/ready")


@pytest.mark.case("signal-to-all")
@pytest.mark.parametrize("parent_first", [True, False])
async def test_a_signal_beside_the_stop_of_the_parent_does_not_hurry(parent_first: bool) -> None:
    """A service manager signals every process of a group; the parent in the group also asks its children to stop."""
    stop = StopSignals()
    stop.watch()
    asks: list[Callable[[], None]] = [stop.stop, lambda: stop(signal.SIGTERM, None)]
    for ask in asks if parent_first else reversed(asks):
        ask()
        await asyncio.sleep(0)
    assert stop.requested.is_set()
    assert not stop.hurried.is_set()
    stop(signal.SIGTERM, None)
    await asyncio.sleep(0)
    assert stop.hurried.is_set()


@pytest.mark.case("signal-to-all")
async def test_the_signal_after_a_drain_does_not_hurry_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes runs the preStop command, which drains, and sends SIGTERM when the command has ended."""
    monkeypatch.setattr("kvist.cluster.stopping.SAME_REQUEST_S", -1.0)  # the signal comes late
    stop = StopSignals()
    stop.watch()
    stop.drain()
    await asyncio.sleep(0)
    assert stop.requested.is_set()
    stop(signal.SIGTERM, None)
    await asyncio.sleep(0)
    assert not stop.hurried.is_set()
    stop(signal.SIGTERM, None)
    await asyncio.sleep(0)
    assert stop.hurried.is_set()


@pytest.mark.case("signal-to-all")
async def test_a_signal_to_a_server_that_has_ended_does_not_interrupt_the_end_of_its_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The event loop waits for its threads at its end: an interrupt there ends in their tracebacks."""
    stop = StopSignals()
    with handle_signals(stop, [signal.SIGTERM]):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)  # while the server starts
        stop.watch()
        stop.unwatch()
        signal.raise_signal(signal.SIGTERM)
        stop.stop()  # of the parent, which signals this process
        await asyncio.sleep(0)
        monkeypatch.setattr("kvist.cluster.stopping.SAME_REQUEST_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)  # something keeps the process


async def test_kvist_drain_ends_a_server_after_its_open_requests(
    serve: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    async with serve() as server:  # type: ignore[attr-defined]
        server.engine.stop_after = 3
        streaming = asyncio.create_task(read(server, ASK))
        await until(lambda: server.engine.num_hanging)
        assert await asyncio.to_thread(main, ["drain", str(server.client.base_url)]) == 0
        assert "drains: 1 requests are open" in capsys.readouterr().out
        assert (await server.client.get("/ready")).status_code == 503
        server.engine.finish_streams()
        assert (await streaming).endswith("data: [DONE]\n\n")
        await server.ended()
    assert await asyncio.to_thread(main, ["drain", str(server.client.base_url)]) == 1
    assert "no Kvist server answers" in capsys.readouterr().err


@pytest.mark.case("signal-to-all")
async def test_a_draining_worker_gets_no_new_request_and_finishes_its_open_ones(serve: Callable[..., object]) -> None:
    """One of several workers of a router is asked to stop."""
    async with serve() as server:  # type: ignore[attr-defined]
        server.engine.stop_after = 3
        streaming = asyncio.create_task(read(server, ASK))
        await until(lambda: server.engine.num_hanging)
        server.engine.report(draining=True)
        ready = await server.client.get("/ready")
        async with asyncio.timeout(60):
            while ready.status_code == 200:
                ready = await server.client.get("/ready")
        assert "it is stopping" in ready.text
        num_submitted = len(server.engine.submitted)
        refused = await server.client.post("/v1/completions", json=ASK)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert len(server.engine.submitted) == num_submitted
        server.engine.finish_streams()
        assert (await streaming).endswith("data: [DONE]\n\n")
