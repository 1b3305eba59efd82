"""The endpoints of a router's workers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from urllib.parse import quote

import httpx
import msgspec
import pytest

from kvist.channel import PROOF_HEADER, ClusterProof
from kvist.router import Members
from kvist.router.addresses import HostRule
from kvist.router.membership import Membership, NamedWorker
from kvist.server.app import build_app
from kvist.server.config import ServerConfig
from kvist.testing.router_bench import RouterBench
from kvist.testing.tokenizers import byte_tokenizer
from tests.server.conftest import MakeBench

KEY = "the cluster key"
URL = "http://10.0.0.5:30001"


class RegistryLinks:
    """Links that only the registry sees. Mutable; owned by one test."""

    def __init__(self, bench: RouterBench) -> None:
        self._registry = bench.registry
        self.joined: list[NamedWorker] = []

    def join(self, named: NamedWorker) -> None:
        self.joined.append(named)
        self._registry.add(named.url, named.role, 0.0)

    def leave(self, url: str) -> None:
        worker = self._registry.find(url)
        assert worker is not None
        self._registry.remove(worker)


class World:
    """A router's application, and clients of it."""

    def __init__(self, *, sender: str = "127.0.0.1", max_workers: int = 8, **settings: object) -> None:
        bench = RouterBench()
        self.links = RegistryLinks(bench)
        self.members = Members(
            membership=Membership(max_workers=max_workers),
            registry=bench.registry,
            links=self.links,
            hosts=HostRule(()),
            proof=ClusterProof(KEY),
            clock=bench.clock,
        )
        app = build_app(
            dispatcher=bench.dispatcher,
            members=self.members,
            tokenizer=byte_tokenizer(),
            config=msgspec.convert(settings, ServerConfig),
            model_name="tiny",
            clock=bench.clock,
        )
        transport = httpx.ASGITransport(app, client=(sender, 4000))
        self.client = httpx.AsyncClient(transport=transport, base_url="http://localhost")

    async def post(self, body: object, **headers: str) -> httpx.Response:
        return await self.client.post("/workers", json=body, headers=headers)

    async def urls(self) -> list[str]:
        return [worker["url"] for worker in (await self.client.get("/workers")).json()["workers"]]

    async def announce(self, url: str = URL, instance: str = "i", key: str = KEY) -> httpx.Response:
        proof = ClusterProof(key).of("POST", url, instance)
        return await self.post({"url": url, "instance": instance, "interval_s": 2}, **{PROOF_HEADER: proof})

    async def metric(self, line: str) -> bool:
        return line in (await self.client.get("/metrics")).text.splitlines()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    async with made.client:
        yield made


async def test_a_worker_is_added_listed_and_removed(world: World) -> None:
    added = await world.post({"url": "http://10.0.0.5:30001/", "worker_type": "prefill"})
    assert added.status_code == 202
    assert added.headers["location"] == added.json()["location"] == f"/workers/{quote(URL, safe='')}"
    assert {"status": "accepted", "worker_id": URL, "url": URL}.items() <= added.json().items()
    listed = (await world.client.get("/workers")).json()
    assert (listed["total"], listed["stats"]) == (1, {"prefill_count": 1, "decode_count": 0, "regular_count": 0})
    expected = {
        "id": URL,
        "url": URL,
        "worker_type": "prefill",
        "is_healthy": False,
        "state": "joining",
        "sources": ["http"],
    }
    assert expected.items() <= listed["workers"][0].items()
    assert (await world.client.get(added.headers["location"])).json() == listed["workers"][0]
    assert (await world.client.get("/server_info")).json()["workers"][0]["sources"] == ["http"]
    assert await world.metric('kvist:workers_named{source="http"} 1.0')
    assert await world.metric('kvist:workers{state="joining"} 1.0')
    removed = await world.client.delete(added.headers["location"])
    assert (removed.status_code, removed.json()["worker_id"]) == (202, URL)
    assert await world.urls() == []
    again = await world.client.delete(f"/workers/{URL}")
    assert (again.status_code, again.json()["error"]["code"]) == (404, "worker_not_found")


async def test_fields_of_sglang_without_effect_are_named(world: World) -> None:
    added = await world.post({"url": URL, "worker_type": "regular", "priority": 5, "labels": {"a": "b"}})
    assert added.status_code == 202
    assert added.headers["x-kvist-ignored"] == "priority, labels"


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"url": "http://10.0.0.5:1/x"}, 400, "http://HOST:PORT"),
        ({"url": "http://h" * 100}, 400, "http://HOST:PORT"),
        ({"url": "http://8.8.8.8:1"}, 403, "--allowed-worker-hosts"),
        ({"url": URL, "worker_type": "encode"}, 400, "worker_type"),
        ({"url": URL, "instance": ""}, 400, "instance"),
        ({"url": URL, "instance": "i"}, 403, "--cluster-key-file"),
        ({"address": URL}, 400, "address"),
        ({}, 400, "url"),
    ],
)
async def test_a_request_that_names_no_acceptable_worker_is_refused_with_a_remedy(
    world: World, body: object, status: int, word: str
) -> None:
    refused = await world.post(body)
    assert refused.status_code == status
    assert word in refused.json()["error"]["message"]
    assert await world.urls() == []


async def test_a_stranger_without_the_api_key_changes_nothing_and_is_counted() -> None:
    world = World(api_key=("k",))
    async with world.client:
        refused = [
            await world.announce(),
            await world.client.delete(f"/workers/{URL}"),
            await world.client.get("/workers"),
        ]
        assert [each.status_code for each in refused] == [401, 401, 401]
        assert "Authorization: Bearer KEY" in refused[0].json()["error"]["message"]
        world.client.headers["authorization"] = "Bearer k"
        assert await world.urls() == []
        assert await world.metric('kvist:http_requests_total{method="POST",path="/workers",status="401"} 1.0')


async def test_only_a_member_of_the_cluster_announces_a_worker(world: World) -> None:
    refused = await world.announce(key="another key")
    assert refused.status_code == 403
    assert "--cluster-key-file" in refused.json()["error"]["message"]
    assert await world.metric('kvist:worker_changes_refused_total{code="forbidden"} 1.0')
    assert (await world.announce()).status_code == 202
    assert (await world.announce()).status_code == 202
    assert await world.urls() == [URL]
    assert await world.metric('kvist:worker_announcements_total{outcome="repeated"} 1.0')
    misspelt = await world.client.delete(f"/workers/{URL}?instanse=i")
    assert (misspelt.status_code, misspelt.json()["error"]["param"]) == (400, "instanse")
    by_a_stranger = await world.client.delete(f"/workers/{URL}?instance=i")
    assert (by_a_stranger.status_code, await world.urls()) == (403, [URL])
    proof = ClusterProof(KEY).of("DELETE", URL, "i")
    withdrawn = await world.client.delete(f"/workers/{quote(URL, safe='')}?instance=i", headers={PROOF_HEADER: proof})
    assert (withdrawn.status_code, await world.urls()) == (202, [])


async def test_without_an_api_key_only_this_machine_changes_the_workers() -> None:
    elsewhere = World(sender="10.0.0.7", host="0.0.0.0")
    async with elsewhere.client:
        refused = [await elsewhere.post({"url": URL}), await elsewhere.client.delete(f"/workers/{URL}")]
        assert [each.status_code for each in refused] == [403, 403]
        assert "--api-key" in refused[0].json()["error"]["message"]
        assert (await elsewhere.announce()).status_code == 202, "a proof of membership is enough"
    keyed = World(sender="10.0.0.7", host="0.0.0.0", api_key=("k",))
    async with keyed.client:
        keyed.client.headers["authorization"] = "Bearer k"
        assert (await keyed.post({"url": URL})).status_code == 202
        assert [named.api_key for named in keyed.links.joined] == ["k"], "the client's own key"


async def test_more_workers_than_allowed_are_a_429() -> None:
    world = World(max_workers=1)
    async with world.client:
        assert (await world.post({"url": URL})).status_code == 202
        refused = await world.post({"url": "http://10.0.0.6:1"})
        assert refused.status_code == 429
        assert "--max-workers" in refused.json()["error"]["message"]


async def test_a_worker_has_no_workers_of_its_own(make_bench: MakeBench) -> None:
    bench = make_bench()
    async with bench.client:
        refused = await bench.post("/workers", {"url": URL})
        assert refused.status_code == 400
        assert "its router" in refused.json()["error"]["message"]
