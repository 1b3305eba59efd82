"""Streams of /generate: the parts of earlier events that each event repeats."""

from __future__ import annotations

from typing import Any

import pytest

from kvist.errors import ConfigError
from kvist.server.config import ServerConfig
from kvist.testing.gateway_bench import GatewayBench, events_of
from tests.server.conftest import MakeBench

BODY = {"text": "x", "stream": True, "return_logprob": True, "top_logprobs_num": 2}
EOS = 256


async def events(bench: GatewayBench, **fields: object) -> list[dict[str, Any]]:
    *found, done = events_of(await bench.post("/generate", {**BODY, **fields}))
    assert done == "[DONE]"
    return found


def logprobs(event: dict[str, Any]) -> list[int]:
    """Return the token ids whose logprobs an event has."""
    meta = event["meta_info"]
    assert len(meta["output_top_logprobs"]) == len(meta["output_token_logprobs"])
    return [token_id for _, token_id, _ in meta["output_token_logprobs"]]


@pytest.mark.case("logprobs-quadratic")
async def test_an_event_has_the_logprobs_of_its_new_tokens_and_the_last_one_has_all(bench: GatewayBench) -> None:
    found = await events(bench)
    ids = found[-1]["output_ids"]
    assert [logprobs(event) for event in found[:-1]] == [[token_id] for token_id in ids[:-1]]
    assert logprobs(found[-1]) == ids
    assert [event["text"] for event in found] == ["h", "he", "hel", "hell", "hello", "hello"]


@pytest.mark.case("logprobs-quadratic")
async def test_logprobs_in_a_generate_stream_grow_linearly_with_its_length(bench: GatewayBench) -> None:
    async def added(num_tokens: int) -> int:
        bench.dispatcher.answer = "a" * num_tokens
        body = {**BODY, "sampling_params": {"max_new_tokens": num_tokens}}
        plain = {**body, "return_logprob": False, "top_logprobs_num": 0}
        sizes = [len((await bench.post("/generate", one)).content) for one in (body, plain)]
        return sizes[0] - sizes[1]

    assert await added(160) < 2.1 * await added(80)


async def test_cumulative_logprobs_repeats_all_logprobs_in_every_event(make_bench: MakeBench) -> None:
    bench = make_bench(cumulative_logprobs=True)
    found = await events(bench)
    assert [len(logprobs(event)) for event in found] == [1, 2, 3, 4, 5, 6]


async def test_an_incremental_stream_repeats_nothing(make_bench: MakeBench) -> None:
    bench = make_bench(incremental_streaming_output=True)
    bench.dispatcher.cuts = (2, 1)
    found = await events(bench)
    assert [event["text"] for event in found] == ["he", "l", "l", "o", ""]
    assert [len(event["output_ids"]) for event in found] == [2, 1, 1, 1, 1]
    assert [logprobs(event) for event in found] == [event["output_ids"] for event in found]
    assert [event["meta_info"]["completion_tokens"] for event in found] == [2, 3, 4, 5, 6]


def test_incremental_and_cumulative_streams_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="set only one"):
        ServerConfig(incremental_streaming_output=True, cumulative_logprobs=True)


async def test_a_response_has_the_id_of_the_client(bench: GatewayBench) -> None:
    assert (await events(bench, rid="mine"))[0]["meta_info"]["id"] == "mine"
    several = (await bench.post("/generate", {"text": ["a", "b"], "rid": "mine"})).json()
    assert [answer["meta_info"]["id"] for answer in several] == ["mine_0", "mine_1"]
    assert (await bench.chat(request_id="r")).json()["id"] == "chatcmpl-r"
    assert (await bench.post("/v1/completions", {"prompt": "a", "request_id": "r"})).json()["id"] == "cmpl-r"
    assert (await bench.post("/v1/completions", {"prompt": "a", "rid": "r"})).json()["id"] == "r"
    ids = [request.request_id for request in bench.dispatcher.requests]
    assert len(set(ids)) == len(ids), "two clients may choose the same id"
    assert not any("mine" in one for one in ids)
    assert (await bench.chat(rid="")).status_code == 400
    assert (await bench.chat(request_id="x" * 257)).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_prompt_before_the_text(bench: GatewayBench, stream: bool) -> None:
    async def texts(**fields: object) -> list[str]:
        response = await bench.post("/v1/completions", {"echo": True, "stream": stream, **fields})
        if not stream:
            return [choice["text"] for choice in response.json()["choices"]]
        texts_by_index: dict[int, str] = {}
        for event in events_of(response)[:-1]:
            for choice in event["choices"]:
                texts_by_index[choice["index"]] = texts_by_index.get(choice["index"], "") + choice["text"]
        return [texts_by_index[index] for index in sorted(texts_by_index)]

    assert await texts(prompt="ab ", max_tokens=1) == ["ab h"]
    assert await texts(prompt=["a ", "b "], n=2) == ["a hello", "a hello", "b hello", "b hello"]
    ids = bench.dispatcher.tokenizer.encode("xy")
    assert await texts(prompt=[ids, [*ids, EOS]]) == ["xyhello", "xyhello"]
    assert await texts(prompt=[*ids, EOS], skip_special_tokens=False) == ["xy<|end|>hello"]
