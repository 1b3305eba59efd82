"""The application under its real server, with the clients that users have."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from kvist.errors import WorkerLost
from kvist.server.serve import http_server
from kvist.testing.gateway_bench import GatewayBench
from tests.server.conftest import MakeBench

BOUND_S = 60.0


@asynccontextmanager
async def served(bench: GatewayBench) -> AsyncIterator[str]:
    server = http_server(bench.app, bench.app.traffic, bench.config)
    task = asyncio.create_task(server.serve())
    async with asyncio.timeout(BOUND_S):
        while not server.started:
            await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, BOUND_S)


async def test_a_broken_connection_closes_the_stream_of_the_engine(make_bench: MakeBench) -> None:
    bench = make_bench(port=0)
    bench.dispatcher.hold = asyncio.Event()  # never set
    async with served(bench) as url, httpx.AsyncClient() as client:
        async with client.stream("POST", f"{url}/v1/completions", json={"prompt": "x", "stream": True}) as response:
            async for _ in response.aiter_bytes():
                break
        await asyncio.wait_for(bench.dispatcher.closed.wait(), BOUND_S)
    assert bench.dispatcher.num_closed_early == 1


async def test_the_openai_client_gets_chats_streams_and_errors(make_bench: MakeBench) -> None:
    openai = pytest.importorskip("openai")
    bench = make_bench(port=0, api_key=("sesam",))
    messages = [{"role": "user", "content": "hi"}]
    async with (
        served(bench) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="sesam", max_retries=0) as client,
    ):
        chat = client.chat.completions
        answer = await chat.create(model="tiny", messages=messages, logprobs=True, top_logprobs=1, n=2)
        assert [choice.message.content for choice in answer.choices] == ["hello", "hello"]
        assert answer.usage.prompt_tokens_details.cached_tokens == 4
        stream = await chat.create(
            model="tiny",
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"top_k": 5},
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "hello"
        assert chunks[-1].usage.completion_tokens == 6
        completion = await client.completions.create(model="tiny", prompt=["a", "b"], logprobs=2)
        assert [choice.text for choice in completion.choices] == ["hello", "hello"]
        assert [model.id async for model in client.models.list()] == ["tiny"]
        with pytest.raises(openai.NotFoundError, match="not served"):
            await chat.create(model="other", messages=messages)
        with pytest.raises(openai.BadRequestError, match="did you mean"):
            await chat.create(model="tiny", messages=messages, extra_body={"temprature": 1})
        bench.dispatcher.error, bench.dispatcher.error_after = WorkerLost("worker d:1 was lost"), 2
        broken = await chat.create(model="tiny", messages=messages, stream=True)
        with pytest.raises(openai.APIError, match="was lost"):
            [chunk async for chunk in broken]
    async with served(bench) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="no", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
