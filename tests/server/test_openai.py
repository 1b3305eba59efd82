from __future__ import annotations

import pytest

from kvist.errors import WorkerLost
from kvist.testing.gateway_bench import GatewayBench, events_of


async def test_a_chat_answers_in_openais_shape(bench: GatewayBench) -> None:
    response = await bench.chat("hi")
    body = response.json()
    assert response.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
            "matched_stop": 256,
        }
    ]
    num_prompt = len("<user>hi<assistant>")
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 6,
        "total_tokens": num_prompt + 6,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert bench.dispatcher.requests[0].sampling.max_tokens == 200 - num_prompt  # the rest of the context


async def test_a_streamed_chat_has_the_same_content_in_pieces(bench: GatewayBench) -> None:
    bench.dispatcher.answer = "hé🎉!"
    response = await bench.chat(stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = events_of(response)
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    # an event without text carries a token that is part of a character
    assert texts == ["", "h", "", "é", "", "", "", "🎉", "!", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 9 + ["stop"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len("hé🎉!".encode()) + 1


async def test_without_include_usage_no_event_has_usage(bench: GatewayBench) -> None:
    *chunks, done = events_of(await bench.chat(stream=True))
    assert done == "[DONE]"
    assert all("usage" not in chunk for chunk in chunks)


async def test_tokens_that_arrive_together_are_sent_in_one_event(bench: GatewayBench) -> None:
    bench.dispatcher.cuts = (1, 3, 2)
    *chunks, _ = events_of(await bench.chat(stream=True))
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["", "h", "ell", "o"]


async def test_a_stop_string_cuts_the_answer_and_closes_the_engines_stream(bench: GatewayBench) -> None:
    bench.dispatcher.answer = "one STOP two"
    body = (await bench.chat(stop=["STOP", "never"])).json()
    assert body["choices"][0]["message"]["content"] == "one "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert bench.dispatcher.num_closed_early == 1
    *chunks, _ = events_of(await bench.chat(stop="STOP", stream=True))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "one "


async def test_text_withheld_for_a_stop_string_is_sent_at_the_end(bench: GatewayBench) -> None:
    bench.dispatcher.answer = "one ST"
    assert (await bench.chat(stop=["STOP"])).json()["choices"][0]["message"]["content"] == "one ST"


async def test_the_finish_reason_at_max_tokens_is_length(bench: GatewayBench) -> None:
    choice = (await bench.chat(max_completion_tokens=3)).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("hel", "length")


async def test_several_answers_have_their_own_seeds_and_count_the_prompt_once(bench: GatewayBench) -> None:
    body = (await bench.chat(n=3, seed=7)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert sorted(request.sampling.seed for request in bench.dispatcher.requests) == [7, 8, 9]
    assert body["usage"]["prompt_tokens"] == len("<user>hi<assistant>")
    assert body["usage"]["completion_tokens"] == 18


async def test_several_streamed_answers_are_merged_under_their_index(bench: GatewayBench) -> None:
    *chunks, done = events_of(await bench.chat(n=2, stream=True))
    assert done == "[DONE]"
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in own) == "hello"
        assert own[0]["delta"]["role"] == "assistant"
        assert own[-1]["finish_reason"] == "stop"
    assert bench.dispatcher.num_open == 0


async def test_the_server_draws_the_seed_when_the_request_has_none(bench: GatewayBench) -> None:
    await bench.chat()
    assert bench.dispatcher.requests[0].sampling.seed == 1000


async def test_every_sampling_field_reaches_the_engine(bench: GatewayBench) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "seed": 3, "ignore_eos": True}
    await bench.chat(**fields, min_tokens=2, max_tokens=9, stop_token_ids=[65], cache_salt="s", logprobs=True)
    request = bench.dispatcher.requests[0]
    for name, value in fields.items():
        assert getattr(request.sampling, name) == value
    assert request.sampling.min_tokens == 2
    assert request.sampling.max_tokens == 9
    assert request.sampling.stop_token_ids == (65,)
    assert request.sampling.num_logprobs == 0
    assert len(request.cache_salt) == 64  # the hash of it
    await bench.chat(top_k=-1)
    assert bench.dispatcher.requests[1].sampling.top_k == 0


async def test_chat_logprobs_have_one_entry_per_token(bench: GatewayBench) -> None:
    bench.dispatcher.answer = "é"
    content = (await bench.chat(logprobs=True, top_logprobs=2)).json()["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9], list(b"<|end|>")]
    assert content[0]["logprob"] == -0.5
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -9999.0]
    *chunks, _ = events_of(await bench.chat(logprobs=True, stream=True))
    streamed = [
        entry for c in chunks if c["choices"][0]["logprobs"] for entry in c["choices"][0]["logprobs"]["content"]
    ]
    assert len(streamed) == 3  # a token that completes no character has an entry too


async def test_completion_logprobs_have_the_older_shape(bench: GatewayBench) -> None:
    body = {"model": "tiny", "prompt": "x", "logprobs": 2}
    logprobs = (await bench.post("/v1/completions", body)).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["h", "e", "l", "l", "o", "<|end|>"]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4, 5]
    assert set(logprobs["top_logprobs"][0]) == {"h", bench.dispatcher.tokenizer.token_text(65)}
    *chunks, _ = events_of(await bench.post("/v1/completions", {**body, "stream": True}))
    assert [offset for c in chunks for offset in c["choices"][0]["logprobs"]["text_offset"]] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("prompt", "num_prompts"), [("ab", 1), (["ab", "c"], 2), ([1, 2, 3], 1), ([[1, 2], [3]], 2)])
async def test_a_completion_takes_text_and_tokens_alone_or_in_lists(
    bench: GatewayBench, prompt: object, num_prompts: int
) -> None:
    body = (await bench.post("/v1/completions", {"prompt": prompt})).json()
    assert [choice["text"] for choice in body["choices"]] == ["hello"] * num_prompts
    assert len(bench.dispatcher.requests) == num_prompts
    assert bench.dispatcher.requests[0].sampling.max_tokens == 16
    if prompt == [[1, 2], [3]]:
        assert sorted(request.prompt_token_ids for request in bench.dispatcher.requests) == [(1, 2), (3,)]


async def test_a_streamed_completion_ends_with_its_reason(bench: GatewayBench) -> None:
    *chunks, done = events_of(await bench.post("/v1/completions", {"prompt": "x", "stream": True}))
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[0]["object"] == "text_completion"


async def test_the_report_names_workers_and_handoff(bench: GatewayBench) -> None:
    expected = {
        "index": 0,
        "prefill_worker": "p:1",
        "decode_worker": "d:1",
        "route": {"reason": "split", "cost_ms": 1.5},
        "failovers": 0,
        "cached_tokens": 4,
        "seed": 1000,
        "handoff": {
            "way": None,
            "way_reason": "",
            "num_pages": 3,
            "num_pages_reused": 2,
            "num_pages_missing": 0,
            "num_pages_recomputed": 0,
            "num_bytes": 4096,
            "duration_ms": 12.5,
            "wait_ms": 1.0,
            "store_ms": None,
            "transport": "shm",
            "transport_reason": "both are near",
            "second_token": {
                "gap_ms": 0.0,
                "grant_wait_ms": 0.0,
                "last_copy_ms": 0.0,
                "store_ms": 0.0,
                "verify_ms": 1.0,
                "admission_ms": 0.0,
                "first_step_ms": 0.0,
                "other_ms": 0.0,
            },
        },
    }
    assert (await bench.chat(kvist={"report": True})).json()["kvist"] == expected
    *_, last, done = events_of(await bench.chat(kvist={"report": True}, stream=True))
    assert (last["kvist"], done) == (expected, "[DONE]")
    assert "kvist" not in (await bench.chat()).json()


async def test_usage_has_the_tiers_of_cached_tokens_on_request(bench: GatewayBench) -> None:
    expected = {"cached_tokens": {"device": 1, "host": 2, "storage": 1}}
    assert (await bench.chat(kvist={"usage": True})).json()["usage"]["kvist"] == expected
    assert (await bench.chat(kvist={"usage": True}, n=2)).json()["usage"]["kvist"] == expected  # one prompt
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    *_, last, _ = events_of(await bench.chat(kvist={"usage": True}, **streamed))
    assert last["usage"]["kvist"] == expected
    *_, last, _ = events_of(await bench.chat(**streamed))
    assert "kvist" not in last["usage"]
    refused = await bench.chat(kvist={"usage": True}, stream=True)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "kvist.usage")


async def test_an_error_before_the_first_token_is_an_http_error(bench: GatewayBench) -> None:
    bench.dispatcher.error = WorkerLost("worker d:1 was lost", retry_after_s=3.0)
    response = await bench.chat(stream=True)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "3"
    assert response.json()["error"]["code"] == "worker_lost"


async def test_an_error_in_the_middle_of_a_stream_is_an_event_without_done(bench: GatewayBench) -> None:
    bench.dispatcher.error, bench.dispatcher.error_after = WorkerLost("worker d:1 was lost"), 3
    response = await bench.chat(stream=True)
    *_, last = events_of(response)
    assert last["error"]["message"] == "worker d:1 was lost"
    assert "event: error\n" in response.text
    assert "[DONE]" not in response.text


async def test_an_error_in_the_middle_of_a_whole_answer_is_an_http_error(bench: GatewayBench) -> None:
    bench.dispatcher.error, bench.dispatcher.error_after = WorkerLost("worker d:1 was lost"), 3
    response = await bench.chat(n=2)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert bench.dispatcher.num_open == 0


async def test_an_unexpected_exception_in_a_stream_is_reported_without_its_text(bench: GatewayBench) -> None:
    bench.dispatcher.error, bench.dispatcher.error_after = RuntimeError("secret detail"), 2
    response = await bench.chat(stream=True)
    assert events_of(response)[-1]["error"]["code"] == "engine_error"
    assert "secret detail" not in response.text


async def test_token_ids_are_returned_also_for_tokens_without_text(bench: GatewayBench) -> None:
    bench.dispatcher.answer = "é!"
    body = {"prompt": [104, 105], "return_token_ids": True, "max_tokens": 3}
    whole = (await bench.post("/v1/completions", body)).json()["choices"][0]
    assert whole["prompt_token_ids"] == [104, 105]
    assert len(whole["token_ids"]) == 3
    *chunks, done = events_of(await bench.post("/v1/completions", {**body, "stream": True}))
    assert done == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["text"] for choice in choices] == ["", "é", "!"]
    assert [token_id for choice in choices for token_id in choice["token_ids"]] == whole["token_ids"]
    assert ["prompt_token_ids" in choice for choice in choices] == [True, False, False]


async def test_ids_of_the_padded_vocabulary_are_accepted(bench: GatewayBench) -> None:
    response = await bench.post("/v1/completions", {"prompt": [290, 104], "max_tokens": 2})
    assert response.status_code == 200, "a model may generate such an id, and the client sends it back in the next turn"
    assert bench.dispatcher.requests[0].prompt_token_ids == (290, 104)


async def test_token_ids_are_returned_only_on_request(bench: GatewayBench) -> None:
    choice = (await bench.post("/v1/completions", {"prompt": [104], "max_tokens": 2})).json()["choices"][0]
    assert not {"token_ids", "prompt_token_ids"} & set(choice)


async def test_a_session_reaches_the_router_as_a_digest_that_depends_on_the_salt(bench: GatewayBench) -> None:
    for fields in (
        {"session_id": "a"},
        {"prompt_cache_key": "a"},
        {"session_id": "a", "prompt_cache_key": "b"},
        {"session_id": "a", "cache_salt": "s"},
        {"session_id": 1},
        {},
    ):
        await bench.chat(**fields)
    one, key, both, salted, number, none = [placement.session for placement in bench.dispatcher.placements]
    assert one == key == both
    assert len({one, salted, number, none}) == 4
    assert none == ""
    refused = await bench.chat(prompt_cache_key="é" * 129)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt_cache_key")


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, "<end>"[-3:]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, "abc"),
        ({"truncate_prompt_tokens": 5000}, None),
        ({"truncate_prompt_tokens": -1, "max_tokens": 150}, ("abcdef" * 50 + "<end>")[-50:]),
    ],
)
async def test_a_prompt_is_truncated_on_request(
    bench: GatewayBench, fields: dict[str, object], kept: str | None
) -> None:
    text = "abcdef" * 50 + "<end>" if kept else "short"
    for prompt in (text, [text, text]):
        body = {"prompt": prompt, "max_tokens": 4, **fields}
        assert (await bench.post("/v1/completions", body)).status_code == 200
        assert bench.dispatcher.tokenizer.decode(bench.dispatcher.requests[-1].prompt_token_ids) == (kept or text)
    messages = [{"role": "user", "content": "x" * 300}]
    asked = {"messages": messages, "max_tokens": 4, "truncate_prompt_tokens": 12}
    assert (await bench.post("/v1/chat/completions", asked)).status_code == 200
    prompt = bench.dispatcher.tokenizer.decode(bench.dispatcher.requests[-1].prompt_token_ids)
    assert prompt == "<assistant>".rjust(12, "x")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"truncate_prompt_tokens": 5, "echo": True}, "echo"),
        ({"truncate_prompt_tokens": 190, "prompt": "x" * 300}, "max_tokens"),
    ],
)
async def test_a_truncation_that_cannot_be_honoured_is_refused(
    bench: GatewayBench, fields: dict[str, object], param: str
) -> None:
    response = await bench.post("/v1/completions", {"prompt": "abc", **fields, "max_tokens": 20})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
