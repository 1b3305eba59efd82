"""Workers that join and leave while a gateway runs, over real sockets on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Protocol

import httpx
import msgspec
import pytest

from kvist.channel import ChannelConfig, ClusterProof
from kvist.errors import Forbidden, KvistError, Unavailable, WorkerLost
from kvist.options import compose
from kvist.request import EpochId, Role, WorkerId
from kvist.router import Announcement, Dispatcher, RouterConfig, RouterParts, build_router
from kvist.testing.fake_engine import CLUSTER_KEY, FakeEngine
from kvist.testing.specs import make_request, make_roomy_spec
from kvist.testing.waits import until
from tests.router.conftest import StartEngine

BOUND_S = 60.0
SENDER = "10.0.0.9"


class Network:
    """Answers /server_info for the workers of a test, and records the requests."""

    def __init__(self) -> None:
        self.engines: dict[str, FakeEngine] = {}
        self.requests: list[httpx.Request] = []
        self.redirect_to: str | None = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.redirect_to is not None:
            return httpx.Response(307, headers={"location": self.redirect_to})
        engine = self.engines.get(request.url.host)
        if engine is None:
            raise httpx.ConnectError("connection refused")
        return httpx.Response(200, content=msgspec.json.encode({"engine": engine.spec}))


class StartGateway(Protocol):
    async def __call__(self, *, api_key: str | None = None, **config: object) -> RouterParts: ...


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
async def start_gateway(network: Network) -> AsyncIterator[StartGateway]:
    started: list[RouterParts] = []

    async def start(*, api_key: str | None = None, **config: object) -> RouterParts:
        parts = build_router(
            compose(RouterConfig, {"keepalive_s": 0.05, "allowed_worker_hosts": ("127.0.0.1",), **config}),
            ChannelConfig(cluster_key=CLUSTER_KEY),
            transport=httpx.MockTransport(network),
            api_key=api_key,
        )
        started.append(parts)
        await parts.dispatcher.start()
        parts.members.start()
        return parts

    yield start
    for parts in started:
        await parts.members.close()
        await parts.dispatcher.close()


@pytest.fixture
def start_worker(start_engine: StartEngine, network: Network) -> Callable[[str], FakeEngine]:
    def start(host: str, role: Role = Role.UNIFIED) -> FakeEngine:
        spec = make_roomy_spec(worker_id=WorkerId(f"{host}:1"), epoch=EpochId(f"epoch-{host}"), role=role)
        network.engines[host] = start_engine(spec=spec)
        return network.engines[host]

    return start


def add(parts: RouterParts, host: str, role: Role | None = None, api_key: str | None = None) -> str:
    return parts.members.add(f"http://{host}:1", role, sender=SENDER, api_key=api_key)


async def ask(dispatcher: Dispatcher, max_tokens: int = 20) -> list[int]:
    request = make_request("r", (1000, 1, 2), max_tokens=max_tokens)
    async with asyncio.timeout(BOUND_S):
        return [token async for part in dispatcher.generate(request) for token in part.chunk.token_ids]


def states(parts: RouterParts) -> dict[str, str]:
    return {worker.url: worker.state for worker in parts.dispatcher.snapshot().workers}


async def test_a_gateway_without_workers_serves_once_workers_join(
    start_gateway: StartGateway, start_worker: Callable[..., FakeEngine]
) -> None:
    parts = await start_gateway()
    with pytest.raises(Unavailable, match="no worker is ready"):
        await ask(parts.dispatcher)
    prefill = add(parts, "10.0.0.1")  # named before it runs
    start_worker("10.0.0.2", Role.DECODE)
    decode = add(parts, "10.0.0.2")
    start_worker("10.0.0.1", Role.PREFILL)
    await until(parts.dispatcher.ready)
    assert await ask(parts.dispatcher) == list(range(1000, 1020))
    assert {worker.url: worker.sources for worker in parts.dispatcher.snapshot().workers} == {
        prefill: ("http",),
        decode: ("http",),
    }


async def test_a_removed_worker_finishes_its_requests_and_gets_no_other(
    start_gateway: StartGateway, start_worker: Callable[..., FakeEngine]
) -> None:
    engine = start_worker("10.0.0.1")
    parts = await start_gateway()
    url = add(parts, "10.0.0.1")
    await until(parts.dispatcher.ready)
    engine.stop_after = 3
    open_request = asyncio.create_task(ask(parts.dispatcher))
    await until(lambda: engine.num_hanging)
    assert parts.members.remove("10.0.0.1:1", sender=SENDER) == url
    assert states(parts) == {url: "leaving"}
    with pytest.raises(Unavailable, match="removed from this gateway"):
        await ask(parts.dispatcher)
    await asyncio.sleep(0.2)  # several keep-alives, whose answers do not bring the worker back
    assert states(parts) == {url: "leaving"}
    engine.finish_streams()
    assert await open_request == list(range(1000, 1020))
    await until(lambda: not states(parts))

    def has_no_gateway() -> bool:
        engine.report()  # a failed send removes a gateway
        return not engine.gateways

    await until(has_no_gateway)  # the link is closed


async def test_a_removed_worker_without_requests_is_gone_at_once_and_can_be_added_again(
    start_gateway: StartGateway, start_worker: Callable[..., FakeEngine]
) -> None:
    start_worker("10.0.0.1")
    parts = await start_gateway()
    for _ in range(3):
        url = add(parts, "10.0.0.1")
        await until(parts.dispatcher.ready)
        assert await ask(parts.dispatcher) == list(range(1000, 1020))
        await until(lambda: not parts.dispatcher.num_open)
        parts.members.remove(url, sender=SENDER)
        assert states(parts) == {}
    add(parts, "10.0.0.3")  # without a server
    parts.members.remove("http://10.0.0.3:1", sender=SENDER)
    assert states(parts) == {}


async def test_a_worker_that_is_named_again_while_it_leaves_keeps_its_requests(
    start_gateway: StartGateway, start_worker: Callable[..., FakeEngine]
) -> None:
    engine = start_worker("10.0.0.1")
    parts = await start_gateway()
    url = add(parts, "10.0.0.1")
    await until(parts.dispatcher.ready)
    engine.stop_after = 3
    open_request = asyncio.create_task(ask(parts.dispatcher))
    await until(lambda: engine.num_hanging)
    parts.members.remove(url, sender=SENDER)
    add(parts, "10.0.0.1")
    await until(parts.dispatcher.ready)
    engine.finish_streams()
    assert await open_request == list(range(1000, 1020))
    assert await ask(parts.dispatcher) == list(range(1000, 1020))


async def test_the_requests_of_a_worker_that_dies_while_it_leaves_fail(
    start_gateway: StartGateway, start_worker: Callable[..., FakeEngine]
) -> None:
    engine = start_worker("10.0.0.1")
    parts = await start_gateway()
    url = add(parts, "10.0.0.1")
    await until(parts.dispatcher.ready)
    engine.hold = True
    open_request = asyncio.create_task(ask(parts.dispatcher))
    await until(lambda: engine.submitted)
    parts.members.remove(url, sender=SENDER)
    engine.stop()
    with pytest.raises(WorkerLost, match="broke"):
        await open_request
    await until(lambda: not states(parts))


async def test_the_wait_for_a_leaving_worker_is_bounded(
    start_gateway: StartGateway, start_worker: Callable[..., FakeEngine]
) -> None:
    engine = start_worker("10.0.0.1")
    parts = await start_gateway(request_timeout_s=0.3)
    url = add(parts, "10.0.0.1")
    await until(parts.dispatcher.ready)
    engine.hold = engine.silent = True
    open_request = asyncio.create_task(ask(parts.dispatcher))
    await until(lambda: parts.dispatcher.num_open)
    parts.members.remove(url, sender=SENDER)
    with pytest.raises(KvistError):
        await open_request
    await until(lambda: not states(parts))  # although its engine never ends the request


async def test_an_announced_worker_leaves_when_its_announcements_cease(
    start_gateway: StartGateway, start_worker: Callable[..., FakeEngine]
) -> None:
    start_worker("10.0.0.1")
    parts, url, proof = await start_gateway(), "http://10.0.0.1:1", ClusterProof(CLUSTER_KEY)
    announcement = Announcement(url=url, instance="i", interval_s=0.1)
    with pytest.raises(Forbidden, match="--cluster-key-file"):
        parts.members.announce(announcement, sender=SENDER, proof=ClusterProof("another").of("POST", url, "i"))
    with pytest.raises(Forbidden, match="--cluster-key-file"):
        parts.members.withdraw(url, "i", sender=SENDER, proof=proof.of("POST", url, "i"))
    assert parts.members.counts().refused == {"forbidden": 2}
    parts.members.announce(announcement, sender=SENDER, proof=proof.of("POST", url, "i"))
    await until(parts.dispatcher.ready)
    await until(lambda: not states(parts))
    assert [count for count in parts.members.counts().announcements.values() if count] == [1, 1]


async def test_the_api_key_of_the_gateway_is_not_sent_to_a_worker_that_a_client_names(
    start_gateway: StartGateway, network: Network
) -> None:
    parts = await start_gateway(api_key="of the gateway", worker_urls=("http://10.0.0.1:1",))
    add(parts, "10.0.0.2", api_key="of the client")
    await until(lambda: {request.url.host for request in network.requests} == {"10.0.0.1", "10.0.0.2"})
    sent = {request.url.host: request.headers["authorization"] for request in network.requests}
    assert sent == {"10.0.0.1": "Bearer of the gateway", "10.0.0.2": "Bearer of the client"}


async def test_a_worker_that_redirects_is_not_followed(start_gateway: StartGateway, network: Network) -> None:
    network.redirect_to = "http://169.254.169.254/latest/meta-data"
    parts = await start_gateway()
    add(parts, "10.0.0.1")
    await until(lambda: "status 307" in parts.dispatcher.snapshot().workers[0].problem)
    assert {request.url.host for request in network.requests} == {"10.0.0.1"}


async def test_a_worker_that_sends_the_router_to_an_engine_elsewhere_is_not_followed(
    start_gateway: StartGateway, start_worker: Callable[..., FakeEngine]
) -> None:
    engine = start_worker("10.0.0.1")  # listens on 127.0.0.1
    parts = await start_gateway(allowed_worker_hosts=())
    add(parts, "10.0.0.1")
    await until(lambda: "--allowed-worker-hosts" in parts.dispatcher.snapshot().workers[0].problem)
    assert not engine.gateways


async def test_many_workers_come_and_go_under_load_without_a_lost_request(
    start_gateway: StartGateway, start_worker: Callable[..., FakeEngine]
) -> None:
    hosts = [f"10.0.0.{number}" for number in range(1, 5)]
    for host in hosts:
        start_worker(host)
    parts = await start_gateway()
    add(parts, hosts[0])
    await until(parts.dispatcher.ready)
    answers: list[list[int]] = []

    async def load() -> None:
        while True:
            answers.append(await ask(parts.dispatcher, 50))

    async def some_answers() -> None:
        num_before = len(answers)
        await asyncio.sleep(0.05)
        await until(lambda: len(answers) > num_before + 2 or any(client.done() for client in clients))

    clients = [asyncio.create_task(load()) for _ in range(8)]
    for _ in range(5):
        for host in hosts[1:]:
            add(parts, host)
        await some_answers()
        for host in hosts[1:]:
            parts.members.remove(f"http://{host}:1", sender=SENDER)
        await some_answers()
    assert not any(client.done() for client in clients), "no request failed"
    for client in clients:
        client.cancel()
        with suppress(asyncio.CancelledError):
            await client
    assert len(answers) > 8
    assert all(answer == list(range(1000, 1050)) for answer in answers)
