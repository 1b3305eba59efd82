"""The endpoints of the operator: POST /role, POST /drain."""

from __future__ import annotations

import asyncio

import httpx
import msgspec
import pytest

from kvist import wire
from kvist.request import Role
from kvist.router import Members
from kvist.router.config import RouterConfig, RoutingOptions
from kvist.server.app import build_app
from kvist.server.config import ServerConfig
from kvist.testing.router_bench import RouterBench, settle
from kvist.testing.tokenizers import byte_tokenizer


class World:
    """A gateway's application over workers in memory, which answer `SetRole`."""

    def __init__(
        self,
        *,
        sender: str = "127.0.0.1",
        members: Members | None = None,
        router: RouterConfig | None = None,
        **settings: object,
    ) -> None:
        self.bench = RouterBench(router)
        app = build_app(
            dispatcher=self.bench.dispatcher,
            members=members,
            tokenizer=byte_tokenizer(),
            config=msgspec.convert(settings, ServerConfig),
            model_name="tiny",
            clock=self.bench.clock,
        )
        transport = httpx.ASGITransport(app, client=(sender, 4000))
        self.client = httpx.AsyncClient(transport=transport, base_url="http://localhost")
        self.refusal = ""

    async def switch(self, **body: object) -> httpx.Response:
        request = asyncio.ensure_future(self.client.post("/role", json=body))
        await settle()
        for worker, message in self.bench.engines.sent:
            if isinstance(message, wire.SetRole):
                code = "conflict" if self.refusal else None
                answer = wire.RoleAnswer(call_id=message.call_id, error_code=code, message=self.refusal)
                self.bench.dispatcher.on_answer(worker, answer)
        return await request

    def asked(self) -> list[tuple[str, Role]]:
        return [
            (worker.url, message.role)
            for worker, message in self.bench.engines.sent
            if isinstance(message, wire.SetRole)
        ]


@pytest.fixture
def world() -> World:
    return World()


async def test_a_worker_of_a_router_is_switched_by_its_id_or_url(world: World) -> None:
    world.bench.engines.join("http://a:1", worker_id="a:1", role=Role.PREFILL)
    world.bench.engines.join("http://b:1", worker_id="b:1", role=Role.DECODE)
    answer = await world.switch(worker="a:1", role="decode")
    assert (answer.status_code, answer.json()) == (200, {"success": True, "worker": "a:1", "role": "decode"})
    await world.switch(worker="http://b:1", role="prefill")
    assert world.asked() == [("http://a:1", Role.DECODE), ("http://b:1", Role.PREFILL)]


async def test_on_a_worker_s_own_port_the_worker_is_not_named(world: World) -> None:
    world.bench.engines.join("w")
    assert (await world.switch(role="prefill")).status_code == 200
    assert world.asked() == [("w", Role.PREFILL)]


async def test_wrong_switches_are_refused_with_the_remedy(world: World) -> None:
    world.bench.engines.join("a")
    world.bench.engines.join("b", protocol_version=4)
    for body, status, code, text in (
        ({"worker": "a", "role": "both"}, 400, "invalid_request", "use prefill, decode or unified"),
        ({"role": "decode"}, 400, "invalid_request", "name one of the 2 workers"),
        ({"worker": "c", "role": "decode"}, 404, "worker_not_found", "there is no worker 'c'"),
        ({"worker": "a"}, 400, "invalid_request", "role"),
        ({"worker": "b", "role": "decode"}, 409, "conflict", "protocol version 4, and this needs 5: upgrade"),
    ):
        answer = await world.switch(**body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (status, code), error
        assert text in error["message"]
    assert world.asked() == []
    world.refusal = "no transport reaches its pages"
    answer = await world.switch(worker="a", role="decode")
    assert (answer.status_code, answer.json()["error"]["message"]) == (409, world.refusal)


async def test_a_lost_worker_is_not_switched(world: World) -> None:
    worker = world.bench.engines.join("a")
    world.bench.engines.lose(worker)
    answer = await world.switch(worker="a", role="decode")
    assert answer.status_code == 503
    assert "worker a is lost (it died)" in answer.json()["error"]["message"]


async def test_without_an_api_key_only_clients_on_this_host_operate_the_server() -> None:
    world = World(sender="10.0.0.9")
    world.bench.engines.join("a")
    answer = await world.switch(worker="a", role="decode")
    assert answer.status_code == 403
    assert "--api-key" in answer.json()["error"]["message"]
    assert world.asked() == []


async def test_a_drained_server_says_so_and_refuses_new_requests(world: World) -> None:
    world.bench.engines.join("a")
    assert (await world.client.get("/ready")).status_code == 200
    answer = await world.client.post("/drain")
    assert (answer.status_code, answer.json()) == (202, {"success": True, "requests_in_flight": 0})
    for path, body in (("/ready", None), ("/v1/completions", {"prompt": "1"})):
        refused = await world.client.request("GET" if body is None else "POST", path, json=body)
        assert refused.status_code == 503
        assert "this server is draining" in refused.json()["error"]["message"]
        assert "retry-after" in refused.headers
    assert (await world.client.get("/health")).status_code == 200


async def test_a_gateway_that_cannot_serve_names_what_is_missing() -> None:
    world = World(router=RouterConfig(routing=RoutingOptions(aggregate="never")))

    async def problem() -> str:
        answer = await world.client.get("/ready")
        assert answer.status_code == 503
        return str(answer.json()["error"]["message"])

    assert await problem() == "not ready: no worker has joined yet"
    decode = world.bench.engines.join("d", role=Role.DECODE)
    assert await problem() == "not ready: no prefill worker has joined yet"
    world.bench.engines.join("p", role=Role.PREFILL, host_id="another")
    assert "`pairs` in /server_info" in await problem()
    world.bench.engines.lose(decode)
    assert await problem() == "not ready (d: it died)"


async def test_a_stranger_cannot_drain_a_server() -> None:
    world = World(sender="10.0.0.9")
    world.bench.engines.join("a")
    assert (await world.client.post("/drain")).status_code == 403
    assert (await world.client.get("/ready")).status_code == 200
