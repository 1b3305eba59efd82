"""Every HTTP request, refused ones too, leaves a log line and a count; the root path describes the server."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

import pytest

from kvist.errors import WorkerLost
from kvist.testing.gateway_bench import GatewayBench
from tests.server.conftest import MakeBench

CHAT = b'{"messages":[{"role":"user","content":"hi"}]}'


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    found = [record for record in caplog.records if record.name == "kvist.access" and record.levelno >= level]
    return [record.getMessage() for record in found]


async def test_the_access_log_has_a_line_with_tokens_and_id_of_every_request(
    bench: GatewayBench, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        await bench.client.post("/v1/chat/completions?secret=1", content=CHAT, headers={"x-request-id": "abc"})
    (line,) = lines(caplog)
    assert line.startswith("POST /v1/chat/completions 200 ")
    assert " ms in=19 out=6 cached=4 id=abc client=" in line
    assert "secret" not in line


async def test_the_access_log_marks_a_stream_that_an_error_ended(
    bench: GatewayBench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.dispatcher.error, bench.dispatcher.error_after = WorkerLost("gone"), 2
    with caplog.at_level(logging.INFO):
        await bench.client.post("/v1/chat/completions", content=CHAT[:-1] + b',"stream":true}')
    (line,) = lines(caplog)
    assert line.startswith("POST /v1/chat/completions 200 ")
    assert " in=19 out=2 cached=4 unfinished id=" in line


async def test_the_access_log_records_a_disconnected_client_as_499(
    bench: GatewayBench, caplog: pytest.LogCaptureFixture
) -> None:
    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        raise AssertionError(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
        "client": None,
    }
    with caplog.at_level(logging.INFO):
        await bench.app(scope, gone, send)
    assert lines(caplog)[0].startswith("POST /v1/completions 499 ")


async def test_refused_requests_are_logged_and_counted_by_route_and_status(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    bench = make_bench(api_key=("k",))
    keyed = {"authorization": "Bearer k"}
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            await bench.client.post("/v1/chat/completions", content=CHAT)
        await bench.client.post("/v1/completions", content=b"x", headers={**keyed, "content-type": "text/plain"})
        await bench.client.get("/v1/models/a/b", headers=keyed)
        await bench.client.get("/made/up", headers=keyed)
        await bench.client.request("BREW", "/pot", headers=keyed)
        await bench.client.get("/health")
    assert [line.split()[2] for line in lines(caplog)] == ["401", "401", "415", "404", "404", "404"]
    exposition = (await bench.client.get("/metrics", headers=keyed)).text
    for labels, count in (
        ('method="POST",path="/v1/chat/completions",status="401"', 2),
        ('method="POST",path="/v1/completions",status="415"', 1),
        ('method="GET",path="/v1/models/*",status="404"', 1),
        ('method="GET",path="other",status="404"', 1),
        ('method="other",path="other",status="404"', 1),
        ('method="GET",path="/health",status="200"', 1),
    ):
        assert f"kvist:http_requests_total{{{labels}}} {count}.0" in exposition


async def test_polls_are_logged_at_debug_only_and_the_access_log_can_be_disabled(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    bench = make_bench(api_key=("k",))
    bench.dispatcher.can_serve = False
    keyed = {"authorization": "Bearer k"}
    with caplog.at_level(logging.DEBUG, "kvist.access"):
        for path in ("/health", "/ready", "/server_info", "/metrics"):
            await bench.client.get(path, headers=keyed)
        assert [line.split()[2] for line in lines(caplog, logging.DEBUG)] == ["200", "503", "200", "200"]
        assert lines(caplog) == []
        await bench.client.get("/metrics")
        assert [line.split()[1:3] for line in lines(caplog)] == [["/metrics", "401"]]
        await make_bench(access_log=False).client.get("/nowhere")
    assert len(lines(caplog)) == 1


async def test_the_root_path_describes_the_server(make_bench: MakeBench) -> None:
    body = (await make_bench().client.get("/")).json()
    assert "Kvist" in body["server"]
    assert "POST /v1/chat/completions" in body["generate"]
    bench = make_bench(api_key=("k",))
    assert (await bench.client.get("/")).json()["api_key"] == "required"
    for entry in [*body["generate"], *body["look"]]:
        method, path = entry.split()
        response = await bench.client.request(method, path, headers={"authorization": "Bearer k"})
        assert response.status_code not in (404, 405), entry
