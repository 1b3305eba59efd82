"""Requests of other benchmarks and evaluations, as recorded (docs/clients.md), and the fields that they read."""

from __future__ import annotations

from typing import Any

import pytest

from kvist.testing.gateway_bench import GatewayBench, events_of

USER = {"role": "user", "content": "The capital of France is"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "1 0 m0 Hard pass have"}]}
COUNTED = {"include_usage": True, "continuous_usage_stats": True}
STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "guidellm 0.8.1, chats": (
        "/v1/chat/completions",
        {"stream_options": COUNTED, "max_completion_tokens": 3, "ignore_eos": True, "messages": [PARTS]},
    ),
    "guidellm 0.8.1, completions": (
        "/v1/completions",
        {"stream_options": COUNTED, "max_tokens": 3, "ignore_eos": True, "prompt": "1 0 m0 Hard pass have"},
    ),
    "aiperf 0.13.0, chats": (
        "/v1/chat/completions",
        {"messages": [USER], "max_completion_tokens": 3, "stream_options": {"include_usage": True}},
    ),
    "bench_serving 0.5.23, sglang-oai": (
        "/v1/completions",
        {"prompt": " Ho", "best_of": 1, "max_tokens": 3, "temperature": 0.0, "ignore_eos": True},
    ),
    "bench_serving 0.5.23, sglang-oai-chat": (
        "/v1/chat/completions",
        {"messages": [USER], "max_completion_tokens": 3, "temperature": 0.0, "ignore_eos": True},
    ),
    "bench_serving 0.5.23, sglang": (
        "/generate",
        {
            "text": " Ho",
            "sampling_params": {"temperature": 0.0, "max_new_tokens": 3, "ignore_eos": True},
            "lora_path": None,
            "return_logprob": False,
            "return_routed_experts": False,
            "logprob_start_len": -1,
        },
    ),
}
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "lm-eval 0.4.13, local-completions": (
        "/v1/completions",
        {"prompt": [[50, 35, 82]], "max_tokens": 12, "temperature": 0.0, "stop": ["\n", ".", "<|end|>"], "seed": 1234},
    ),
    "lm-eval 0.4.13, local-chat-completions": (
        "/v1/chat/completions",
        {"messages": [USER], "max_tokens": 12, "temperature": 0.0, "stop": ["\n", "."], "seed": 1234},
    ),
}


@pytest.mark.parametrize("client", STREAMS)
async def test_a_stream_for_a_benchmark_client_has_three_tokens_and_usage(bench: GatewayBench, client: str) -> None:
    path, body = STREAMS[client]
    model = {} if path == "/generate" else {"model": "tiny"}
    response = await bench.post(path, {**body, **model, "stream": True})
    assert response.status_code == 200, response.text
    assert "x-kvist-ignored" not in response.headers
    *events, done = events_of(response)
    assert done == "[DONE]"
    if path == "/generate":
        assert [event["meta_info"]["completion_tokens"] for event in events] == [1, 2, 3]
    elif "stream_options" in body:
        assert events[-1]["usage"]["completion_tokens"] == 3
        everywhere = body["stream_options"].get("continuous_usage_stats", False)
        assert all((event["usage"] is not None) == everywhere for event in events[:-1])


@pytest.mark.parametrize("client", WHOLE)
async def test_an_answer_for_an_evaluation_client_is_complete(bench: GatewayBench, client: str) -> None:
    path, body = WHOLE[client]
    response = await bench.post(path, {**body, "model": "tiny"})
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert "hello" in (choice.get("text"), choice.get("message", {}).get("content"))


async def test_the_endpoints_that_clients_query_first_answer(bench: GatewayBench) -> None:
    for path in ("/health", "/v1/models", "/server_info", "/metrics", "/tokenizer_info"):
        assert (await bench.client.get(path)).status_code == 200, path
    assert (await bench.client.head("/metrics")).status_code == 200
    counted = await bench.post("/tokenize", {"prompt": "test", "add_special_tokens": False})
    assert counted.json()["count"] == 4
