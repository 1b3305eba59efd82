"""Engines without progress are lost, with the reason; engines in a long step are not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress

import httpx
import msgspec
import pytest
import zmq

from kvist import wire
from kvist.channel import ChannelConfig, EngineChannel, GatewayLink
from kvist.channel.security import Member
from kvist.errors import WorkerLost
from kvist.request import EpochId, WorkerId
from kvist.router import Dispatcher, LinkOptions, RouterConfig, WorkerUrls, build_router
from kvist.testing.fake_engine import CLUSTER_KEY, FakeEngine
from kvist.testing.specs import make_request, make_roomy_spec
from kvist.testing.waits import until

TIMEOUT_S = 0.5


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    made = FakeEngine(spec=make_roomy_spec(worker_id=WorkerId("u"), epoch=EpochId("e"))).start()
    yield made
    made.stop()


@pytest.fixture
async def ask_worker(engine: FakeEngine) -> AsyncIterator[tuple[Dispatcher, Callable[..., None]]]:
    """A gateway with a `--worker-timeout-s` of half a second, and a function that sets its worker's /server_info."""
    server_info: dict[str, object] = {"engine": engine.spec, "engine_health": wire.EngineHealth()}

    def set_health(**health: float) -> None:
        server_info["engine_health"] = wire.EngineHealth(**health)  # type: ignore[arg-type]

    dispatcher = build_router(
        RouterConfig(
            urls=WorkerUrls(worker_urls=("http://u:1",)),
            links=LinkOptions(keepalive_s=0.05, worker_timeout_s=TIMEOUT_S, migration_timeout_s=0.1),
        ),
        ChannelConfig(cluster_key=CLUSTER_KEY),
        transport=httpx.MockTransport(lambda _request: httpx.Response(200, content=msgspec.json.encode(server_info))),
    ).dispatcher
    await dispatcher.start()
    await until(dispatcher.ready)
    yield dispatcher, set_health
    await dispatcher.close()


async def stream(dispatcher: Dispatcher) -> None:
    request = make_request("r", (1, 2), max_tokens=1_000)
    async for _part in dispatcher.generate(request):
        pass


@pytest.mark.case("stopped-engine")
async def test_the_streams_of_an_engine_without_progress_end_with_the_reason(
    engine: FakeEngine, ask_worker: tuple[Dispatcher, Callable[..., None]]
) -> None:
    dispatcher, set_health = ask_worker
    engine.stop_after = 3
    streaming = asyncio.create_task(stream(dispatcher))
    await until(lambda: engine.submitted)
    engine.silent = True
    set_health(turn_s=8.0, stalled_s=8.0)
    with pytest.raises(WorkerLost, match="no progress for 8 s"):
        await streaming
    assert not dispatcher.ready()
    await until(lambda: "no progress for 8 s" in dispatcher.snapshot().workers[0].problem)


@pytest.mark.case("stopped-engine")
async def test_an_engine_in_the_middle_of_a_long_step_keeps_its_streams(
    engine: FakeEngine, ask_worker: tuple[Dispatcher, Callable[..., None]]
) -> None:
    dispatcher, set_health = ask_worker
    engine.stop_after = 3
    streaming = asyncio.create_task(stream(dispatcher))
    await until(lambda: engine.submitted)
    set_health(turn_s=60.0, stalled_s=0.0)
    engine.silent = True
    await asyncio.sleep(4 * TIMEOUT_S)
    assert dispatcher.ready()
    assert not streaming.done()
    streaming.cancel()
    with suppress(asyncio.CancelledError):
        await streaming


async def test_an_engine_whose_messages_do_not_arrive_is_lost(
    engine: FakeEngine, ask_worker: tuple[Dispatcher, Callable[..., None]]
) -> None:
    dispatcher, set_health = ask_worker
    set_health(turn_s=0.0, stalled_s=0.0)
    engine.silent = True
    await until(lambda: not dispatcher.ready())
    assert "do not reach this gateway" in dispatcher.snapshot().workers[0].problem


async def test_a_gateway_that_was_stopped_does_not_mark_its_engines_lost(
    ask_worker: tuple[Dispatcher, Callable[..., None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher, set_health = ask_worker
    set_health(turn_s=0.0, stalled_s=60.0)  # a check for silence would mark the engine lost
    worker = dispatcher._registry.workers[0]
    before_s = worker.last_message_s
    clock, jumped_s = dispatcher._clock, 0.0
    now_s = clock.now_s
    monkeypatch.setattr(type(clock), "now_s", lambda _self: now_s() + jumped_s)
    jumped_s = 3600.0  # one hour without reading messages
    await until(lambda: worker.last_message_s > before_s + 3600.0)
    assert dispatcher.ready()


@pytest.mark.case("heartbeat-not-option")
async def test_no_socket_uses_zeromq_heartbeats() -> None:
    channel = EngineChannel("tcp://127.0.0.1:0", member=Member(CLUSTER_KEY))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link = GatewayLink(
        context,
        channel.endpoint,
        member=Member(CLUSTER_KEY),
        on_message=lambda _message: None,
        on_lost=lambda _reason: None,
        on_rejected=lambda: None,
    )
    link.open()
    sockets = [link._socket, channel._router, channel._peer(channel.endpoint)]
    try:
        assert [socket.getsockopt(zmq.HEARTBEAT_IVL) for socket in sockets if socket is not None] == [0, 0, 0]
    finally:
        link.close()
        channel.close()
        context.destroy(linger=0)
