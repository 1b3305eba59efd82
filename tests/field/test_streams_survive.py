"""Reports on workers that die with streams: vllm-ascend #13165, Dynamo #7930, #7634, SGLang #12355.

There, a failure of decode gave a 200 with an empty body, streams ended as if they were whole, or a migrated request
answered something else. Here a stream goes on elsewhere with the same tokens; an end without all tokens is an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest

from kvist.errors import PoisonousRequest
from kvist.request import FinishReason, Mode, Outcome, Role
from kvist.router.registry import Worker
from kvist.router.stream import FailoverCounts
from kvist.server.app import build_app
from kvist.server.config import ServerConfig
from kvist.testing.gateway_bench import events_of
from kvist.testing.router_bench import RouterBench, settle
from kvist.text import Tokenizer


class Gateway(RouterBench):
    """The gateway's HTTP over a real dispatcher, whose engines answer as the test says."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        app = build_app(dispatcher=self.dispatcher, tokenizer=tokenizer, config=ServerConfig(), model_name="tiny")
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1")

    def join(self, name: str, role: Role) -> Worker:
        return self.engines.join(name, role=role, vocab_size=300)

    async def complete(self, **fields: Any) -> asyncio.Task[httpx.Response]:
        body = {"prompt": [65, 66, 67], "max_tokens": 20, "kvist": {"report": True}, **fields}
        headers = {"content-type": "application/json"}
        post = self.client.post("/v1/completions", content=msgspec.json.encode(body), headers=headers)
        task = asyncio.create_task(post)
        for _ in range(20):
            await settle()
        return task

    @property
    def failovers(self) -> FailoverCounts:
        return self.dispatcher.snapshot().failovers


@pytest.fixture
async def gateway(letters: Tokenizer) -> AsyncIterator[Gateway]:
    made = Gateway(letters)
    async with made.client:
        yield made


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["dies", "fails"])
async def test_a_failure_of_decode_is_a_pause_and_not_an_empty_answer(gateway: Gateway, how: str, stream: bool) -> None:
    prefill, decode = gateway.join("p", Role.PREFILL), gateway.join("d", Role.DECODE)
    task = await gateway.complete(stream=stream, stream_options={"include_usage": True} if stream else None)
    gateway.engines.emit(prefill, 0, 65)
    gateway.engines.end(prefill)
    gateway.engines.emit(decode, 1, 66)
    spare = gateway.join("d2", Role.DECODE)
    await settle()
    if how == "dies":
        gateway.engines.lose(decode)
    else:
        gateway.engines.end(decode, Outcome.FAILED, error_code="unavailable", message="it stops")
    first, second = gateway.engines.submits(prefill)
    (asked,) = gateway.engines.submits(spare)
    assert asked.request.output_token_ids == second.request.output_token_ids == (65, 66)
    assert asked.request.sampling == first.request.sampling, "the seed that the gateway drew is kept"
    gateway.engines.emit(prefill, 2, 67)
    gateway.engines.emit(spare, 3, 68, 69, finish=FinishReason.STOP)
    for worker in (prefill, spare):
        gateway.engines.end(worker)
    response = await task
    assert response.status_code == 200
    if stream:
        *events, done = events_of(response)
        assert done == "[DONE]"
        text = "".join(event["choices"][0]["text"] for event in events if event["choices"])
        usage, report = events[-1]["usage"], next(event["kvist"] for event in events if "kvist" in event)
    else:
        body = response.json()
        text, usage, report = body["choices"][0]["text"], body["usage"], body["kvist"]
    assert text == "bcde"
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 5)
    assert (report["failovers"], report["decode_worker"]) == (1, "d2")
    assert gateway.failovers.num_resumed == 1
    assert gateway.idle()


async def test_a_stream_that_no_worker_takes_ends_with_an_error_event_and_not_as_if_it_were_whole(
    gateway: Gateway,
) -> None:
    worker = gateway.join("u", Role.UNIFIED)
    task = await gateway.complete(stream=True)
    gateway.engines.emit(worker, 0, 65)
    await settle()
    gateway.engines.lose(worker)
    await gateway.pass_time(4.5)
    assert not task.done()
    await gateway.pass_time(0.5)
    response = await task
    lines = response.text.split("\n\n")
    assert '"text":"b"' in lines[0]
    assert lines[-2].startswith('event: error\ndata: {"error":')
    assert '"code":"worker_lost"' in lines[-2]
    assert "[DONE]" not in response.text


async def test_a_request_that_no_worker_takes_is_a_503_with_retry_after_if_no_token_was_sent(gateway: Gateway) -> None:
    worker = gateway.join("u", Role.UNIFIED)
    task = await gateway.complete(stream=True)
    gateway.engines.lose(worker)
    await gateway.pass_time(5.0)
    response = await task
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["error"]["code"] == "worker_lost"


async def test_a_request_that_kills_four_workers_in_a_row_is_not_sent_to_a_fifth(gateway: Gateway) -> None:
    workers = [gateway.join(f"u{number}", Role.UNIFIED) for number in range(6)]
    task = await gateway.complete()
    for _ in range(4):
        (victim,) = (worker for worker in workers if worker.in_flight)
        gateway.engines.lose(victim)
        await gateway.pass_time(0.25)
    response = await task
    assert (response.status_code, response.json()["error"]["code"]) == (500, PoisonousRequest.code)
    assert "4 workers in a row were lost" in response.json()["error"]["message"]
    assert not any(worker.in_flight for worker in workers)


async def test_when_the_last_decode_worker_dies_prefill_writes_the_rest(gateway: Gateway) -> None:
    prefill, decode = gateway.join("p", Role.PREFILL), gateway.join("d", Role.DECODE)
    task = await gateway.complete()
    gateway.engines.emit(prefill, 0, 65)
    gateway.engines.end(prefill)
    gateway.engines.lose(decode)
    submit = gateway.engines.submits(prefill)[-1]
    assert (submit.mode, submit.request.output_token_ids) == (Mode.FULL, (65,))
    gateway.engines.emit(prefill, 1, 66, finish=FinishReason.STOP)
    report = (await task).json()["kvist"]
    assert (report["route"]["reason"], report["failovers"]) == ("no_decode", 1)
    again = await gateway.complete()
    gateway.engines.emit(prefill, 0, 66, finish=FinishReason.STOP)
    assert (await again).json()["kvist"]["route"]["reason"] == "no_decode", "new requests, too"


async def test_when_the_last_prefill_worker_dies_decode_computes_the_prompt(gateway: Gateway) -> None:
    prefill, decode = gateway.join("p", Role.PREFILL), gateway.join("d", Role.DECODE)
    task = await gateway.complete()
    (waiting,) = gateway.engines.submits(decode)
    gateway.engines.lose(prefill)
    assert gateway.engines.aborts(decode) == [waiting.request.request_id]
    submit = gateway.engines.submits(decode)[-1]
    assert (submit.mode, submit.request.output_token_ids) == (Mode.FULL, ())
    gateway.engines.emit(decode, 0, 65, 66, finish=FinishReason.STOP)
    report = (await task).json()["kvist"]
    assert (report["route"]["reason"], report["failovers"]) == ("no_prefill", 1)
