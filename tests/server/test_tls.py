from __future__ import annotations

import asyncio
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kvist import settings
from kvist.errors import ConfigError
from kvist.server.config import TlsOptions
from kvist.server.serve import http_server
from tests.server.conftest import MakeBench

BOUND_S = 30.0


@pytest.fixture
def certificate(tmp_path: Path) -> dict[str, Any]:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return {"ssl_certfile": certificate, "ssl_keyfile": key}


async def test_a_server_with_a_certificate_serves_https(make_bench: MakeBench, certificate: dict[str, Any]) -> None:
    bench = make_bench(port=0)
    tls = TlsOptions(**certificate)
    server = http_server(bench.app, bench.app.traffic, bench.config, tls)
    task = asyncio.create_task(server.serve())
    async with asyncio.timeout(BOUND_S):
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        context = ssl.create_default_context(cafile=certificate["ssl_certfile"])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
        writer.write(b"no HTTP at all\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400")
        writer.close()
        server.should_exit = True
        await task
    assert (tls.scheme, TlsOptions().scheme) == ("https", "http")


async def test_a_certificate_that_cannot_be_used_is_an_error_at_start(
    make_bench: MakeBench, certificate: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="need each other"):
        TlsOptions(ssl_certfile=certificate["ssl_certfile"])
    bench = make_bench()
    for keyfile in (tmp_path / "nowhere.pem", certificate["ssl_certfile"]):
        tls = TlsOptions(ssl_certfile=certificate["ssl_certfile"], ssl_keyfile=keyfile)
        with pytest.raises(ConfigError, match="--ssl-keyfile"):
            http_server(bench.app, bench.app.traffic, bench.config, tls)


def test_serve_and_router_have_the_certificate_options() -> None:
    flags = ["--ssl-certfile", "c.pem", "--ssl-keyfile", "k.pem"]
    for verb, argv in (("serve", flags), ("router", ["--worker-urls", "http://a:1", *flags])):
        read = settings.read(verb, argv, {})
        assert isinstance(read, settings.ServeSettings | settings.RouterSettings)
        assert read.gateway.tls.scheme == "https"
