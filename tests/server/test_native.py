from __future__ import annotations

import pytest

from kvist.testing.gateway_bench import GatewayBench, events_of


async def test_generate_answers_in_sglangs_shape(bench: GatewayBench) -> None:
    body = {"text": "hi", "sampling_params": {"max_new_tokens": 10, "temperature": 0}}
    answer = (await bench.post("/generate", body)).json()
    assert answer["text"] == "hello"
    assert answer["output_ids"][-1] == 256
    meta = answer["meta_info"]
    assert meta["finish_reason"] == {"type": "stop", "matched": 256}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (2, 6, 4)
    assert meta["cached_tokens_details"] == {"device": 1, "host": 2, "storage": 1}
    assert meta["id"] == bench.dispatcher.requests[0].request_id


async def test_the_text_of_a_generate_stream_is_cumulative(bench: GatewayBench) -> None:
    *events, done = events_of(await bench.post("/generate", {"input_ids": [1, 2], "stream": True}))
    assert done == "[DONE]"
    assert [event["text"] for event in events] == ["h", "he", "hel", "hell", "hello", "hello"]
    assert [event["meta_info"]["finish_reason"] for event in events[:-1]] == [None] * 5


async def test_each_of_several_streamed_answers_finishes_once(bench: GatewayBench) -> None:
    body = {"text": "a", "stream": True, "sampling_params": {"n": 2}, "kvist": {"report": True}}
    *events, _ = events_of(await bench.post("/generate", body))
    for index in (0, 1):
        own = [event for event in events if event["index"] == index]
        assert [event["meta_info"]["finish_reason"] is not None for event in own] == [False] * 5 + [True]
        assert ["kvist" in event for event in own] == [False] * 5 + [True]


async def test_generate_accepts_the_requests_of_sglangs_benchmark(bench: GatewayBench) -> None:
    nothing = {"lora_path": None, "image_data": None, "return_routed_experts": False, "logprob_start_len": -1}
    assert (await bench.post("/generate", {"text": "a", **nothing})).status_code == 200


async def test_the_finish_reason_distinguishes_length_and_stop_string(bench: GatewayBench) -> None:
    short = (await bench.post("/generate", {"text": "x", "sampling_params": {"max_new_tokens": 2}})).json()
    assert short["meta_info"]["finish_reason"] == {"type": "length", "length": 2}
    stopped = (await bench.post("/generate", {"text": "x", "sampling_params": {"stop": "ll"}})).json()
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": "ll"}
    assert stopped["text"] == "he"


async def test_batches_and_several_answers_give_a_list(bench: GatewayBench) -> None:
    assert len((await bench.post("/generate", {"text": ["a", "b"]})).json()) == 2
    assert len((await bench.post("/generate", {"input_ids": [[1], [2]]})).json()) == 2
    several = (await bench.post("/generate", {"text": "a", "sampling_params": {"n": 2, "sampling_seed": 5}})).json()
    assert [answer["index"] for answer in several] == [0, 1]
    assert sorted(request.sampling.seed for request in bench.dispatcher.requests[-2:]) == [5, 6]


async def test_logprobs_come_with_token_ids(bench: GatewayBench) -> None:
    body = {"text": "x", "return_logprob": True, "top_logprobs_num": 2}
    meta = (await bench.post("/generate", body)).json()["meta_info"]
    assert meta["output_token_logprobs"][-1] == [-0.5, 256, None]
    assert meta["output_top_logprobs"][-1] == [[-0.5, 256, None], [-9999.0, 65, None]]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "text"),
        ({"text": []}, "text"),
        ({"input_ids": [1, [2]]}, "input_ids"),
        ({"input_ids": [999]}, "input_ids"),
        ({"text": "a", "sampling_params": {"regex": "a+("}}, "sampling_params.regex"),
        ({"text": "a", "sampling_params": {"max_tokens": 1}}, "sampling_params.max_tokens"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 500}}, "sampling_params.max_new_tokens"),
        ({"text": "a", "sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
        ({"text": "a", "sampling_params": {"top_p": 2}}, "sampling_params.top_p"),
        ({"text": "a", "sampling_params": {"top_k": 2**31}}, "sampling_params.top_k"),
        ({"text": "a", "sampling_params": {"min_p": -1}}, "sampling_params.min_p"),
        ({"text": "a", "sampling_params": {"stop": ""}}, "sampling_params.stop"),
        ({"text": "a", "sampling_params": {"stop_token_ids": [-1]}}, "sampling_params.stop_token_ids"),
        ({"text": "a", "sampling_params": {"min_new_tokens": -1}}, "sampling_params.min_new_tokens"),
        ({"text": "a", "sampling_params": {"n": 0}}, "sampling_params.n"),
        ({"text": ["a", "b"], "sampling_params": {"n": 100}}, "sampling_params.n"),
        ({"text": ["a"] * 129}, "text"),
        ({"input_ids": [[1]] * 129}, "input_ids"),
        ({"text": "a", "top_logprobs_num": 1}, "top_logprobs_num"),
        ({"text": "a", "logprob_start_len": 0}, "logprob_start_len"),
        ({"text": "a", "lora_path": "x"}, "lora_path"),
    ],
)
async def test_generate_names_the_invalid_field(bench: GatewayBench, body: dict[str, object], param: str) -> None:
    response = await bench.post("/generate", body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"] == param
    assert "`min_tokens`" not in error["message"]


async def test_special_tokens_are_shown_on_request(bench: GatewayBench) -> None:
    bench.dispatcher.answer = "a<|end|>b"
    shown = {"text": "x", "sampling_params": {"skip_special_tokens": False}}
    assert (await bench.post("/generate", shown)).json()["text"] == "a<|end|>b"
    assert (await bench.post("/generate", {"text": "x"})).json()["text"] == "ab"
