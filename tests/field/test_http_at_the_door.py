"""Limits that apply before a request is validated: header bytes, lines and time, Host, codings, HTTP/1.0."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import pytest

from kvist.server.serve import http_server
from kvist.testing.gateway_bench import GatewayBench
from tests.server.conftest import MakeBench

BOUND_S = 30.0
PROMPT = b'{"prompt":"x","stream":true}'


@asynccontextmanager
async def served(bench: GatewayBench) -> AsyncIterator[int]:
    """Yield the port of the application under its real server."""
    server = http_server(bench.app, bench.app.traffic, bench.config)
    task = asyncio.create_task(server.serve())
    async with asyncio.timeout(BOUND_S):
        while not server.started:
            await asyncio.sleep(0.005)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, BOUND_S)


async def exchange(port: int, *pieces: bytes) -> bytes:
    """Return everything that the server sends until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(BOUND_S):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def request(*lines: bytes, method: bytes = b"GET /health", version: bytes = b"1.1", body: bytes = b"") -> bytes:
    return b"\r\n".join([method + b" HTTP/" + version, *lines, b"", b""]) + body


def error_of(answer: bytes) -> tuple[int, str]:
    """Return status and message of an error in OpenAI's shape."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


# ---------------------------------------------------------------- headers


@pytest.mark.case("header-limits")
@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([b"GET /health HTTP/1.1\r\nHost: a\r\n", *[b"x: " + b"a" * 65_000 + b"\r\n"] * 100], id="bytes"),
        pytest.param([b"GET /health HTTP/1.1\r\nHost: a\r\n", *[b"x: " + b"a" * 65_000] * 100], id="one line"),
        pytest.param([b"GET /" + b"a" * 65_000, *[b"a" * 65_000] * 100], id="path"),
        pytest.param([request(b"Host: a", *[b"x: y"] * 200)], id="lines"),
        pytest.param([request(b"Host: a", *[b"x: " + b"a" * 9000] * 8)], id="complete"),
    ],
)
async def test_a_header_over_the_limit_is_a_431_before_the_key_is_asked(
    make_bench: MakeBench, pieces: list[bytes]
) -> None:
    bench = make_bench(port=0, api_key=("sesam",))
    async with served(bench) as port:
        status, message = error_of(await exchange(port, *pieces))
        assert status == 431
        assert "65536 bytes or 100 lines" in message
        assert (await exchange(port, request(b"Host: localhost", b"Connection: close"))).startswith(b"HTTP/1.1 200")


@pytest.mark.case("header-limits")
@pytest.mark.parametrize(
    "tail",
    [
        pytest.param([b"0\r\n", *[b"x: " + b"a" * 65_000] * 100], id="trailer"),
        pytest.param([b"1;a=", *[b"b" * 65_000] * 100], id="extension"),
        pytest.param([b"0\r\n", *[b"x: y\r\n"] * 200], id="trailer lines"),
    ],
)
async def test_trailers_and_chunk_extensions_have_the_header_limit(make_bench: MakeBench, tail: list[bytes]) -> None:
    head = request(b"Host: localhost", b"Transfer-Encoding: chunked", method=b"POST /v1/completions")
    async with served(make_bench(port=0)) as port:
        status, _ = error_of(await exchange(port, head, b"1\r\n{\r\n", *tail))
    assert status == 431


@pytest.mark.case("header-limits")
@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: y"])
async def test_a_header_that_does_not_end_is_a_408_and_a_silent_connection_is_closed(
    make_bench: MakeBench, sent: bytes
) -> None:
    async with served(make_bench(port=0, header_timeout_s=0.1)) as port:
        answer = await exchange(port, sent)
    if not sent:
        assert answer == b""
        return
    status, message = error_of(answer)
    assert status == 408
    assert "--header-timeout-s" in message


async def test_the_header_of_every_request_has_its_own_time_limit(make_bench: MakeBench) -> None:
    async with served(make_bench(port=0, header_timeout_s=0.2)) as port:
        first = request(b"Host: localhost")
        answers = await exchange(port, first, b"GET /health HTT")
    assert answers.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 408" in answers


async def test_a_response_in_progress_is_finished_before_malformed_input_closes_the_connection(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(port=0)
    bench.dispatcher.hold = asyncio.Event()
    ask = request(b"Host: localhost", b"Content-Length: %d" % len(PROMPT), method=b"POST /v1/completions", body=PROMPT)
    async with served(bench) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(BOUND_S):
            writer.write(ask)
            got = await reader.readuntil(b"data: ")
            writer.write(b"\x00\x01 this is no HTTP\r\n\r\n")
            await writer.drain()
            await asyncio.sleep(0.05)
            bench.dispatcher.hold.set()
            got += await reader.read()
        writer.close()
    assert b"[DONE]" in got
    assert got.count(b"HTTP/1.1") == 1


async def test_an_unread_body_does_not_keep_the_connection_open(make_bench: MakeBench) -> None:
    bench = make_bench(port=0, api_key=("sesam",))
    head = request(b"Host: localhost", b"Content-Length: 1000000000", method=b"POST /v1/completions")
    async with served(bench) as port:
        status, _ = error_of(await exchange(port, head, b"{"))  # returns: the server closes
    assert status == 401


async def send_then_read(port: int, *pieces: bytes) -> bytes:
    """Send, then read, like most clients: an error while sending ends the exchange, even if an answer has come."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(BOUND_S):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)
            return await reader.read()
    finally:
        writer.close()


@pytest.fixture
def long_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the server drop input for a minute: a client of a busy machine can take over a second to send."""
    monkeypatch.setattr("kvist.http.protocol._LINGER_S", 60.0)


@pytest.mark.usefixtures("long_linger")
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
async def test_a_client_that_sends_on_after_an_early_response_receives_the_response(
    make_bench: MakeBench, version: bytes
) -> None:
    bench = make_bench(port=0, api_key=("sesam",))
    lines = (b"Host: localhost", b"Content-Length: 2000000", b"Connection: close")
    head = request(*lines, method=b"POST /v1/completions", version=version)
    async with served(bench) as port:
        status, _ = error_of(await send_then_read(port, head, *[b"a" * 100_000] * 20))
    assert status == 401


async def test_a_small_body_after_its_response_keeps_the_connection_alive(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(port=0, api_key=("sesam",))
    head = request(b"Host: localhost", b"Content-Length: 2", method=b"POST /v1/completions")
    async with served(bench) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(BOUND_S):
            writer.write(head)
            assert b"401" in await reader.readuntil(b"}}")
            writer.write(b"{}" + request(b"Host: localhost"))
            assert b"200" in await reader.readuntil(b"}")
        writer.close()


async def test_a_request_that_began_before_the_last_response_ended_is_not_idle(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvist.server.serve._KEEP_ALIVE_S", 0.1)
    bench = make_bench(port=0)
    bench.dispatcher.hold = asyncio.Event()
    ask = request(b"Host: localhost", b"Content-Length: %d" % len(PROMPT), method=b"POST /v1/completions", body=PROMPT)
    async with served(bench) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(BOUND_S):
            writer.write(ask + ask[:20])
            await reader.readuntil(b"data: ")
            bench.dispatcher.hold.set()
            await reader.readuntil(b"[DONE]")
            bench.dispatcher.hold = asyncio.Event()
            writer.write(ask[20:])
            await reader.readuntil(b"data: ")
            await asyncio.sleep(0.3)
            bench.dispatcher.hold.set()
            await reader.readuntil(b"[DONE]")
        writer.close()


async def test_a_client_cannot_claim_another_address(make_bench: MakeBench, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        async with served(make_bench(port=0)) as port:
            await exchange(
                port, request(b"Host: localhost", b"X-Forwarded-For: 6.6.6.6", method=b"GET /", version=b"1.0")
            )
    assert "client=127.0.0.1:" in caplog.text
    assert "6.6.6.6" not in caplog.text


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"\r\n\r\n"])
async def test_an_idle_connection_that_sends_empty_lines_is_closed(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr("kvist.server.serve._KEEP_ALIVE_S", 0.2)
    async with served(make_bench(port=0)) as port:
        answer = await exchange(port, request(b"Host: localhost"), sent)  # returns: the server closes
    assert answer.count(b"HTTP/1.1 200") == 1
    assert answer.count(b"HTTP/1.1") == 1


async def test_connections_over_the_limit_get_a_503_and_are_counted(make_bench: MakeBench) -> None:
    bench = make_bench(port=0, max_connections=2)
    async with served(bench) as port:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        await asyncio.sleep(0.05)
        status, message = error_of(await exchange(port))
        for _, writer in held:
            writer.close()
    assert status == 503
    assert "--max-connections" in message
    exposition = (await bench.client.get("/metrics")).text
    assert "kvist:http_connections_refused_total 1.0" in exposition


@pytest.mark.usefixtures("long_linger")
async def test_a_connection_over_the_limit_receives_its_503_although_it_sends_a_request(
    make_bench: MakeBench,
) -> None:
    async with served(make_bench(port=0, max_connections=1)) as port:
        _, held = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(0.05)
        status, message = error_of(await send_then_read(port, *[b"a" * 100_000] * 20))
        held.close()
    assert status == 503
    assert "--max-connections" in message


# ---------------------------------------------------------------- Host, methods, upgrades


@pytest.mark.case("host-header")
@pytest.mark.parametrize(
    ("lines", "version", "status"),
    [
        ((), b"1.1", 400),
        ((b"Host: localhost", b"Host: localhost"), b"1.1", 400),
        ((b"Host: localhost", b"Host: evil.example"), b"1.0", 400),
        ((b"Host: localhost",), b"1.1", 200),
        ((), b"1.0", 200),
    ],
)
async def test_http_1_1_needs_exactly_one_host(
    make_bench: MakeBench, lines: tuple[bytes, ...], version: bytes, status: int
) -> None:
    async with served(make_bench(port=0)) as port:
        answer = await exchange(port, request(*lines, b"Connection: close", version=version))
    assert answer.split()[1] == b"%d" % status


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"BREW /pot HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
        (b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /%0a%1b[31mx HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
        (b"PATCH /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 405),
        (b"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
        (
            b"GET /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\nframes",
            405,
        ),
    ],
)
async def test_input_that_is_not_http_is_an_error_response_and_one_log_line(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture, sent: bytes, status: int
) -> None:
    with caplog.at_level(logging.INFO):
        async with served(make_bench(port=0)) as port:
            answer = await exchange(port, sent)
    assert error_of(answer)[0] == status
    records = [record for record in caplog.records if record.name.startswith(("kvist", "uvicorn", "asyncio"))]
    lines = [record for record in records if f" {status} " in record.getMessage()]
    assert len(lines) == 1
    assert not [record for record in records if record.exc_info or record.levelno > logging.INFO]


# ---------------------------------------------------------------- HTTP/1.0


@pytest.mark.case("http-1.0")
async def test_a_stream_over_http_1_0_has_no_chunks_and_ends_with_its_connection(
    make_bench: MakeBench,
) -> None:
    head = (b"Content-Length: %d" % len(PROMPT), b"Connection: keep-alive")
    ask = request(*head, method=b"POST /v1/completions", version=b"1.0", body=PROMPT)
    async with served(make_bench(port=0)) as port:
        answer = await exchange(port, ask)
    head_bytes, _, body = answer.partition(b"\r\n\r\n")
    assert b"200" in head_bytes.split(b"\r\n")[0]
    assert b"transfer-encoding" not in head_bytes.lower()
    assert b"connection: close" in head_bytes.lower()
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")


@pytest.mark.case("http-1.0")
async def test_a_response_of_known_length_over_http_1_0_has_content_length(make_bench: MakeBench) -> None:
    async with served(make_bench(port=0)) as port:
        answer = await exchange(port, request(version=b"1.0"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-length: %d" % len(body) in head.lower()


# ---------------------------------------------------------------- compressed bodies


def completion(prompt: str = "x") -> bytes:
    return msgspec.json.encode({"prompt": prompt})


def raw_deflate(body: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return deflater.compress(body) + deflater.flush()


async def post_coded(bench: GatewayBench, body: bytes, coding: str) -> httpx.Response:
    headers = {"content-encoding": coding, "content-type": "application/json"}
    response: httpx.Response = await bench.client.post("/v1/completions", content=body, headers=headers)
    return response


@pytest.mark.case("compressed-body")
@pytest.mark.parametrize(
    ("coding", "encode"), [("gzip", gzip.compress), ("GZip", gzip.compress), ("deflate", zlib.compress),
                           ("deflate", raw_deflate), ("identity", bytes)]
)  # fmt: skip
async def test_a_compressed_body_is_read(bench: GatewayBench, coding: str, encode: Callable[[bytes], bytes]) -> None:
    response = await post_coded(bench, encode(completion()), coding)
    assert response.json()["choices"][0]["text"] == "hello"


@pytest.mark.case("compressed-body")
@pytest.mark.parametrize(
    "body",
    [completion(), b"", gzip.compress(completion())[:-9], gzip.compress(completion()) + b"more", b"\x1f\x8b\xff\xff"],
    ids=[
        "not coded",
        "empty",
        "cut short",
        "more after its end",
        "damaged",
    ],  # fixed ids: gzip output contains the time
)
@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_a_body_that_does_not_match_its_content_encoding_is_a_400(
    bench: GatewayBench, body: bytes, coding: str
) -> None:
    response = await post_coded(bench, body, coding)
    assert response.status_code == 400
    assert "Content-Encoding" in response.json()["error"]["message"]


@pytest.mark.case("compressed-body")
@pytest.mark.parametrize("coding", ["zstd", "br", "gzip, gzip"])
async def test_an_unsupported_content_encoding_is_a_415_that_names_the_header(bench: GatewayBench, coding: str) -> None:
    response = await post_coded(bench, completion(), coding)
    assert response.status_code == 415
    assert "Content-Encoding" in response.json()["error"]["message"]
    assert "gzip" in response.json()["error"]["message"]


@pytest.mark.case("compressed-body")
@pytest.mark.parametrize("encode", [gzip.compress, zlib.compress, raw_deflate])
async def test_a_body_that_grows_beyond_the_limit_is_not_decompressed_to_its_end(
    make_bench: MakeBench, encode: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(max_body_bytes=1 << 20)
    sizes = []
    real = zlib.decompressobj

    class Counting:
        def __init__(self, wbits: int) -> None:
            self._real = real(wbits)

        def decompress(self, body: bytes, max_length: int = 0) -> bytes:
            piece = self._real.decompress(body, max_length)
            sizes.append(len(piece))
            return piece

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

    bomb = encode(bytes(64 << 20))
    monkeypatch.setattr(zlib, "decompressobj", Counting)
    response = await post_coded(bench, bomb, "gzip" if encode is gzip.compress else "deflate")
    assert response.status_code == 413
    assert 1 << 20 < sum(sizes) <= (1 << 20) + (1 << 18)
    assert max(sizes) <= 1 << 18
