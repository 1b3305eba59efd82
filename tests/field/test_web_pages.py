"""Web pages in a browser: allowed origins may use the server, and no other page can trigger an effect."""

from __future__ import annotations

import httpx
import pytest

from kvist import settings
from kvist.errors import ConfigError
from kvist.testing.gateway_bench import GatewayBench
from tests.server.conftest import MakeBench

PAGE = "https://chat.example"
EVIL = "https://evil.example"
CHAT = b'{"messages":[{"role":"user","content":"hi"}]}'
JSON = {"content-type": "application/json"}


def message_of(response: httpx.Response) -> str:
    message: str = response.json()["error"]["message"]
    return message


# ---------------------------------------------------------------- pages without --allowed-origins


@pytest.mark.case("cross-site")
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate", "/tokenize", "/flush_cache"])
async def test_a_content_type_that_web_pages_can_send_is_a_415_that_names_the_header(
    bench: GatewayBench, path: str, kind: str
) -> None:
    response = await bench.client.post(path, content=CHAT, headers={"content-type": kind})
    assert response.status_code == 415
    assert "'Content-Type: application/json'" in message_of(response)
    assert bench.dispatcher.requests == []
    assert bench.dispatcher.flushed == []


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/x.y+json", None])
async def test_json_content_types_and_a_missing_content_type_are_accepted(
    bench: GatewayBench, kind: str | None
) -> None:
    headers = {} if kind is None else {"content-type": kind}
    response = await bench.client.post("/v1/chat/completions", content=CHAT, headers=headers)
    assert response.status_code == 200


@pytest.mark.case("cross-site")
async def test_get_requests_change_nothing(bench: GatewayBench) -> None:
    response = await bench.client.get("/flush_cache")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert bench.dispatcher.flushed == []


@pytest.mark.case("cross-site")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
@pytest.mark.parametrize("origin", [EVIL, "null", "https://localhost.evil.example", "http://[", "file://"])
async def test_on_loopback_without_a_key_a_foreign_origin_is_refused(
    make_bench: MakeBench, host: str, origin: str
) -> None:
    bench = make_bench(host=host)
    response = await bench.client.post("/flush_cache", headers={"origin": origin})
    assert response.status_code == 403
    assert bench.dispatcher.flushed == []


@pytest.mark.case("cross-site")
@pytest.mark.parametrize("host", ["evil.example", "evil.example:30000", "127.0.0.1.evil.example", "", "[", "10.0.0.1"])
async def test_on_loopback_without_a_key_a_foreign_host_is_refused(bench: GatewayBench, host: str) -> None:
    for path, method in (("/v1/models", "GET"), ("/metrics", "GET"), ("/hicache/storage-backend", "PUT")):
        response = await bench.client.request(method, path, headers={**JSON, "host": host}, content=b"{}")
        assert response.status_code == 403
        assert "--api-key" in message_of(response)
    assert bench.dispatcher.storage_commands == []


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:30000", "127.0.0.1:1", "[::1]:30000", "LOCALHOST.", "a.localhost"]
)
async def test_local_host_names_are_accepted_as_host_and_origin(bench: GatewayBench, host: str) -> None:
    response = await bench.client.get("/v1/models", headers={"host": host, "origin": f"http://{host}"})
    assert response.status_code == 200


async def test_host_and_origin_are_free_with_an_api_key_or_a_public_address(
    make_bench: MakeBench,
) -> None:
    foreign = {"host": "kvist.example", "origin": "https://kvist.example"}
    keyed = {**foreign, "authorization": "Bearer k"}
    assert (await make_bench(host="0.0.0.0").client.get("/v1/models", headers=foreign)).status_code == 200
    assert (await make_bench(api_key=("k",)).client.get("/v1/models", headers=keyed)).status_code == 200
    named = make_bench(allowed_origins=("https://kvist.example",))
    assert (await named.client.get("/v1/models", headers=foreign)).status_code == 200


# ---------------------------------------------------------------- pages of allowed origins


def preflight(origin: str, headers: str = "authorization, content-type, x-stainless-os") -> dict[str, str]:
    return {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": headers,
    }


@pytest.mark.case("cors")
@pytest.mark.parametrize(("allowed", "answered"), [((PAGE,), PAGE), ((PAGE, "http://b"), PAGE), (("*",), "*")])
async def test_a_page_of_an_allowed_origin_can_read_responses_streams_and_errors(
    make_bench: MakeBench, allowed: tuple[str, ...], answered: str
) -> None:
    bench = make_bench(allowed_origins=allowed, api_key=("k",))
    preflight_response = await bench.client.options("/v1/chat/completions", headers=preflight(PAGE))  # carries no key
    assert preflight_response.status_code == 200
    assert preflight_response.headers["access-control-allow-origin"] == answered
    assert "POST" in preflight_response.headers["access-control-allow-methods"]
    assert "authorization" in preflight_response.headers["access-control-allow-headers"]
    body = CHAT[:-1] + b',"stream":true}'
    keyed = {**JSON, "origin": PAGE, "authorization": "Bearer k"}
    stream = await bench.client.post("/v1/chat/completions", content=body, headers=keyed)
    assert stream.text.endswith("data: [DONE]\n\n")
    unkeyed = await bench.client.post("/v1/chat/completions", content=body, headers={**JSON, "origin": PAGE})
    assert unkeyed.status_code == 401
    for response in (stream, unkeyed):
        assert response.headers["access-control-allow-origin"] == answered
        assert "x-request-id" in response.headers["access-control-expose-headers"].lower()


@pytest.mark.case("cors")
async def test_other_origins_get_no_cors_permission(make_bench: MakeBench) -> None:
    for bench in (make_bench(), make_bench(allowed_origins=(PAGE,)), make_bench(host="0.0.0.0")):
        preflight_response = await bench.client.options("/v1/chat/completions", headers=preflight(EVIL))
        assert preflight_response.status_code in (400, 403, 405)
        answer = await bench.client.post("/v1/chat/completions", content=CHAT, headers={**JSON, "origin": EVIL})
        for response in (preflight_response, answer):
            assert "access-control-allow-origin" not in response.headers


@pytest.mark.case("cors")
def test_an_invalid_origin_is_refused_at_start() -> None:
    read = settings.read("serve", ["--allowed-origins", PAGE, "http://localhost:3000"], {})
    assert isinstance(read, settings.ServeSettings)
    assert read.gateway.server.allowed_origins == (PAGE, "http://localhost:3000")
    for wrong in ("chat.example", PAGE + "/", PAGE + "/page", "ftp://a", '["*"]', "https://"):
        with pytest.raises(ConfigError, match="--allowed-origins"):
            settings.read("serve", ["--allowed-origins", wrong], {})
