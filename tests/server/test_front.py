"""Two servers with one listening socket: the second one takes over without a refused connection or a cut stream."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from kvist.cluster.listener import bound_socket
from kvist.errors import ConfigError
from kvist.http.front import Front
from kvist.server.serve import http_server
from kvist.testing.gateway_bench import GatewayBench
from tests.server.conftest import MakeBench

BOUND_S = 60.0
ASK = {"prompt": "x", "max_tokens": 4}


@asynccontextmanager
async def behind(bench: GatewayBench, shared: socket.socket) -> AsyncIterator[tuple[Front, asyncio.Task[None]]]:
    """Run a server that has its own socket and, as a child process has, a copy of the shared one."""
    server, front = http_server(bench.app, bench.app.traffic, bench.config), Front(os.dup(shared.fileno()))
    with bound_socket("127.0.0.1", 0) as own:
        serving = asyncio.create_task(server.serve(sockets=[own]))
        running = asyncio.create_task(front.run(server))
        try:
            yield front, running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            server.should_exit = True
            await asyncio.wait_for(serving, BOUND_S)


async def ask(client: httpx.AsyncClient) -> httpx.Response:
    answer = await client.post("/v1/completions", json=ASK)
    assert answer.status_code == httpx.codes.OK, answer.text
    return answer


async def test_a_successor_takes_over_without_a_refused_connection_or_a_cut_stream(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvist.http.protocol.RETIRING_KEEP_ALIVE_S", 0.1)
    old_bench, new_bench = make_bench(port=0), make_bench(port=0)
    old_bench.dispatcher.hold = asyncio.Event()
    with bound_socket("127.0.0.1", 0) as shared:
        shared.listen()
        url = f"http://127.0.0.1:{shared.getsockname()[1]}"
        async with (
            behind(old_bench, shared) as (old, old_running),
            behind(new_bench, shared) as (new, _),
            httpx.AsyncClient(base_url=url, timeout=BOUND_S) as client,
            httpx.AsyncClient(base_url=url, timeout=BOUND_S) as kept,
        ):
            old.accept()
            assert (await kept.get("/ready")).headers.get("connection") != "close"
            async with client.stream("POST", "/v1/completions", json={**ASK, "stream": True}) as stream:
                pieces = stream.aiter_text()
                text = await anext(pieces)
                new.accept()
                old.retire()
                last = await kept.get("/ready")
                assert last.headers["connection"] == "close", "the kept connection ends with its next response"
                async with httpx.AsyncClient(base_url=url, timeout=BOUND_S) as fresh:
                    for _ in range(20):
                        await ask(fresh)
                await ask(kept)
                assert not old_running.done(), "the stream is open"
                old_bench.dispatcher.hold.set()
                text += "".join([piece async for piece in pieces])
            assert text.endswith("data: [DONE]\n\n")
            await asyncio.wait_for(old_running, BOUND_S)
    assert len(new_bench.dispatcher.requests) == 21
    assert len(old_bench.dispatcher.requests) == 1


async def test_connections_wait_in_the_socket_until_a_server_accepts_them(make_bench: MakeBench) -> None:
    with bound_socket("127.0.0.1", 0) as shared:
        shared.listen()  # as a router did that is dead now
        url = f"http://127.0.0.1:{shared.getsockname()[1]}"
        async with behind(make_bench(port=0), shared) as (front, _), httpx.AsyncClient(base_url=url) as client:
            waiting = asyncio.create_task(ask(client))
            done, _ = await asyncio.wait((waiting,), timeout=0.1)
            assert not done
            front.accept()
            await asyncio.wait_for(waiting, BOUND_S)


def test_a_descriptor_without_a_socket_is_an_error_that_names_the_flag() -> None:
    with open(os.devnull) as file, pytest.raises(ConfigError, match="--listen-fd"):
        Front(file.fileno())
