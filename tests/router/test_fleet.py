"""Gateways and engines over real sockets on loopback."""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import httpx
import msgspec
import pytest

from kvist import wire
from kvist.channel import ChannelConfig
from kvist.errors import ConfigError, KvistError, Unavailable, WorkerLost
from kvist.options import compose
from kvist.request import EpochId, Role, WorkerId
from kvist.router import Dispatcher, MemberOptions, RouterConfig, WorkerUrls, build_router
from kvist.router.addresses import normal_url
from kvist.router.discovery import reachable_endpoint
from kvist.testing.fake_engine import CLUSTER_KEY, FakeEngine
from kvist.testing.page_events import tier_changes
from kvist.testing.specs import make_request, make_roomy_spec
from kvist.testing.waits import until

BOUND_S = 60.0
StartEngine = Callable[..., FakeEngine]
Connect = Callable[..., Awaitable[Dispatcher]]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    started: list[Dispatcher] = []

    async def make(
        *engines: FakeEngine,
        key: str = CLUSTER_KEY,
        transport: httpx.AsyncBaseTransport | None = None,
        api_key: str | None = None,
        **config: Any,
    ) -> Dispatcher:
        urls = {f"e{number}": engine for number, engine in enumerate(engines)}
        dispatcher = build_router(
            compose(
                RouterConfig,
                {"keepalive_s": 0.05, "worker_urls": tuple(f"http://{host}:1" for host in urls), **config},
            ),
            ChannelConfig(cluster_key=key),
            transport=transport or serve({host: partial(info_of, engine) for host, engine in urls.items()}),
            api_key=api_key,
        ).dispatcher
        started.append(dispatcher)
        await dispatcher.start()
        return dispatcher

    yield make
    for dispatcher in started:
        await dispatcher.close()


async def ask(dispatcher: Dispatcher, first_token: int = 1000, max_tokens: int = 50, name: str = "r") -> list[int]:
    request = make_request(name, (first_token, 1, 2), max_tokens=max_tokens)
    tokens: list[int] = []
    async with asyncio.timeout(BOUND_S):
        async for part in dispatcher.generate(request):
            assert part.chunk.position == len(tokens)
            tokens += part.chunk.token_ids
    return tokens


def spec(name: str, role: Role = Role.UNIFIED, **changes: Any) -> wire.EngineSpec:
    return make_roomy_spec(worker_id=WorkerId(name), role=role, epoch=EpochId(f"epoch-{name}"), **changes)


def num_known_pages(dispatcher: Dispatcher) -> int:
    pages = dispatcher._registry.workers[0].pages
    return 0 if pages is None else pages.num_pages


def all_ready(dispatcher: Dispatcher) -> bool:
    """Return whether every worker is ready: a decode worker alone makes the dispatcher ready."""
    return all(worker.state == "ready" for worker in dispatcher.snapshot().workers)


def in_flight(dispatcher: Dispatcher) -> int:
    return sum(worker.num_in_flight for worker in dispatcher.snapshot().workers)


async def test_a_pair_delivers_many_streams_complete_and_in_order(start_engine: StartEngine, connect: Connect) -> None:
    dispatcher = await connect(start_engine(spec=spec("p", Role.PREFILL)), start_engine(spec=spec("d", Role.DECODE)))
    await until(lambda: all_ready(dispatcher))
    answers = await asyncio.gather(*(ask(dispatcher, 1000 * i, name=str(i)) for i in range(40)))
    assert answers == [list(range(1000 * i, 1000 * i + 50)) for i in range(40)]
    await until(lambda: in_flight(dispatcher) == 0)


async def test_two_gateways_share_the_engines_even_with_equal_request_ids(
    start_engine: StartEngine, connect: Connect
) -> None:
    engines = start_engine(spec=spec("p", Role.PREFILL)), start_engine(spec=spec("d", Role.DECODE))
    gateways = [await connect(*engines), await connect(*engines)]
    for gateway in gateways:
        await until(functools.partial(all_ready, gateway))
    answers = await asyncio.gather(*(ask(gateways[i % 2], 1000 * i, name="same") for i in range(10)))
    assert answers == [list(range(1000 * i, 1000 * i + 50)) for i in range(10)]


async def test_closing_a_stream_aborts_the_request_at_both_engines(start_engine: StartEngine, connect: Connect) -> None:
    prefill, decode = start_engine(spec=spec("p", Role.PREFILL)), start_engine(spec=spec("d", Role.DECODE))
    dispatcher = await connect(prefill, decode)
    await until(lambda: all_ready(dispatcher))
    prefill.hold = decode.hold = True
    task = asyncio.create_task(ask(dispatcher))
    await until(lambda: prefill.submitted and decode.submitted)
    task.cancel()
    await until(lambda: prefill.aborted and decode.aborted)
    await until(lambda: in_flight(dispatcher) == 0)


async def test_a_worker_lost_while_idle_is_noticed_and_serves_when_it_is_back(
    start_engine: StartEngine, connect: Connect
) -> None:
    with socket.socket() as held:  # bound but not listening: reserves the port between the two engines
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{held.getsockname()[1]}"
        first = start_engine(spec=spec("u"), bind=endpoint)
        dispatcher = await connect(first)
        await until(dispatcher.ready)
        first.stop()
        await until(lambda: not dispatcher.ready())
        with pytest.raises(Unavailable, match="no worker is ready"):
            await ask(dispatcher)
        start_engine(spec=make_roomy_spec(worker_id=WorkerId("u"), epoch=EpochId("second")), bind=endpoint)
        await until(dispatcher.ready)
    assert await ask(dispatcher, 5, 2) == [5, 6]
    (worker,) = dispatcher.snapshot().workers
    assert worker.spec is not None
    assert worker.spec.epoch == "second"


async def test_a_worker_that_dies_mid_stream_fails_its_request_if_there_is_no_other(
    start_engine: StartEngine, connect: Connect
) -> None:
    engine = start_engine(spec=spec("u"))
    dispatcher = await connect(engine, migration_timeout_s=0.1)
    await until(dispatcher.ready)
    engine.stop_after = 3
    task = asyncio.create_task(ask(dispatcher))
    await until(lambda: engine.submitted)
    engine.stop()
    with pytest.raises(WorkerLost):
        await task
    assert in_flight(dispatcher) == 0


async def test_a_silent_worker_is_lost_and_is_ready_after_its_next_message(
    start_engine: StartEngine, connect: Connect
) -> None:
    engine = start_engine(spec=spec("u"))
    dispatcher = await connect(engine, worker_timeout_s=0.3)
    await until(dispatcher.ready)
    engine.silent = True
    await until(lambda: not dispatcher.ready())
    assert "silent" in dispatcher.snapshot().workers[0].problem
    engine.silent = False
    await until(dispatcher.ready)

    def has_one_gateway() -> bool:
        engine.report()  # a failed send removes a gateway
        return len(engine.gateways) == 1

    await until(has_one_gateway)  # the old connection is closed


async def test_requests_of_an_engine_that_restarted_go_on_in_its_new_process(
    start_engine: StartEngine, connect: Connect
) -> None:
    engine = start_engine(spec=spec("u"))
    dispatcher = await connect(engine)
    await until(dispatcher.ready)
    engine.hold = True
    task = asyncio.create_task(ask(dispatcher))
    await until(lambda: engine.submitted)
    engine.hold = False
    engine.spec = msgspec.structs.replace(engine.spec, epoch=EpochId("second"))
    assert await task
    assert len(engine.submitted) == 2
    assert dispatcher.snapshot().failovers.by_cause == {"worker_lost": 1}


async def test_lost_page_events_make_the_gateway_list_the_pages(start_engine: StartEngine, connect: Connect) -> None:
    engine = start_engine(spec=spec("u"))
    dispatcher = await connect(engine, keepalive_s=60.0)  # the request must not wait for a keep-alive
    await until(dispatcher.ready)
    await until(lambda: engine.num_listings == 1)
    engine.change_pages(tier_changes(b"page"))
    await until(lambda: num_known_pages(dispatcher) == 1)
    engine.change_pages(tier_changes(b"other page"), num_lost=2)
    await until(lambda: engine.num_listings == 2)
    await until(lambda: num_known_pages(dispatcher) == 0)  # the fake engine lists none


async def test_flush_reaches_every_worker(start_engine: StartEngine, connect: Connect) -> None:
    dispatcher = await connect(start_engine(spec=spec("p", Role.PREFILL)), start_engine(spec=spec("d", Role.DECODE)))
    await until(lambda: all_ready(dispatcher))
    answers = await dispatcher.ask_workers(wire.FlushCache(call_id=""), wire.Flushed)
    assert {name: flushed.num_pages for name, flushed in answers.items()} == {"p": 7, "d": 7}


async def test_a_worker_with_another_model_is_listed_and_gets_no_request(
    start_engine: StartEngine, connect: Connect
) -> None:
    dispatcher = await connect(start_engine(spec=spec("a")), start_engine(spec=spec("b", model_fingerprint="x")))
    await until(lambda: any("another model" in w.problem for w in dispatcher.snapshot().workers))
    assert sum(worker.alive for worker in dispatcher.snapshot().workers) == 1


async def test_an_engine_admits_a_gateway_with_its_cluster_key_only(
    start_engine: StartEngine, connect: Connect
) -> None:
    engine = start_engine(spec=spec("u"))
    member, stranger = await connect(engine), await connect(engine, key="another key than the engines'")
    await until(member.ready)
    assert await ask(member, 5, 2) == [5, 6]
    await until(lambda: "--cluster-key" in stranger.snapshot().workers[0].problem)
    assert not stranger.ready()


# ---------------------------------------------------------------- discovery by URL


def serve(answers: dict[str, Callable[[], httpx.Response]]) -> httpx.MockTransport:
    return httpx.MockTransport(lambda request: answers[request.url.host]())


def info_of(engine: FakeEngine) -> httpx.Response:
    return info(engine.spec)


def info(engine: wire.EngineSpec | None) -> httpx.Response:
    return httpx.Response(200, content=msgspec.json.encode({"version": "1", "engine": engine}))


async def test_workers_named_by_url_are_found_once_they_have_loaded(
    start_engine: StartEngine, connect: Connect
) -> None:
    prefill, decode = start_engine(spec=spec("p", Role.PREFILL)), start_engine(spec=spec("d", Role.DECODE))
    loading = iter([httpx.Response(503), info(None), httpx.Response(200, content=b"<html>")])
    transport = serve(
        {"p": lambda: next(loading, None) or info(prefill.spec), "d": lambda: info(decode.spec)},
    )
    dispatcher = await connect(transport=transport, prefill=("http://p:1",), decode=("d:2",))
    await until(lambda: all_ready(dispatcher))
    assert await ask(dispatcher, 5, 3) == [5, 6, 7]
    assert [worker.role for worker in dispatcher.snapshot().workers] == [Role.PREFILL, Role.DECODE]


async def test_a_worker_that_cannot_be_reached_shows_the_reason(connect: Connect) -> None:
    def refuse() -> httpx.Response:
        raise httpx.ConnectError("connection refused")

    dispatcher = await connect(transport=serve({"w": refuse}), worker_urls=("http://w:1",))
    await until(lambda: "connection refused" in dispatcher.snapshot().workers[0].problem)
    with pytest.raises(KvistError, match="connection refused"):
        await ask(dispatcher)


async def test_the_router_sends_its_api_key_to_find_workers(start_engine: StartEngine, connect: Connect) -> None:
    engine = start_engine(spec=spec("w", Role.UNIFIED))

    def answer(request: httpx.Request) -> httpx.Response:
        return info(engine.spec) if request.headers.get("Authorization") == "Bearer k" else httpx.Response(401)

    stranger = await connect(transport=httpx.MockTransport(answer), worker_urls=("http://w:1",))
    await until(lambda: "--api-key" in stranger.snapshot().workers[0].problem)
    member = await connect(transport=httpx.MockTransport(answer), worker_urls=("http://w:1",), api_key="k")
    await until(member.ready)


@pytest.mark.parametrize("url", ["", "ftp://h:1", "http://", "http://h:99999", "30001", "worker"])
def test_a_bad_url_is_refused_at_start(url: str) -> None:
    with pytest.raises(ConfigError, match="not a worker URL"):
        build_router(RouterConfig(urls=WorkerUrls(worker_urls=(url,))), ChannelConfig(cluster_key=CLUSTER_KEY))


def test_more_workers_in_the_flags_than_allowed_are_refused_at_start() -> None:
    config = RouterConfig(urls=WorkerUrls(worker_urls=("a:1", "b:1")), members=MemberOptions(max_workers=1))
    with pytest.raises(ConfigError, match="2 workers are named, and --max-workers is 1"):
        build_router(config, ChannelConfig(cluster_key=CLUSTER_KEY))


def test_a_worker_that_the_flags_name_twice_is_refused_at_start() -> None:
    urls = WorkerUrls(worker_urls=("http://H:1",), prefill=("h:1/",))
    with pytest.raises(ConfigError, match="named twice"):
        build_router(RouterConfig(urls=urls), ChannelConfig(cluster_key=CLUSTER_KEY))


def test_worker_urls_may_have_a_trailing_slash_and_no_scheme() -> None:
    assert normal_url("h:1/") == normal_url("http://h:1") == "http://h:1"


def test_an_engine_bound_everywhere_is_reached_at_its_urls_host() -> None:
    assert reachable_endpoint("http://10.0.0.5:30001", "tcp://0.0.0.0:555") == "tcp://10.0.0.5:555"
    assert reachable_endpoint("http://[fd00::1]:1", "tcp://[::]:555") == "tcp://[fd00::1]:555"
    assert reachable_endpoint("http://10.0.0.5:30001", "tcp://10.0.0.9:555") == "tcp://10.0.0.9:555"
