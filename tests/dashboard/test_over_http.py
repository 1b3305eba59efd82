"""The dashboard's endpoints: the key, the files, the snapshot, and streams that are read late or never."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import msgspec
import pytest

from kvist.dashboard import feed
from kvist.dashboard.snapshot import Snapshot
from kvist.server.config import ServerConfig
from kvist.server.serve import HttpServer, http_server
from kvist.testing.gateway_bench import GatewayBench, gateway_bench
from tests.dashboard.fleet import busy_fleet

BOUND_S = 30.0


def port_of(server: HttpServer) -> int:
    port: int = server.servers[0].sockets[0].getsockname()[1]
    return port


def made(**settings: Any) -> GatewayBench:
    bench = gateway_bench(config=replace(ServerConfig(), port=0, **settings))
    bench.dispatcher.snapshots = busy_fleet()
    return bench


@asynccontextmanager
async def served(bench: GatewayBench) -> AsyncIterator[HttpServer]:
    """Yield the real server of the bench, with the task that records."""
    server = http_server(bench.app, bench.app.traffic, bench.config, background=bench.app.background)
    task = asyncio.create_task(server.serve())
    async with asyncio.timeout(BOUND_S):
        while not server.started:
            await asyncio.sleep(0.01)
    try:
        yield server
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, BOUND_S)


async def test_the_page_and_its_files_need_no_key_and_the_figures_do() -> None:
    bench = made(api_key=("sesame",))
    async with bench.client as client:
        page = await client.get("/dashboard")
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert (await client.get("/dashboard/static/uplot.js")).status_code == 200
        for path in ("/dashboard/snapshot", "/dashboard/events"):
            assert (await client.get(path)).status_code == 401
            assert (await client.get(path, headers={"authorization": "Bearer other"})).status_code == 401
        found = await client.get("/dashboard/snapshot", headers={"authorization": "Bearer sesame"})
    assert msgspec.json.decode(found.content, type=Snapshot).server.model == "tiny"


async def test_a_browser_runs_only_files_of_this_server() -> None:
    async with made().client as client:
        policy = (await client.get("/dashboard")).headers["content-security-policy"]
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy


async def test_a_browser_that_has_a_file_does_not_get_it_again() -> None:
    async with made().client as client:
        first = await client.get("/dashboard/static/uplot.js")
        again = await client.get("/dashboard/static/uplot.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["none.js", "..%2f__init__.py", "%2e%2e/feed.py"])
async def test_other_files_cannot_be_read(name: str) -> None:
    async with made().client as client:
        assert (await client.get(f"/dashboard/static/{name}")).status_code == 404


@pytest.mark.parametrize(
    ("query", "param"),
    [("points=-1", "points"), ("points=901", "points"), ("x=1", "x"), ("points=1&points=2", "points")],
)
async def test_a_wrong_query_names_its_parameter(query: str, param: str) -> None:
    async with made().client as client:
        response = await client.get(f"/dashboard/snapshot?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_too_many_viewers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "MAX_VIEWERS", 0)
    async with made().client as client:
        response = await client.get("/dashboard/events")
    assert response.status_code == 429
    assert "close another dashboard" in response.json()["error"]["message"]


async def test_events_begin_with_the_history_and_go_on_with_new_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "INTERVAL_S", 0.05)
    bench = made()
    found: list[Snapshot] = []
    async with served(bench) as server, httpx.AsyncClient() as client:
        await asyncio.sleep(0.3)
        async with client.stream("GET", f"http://127.0.0.1:{port_of(server)}/dashboard/events") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    found.append(msgspec.json.decode(line[6:], type=Snapshot))
                if len(found) == 3:
                    break
    assert len(found[0].series.times_unix_s) > 2
    assert [len(each.series.times_unix_s) for each in found[1:]] == [1, 1]
    assert found[0].series.times_unix_s[-1] < found[1].series.times_unix_s[0] < found[2].series.times_unix_s[0]


async def test_a_stream_ends_when_the_server_stops() -> None:
    bench = made()
    async with httpx.AsyncClient() as client:
        async with served(bench) as server:
            request = client.build_request("GET", f"http://127.0.0.1:{port_of(server)}/dashboard/events")
            response = await client.send(request, stream=True)
        rest = [chunk async for chunk in response.aiter_raw()]
    assert rest
    assert response.is_closed


async def test_an_unread_stream_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "INTERVAL_S", 0.005)
    monkeypatch.setattr("kvist.dashboard.UNREAD_S", 0.2)
    monkeypatch.setattr("kvist.http.protocol._UNREAD_S", 0.1)
    async with served(made()) as server:
        with socket.create_connection(("127.0.0.1", port_of(server))) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(b"GET /dashboard/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            async with asyncio.timeout(BOUND_S):
                while not server.num_connections():
                    await asyncio.sleep(0.01)
                while server.num_connections():
                    await asyncio.sleep(0.02)
