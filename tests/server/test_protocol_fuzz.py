"""For any input bytes, the server answers or closes the connection, logs no traceback, and serves the next client."""

from __future__ import annotations

import asyncio
import logging
import random

import pytest

from kvist.server.serve import http_server
from tests.server.conftest import MakeBench

NUM_MESSAGES = 400
BOUND_S = 60.0
BODY = b'{"prompt":"x","stream":true,"max_tokens":2}'
SEEDS = (
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET http://localhost/metrics?a=b HTTP/1.0\r\nHost: localhost\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY,
    b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY,
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"%x;ext=1\r\n%s\r\n0\r\nTrailer: x\r\n\r\n" % (len(BODY), BODY),
    b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
    b"PUT /flush_cache HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
)
PIECES = (
    b"\r\n",
    b"\n",
    b"\r",
    b" ",
    b":",
    b"\x00",
    b"\xff",
    b"%",
    b"%0a",
    b"HTTP/1.1",
    b"Host: a\r\n",
    b"-1",
    b"9" * 30,
)


def mutated(random_: random.Random) -> bytes:
    message = bytearray(b"".join(random_.choice(SEEDS) for _ in range(random_.randint(1, 3))))
    for _ in range(random_.randint(0, 4)):
        at = random_.randrange(len(message))
        what = random_.randrange(4)
        if what == 0:
            message[at] = random_.randrange(256)
        elif what == 1:
            del message[at : at + random_.randint(1, 20)]
        elif what == 2:
            message[at:at] = random_.choice(PIECES)
        else:
            message[at:at] = message[max(0, at - random_.randint(1, 40)) : at]
    return bytes(message[: random_.randint(1, len(message))]) if random_.random() < 0.2 else bytes(message)


async def test_the_server_survives_any_bytes_without_a_traceback_and_serves_the_next_client(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    bench = make_bench(port=0, header_timeout_s=0.3, body_timeout_s=0.3)
    server = http_server(bench.app, bench.app.traffic, bench.config)
    task = asyncio.create_task(server.serve())
    random_ = random.Random(1)
    async with asyncio.timeout(BOUND_S):
        while not server.started:
            await asyncio.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]

        async def send(message: bytes) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                cut = random_.randrange(len(message))
                for part in (message[:cut], message[cut:]):
                    writer.write(part)
                    await writer.drain()
                if writer.can_write_eof():
                    writer.write_eof()
                await reader.read()
            except ConnectionError:
                pass
            finally:
                writer.close()

        with caplog.at_level(logging.INFO):
            for _ in range(NUM_MESSAGES // 20):
                await asyncio.gather(*(send(mutated(random_)) for _ in range(20)))
            await send(SEEDS[2])
        server.should_exit = True
        await task
    assert [record for record in caplog.records if record.exc_info or record.levelno > logging.INFO] == []
    assert caplog.records[-1].getMessage().startswith("POST /v1/completions 200 ")
    assert bench.dispatcher.num_open == 0
