"""A worker that announces itself to routers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import httpx
import pytest

from kvist.channel import ClusterProof
from kvist.cluster.config import JoinOptions
from kvist.cluster.joining import Joining, OwnAddress
from kvist.errors import ConfigError
from kvist.testing.waits import until
from tests.server.test_workers import KEY, World

ROUTER = "http://localhost:30000"
OWN = OwnAddress(scheme="http", host="127.0.0.1", port=30001)


class Network:
    """Carries requests to a router's application, or fails them. Mutable; owned by one test."""

    def __init__(self, world: World) -> None:
        self._inner = world.client._transport
        self.failures: list[Exception] = []  # of the next requests
        self.hangs = False
        self.requests: list[tuple[str, str]] = []
        self.transport = httpx.MockTransport(self._handle)

    async def _handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append((request.method, request.url.host))
        if self.hangs:
            await asyncio.sleep(3600)
        if self.failures:
            raise self.failures.pop(0)
        response = await self._inner.handle_async_request(request)
        await response.aread()
        return response


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    async with made.client:
        yield made


def joining(
    network: Network, *, routers: tuple[str, ...] = (ROUTER,), key: str = KEY, api_key: str | None = None
) -> Joining:
    return Joining(
        routers=routers,
        own=OWN,
        proof=ClusterProof(key),
        interval_s=0.1,
        api_key=api_key,
        transport=network.transport,
    )


async def test_a_worker_announces_itself_again_and_again_and_withdraws_at_its_stop(world: World) -> None:
    network = Network(world)
    joined = joining(network)
    joined.start()
    await until(lambda: len(network.requests) >= 3)
    assert await world.urls() == ["http://127.0.0.1:30001"]
    assert len(world.links.joined) == 1
    await joined.stop()
    assert await world.urls() == []
    assert network.requests[-1][0] == "DELETE"
    num_requests = len(network.requests)
    await joined.stop()
    assert len(network.requests) == num_requests


async def test_a_router_that_starts_later_is_reached_and_every_reason_is_logged_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    network = Network(world)
    network.failures = [httpx.ConnectError("connection refused")] * 2
    joined = joining(network)
    joined.start()
    await until(lambda: world.links.joined)
    await until(lambda: "announced at" in caplog.text)
    await joined.stop()
    assert caplog.text.count("connection refused") == 1
    assert caplog.text.count("announced at") == 1


@pytest.mark.parametrize(
    ("keys", "word"), [({"key": "another key"}, "--cluster-key-file"), ({"api_key": "wrong"}, "--api-key")]
)
async def test_the_log_of_the_worker_says_what_to_do_about_a_refusal(
    keys: dict[str, str], word: str, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(api_key=("k",)) if "api_key" in keys else World()
    async with world.client:
        joined = joining(Network(world), **keys)  # type: ignore[arg-type]
        joined.start()
        await until(lambda: "has not accepted this worker" in caplog.text)
        await joined.stop()
        assert word in caplog.text
        assert not world.links.joined


async def test_a_router_that_does_not_answer_delays_neither_the_others_nor_the_stop(world: World) -> None:
    network = Network(world)
    joined = joining(network, routers=(ROUTER, "http://127.0.0.1:30000"))
    joined.start()
    await until(lambda: {host for _, host in network.requests} == {"localhost", "127.0.0.1"})
    await until(lambda: world.links.joined)
    network.hangs = True
    async with asyncio.timeout(60):
        await joined.stop()
    assert {host for method, host in network.requests if method == "DELETE"} == {"localhost", "127.0.0.1"}


async def test_a_worker_on_a_wildcard_address_announces_the_address_that_the_router_can_reach() -> None:
    everywhere = OwnAddress(scheme="http", host="0.0.0.0", port=1)
    assert await everywhere.url_for("http://127.0.0.1:30000") == "http://127.0.0.1:1"
    named = OwnAddress(scheme="https", host="::", port=1, advertised_host="fd00::5")
    assert await named.url_for("http://127.0.0.1:30000") == "https://[fd00::5]:1"


def test_a_wrong_router_url_is_an_error_that_names_the_flag() -> None:
    with pytest.raises(ConfigError, match="--router"):
        JoinOptions(router=("ftp://h:1",))
    assert JoinOptions(router=("H:1", "http://h:1/")).router_urls() == ("http://h:1",)
