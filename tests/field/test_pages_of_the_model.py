"""The endpoints that describe server and model, as clients of vLLM and SGLang request them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvist.errors import WorkerLost
from kvist.request import Role
from kvist.server.not_served import NOT_SERVED
from kvist.testing.gateway_bench import GatewayBench
from tests.server.conftest import MakeBench


async def test_v1_models_has_vllms_fields(bench: GatewayBench) -> None:
    (model,) = (await bench.client.get("/v1/models")).json()["data"]
    assert (model["id"], model["root"], model["parent"], model["max_model_len"]) == ("tiny", "tiny", None, 200)
    assert model["permission"][0]["allow_sampling"] is True


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
async def test_model_info_has_sglangs_fields(bench: GatewayBench, path: str) -> None:
    info = (await bench.client.get(path)).json()
    assert (info["model_path"], info["served_model_name"], info["is_generation"]) == ("tiny", "tiny", True)
    assert info["tokenizer_path"] == "tiny"


async def test_tokenizer_info_has_vllms_fields(bench: GatewayBench) -> None:
    info = (await bench.client.get("/tokenizer_info")).json()
    template = bench.dispatcher.tokenizer.chat_template
    assert template is not None
    assert info["chat_template"] == template.source
    assert info["added_tokens_decoder"] == {"256": {"content": "<|end|>", "special": True}}
    assert (info["vocab_size"], info["model_max_length"]) == (257, 200)


@pytest.mark.parametrize("num_tokens_before", [0, 1])  # a prefill worker alone can produce the first token
async def test_health_generate_needs_a_token_of_prefill_and_one_of_decode(
    bench: GatewayBench, num_tokens_before: int
) -> None:
    assert (await bench.client.get("/health_generate")).status_code == 200
    (request,) = bench.dispatcher.requests
    assert request.sampling.max_tokens == 2
    assert (bench.dispatcher.num_open, bench.dispatcher.num_closed_early) == (0, 0)
    bench.dispatcher.error = WorkerLost("worker d:1 was lost")
    bench.dispatcher.error_after = num_tokens_before
    response = await bench.client.get("/health_generate")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "worker_lost")


async def test_probes_at_the_same_time_share_one_request(bench: GatewayBench) -> None:
    answers = await asyncio.gather(*(bench.client.get("/health_generate") for _ in range(5)))
    assert [answer.status_code for answer in answers] == [200] * 5
    assert len(bench.dispatcher.requests) == 1


async def test_health_generate_without_a_token_fails_in_bounded_time(
    bench: GatewayBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvist.server.model_endpoints._PROBE_TIMEOUT_S", 0.01)
    never = asyncio.Event()

    async def silent(_request: object) -> Any:
        try:
            await never.wait()
            yield None
        finally:
            bench.dispatcher.num_closed_early += 1

    monkeypatch.setattr(bench.dispatcher, "generate", silent)
    response = await bench.client.get("/health_generate")
    assert response.status_code == 503
    assert "within 0.01 s" in response.json()["error"]["message"]
    assert bench.dispatcher.num_closed_early == 1


async def test_health_generate_of_a_decode_worker_names_the_router(make_bench: MakeBench) -> None:
    bench = make_bench(own_role=Role.DECODE)
    for path in ("/health_generate", "/tokenizer_info"):
        response = await bench.client.get(path)
        assert response.status_code == 400
        assert "router" in response.json()["error"]["message"]


async def test_sglangs_and_vllms_requests_to_flush_the_cache_work(bench: GatewayBench) -> None:
    sglang = await bench.client.post("/flush_cache?timeout=60.0")
    assert (sglang.status_code, sglang.headers["x-kvist-ignored"]) == (200, "timeout")
    assert (await bench.client.post("/reset_prefix_cache")).json()["success"] is True
    assert (await bench.client.post("/reset_prefix_cache?reset_external=false")).status_code == 200
    assert bench.dispatcher.flushed == [None] * 3
    for query in ("reset_running_requests=true", "tier=device&tier=host", "timeuot=1"):
        assert (await bench.client.post(f"/reset_prefix_cache?{query}")).status_code == 400
    assert (await bench.client.post("/flush_cache?tier=host&timeout=1")).status_code == 200
    assert bench.dispatcher.flushed[3:] == ["host"]


@pytest.mark.parametrize(
    ("path", "works"),
    [
        ("/v1/responses/compact", "/v1/responses"),
        ("/v1/messages/batches", "/v1/messages"),
        ("/v1/messages/batches/b_1/cancel", "/v1/messages"),
        ("/v1/embeddings", "/v1/completions"),
        ("/v1/audio/transcriptions", "only text"),
        ("/rerank", "only text"),
        ("/update_weights_from_tensor", "--model-path"),
    ],
)
async def test_an_endpoint_that_is_not_served_is_a_404_that_names_an_alternative(
    bench: GatewayBench, path: str, works: str
) -> None:
    response = await bench.post(path, {"model": "tiny", "input": "x"})
    assert response.status_code == 404
    message = response.json()["error"]["message"]
    assert message.startswith(f"{path} is not served here")
    assert works in message


async def test_every_path_that_a_404_names_is_served(bench: GatewayBench) -> None:
    for instead in NOT_SERVED.values():
        for word in instead.replace(",", " ").replace(";", " ").split():
            if word.startswith("/"):
                status = (await bench.post(word, {})).status_code
                assert status in (200, 400, 405), f"{word} in: {instead}"
