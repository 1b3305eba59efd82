"""GET /requests, GET /requests/ID and the header x-kvist-trace, over a scripted dispatcher."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from kvist.errors import WorkerLost
from kvist.flight.flight_log import FlightLog
from kvist.server.config import ServerConfig
from kvist.testing.gateway_bench import GatewayBench, events_of, gateway_bench


async def listed(bench: GatewayBench, query: str = "") -> list[dict[str, Any]]:
    response = await bench.client.get(f"/requests{query}")
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["requests"]
    return found


async def chat_with(bench: GatewayBench, headers: dict[str, str]) -> httpx.Response:
    return await bench.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, **headers)


async def test_a_finished_request_has_a_record_without_its_texts() -> None:
    bench = gateway_bench()
    async with bench.client:
        answer = await bench.chat("a secret question")
        [record] = await listed(bench)
        assert record == (await bench.client.get(f"/requests/{answer.headers['x-request-id']}")).json()
        assert record == (await bench.client.get(f"/requests/{answer.json()['id']}")).json()
    assert record["id"] == answer.headers["x-request-id"]
    assert (record["endpoint"], record["model"], record["status"]) == ("/v1/chat/completions", "tiny", "finished")
    assert (record["prompt_tokens"], record["completion_tokens"], record["finish_reason"]) == (23, 6, "stop")
    assert record["cached_tokens"] == {"device": 1, "host": 2, "storage": 1}
    assert record["workers"] == ["p:1", "d:1"]
    assert record["trace_id"] is None
    assert "secret" not in str(record)
    assert "hello" not in str(record)


class TickingClock:
    """A millisecond passes between two readings."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def now_s(self) -> float:
        self._now_s += 0.001
        return self._now_s


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
async def test_the_stages_of_the_gateway_are_in_order_and_cover_the_time(n: int, stream: bool) -> None:
    bench = gateway_bench(clock=TickingClock())
    async with bench.client:
        await bench.chat(n=n, stream=stream, response_format={"type": "json_object"})
        [record] = await listed(bench)
    names = [stage["name"] for stage in record["stages"]]
    assert names == ["received", "tokenised", "grammar", "detokenised", "sent"]
    assert {stage["where"] for stage in record["stages"]} == {"gateway"}
    assert sum(stage["duration_s"] for stage in record["stages"]) == pytest.approx(record["duration_s"], abs=1e-4)
    assert record["duration_s"] > record["ttft_s"] > 0


async def test_the_newest_requests_are_kept_and_listed_first() -> None:
    bench = gateway_bench(flights=FlightLog(3))
    async with bench.client:
        for number in range(5):
            await bench.post("/generate", {"text": "hi"}, **{"x-request-id": f"r{number}"})
        assert [each["id"] for each in await listed(bench)] == ["r4", "r3", "r2"]
        assert [each["id"] for each in await listed(bench, "?limit=1")] == ["r4"]
        assert len(await listed(bench, "?order=slowest")) == 3
        assert await listed(bench, "?status=failed,aborted") == []
        missing = await bench.client.get("/requests/r0")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "request_not_found"
    assert "--request-log-size" in missing.json()["error"]["message"]


async def test_a_log_of_size_0_records_nothing() -> None:
    bench = gateway_bench(flights=FlightLog(0))
    async with bench.client:
        await bench.chat()
        assert await listed(bench) == []
        traced = await chat_with(bench, {"x-kvist-trace": "1"})
        assert traced.json()["kvist"]["trace"]["status"] == "finished"
        assert await listed(bench) == []


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=x", "limit=1001", "order=best", "status=dead", "from=1", "order=slowest&order=recent"]
)
async def test_a_wrong_query_names_its_field(query: str) -> None:
    bench = gateway_bench()
    async with bench.client:
        response = await bench.client.get(f"/requests?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == query.partition("=")[0]


async def test_a_failed_request_says_why() -> None:
    bench = gateway_bench()
    bench.dispatcher.error, bench.dispatcher.error_after = WorkerLost("gone"), 2
    async with bench.client:
        await bench.chat()
        await bench.chat(stream=True)
        records = await listed(bench)
    assert [(each["status"], each["error"], each["finish_reason"]) for each in records] == [
        ("failed", "worker_lost", None)
    ] * 2
    assert records[0]["completion_tokens"] == 2


async def test_a_refused_body_has_no_record_and_a_refused_place_has_one() -> None:
    bench = gateway_bench(config=ServerConfig(max_concurrent_requests=1))
    async with bench.client:
        await bench.chat(temperature=-1)
        assert await listed(bench) == []
        await bench.chat(n=2)
        [record] = await listed(bench)
    assert (record["status"], record["error"], record["answers"]) == ("failed", "overloaded", 2)


async def test_a_request_under_way_is_listed_as_running() -> None:
    bench = gateway_bench()
    bench.dispatcher.hold = asyncio.Event()
    async with bench.client:
        task = asyncio.create_task(bench.chat())
        async with asyncio.timeout(60):
            while not (records := await listed(bench, "?status=running")) or not records[0]["completion_tokens"]:
                await asyncio.sleep(0.001)
        assert records[0]["ttft_s"] is not None
        bench.dispatcher.hold.set()
        await task
        assert await listed(bench, "?status=running") == []


async def test_a_client_that_leaves_aborts_its_request() -> None:
    bench = gateway_bench()
    bench.dispatcher.hold = asyncio.Event()
    async with bench.client:
        task = asyncio.create_task(bench.chat())
        async with asyncio.timeout(60):
            while not await listed(bench, "?status=running"):
                await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait({task})
        [record] = await listed(bench)
    assert (record["status"], record["error"]) == ("aborted", None)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate"])
async def test_a_response_shows_its_record_if_a_header_asks(path: str) -> None:
    bench = gateway_bench()
    prompts: dict[str, dict[str, object]] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
        "/v1/completions": {"prompt": "hi"},
        "/generate": {"text": "hi"},
    }
    prompt = prompts[path]
    async with bench.client:
        for asked in ({"x-kvist-trace": "1"}, {"x-kvist-trace": "0"}):
            whole = await bench.post(path, prompt, **asked)
            streamed = await bench.post(path, {**prompt, "stream": True}, **asked)
            traces = [
                whole.json().get("kvist", {}).get("trace"),
                next((each["kvist"]["trace"] for each in events_of(streamed) if "kvist" in each), None),
            ]
            if asked["x-kvist-trace"] == "0":
                assert traces == [None, None]
            else:
                assert [trace["status"] for trace in traces] == ["finished"] * 2
                assert traces[0]["id"] == whole.headers["x-request-id"]


async def test_a_wrong_trace_header_and_an_endpoint_without_traces_are_errors() -> None:
    bench = gateway_bench()
    async with bench.client:
        wrong = await chat_with(bench, {"x-kvist-trace": "yes" * 100})
        messages = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
        elsewhere = await bench.post("/v1/messages", messages, **{"x-kvist-trace": "1"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "x-kvist-trace")
    assert wrong.json()["error"]["message"] == (
        "the header x-kvist-trace is 'yesyesyesyesyesyesyesyesyesyesye'; use 1 to see the stages of the request in its "
        "response, or omit the header"
    )
    assert elsewhere.status_code == 400
    assert "GET /requests/ID" in elsewhere.json()["error"]["message"]


async def test_records_are_behind_the_api_key_and_without_one_on_this_host() -> None:
    bench = gateway_bench(config=ServerConfig(api_key=("k",)))
    async with bench.client:
        assert (await bench.client.get("/requests")).status_code == 401
        assert (await bench.client.get("/requests", headers={"x-api-key": "k"})).status_code == 200
    bench = gateway_bench()
    away = httpx.ASGITransport(bench.app, client=("10.0.0.9", 4000))
    async with httpx.AsyncClient(transport=away, base_url="http://localhost") as client:
        assert (await client.get("/requests")).status_code == 403
        assert (await client.get("/requests/x")).status_code == 403


async def test_the_trace_of_the_caller_is_in_the_record() -> None:
    bench = gateway_bench()
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    async with bench.client:
        await chat_with(bench, {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"})
        await chat_with(bench, {"traceparent": "00-" + "a" * 5000})
        newest, before = await listed(bench)
    assert before["trace_id"] == trace_id
    assert newest["trace_id"] is None


async def test_other_apis_are_recorded_too() -> None:
    bench = gateway_bench()
    async with bench.client:
        await bench.post(
            "/v1/messages", {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "a"}]}
        )
        await bench.post("/v1/responses", {"model": "tiny", "input": "hi"})
        await bench.post("/v1/prefill", {"prompt": "hi"})
        created = await bench.post("/v1/responses", {"model": "tiny", "input": "hi", "background": True})
        async with asyncio.timeout(60):
            while await listed(bench, "?status=running"):
                await asyncio.sleep(0.001)
        records = await listed(bench)
    assert created.status_code == 200
    assert [each["endpoint"] for each in records] == ["/v1/responses", "/v1/prefill", "/v1/responses", "/v1/messages"]
    assert {each["status"] for each in records} == {"finished"}
