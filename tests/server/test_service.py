"""The behaviour of every endpoint: limits, keys, ids, disconnects, health, metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvist.request import Role
from kvist.testing.gateway_bench import GatewayBench
from kvist.testing.specs import make_spec
from kvist.wire import EngineSpec
from tests.server.conftest import MakeBench


class RawClient:
    """One ASGI request whose client can disconnect at any time."""

    def __init__(self, app: Any, path: str, body: object) -> None:
        self.scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "headers": [(b"host", b"localhost")],
            "query_string": b"",
        }
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._inbox.put_nowait({"type": "http.request", "body": msgspec.json.encode(body), "more_body": False})
        self.sent: list[MutableMapping[str, Any]] = []
        self.first_body = asyncio.Event()
        self._app = app

    async def run(self) -> None:
        await self._app(self.scope, self._inbox.get, self._send)

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.first_body.set()

    def leave(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 2])
async def test_a_client_that_leaves_closes_every_engine_stream(bench: GatewayBench, stream: bool, n: int) -> None:
    bench.dispatcher.hold = asyncio.Event()  # never set
    client = RawClient(bench.app, "/v1/completions", {"prompt": "x", "stream": stream, "n": n})
    task = asyncio.create_task(client.run())
    while bench.dispatcher.num_open < n:
        await asyncio.sleep(0)
    if stream:
        await client.first_body.wait()
    client.leave()
    ended, _ = await asyncio.wait({task}, timeout=60)
    assert task in ended
    assert bench.dispatcher.num_open == 0
    assert bench.dispatcher.num_closed_early == n
    assert "kvist:client_disconnects_total 1.0" in (await bench.client.get("/metrics")).text
    assert "kvist:gateway_requests_in_flight 0.0" in (await bench.client.get("/metrics")).text


async def test_a_server_that_stops_cancels_the_stream_and_the_engines(bench: GatewayBench) -> None:
    bench.dispatcher.hold = asyncio.Event()
    client = RawClient(bench.app, "/v1/completions", {"prompt": "x", "stream": True})
    task = asyncio.create_task(client.run())
    await client.first_body.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.dispatcher.num_open == 0


async def test_a_request_over_the_limit_of_open_generations_is_a_429(make_bench: MakeBench) -> None:
    bench = make_bench(max_concurrent_requests=2)
    bench.dispatcher.hold = asyncio.Event()
    first = asyncio.create_task(bench.chat(n=2))
    while bench.dispatcher.num_open < 2:
        await asyncio.sleep(0)
    refused = await bench.chat()
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "overloaded"
    bench.dispatcher.hold.set()
    assert (await first).status_code == 200
    assert (await bench.chat()).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_over_the_time_limit_gets_a_timeout_error(make_bench: MakeBench, stream: bool) -> None:
    bench = make_bench(request_timeout_s=0.02)
    bench.dispatcher.hold = asyncio.Event()
    response = await bench.chat(stream=stream)
    assert "longer than 0.02 s" in response.text
    assert response.status_code == (200 if stream else 504)
    assert bench.dispatcher.num_open == 0
    assert 'kvist:request_failure_total{code="timeout"} 1.0' in (await bench.client.get("/metrics")).text


async def test_a_client_that_reads_nothing_is_disconnected_at_the_time_limit(make_bench: MakeBench) -> None:
    bench = make_bench(request_timeout_s=0.02)
    client = RawClient(bench.app, "/v1/completions", {"prompt": "x", "stream": True})

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()  # as uvicorn does while the client's buffers are full

    async with asyncio.timeout(60):
        await bench.app(client.scope, client._inbox.get, send)
    assert bench.dispatcher.num_open == 0
    assert "kvist:gateway_requests_in_flight 0.0" in (await bench.client.get("/metrics")).text


async def test_a_body_that_never_ends_is_a_408(make_bench: MakeBench) -> None:
    bench = make_bench(body_timeout_s=0.02)

    async def first_piece_only() -> dict[str, Any]:
        if not is_sent:
            is_sent.append(True)
            return {"type": "http.request", "body": b"{", "more_body": True}
        return await asyncio.Event().wait()  # type: ignore[return-value]

    is_sent: list[bool] = []
    client = RawClient(bench.app, "/v1/completions", {})
    await bench.app(client.scope, first_piece_only, client._send)
    assert client.sent[0]["status"] == 408


async def test_the_api_key_guards_all_but_health_and_ready(make_bench: MakeBench) -> None:
    bench = make_bench(api_key=("sesam",))
    for path in ("/v1/models", "/server_info", "/metrics", "/nowhere"):
        assert (await bench.client.get(path)).status_code == 401
        assert (await bench.client.get(path, headers={"authorization": "Bearer wrong"})).status_code == 401
        assert (await bench.client.get(path, headers={"authorization": "Basic sesam"})).status_code == 401
    assert (await bench.chat()).json()["error"]["code"] == "invalid_api_key"
    assert (await bench.client.get("/v1/models", headers={"authorization": "Bearer sesam"})).status_code == 200
    assert (await bench.client.get("/health")).status_code == 200
    assert (await bench.client.get("/ready")).status_code == 200
    assert not bench.dispatcher.requests


async def test_the_response_has_the_clients_request_id_or_a_new_one(bench: GatewayBench) -> None:
    assert (await bench.client.get("/health", headers={"x-request-id": "abc-1"})).headers["x-request-id"] == "abc-1"
    assert (await bench.client.get("/nowhere", headers={"x-request-id": "abc-1"})).headers["x-request-id"] == "abc-1"
    made = (await bench.client.get("/health", headers={"x-request-id": "a b"})).headers["x-request-id"]
    assert made != "a b"
    assert len(made) == 32


async def test_ready_depends_on_the_workers_and_health_does_not(bench: GatewayBench) -> None:
    assert (await bench.client.get("/ready")).status_code == 200
    bench.dispatcher.can_serve = False
    assert (await bench.client.get("/ready")).status_code == 503
    assert (await bench.client.get("/health")).status_code == 200


async def test_a_prefill_or_decode_worker_is_ready_when_its_engine_is(make_bench: MakeBench, busy: Any) -> None:
    spec: EngineSpec = busy.workers[0].spec
    loading = make_bench(own_role=Role.DECODE)
    assert (await loading.client.get("/ready")).status_code == 503
    assert (await loading.client.get("/server_info")).json()["engine"] is None
    loaded = make_bench(own_role=Role.DECODE, own_engine=spec)
    assert (await loaded.client.get("/ready")).status_code == 200
    for path in ("/server_info", "/get_server_info"):
        engine = (await loaded.client.get(path)).json()["engine"]
        assert msgspec.convert(engine, EngineSpec, strict=True) == spec


async def test_models_are_listed_and_found(make_bench: MakeBench) -> None:
    bench = make_bench(model_name="org/name")
    (model,) = (await bench.client.get("/v1/models")).json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("org/name", "model", 200)
    assert (await bench.client.get("/v1/models/org/name")).json() == model
    assert (await bench.client.get("/v1/models/tiny")).status_code == 404
    assert (await bench.chat(model="org/name")).status_code == 200


async def test_tokenize_and_detokenize_are_inverse(bench: GatewayBench) -> None:
    found = (await bench.post("/tokenize", {"prompt": "hé<|end|>", "return_token_strs": True})).json()
    assert (found["count"], found["max_model_len"]) == (4, 200)
    assert found["token_strs"][0] == "h"
    assert (await bench.post("/detokenize", {"tokens": found["tokens"]})).json()["prompt"] == "hé<|end|>"
    chat = {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"mood": "!"}}
    assert (await bench.post("/tokenize", chat)).json()["count"] == len("<user>a<assistant>!")
    assert (await bench.post("/tokenize", {})).status_code == 400
    assert (await bench.post("/detokenize", {"tokens": [9999]})).json()["error"]["param"] == "tokens"


async def test_flush_cache_counts_the_pages_of_all_workers(bench: GatewayBench) -> None:
    body = (await bench.client.post("/flush_cache")).json()
    assert body == {"success": True, "num_pages": 12, "workers": {"p:1": 5, "d:1": 7}}
    for tier in ("device", "host"):
        assert (await bench.client.post(f"/flush_cache?tier={tier}")).status_code == 200
    assert bench.dispatcher.flushed == [None, "device", "host"]


@pytest.mark.parametrize(
    ("query", "param", "says"),
    [
        ("tier=storage", "tier", "remove its folder"),
        ("tier=all", "tier", "remove its folder"),
        ("tier=gpu", "tier", "use device or host"),
        ("tier=", "tier", "use device or host"),
        ("tier=host&tier=device", "tier", "once"),
        ("level=host", "level", "takes only `tier`"),
    ],
)
async def test_a_tier_that_cannot_be_flushed_is_refused(bench: GatewayBench, query: str, param: str, says: str) -> None:
    response = await bench.client.request("POST", f"/flush_cache?{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert says in response.json()["error"]["message"]
    assert bench.dispatcher.flushed == []


async def test_metrics_count_requests_tokens_and_workers(bench: GatewayBench, busy: Any) -> None:
    bench.dispatcher.snapshots = busy
    await bench.chat()
    text = (await bench.client.get("/metrics")).text
    for line in (
        "kvist:generation_tokens_total 6.0",
        "kvist:prompt_tokens_total 19.0",
        "kvist:cached_prompt_tokens_total 4.0",
        'kvist:request_success_total{finished_reason="stop"} 1.0',
        "kvist:time_to_first_token_seconds_count 1.0",
        "kvist:inter_token_latency_seconds_count 5.0",
        'kvist:e2e_request_latency_seconds_bucket{le="+Inf"} 1.0',
        'kvist:num_requests_running{role="decode",worker="d:1"} 3.0',
        'kvist:kv_cache_usage_perc{role="decode",worker="d:1"} 0.5',
        'kvist:kv_pages{role="decode",state="in_flight",worker="d:1"} 2.0',
        'kvist:storage_attached{role="decode",worker="d:1"} 1.0',
        'kvist:storage_breaker_open{role="decode",worker="d:1"} 1.0',
        'kvist:storage_quarantined_pages{role="decode",worker="d:1"} 128.0',
        'kvist:storage_stored_bytes{role="decode",worker="d:1"} 1000.0',
        'kvist:worker_storage_errors_total{errno="EIO",role="decode",worker="d:1"} 3.0',
        'kvist:worker_handoffs_received_total{role="decode",worker="d:1"} 9.0',
    ):
        assert line in text, line


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="read from /proc")
async def test_metrics_have_the_processor_time_of_the_gateway(bench: GatewayBench) -> None:
    text = (await bench.client.get("/metrics")).text
    spent = [line.split() for line in text.splitlines() if line.startswith("process_cpu_seconds_total")]
    assert [0.0 < float(value) <= time.process_time() + 0.02 for _, value in spent] == [True]


async def test_long_prompts_are_tokenised_like_short_prompts(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.dispatcher.spec = make_spec(max_model_len=20_000)
    await bench.post("/v1/completions", {"prompt": "x" * 10_000})
    assert bench.dispatcher.requests[0].num_prompt_tokens == 10_000
